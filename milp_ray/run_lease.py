"""A lease in a bucket, by which two machines do not work on one run there.

Its holder renews it every :data:`RENEW_SECONDS`, in a thread of its own; without that it runs out by itself
after a minute, so that a machine that is lost stands in nobody's way for long. A holder that stood still for
longer, or could not reach the bucket, may have lost the run to another machine. It looks before each renewal,
and before whatever it writes (:meth:`Lease.check`); once the lease is lost it writes nothing more, and the
command is interrupted and ends with an error.

pyarrow cannot write on a condition, so that between a look and the write after it another machine may come:

* Of two that take a free run in the same moment both may believe that they have it, until the one whose lease
  was replaced looks again: after bringing what is there, and at the next renewal at the latest.
* A holder that stands still just between the two, until the lease has run out, writes one object when it goes
  on: an older version over that of the new holder, or its lease, to which the new holder then gives way.
* A lease's age is told by two machines' clocks. Where they differ by most of a minute it seems to run out too
  early, or stands for longer.
* Workers publish adapters without asking for it: those that are finished before the interruption are there.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from milp_ray.buckets import Bucket
from milp_ray.errors import MilpError
from milp_ray.this_process import this_process

LEASE = "lease.json"
RENEW_SECONDS = 10.0
_LEASE_SECONDS = 60.0  # without renewal, after which another machine may take a run up
_LENGTH = 512
logger = logging.getLogger("milp_ray")


class LeaseLostError(MilpError):
    """Another process may work on the run by now."""


class Lease:
    """The lease of the run that a bucket's root is."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._path = f"{bucket.root}/{LEASE}"
        self._lost = ""  # to whom, in words

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lease for this process while the block lasts, which is interrupted once it is lost.

        Raises:
            MilpError: another machine works on the run, or the bucket cannot be written.
            LeaseLostError: the lease was lost, at the end of the block and in place of what ended it.
        """
        self._check_free()
        self._write()
        self._check_free()  # another machine may have taken it in the same moment
        self._lost = ""
        stop = threading.Event()
        is_main = threading.current_thread() is threading.main_thread()
        thread = threading.Thread(target=self._keep_renewing, args=(stop, is_main), name="lease", daemon=True)
        thread.start()
        try:
            try:
                yield
            finally:
                stop.set()
                thread.join()
        finally:
            self.check()
            self._bucket.delete_file(self._path)

    def check(self) -> None:
        """Look whether this process still has the lease.

        Raises:
            LeaseLostError: it has not, and never has it again before it is taken anew.
            MilpError: the bucket cannot be read.
        """
        if not self._lost:
            lease = self._read()
            if lease is None:
                self._lost = "another process has worked on it"
            elif _who(lease) != this_process():
                self._lost = f"another process works on it (on {lease['host']})"
        if self._lost:
            raise LeaseLostError(
                f"{self._bucket.shown} is no longer held by this process: {self._lost}. A process that "
                f"stands still, or cannot reach the bucket, for {_LEASE_SECONDS:.0f} s loses it. Nothing "
                "more is taken there; wait until no other process works on the run, then the same command "
                "goes on from what is there"
            )

    def holder(self) -> dict[str, Any] | None:
        """Which process works on the run: its host and pid among others; ``None``: none does."""
        lease = self._read()
        if lease is None or time.time() - lease["time"] > _LEASE_SECONDS:
            return None
        # (A host's name does not tell machines apart: containers may share it, with processes of their own.)
        here = this_process()["machine"]
        if here and lease["machine"] == here and not psutil.pid_exists(lease["pid"]):
            return None
        return _who(lease)

    def _check_free(self) -> None:
        holder = self.holder()
        if holder is not None and holder != this_process():
            raise MilpError(
                f"another milp-ray process works on {self._bucket.shown} (on {holder['host']}); wait for it, "
                f"or choose another name=…. Of a machine that was lost, the run is free after "
                f"{_LEASE_SECONDS:.0f} s"
            )

    def _keep_renewing(self, stop: threading.Event, is_main: bool) -> None:
        while not stop.wait(RENEW_SECONDS):
            try:
                self.check()
                self._write()
            except LeaseLostError as error:
                logger.warning("%s", error)
                if is_main:
                    _interrupt_main_thread()
                return
            except MilpError as error:  # the bucket is away: the lease may be there still when it is back
                logger.warning("%s", error)

    def _read(self) -> dict[str, Any] | None:
        try:
            lease = json.loads(self._bucket.read(self._path))
            return {
                **{name: lease.get(name) for name in this_process()},
                "host": str(lease["host"]),
                "pid": int(lease["pid"]),
                "time": float(lease["time"]),
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _write(self) -> None:
        # Always of one length: a reader asks for the length first, and may meet two versions.
        text = json.dumps({**this_process(), "time": time.time()}).ljust(_LENGTH)
        self._bucket.write(self._path, text.encode("utf-8"))


def _who(lease: dict[str, Any]) -> dict[str, Any]:
    return {name: lease[name] for name in this_process()}


def _interrupt_main_thread() -> None:
    """End the command as Ctrl-C would, so that it keeps what is finished."""
    main = threading.main_thread().ident
    for number in (signal.SIGINT, signal.SIGTERM):
        # A command in the background of a script ignores the first; some handle the second.
        if main is not None and callable(signal.getsignal(number)):
            signal.pthread_kill(main, number)
            return
