"""The peak memory of this process and everything it started, sampled while stages run.

Ray's workers share pages (libraries, the base in the object store). Summing their resident sets would count a
shared page once a process, so the proportional set size is summed, in which a page shared by n processes
counts 1/n in each: the sum is what the machine really holds in memory for the run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

_MIB = 2**20


@dataclass
class PeakMemory:
    """The largest sample so far, in MiB."""

    mib: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def sample(self) -> float:
        """Measure once and remember the peak."""
        now = tree_mib()
        with self._lock:
            self.mib = max(self.mib, now)
        return now


@contextmanager
def peak_memory(interval: float = 2.0) -> Iterator[PeakMemory]:
    """Sample every ``interval`` seconds, and once at either end, until the block is left."""
    peak = PeakMemory()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(interval):
            peak.sample()

    peak.sample()
    thread = threading.Thread(target=watch, name="peak-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.sample()


def tree_mib() -> float:
    """Memory of this process and its descendants in MiB (proportional; resident where that is unknown)."""
    me = psutil.Process()
    return sum(_bytes(process) for process in [me, *me.children(recursive=True)]) / _MIB


def _bytes(process: psutil.Process) -> int:
    try:
        try:
            with open(f"/proc/{process.pid}/smaps_rollup", encoding="ascii") as file:
                for line in file:
                    if line.startswith("Pss:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            pass  # not Linux, or another user's process: the resident size is the next best
        return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return 0
