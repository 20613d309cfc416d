"""Images: their names, pulling them, and the credentials that Docker's and Podman's own configuration holds.

Nothing in an image's metadata is ever read as an instruction to us (row D6): no label is a setting, no path in it is
mounted, no port published.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any, Final

import attrs
import trio

from gateway.errors import StartFailed
from gateway.runtimes.base import Progress
from gateway.runtimes.containers.engine import Engine, EngineGone, EngineRefused, docker_folder
from gateway.runtimes.containers.reference import Reference

__all__ = ["Credentials", "credentials", "explain", "pull"]

HELPER_LIMIT: Final = 15.0
"""Seconds for a credential helper: some ask a key ring."""
MAX_FILE: Final = 1024 * 1024
MAX_LAYERS: Final = 1000
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


# --------------------------------------------------------------------------------------------------------- credentials
@attrs.frozen
class Credentials:
    """What a registry is told: the header's value, "" for nothing; and why there is nothing, for people."""

    header: str = attrs.field(default="", repr=False)
    remark: str = ""


def _files(podman: bool, environ: Mapping[str, str]) -> list[str]:
    docker = os.path.join(docker_folder(environ), "config.json")
    if not podman:
        return [docker]
    found = [environ.get("REGISTRY_AUTH_FILE", "")]
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    found.append(f"{runtime}/containers/auth.json" if runtime else f"/run/containers/{os.getuid()}/auth.json")
    config = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    return [*filter(None, found), os.path.join(config, "containers", "auth.json"), docker]


def _load(path: str) -> dict[str, Any]:
    """A file's JSON object; {} when it is not there or is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.loads(file.read(MAX_FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _keys(reference: Reference) -> list[str]:
    """The names under which a registry's credentials may be kept, the most particular first."""
    if reference.domain == "docker.io":
        hosts = ["https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io"]
    else:
        hosts = [reference.domain, f"https://{reference.domain}", f"https://{reference.domain}/v2/"]
        hosts += [f"https://{reference.domain}/", f"https://{reference.domain}/v1/"]
    parts = reference.path.split("/")
    return ["/".join((reference.domain, *parts[:count])) for count in range(len(parts), 0, -1)] + hosts


def _header(username: str, secret: str, server: str) -> str:
    what = {"identitytoken": secret} if username in ("", "<token>") else {"username": username, "password": secret}
    return base64.urlsafe_b64encode(json.dumps({**what, "serveraddress": server}).encode()).decode()


def _written(entry: Any, server: str) -> str:
    """The header for an entry of ``auths``; "" when it holds nothing usable."""
    if not isinstance(entry, dict):
        return ""
    if isinstance(token := entry.get("identitytoken"), str) and token:
        return _header("", token, server)
    username, password = entry.get("username"), entry.get("password")
    if isinstance(entry.get("auth"), str):
        try:
            username, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        except ValueError:
            return ""
    if isinstance(username, str) and isinstance(password, str) and username:
        return _header(username, password.rstrip("\0"), server)
    return ""


async def credentials(reference: Reference, *, podman: bool, environ: Mapping[str, str]) -> Credentials:
    """What the user's own ``docker login`` (or ``podman login``) has left for the image's registry. Raises nothing.

    Runs a credential helper where the configuration names one, for at most HELPER_LIMIT.
    """
    remark = ""
    for path in _files(podman, environ):
        config = await trio.to_thread.run_sync(_load, path, abandon_on_cancel=True)
        helpers, auths = config.get("credHelpers"), config.get("auths")
        for key in _keys(reference):
            helper = helpers.get(key) if isinstance(helpers, dict) else None
            if isinstance(helper, str):
                header, remark = await _ask_helper(helper, key, environ)
                if header:
                    return Credentials(header)
        for key in _keys(reference):
            if isinstance(auths, dict) and key in auths and (header := _written(auths[key], key)):
                return Credentials(header)
        store = config.get("credsStore")
        if isinstance(store, str) and store:
            server = "https://index.docker.io/v1/" if reference.domain == "docker.io" else reference.domain
            header, remark = await _ask_helper(store, server, environ)
            if header:
                return Credentials(header)
    return Credentials("", remark)


async def _ask_helper(name: str, server: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """The header, and why there is none."""
    program = f"docker-credential-{name}"
    if not _HELPER.fullmatch(name):
        return "", f"the credential helper {name[:40]!r} has no usable name"
    path = shutil.which(program, path=environ.get("PATH"))
    if path is None:
        return "", f"the credential helper {program} is not on PATH"
    reason = f"no answer within {HELPER_LIMIT:g} s"
    with trio.move_on_after(HELPER_LIMIT):
        try:
            done = await trio.run_process(
                [path, "get"],
                stdin=server.encode(),
                capture_stdout=True,
                stderr=subprocess.DEVNULL,
                check=False,
                env=dict(environ),
            )
        except OSError as error:
            return "", f"the credential helper {program} can't be run: {error.strerror}"
        if done.returncode == 0:
            try:
                found = json.loads(done.stdout[:MAX_FILE])
                return _header(str(found["Username"]), str(found["Secret"]), server), ""
            except (ValueError, LookupError, TypeError):
                return "", f"the credential helper {program} answers what is no credential"
        if b"credentials not found" in done.stdout:
            return "", ""
        reason = f"exit code {done.returncode}"
    return "", f"the credential helper {program} has failed ({reason})"


# -------------------------------------------------------------------------------------------------------------- pulling
class PullProgress:
    """The layers of one pull, as one line for people. Pure."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._layers: dict[str, tuple[str, int, int]] = {}
        self.error = ""

    def feed(self, step: Any) -> tuple[str, bool]:
        """Take one step that the engine reports: what to show, and whether the pull is known to get on."""
        if not isinstance(step, dict):
            return "", False
        detail = step.get("errorDetail")
        error = step.get("error") or (detail.get("message") if isinstance(detail, dict) else "")
        if error:
            self.error = " ".join(str(error).split())[:600]
            return "", False
        status, layer = step.get("status"), step.get("id")
        if not isinstance(status, str) or not isinstance(layer, str):
            return f"pulling image {self._image}", False
        progress = step.get("progressDetail")
        current, total = 0, 0
        if isinstance(progress, dict):
            numbers = (progress.get("current"), progress.get("total"))
            current, total = (n if isinstance(n, int) and 0 <= n < 2**53 else 0 for n in numbers)
        before = self._layers.get(layer, ("", 0, 0))
        if layer not in self._layers and len(self._layers) >= MAX_LAYERS:
            return "", False
        if status in ("Download complete", "Pull complete", "Already exists"):
            current = total = before[2]
        self._layers[layer] = (status, current, total or before[2])
        return self._text(), status != before[0] or current > before[1]

    def _text(self) -> str:
        doing = "extracting" if any(s == "Extracting" for s, _, _ in self._layers.values()) else "pulling"
        current = total = 0
        for status, got, size in self._layers.values():
            if doing == "pulling" or status in ("Extracting", "Pull complete"):
                current += got
                total += size
            else:
                total += size
        text = f"{doing} image {self._image}"
        return f"{text}: {100 * current // total} % of {total / 1e6:.0f} MB" if total else text


_CAUSES: Final = (
    ("no space left on device", "there is no space left on the engine's disk"),
    ("no matching manifest", "it does not exist for this platform"),
    ("does not match the specified platform", "it does not exist for this platform"),
    ("no image found in manifest list for architecture", "it does not exist for this platform"),
    ("manifest unknown", "the registry has no such image or tag"),
    ("name unknown", "the registry has no such image"),
    ("access denied", "the registry refuses it: there is no such image, or it needs a login (docker login)"),
    ("access to the resource is denied", "the registry refuses it: no such image, or it needs a login (docker login)"),
    ("unauthorized", "the registry refuses it without a valid login (docker login)"),
    ("no basic auth credentials", "the registry refuses it without a login (docker login)"),
    ("authentication required", "the registry refuses it without a login (docker login)"),
    ("denied", "the registry refuses it"),
    ("toomanyrequests", "the registry's rate limit is reached"),
    ("no such host", "the registry can't be reached"),
    ("connection refused", "the registry can't be reached"),
    ("i/o timeout", "the registry can't be reached"),
    ("network is unreachable", "the registry can't be reached"),
    ("tls handshake timeout", "the registry can't be reached"),
    ("server misbehaving", "the registry can't be reached"),
    ("first record does not look like a tls", "the registry speaks no TLS; the engine must know it as insecure"),
    ("http response to https client", "the registry speaks no TLS; the engine must know it as insecure"),
    ("x509: ", "the engine does not trust the registry's certificate"),
    ("context deadline exceeded", "the registry can't be reached"),
    ("client.timeout", "the registry can't be reached"),
    ("not found", "the registry has no such image or tag"),
)


def explain(reason: str, client: str = "docker") -> str:
    """What an engine's words about a pull mean, followed by them. ``client`` is the program that logs in."""
    lower = reason.lower()
    for sign, meaning in _CAUSES:
        if sign in lower:
            return f"{meaning.replace('docker login', f'{client} login')}: {reason}"
    return reason


async def pull(
    engine: Engine, reference: Reference, platform: str | None, environ: Mapping[str, str], progress: Progress
) -> None:
    """Have the engine fetch an image. Waits for as long as it is let. Raises StartFailed that says why it can't."""
    if not reference.tag:
        raise StartFailed(f"image {reference} is not on {engine.name}, and an image id can't be pulled")
    progress(f"pulling image {reference}", extend=True)
    found = await credentials(reference, podman=engine.podman, environ=environ)
    query = {"fromImage": reference.name, "tag": reference.tag, **({"platform": platform} if platform else {})}
    headers = {"X-Registry-Auth": found.header} if found.header else {}
    steps = PullProgress(str(reference))
    try:
        async with engine.lines("POST", "/images/create", query=query, headers=headers) as lines:
            async for step in lines:
                text, advanced = steps.feed(step)
                if text:
                    progress(text, extend=advanced)
        reason = steps.error
    except EngineRefused as refused:
        reason = refused.reason
    except EngineGone as gone:
        raise EngineGone(f"image {reference} can't be pulled: {gone.message}") from gone
    if reason:
        remark = f" ({found.remark})" if found.remark else ""
        client = "podman" if engine.podman else "docker"
        raise StartFailed(f"image {reference} can't be pulled: {explain(reason, client)}{remark}")
