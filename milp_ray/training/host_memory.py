"""How much of a machine's memory one of its processes may count on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_LIBRARIES = 2**29  # bytes that Python, torch and what they import take, about
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def process_memory(threads: int) -> int:
    """Bytes for a process of so many threads, libraries aside: its share of the memory, if that is there now.

    On a machine in full use there is a thread a core, and a process has its cores' share of the memory: what
    is free when it begins is not its own. The limit of a container or job counts as the machine's memory.
    What the process holds already it may use again.
    """
    memory = psutil.virtual_memory()
    limit, available = memory.total, memory.available
    for group in _cgroups():
        most = _number(group, "memory.max", "memory.limit_in_bytes")
        if most is not None and most < memory.total:
            limit = min(limit, most)
            used = _number(group, "memory.current", "memory.usage_in_bytes") or 0
            available = min(available, most - used + _reclaimable(group))
    share = min(1.0, threads / _n_cores())
    held = psutil.Process().memory_info().rss
    return max(0, int(min(share * limit, available + held)) - _LIBRARIES)


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cgroups() -> Iterator[Path]:
    """The control groups that this process is in, where Linux tells of them: its own and those around it."""
    if not _OWN_CGROUPS.is_file():
        return
    for line in _OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / "memory" if controllers else _CGROUPS
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(root):
                yield group


def _number(group: Path, *names: str) -> int | None:
    """What the first of some files says, of either version of control groups; ``None``: no number."""
    for name in names:
        if (group / name).is_file():
            said = (group / name).read_text().strip()
            return int(said) if said.isdigit() else None
    return None


def _reclaimable(group: Path) -> int:
    """Bytes of files' pages that a group gives up when memory is short."""
    if not (group / "memory.stat").is_file():
        return 0
    rows = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    stated = {name: int(number) for name, number in rows}
    return stated.get("total_inactive_file", stated.get("inactive_file", 0))
