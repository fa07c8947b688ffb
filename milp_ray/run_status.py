"""What a run is doing, or how it ended, in its ``status.json``: for people far away, and for programs.

A job list cannot be trusted with this: of a driver that crashed under `ray submit` Ray's own says that it
succeeded. The file is written when a stage begins and when the command ends, however it ends; of a command
that was killed it still says ``running``, and that nobody holds the run any more gives it away.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from milp_ray import exit_codes
from milp_ray.atomic_files import write_json
from milp_ray.errors import MilpError, is_of_the_disk
from milp_ray.this_process import send_signal, this_process

if TYPE_CHECKING:
    from milp_ray.rundir import RunFolder

State = Literal["running", "succeeded", "failed", "stopped", "died"]
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What ``status.json`` says.

    ``died`` is never written: it is a ``running`` whose process is gone. ``reason`` is there for what failed
    or was stopped, and quotes no user; ``exit_code`` is the command's, once it has ended.
    """

    state: State
    command: str
    stage: str | None
    reason: str | None
    exit_code: int | None
    host: str
    pid: int
    started: str
    updated: str
    process: str | None = None  # by which it is told from others with its host's name and its number

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


class Recorder:
    """Keeps the file up to date while a command works.

    Attributes:
        failed: how many users failed, by stage.
        found: what an audit found that must not be, in words; empty: nothing.
    """

    def __init__(self, path: Path, command: str) -> None:
        self.failed: dict[str, int] = {}
        self.found = ""
        self._path = path
        now = _now()
        me = this_process()
        self._status = RunStatus(
            "running", command, None, None, None, me["host"], me["pid"], now, now, me["process"]
        )
        self._write()

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._status = replace(self._status, stage=name)
        self._write()

    def ended(self, state: State, exit_code: int, reason: str | None = None) -> None:
        """The command ends."""
        self._status = replace(self._status, state=state, exit_code=exit_code, reason=reason)
        self._write()

    def _write(self) -> None:
        self._status = replace(self._status, updated=_now())
        write_json(self._path, self._status.to_dict())


@contextmanager
def recorded(run: RunFolder, command: str) -> Iterator[Recorder]:
    """Record a command that works on a run, from its begin to its end.

    An end at which some users failed, or an audit found something, is a success with that exit code and
    reason.

    A request to terminate (SIGTERM, which is how clusters and job managers stop a process) becomes the
    interruption that Ctrl-C is, so that what is finished is kept and the run can go on later.
    """
    with _terminated_as_interrupted():
        recorder = Recorder(run.status_file, command)
        try:
            yield recorder
            failed = ", ".join(f"{n} in {stage}" for stage, n in recorder.failed.items() if n)
            if failed:
                recorder.ended("succeeded", exit_codes.SOME_FAILED, f"users failed: {failed}")
            elif recorder.found:
                recorder.ended("succeeded", exit_codes.FOUND, recorder.found)
            else:
                recorder.ended("succeeded", 0)
        except KeyboardInterrupt as interrupted:
            recorder.ended("stopped", exit_codes.INTERRUPTED, str(interrupted) or "interrupted")
            raise
        except MilpError as error:
            recorder.ended("failed", exit_codes.MISTAKE, str(error))
            raise
        except OSError as error:
            said = os.strerror(error.errno) if error.errno else type(error).__name__
            if is_of_the_disk(error):
                recorder.ended("failed", exit_codes.MISTAKE, said)
            else:
                recorder.ended("failed", exit_codes.BUG, f"{said} (see the log)")
            raise
        except BaseException as error:
            # The message may quote a user; the class and the log's traceback say enough.
            recorder.ended("failed", exit_codes.BUG, f"{type(error).__name__} (see the log)")
            raise


def read_status(run: RunFolder) -> RunStatus | None:
    """The status of a run; ``None`` where no command was recorded on it.

    Raises:
        MilpError: the file was damaged.
    """
    try:
        found = json.loads(run.status_file.read_text(encoding="utf-8"))
        status = RunStatus(**found)
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise MilpError(f"{run.status_file} cannot be read ({type(error).__name__}); remove it") from None
    if status.state != "running" or _is_of(run.holder(), status):
        return status
    return replace(status, state="died", reason="its process is gone; the same command goes on")


def interrupt(run: RunFolder) -> None:
    """Ask the command that works on a run to end as by Ctrl-C.

    Raises:
        MilpError: none does, or it is not this user's or this machine's to stop.
    """
    status = read_status(run)
    if status is None or status.state != "running":
        state = "was never recorded" if status is None else f"has {status.state}"
        raise MilpError(f"nothing works on {run.place}: its last command {state}")
    if status.host != socket.gethostname():
        raise MilpError(
            f"{run.place} is worked on by {status.host}: stop it there, or give `milp-ray stop` the "
            "--address of the cluster"
        )
    holder = run.holder()
    if holder is None or not _is_of(holder, status):
        raise MilpError(f"nothing works on {run.place} any more: its last command has just ended")
    if holder.get("began") is None:
        raise MilpError(f"an older milp_ray works on {run.place}: stop process {status.pid} there")
    send_signal(holder, signal.SIGTERM)


def _is_of(holder: Mapping[str, Any] | None, status: RunStatus) -> bool:
    """Whether who holds a run is whose status that is, and not a later command that records none."""
    return holder is not None and holder.get("process") == status.process


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt("terminated; the same command continues")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _now() -> str:
    return datetime.now(UTC).strftime(_TIME)
