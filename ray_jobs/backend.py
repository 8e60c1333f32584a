"""Where workers run: as Ray actors and tasks, or in this process (`--local`). The road is the same over
both."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Ref = Any
"""A result that may not be there yet."""


class Lost(Exception):
    """A worker vanished with its process or node. Costs no try; what it was doing is done again elsewhere."""


class Failed(Exception):
    """A call raised. `cause` is the exception itself, `text` its traceback."""

    def __init__(self, cause: BaseException, text: str) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.cause, self.text = cause, text


@dataclass(frozen=True)
class Resources:
    """What a worker or task asks of the machine it runs on."""

    cpus: float
    gpus: float = 0.0
    custom: str = ""
    """Name of a custom resource that keeps CPU work on CPU nodes; empty for none."""


class Worker(Protocol):
    """One worker: its calls run one at a time, in the order in which they were submitted."""

    def submit(self, method: str, *args: Any) -> Ref:
        """Call a method; arguments that are references are replaced by their values."""

    def kill(self) -> None:
        """End the worker now, with what it was doing."""


class Backend(Protocol):
    """Starts workers and tasks and waits for their results."""

    def start(self, cls: type, *args: Any, resources: Resources) -> Worker: ...

    def task(self, function: Callable[..., Any], *args: Any, resources: Resources) -> Ref: ...

    def wait(self, ref: Ref, timeout: float | None = None) -> bool:
        """True once the result is there, without fetching it to this process."""

    def get(self, ref: Ref) -> Any:
        """The result. Raises Lost if the worker vanished, Failed if the call raised."""

    def stop(self) -> None: ...


# ---------------------------------------------------------------- in this process


@dataclass(frozen=True)
class _Here:
    """A finished call: its value or its exception."""

    value: Any = None
    error: Failed | None = None


def _here(function: Callable[..., Any], args: tuple[Any, ...]) -> _Here:
    failed = next((arg for arg in args if isinstance(arg, _Here) and arg.error is not None), None)
    if failed is not None:
        return failed
    try:
        return _Here(function(*(arg.value if isinstance(arg, _Here) else arg for arg in args)))
    except Exception as error:
        return _Here(error=Failed(error, traceback.format_exc()))


class _LocalWorker:
    def __init__(self, instance: object) -> None:
        self._instance = instance

    def submit(self, method: str, *args: Any) -> _Here:
        return _here(getattr(self._instance, method), args)

    def kill(self) -> None:
        pass


class LocalBackend:
    """Every call runs at once, in the calling thread: the same stage objects without Ray."""

    def start(self, cls: type, *args: Any, resources: Resources) -> Worker:
        return _LocalWorker(cls(*args))

    def task(self, function: Callable[..., Any], *args: Any, resources: Resources) -> Ref:
        return _here(function, args)

    def wait(self, ref: Ref, timeout: float | None = None) -> bool:
        return True

    def get(self, ref: Ref) -> Any:
        if ref.error is not None:
            raise ref.error
        return ref.value

    def stop(self) -> None:
        pass


# ---------------------------------------------------------------- on Ray


def _options(resources: Resources) -> dict[str, Any]:
    custom = {resources.custom: 0.001} if resources.custom else None
    return {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "resources": custom}


class _RayWorker:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def submit(self, method: str, *args: Any) -> Ref:
        return getattr(self._actor, method).remote(*args)

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


def _require_reachable(address: str) -> None:
    """Raises OSError at once where `ray.init` would try for minutes and then end the process."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host:
        with socket.create_connection((host, int(port)), timeout=10):
            pass


class RayBackend:
    """Workers are sync actors without restarts, so that a lost one is seen and its work done again by us.

    Args:
        address: of a running cluster; None starts a private one on this machine, reached by loopback only.
        num_cpus: that the private cluster claims to have, at least what the pools need together.
    """

    def __init__(self, address: str | None, num_cpus: float) -> None:
        if address is None:
            # No token file in the home directory. A cluster of the user's keeps its own rules.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        if address is None or address.startswith(("127.0.0.1:", "localhost:")):
            # Loopback as it is, which Ray would take for the machine's own address, and wait there for ever.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        import ray

        self._ray = ray
        common: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
        if address is None:
            cpus = max(os.cpu_count() or 1, int(-(-num_cpus // 1)))
            ray.init("local", num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **common)
        else:
            _require_reachable(address)
            ray.init(address, **common)

    def start(self, cls: type, *args: Any, resources: Resources) -> Worker:
        actor: Any = self._ray.remote(cls).options(max_restarts=0, max_task_retries=0, **_options(resources))
        return _RayWorker(actor.remote(*args))

    def task(self, function: Callable[..., Any], *args: Any, resources: Resources) -> Ref:
        # Exceptions are ours to retry; a lost process is Ray's, since these tasks have no state.
        task = self._ray.remote(function).options(
            max_retries=3, retry_exceptions=False, **_options(resources)
        )
        return task.remote(*args)

    def wait(self, ref: Ref, timeout: float | None = None) -> bool:
        ready, _ = self._ray.wait([ref], timeout=timeout, fetch_local=False)
        return bool(ready)

    def get(self, ref: Ref) -> Any:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except exceptions.RayTaskError as error:
            # A call whose argument was lost carries the loss of another worker inside.
            if isinstance(error.cause, exceptions.RayActorError | exceptions.ObjectLostError):
                raise Lost(str(error.cause)) from error
            raise Failed(error.cause, str(error)) from error
        except (
            exceptions.RayActorError,
            exceptions.ObjectLostError,
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
        ) as error:
            raise Lost(str(error)) from error

    def cluster(self) -> dict[str, float]:
        """Resource -> amount that the nodes of the cluster have together, now."""
        return self._ray.cluster_resources()

    def stop(self) -> None:
        self._ray.shutdown()
        sys.stdout.flush()
