"""One `milp-ray personalize` over a file of users: what it took, and what its processes held meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import yaml

from milp_ray.config import Config
from milp_ray.rundir import RunFolder

_SECONDS_BETWEEN_LOOKS = 0.25
_MIB = 2**20
# A driver's memory is judged from the tenth of the users on, when everything that it imports is there, and by
# means over tenths, since a single look may meet the moment before a garbage collection.
_PART = 0.1


@dataclass(frozen=True, slots=True)
class Look:
    """The processes at one moment; seconds since the command's start, and MiB of resident memory."""

    seconds: float
    n_done: int
    driver_mib: float
    worker_mib: float  # the largest worker's


@dataclass(slots=True)
class Watched:
    """A batch that has ended. Seconds are on the clock unless it says otherwise."""

    n_workers: int
    n_users: int
    n_failed: int = 0
    seconds: float = 0.0  # the batch, without Python's and Ray's start
    training_seconds: float = 0.0  # inside training, of all workers together
    ready_seconds: float = 0.0  # from when a worker was ready to the batch's end, of all workers together
    driver_cpu_seconds: float = 0.0
    looks: list[Look] = field(default_factory=list)

    @property
    def users_per_second(self) -> float:
        """From the moment that the first adapters were told of to the last: without starting workers."""
        told = [look for look in self.looks if look.n_done]
        if not told or told[-1].n_done == told[0].n_done:
            return self.n_users / self.seconds
        return (told[-1].n_done - told[0].n_done) / (self._ended - told[0].seconds)

    @property
    def _ended(self) -> float:
        """When the last adapter was told of."""
        return next(look.seconds for look in self.looks if look.n_done == self.looks[-1].n_done)

    @property
    def overhead_share(self) -> float:
        """Part of the workers' time, from the batch's first moment to its last, that was not training."""
        return 1.0 - self.training_seconds / (self.n_workers * self.seconds)

    @property
    def start_seconds(self) -> float:
        """From the command's start to the first look that saw an adapter."""
        return next((look.seconds for look in self.looks if look.n_done), float("nan"))

    @property
    def steady_overhead_share(self) -> float:
        """As ``overhead_share``, of each worker's time from when it was ready."""
        return 1.0 - self.training_seconds / self.ready_seconds

    @property
    def driver_growth(self) -> float | None:
        """Resident memory of the driver near the end over that after a tenth of the users, less one.

        ``None`` where there are too few users to tell.
        """
        early = [look.driver_mib for look in self.looks if _PART <= look.n_done / self.n_users < 2 * _PART]
        late = [look.driver_mib for look in self.looks if look.n_done / self.n_users >= 1 - _PART]
        return fmean(late) / fmean(early) - 1.0 if early and late else None

    @property
    def driver_mib(self) -> float:
        """The driver's largest resident memory."""
        return max((look.driver_mib for look in self.looks), default=0.0)

    @property
    def worker_mib(self) -> float:
        """The largest worker's largest resident memory."""
        return max((look.worker_mib for look in self.looks), default=0.0)


def new_run(folder: Path, settings: Mapping[str, Any], layout: Mapping[str, Any]) -> RunFolder:
    """A run whose layout is chosen, as after a search."""
    run = RunFolder.create(Config.model_validate({"name": "run", "output_dir": folder, **settings}))
    run.chosen_file.write_text(yaml.safe_dump({"layout": dict(layout)}), encoding="utf-8")
    return run


def watched_batch(run: RunFolder, users: Path, n_users: int, n_workers: int) -> Watched:
    """Make every user's adapter by the command that users call, and look at its processes meanwhile.

    Raises:
        RuntimeError: the command failed; with the end of what it printed.
    """
    found = Watched(n_workers, n_users)
    command = [sys.executable, "-m", "milp_ray", "personalize", str(run.path), "--users", str(users)]
    log = run.path / "watched.log"
    started = time.perf_counter()
    with log.open("wb") as file:
        process = psutil.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "MILP_LOG": "json"}
        )
    place = 0
    n_done = 0
    while process.poll() is None:
        with log.open("rb") as file:
            file.seek(place)
            new = file.read()
        place += len(new)
        n_done += new.count(b'"adapter_made"')
        _look(process, found, time.perf_counter() - started, n_done)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    lines = log.read_text(encoding="utf-8").splitlines()
    if process.returncode:
        raise RuntimeError(f"the batch ended with {process.returncode}: " + "\n".join(lines[-20:]))
    events = [json.loads(line) for line in lines if line.startswith("{")]
    [summary] = [event for event in events if event["event"] == "personalized"]
    ended = datetime.fromisoformat(summary["time"])
    ready = [datetime.fromisoformat(one["time"]) for one in events if one["event"] == "worker_started"]
    found.ready_seconds = sum((ended - moment).total_seconds() for moment in ready)
    found.seconds = summary["seconds"]
    found.training_seconds = summary["training_seconds"]
    found.n_failed = summary["failed"]
    if summary["done"] + summary["failed"] != n_users:
        raise RuntimeError(f"{n_users} users were given, and {summary['done']} adapters made")
    return found


def _look(process: psutil.Popen, found: Watched, seconds: float, n_done: int) -> None:
    try:
        driver = process.memory_info().rss / _MIB
        cpu = process.cpu_times()
        found.driver_cpu_seconds = cpu.user + cpu.system
        workers = [_worker_mib(child) for child in process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    found.looks.append(Look(seconds, n_done, driver, max(workers, default=0.0)))


def _worker_mib(process: psutil.Process) -> float:
    """Resident memory, 0 for a process that is none of the batch's workers."""
    try:
        if not process.cmdline()[:1] or "UserWorker" not in process.cmdline()[0]:
            return 0.0
        return float(process.memory_info().rss / _MIB)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0
