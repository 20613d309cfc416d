"""What a pod's status says of the server in it. Pure.

Only what Kubernetes itself reports counts: a container's state, a pod's phase and reason, a condition.
"""

from __future__ import annotations

from typing import Any, Final

import attrs

from gateway.runtimes.kubernetes.manifest import CONTAINER

__all__ = ["Look", "condition", "container_status", "look"]

Object = dict[str, Any]


@attrs.frozen
class Look:
    """What a pod's status says of its server.

    running  it runs, or has run
    ended    why it is over; "" while it may still run
    waiting  what it waits for
    refusal  why it will never run; ``about_image`` if that is its image
    """

    running: bool = False
    ended: str = ""
    waiting: str = ""
    refusal: str = ""
    about_image: bool = False


_IMAGE: Final = frozenset(
    ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "RegistryUnavailable")
)
_BROKEN: Final = frozenset(
    ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff")
)
_ROOT_HINT: Final = "; name the user with `user`, such as `user: 1000` (`user: 0` allows root)"


def look(pod: Object) -> Look:
    """See ``Look``."""
    status, meta = pod.get("status") or {}, pod.get("metadata") or {}
    ours = container_status(status)
    state = ours.get("state") or {}
    terminated = state.get("terminated")
    running = "running" in state or terminated is not None
    phase, reason = status.get("phase"), status.get("reason")
    said = ": ".join(str(each) for each in (reason, status.get("message")) if each)
    disruption = condition(status, "DisruptionTarget")
    if reason and (phase == "Failed" or reason == "NodeLost"):
        return Look(running, ended=f"pod failed: {said}")
    if terminated is not None:
        return Look(True, ended=_end(terminated, pod))
    if phase in ("Failed", "Succeeded"):
        return Look(running, ended=_other_end(status) or f"pod ended as {phase}")
    if meta.get("deletionTimestamp"):
        why = f": {disruption.get('message') or disruption.get('reason')}" if disruption else ""
        return Look(running, ended=f"pod was evicted or deleted{why}")
    if running:
        return Look(True)
    return _not_yet(status, state.get("waiting") or {})


def _not_yet(status: Object, waiting: Object) -> Look:
    reason, message = str(waiting.get("reason") or ""), str(waiting.get("message") or "")
    for each in status.get("initContainerStatuses") or ():
        held = (each.get("state") or {}).get("waiting") or {}
        if held.get("reason") in _IMAGE | _BROKEN:
            reason, message = str(held["reason"]), str(held.get("message") or "")
    text = f"{reason}: {message}" if message else reason
    if reason in _IMAGE:
        return Look(refusal=f"the image can't be had: {text}", about_image=True)
    if reason in _BROKEN:
        hint = _ROOT_HINT if "runAsNonRoot" in message else ""
        return Look(refusal=f"the container can't be started: {text}{hint}")
    scheduled = condition(status, "PodScheduled", "False")
    if scheduled:
        return Look(waiting=f"{scheduled.get('reason') or 'not scheduled'}: {scheduled.get('message') or ''}")
    return Look(waiting=text or ("Pending" if status.get("phase") else "not seen by Kubernetes yet"))


def container_status(status: Object) -> Object:
    """Of our container, {} where there is none yet."""
    for each in status.get("containerStatuses") or ():
        if each.get("name") == CONTAINER:
            return dict(each)
    return {}


def condition(status: Object, kind: str, value: str = "True") -> Object:
    """The pod's condition of that type if it has that value, else {}."""
    for each in status.get("conditions") or ():
        if each.get("type") == kind and each.get("status") == value:
            return dict(each)
    return {}


def _end(terminated: Object, pod: Object) -> str:
    code, reason = terminated.get("exitCode"), str(terminated.get("reason") or "")
    message = str(terminated.get("message") or "").strip()
    if reason == "OOMKilled":
        limits = _limits(pod)
        limit = f", memory limit {limits['memory']}" if "memory" in limits else ""
        return f"container ran out of memory (OOMKilled{limit}, exit code {code})"
    if reason in ("ContainerCannotRun", "StartError"):
        return f"container can't run: {message or reason} (exit code {code})"
    text = f"container exited with code {code}"
    if reason not in ("", "Error", "Completed"):
        text += f" ({reason})"
    return f"{text}: {message}" if message else text


def _other_end(status: Object) -> str:
    """A container that is not ours ended the pod."""
    for each in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        terminated = (each.get("state") or {}).get("terminated") or {}
        if terminated.get("exitCode"):
            said = f": {terminated['message']}" if terminated.get("message") else ""
            return f"container {each.get('name')!r} of its pod exited with code {terminated['exitCode']}{said}"
    return ""


def _limits(pod: Object) -> Object:
    for each in (pod.get("spec") or {}).get("containers") or ():
        if each.get("name") == CONTAINER:
            return dict((each.get("resources") or {}).get("limits") or {})
    return {}
