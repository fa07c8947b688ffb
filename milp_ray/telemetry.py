"""The Ray session that stages run in, and the structured log.

One session serves a whole command: :func:`ray_session` starts Ray in this process (or joins a cluster),
and a stage that opens it again inside gets the one that is open. :func:`log_event` writes one line an
event, as JSON where ``MILP_LOG=json``; its values are numbers, names and opaque ids, never a user's text.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from milp_ray.environment import environment as set_environment
from milp_ray.errors import MilpError

if TYPE_CHECKING:
    from milp_ray.config.cluster import RaySection

LOG_VARIABLE = "MILP_LOG"
_LONGEST_LOGGED_STRING = 200
_MIB = 1 << 20
_START_ATTEMPTS = 2

logger = logging.getLogger("milp_ray")


@dataclass(frozen=True, slots=True)
class Session:
    """The Ray that is open: what it offers and whether it was started here."""

    started_here: bool
    n_cpus: float
    n_gpus: float
    seconds: float  # that opening it took; 0 where it was open already


@contextmanager
def ray_session(section: RaySection) -> Iterator[Session]:
    """Start Ray in this process, or join ``section.address``; leave it as it was found.

    A session that is open already, whoever opened it, is used as it is and stays open. Ray started here is
    shut down at the end, whatever happened inside; a cluster that was joined is only left. What the process
    does at SIGTERM stays as it was.

    Raises:
        MilpError: no cluster answers at ``section.address``.
    """
    environment = worker_environment(section)
    # As Ray itself does: a driver that a cluster started (`ray job submit`) is told where that cluster is.
    address = section.address or os.environ.get("RAY_ADDRESS")
    import ray

    if ray.is_initialized():
        yield _session(started_here=False, seconds=0.0)
        return
    started = time.perf_counter()
    with set_environment(_local_environment(environment) if address is None else {}):
        try:
            with _kept_sigterm():
                if address is None:
                    _start(section)
                else:
                    _join(address, environment)
            yield _session(started_here=address is None, seconds=time.perf_counter() - started)
        finally:
            ray.shutdown()


def worker_environment(section: RaySection) -> dict[str, str]:
    """Environment variables that every worker process gets: thread caps and what libraries read at import.

    ``RAY_ENABLE_ZERO_COPY_TORCH_TENSORS`` is left alone: with it every Ray process, this one included,
    imports torch (3 s and 200 MiB each), and no stage sends tensors through the object store.
    """
    threads = str(section.threads_per_worker)
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in ("HF_HUB_OFFLINE", LOG_VARIABLE):
        if name in os.environ:
            environment[name] = os.environ[name]
    return environment


def prepare_worker(threads: int) -> None:
    """Cap torch's threads in a worker process and let build tools of this environment be found.

    Called first in every actor, before anything imports torch: its pools are sized by the machine unless it
    is told otherwise, so that workers side by side would slow each other down, and DeepSpeed looks for
    ``ninja`` on PATH.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if not _has_accelerator():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    tools = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if tools not in paths:
        os.environ["PATH"] = os.pathsep.join([tools, *paths])


def log_event(event: str, **fields: str | int | float | bool | None) -> None:
    """Write one log line: an event's name and its numbers, names and opaque ids (never a user's text)."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(event, extra={"fields": {k: _loggable(v) for k, v in fields.items()}})


def configure_logging() -> None:
    """Send the package's log to standard error: JSON lines where ``MILP_LOG=json``, else warnings only.

    Calling it again changes nothing but the format and level.
    """
    as_json = os.environ.get(LOG_VARIABLE, "").lower() == "json"
    for handler in [h for h in logger.handlers if getattr(h, "name", "") == "milp_ray"]:
        logger.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.name = "milp_ray"
    handler.setFormatter(_JsonFormatter() if as_json else _PlainFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if as_json else logging.WARNING)
    logger.propagate = False


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Give this process its own answer to SIGTERM back: ``ray.init`` sets Ray's, which is to exit at once."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _start(section: RaySection) -> None:
    """Start Ray in this process; its workers inherit this process's environment.

    A ``runtime_env`` would do that too, but a worker with one is started afresh instead of being taken from
    the prestarted ones.
    """
    import ray

    for _ in range(_START_ATTEMPTS):
        try:
            ray.init(
                address="local",  # without it, a cluster that happens to run on this machine would be joined
                num_cpus=section.num_cpus,
                num_gpus=section.num_gpus,
                object_store_memory=section.object_store_mib * _MIB,
                include_dashboard=section.include_dashboard,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
            return
        except Exception as error:
            # Ray waits 30 s for its own processes, has no option for it and no class for this exception.
            if "timed out during startup" not in str(error):
                raise
            logger.warning("Ray's processes did not start within 30 s; the machine is busy")
            ray.shutdown()
    raise MilpError(
        f"Ray did not start in this process within {_START_ATTEMPTS} × 30 s: the machine is too busy, or a "
        "firewall blocks local ports; try again, or join a running cluster with ray.address"
    )


def _join(address: str, environment: Mapping[str, str]) -> None:
    import ray

    try:
        ray.init(
            address=address,
            logging_level=logging.WARNING,
            log_to_driver=False,
            runtime_env={"env_vars": dict(environment)},
        )
    except (ConnectionError, TimeoutError) as error:
        raise MilpError(
            f"ray.address {address!r}: no Ray cluster answers there ({type(error).__name__}); start one with "
            "`ray up` or `ray start --head`, or leave ray.address out to start Ray in this process"
        ) from error


def _local_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a Ray started here gets on top: no token file in the home directory, no usage report."""
    extra = {"RAY_USAGE_STATS_ENABLED": "0"}
    if "RAY_AUTH_MODE" not in os.environ:
        extra["RAY_AUTH_MODE"] = "disabled"
    if "DS_ACCELERATOR" not in os.environ and not _has_accelerator():
        extra["DS_ACCELERATOR"] = "cpu"
    tools = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if tools not in paths:
        extra["PATH"] = os.pathsep.join([tools, *paths])
    return {**environment, **extra}


def _has_accelerator() -> bool:
    """Whether this process may use a GPU of the machine; asked without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return False
    return bool(list(Path("/dev").glob("nvidia[0-9]*"))) or Path("/dev/kfd").exists()


def _session(*, started_here: bool, seconds: float) -> Session:
    import ray

    resources = ray.cluster_resources()
    return Session(started_here, resources.get("CPU", 0.0), resources.get("GPU", 0.0), seconds)


def _loggable(value: str | int | float | bool | None) -> str | int | float | bool | None:
    """Cut what is too long to be an id or a name."""
    if isinstance(value, str) and len(value) > _LONGEST_LOGGED_STRING:
        return value[:_LONGEST_LOGGED_STRING] + "…"
    return value


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(line)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        pairs = "".join(f" {name}={json.dumps(value)}" for name, value in fields.items())
        return f"{record.levelname.lower()}: {record.getMessage()}{pairs}"
