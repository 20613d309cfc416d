"""The ways to start a server: an explicit tuple, and plugins that the config names (design.md section 8, compat K29).

A spec is cheap to import; what a runtime needs to run is imported by its ``open``, or before (``Runtime.modules``).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Final

import attrs

from gateway.errors import ConfigError, Problem
from gateway.runtimes import docker, k8s_job, k8s_service, local_process, remote_sse
from gateway.runtimes._guard import ProcessGuard
from gateway.runtimes._instances import Instances
from gateway.runtimes.base import Runtime

__all__ = ["RUNTIMES", "Instances", "ProcessGuard", "by_type", "load_plugins", "spec_types"]

RUNTIMES: Final[tuple[Runtime, ...]] = (
    local_process.RUNTIME,
    remote_sse.RUNTIME,
    docker.RUNTIME,
    docker.PODMAN,
    k8s_job.RUNTIME,
    k8s_service.RUNTIME,
)


_IMPORT_ERRORS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def by_type(runtimes: Sequence[Runtime]) -> dict[str, Runtime]:
    """YAML ``type`` -> runtime, aliases included. Raises ConfigError when two claim one name."""
    found: dict[str, Runtime] = {}
    for runtime in runtimes:
        for name in (runtime.type, *runtime.aliases):
            if name in found:
                raise ConfigError([Problem(f"runtimes: two runtimes are called {name!r}; remove one plugin")])
            found[name] = runtime
    return found


def spec_types(runtimes: Sequence[Runtime]) -> dict[str, type[Any]]:
    """YAML ``type`` -> spec class, aliases included: what ``config.load`` structures ``runtime`` with."""
    return {name: runtime.spec for name, runtime in by_type(runtimes).items()}


def load_plugins(names: Sequence[str]) -> tuple[Runtime, ...]:
    """Import the runtimes that the config's ``runtimes`` names as ``module:NAME``, from PYTHONPATH.

    Raises ConfigError with every problem at once. An import runs the plugin's own code: what that raises of Python's
    own errors is a problem, too, named by its type and text.
    """
    problems: list[Problem] = []
    found = []
    for name in names:
        try:
            found.append(_load_plugin(name))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    by_type((*RUNTIMES, *found))
    return tuple(found)


def _load_plugin(name: str) -> Runtime:
    module_name, _, attribute = name.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise _refused(name, "write it as module:NAME, such as acme.gateway:RUNTIME")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise _refused(name, f"no module {missing!r} on PYTHONPATH") from error
        raise _refused(name, f"its import needs the module {missing!r}, which is not installed") from error
    except _IMPORT_ERRORS as error:
        raise _refused(name, f"its import failed: {type(error).__name__}: {error}") from error
    runtime = getattr(module, attribute, None)
    if runtime is None:
        raise _refused(name, f"module {module_name!r} has no {attribute}")
    if not isinstance(runtime, Runtime):
        raise _refused(name, f"it is a {type(runtime).__name__}, not a gateway.runtimes.base.Runtime")
    if not inspect.isclass(runtime.spec) or not attrs.has(runtime.spec) or runtime.spec.__hash__ is None:
        raise _refused(name, "its spec must be a frozen attrs class")
    return runtime


def _refused(name: str, reason: str) -> ConfigError:
    return ConfigError([Problem(f"runtimes: {name!r} can't be used: {reason}")])
