"""A batch in which workers, the driver and Ray itself are killed: no user is lost, and none is made twice.

    .venv/bin/python experiments/benchmarks/batch_kills.py --quick   # 40 users, three kills: minutes
    .venv/bin/python experiments/benchmarks/batch_kills.py           # 500 users, ten kills

`milp-ray personalize --users` runs over a random base of two layers. At random moments of the store's growth
SIGKILL goes to one worker, to all workers, to the driver or to the raylet, each of them at least twice and in
a random order. A command that does not survive it is started again as it was. At the end every user must have
exactly one version, which verifies, no adapter that was there before a kill may have changed, and the last
command must have ended with 0.

Prints a line a kill, and one JSON object as its last line; the exit code is 1 where something was lost,
changed or made twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from batches.tiny import tiny_base

from milp_ray.config import Config
from milp_ray.personalize.store import AdapterStore
from milp_ray.rundir import RunFolder

KINDS = ("worker", "workers", "driver", "raylet")
TEXTS = ("dog", "cat", "turtle", "garden", "piano", "bicycle", "camera", "oven")
COLOURS = ("red", "green", "blue", "black", "white", "brown")
PATIENCE = 600.0  # seconds without a new adapter, after which something hangs


def write_users(path: Path, n_users: int, seed: int) -> None:
    """Users of different length."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for index in range(n_users):
            turns = [f"My {rng.choice(TEXTS)} is {rng.choice(COLOURS)}." for _ in range(rng.randint(4, 40))]
            pairs = [{"query": f"What is {i}?", "response": f"{i * i}."} for i in range(6)]
            file.write(json.dumps({"user_id": f"u/{index}", "history": turns, "examples": pairs}) + "\n")


def prepare(folder: Path, n_users: int, seed: int) -> tuple[RunFolder, Path]:
    """A run whose layout is chosen, and its users' file."""
    tiny_base(folder / "base")
    write_users(folder / "users.jsonl", n_users, seed)
    config = {
        "name": "kills",
        "output_dir": folder,
        "base": {"model": str(folder / "base"), "device": "cpu"},
        "training": {"memory_epochs": 2, "instruction_epochs": 2, "pack_size": 4},
        "personalize": {"n_workers": 2, "cpus_per_worker": 0.5},
        "ray": {"num_cpus": 1, "num_gpus": 0, "object_store_mib": 100},
    }
    run = RunFolder.create(Config.model_validate(config))
    chosen = {"layout": {"n_layers": 2, "layers": [0, 1], "rank": 4}}
    run.chosen_file.write_text(yaml.safe_dump(chosen), encoding="utf-8")
    return run, folder / "users.jsonl"


class Batch:
    """The command, started again and again."""

    def __init__(self, run: RunFolder, users: Path, log: Path) -> None:
        self.run = run
        self.n_starts = 0
        self._command = [
            sys.executable,
            "-m",
            "milp_ray",
            "personalize",
            str(run.path),
            "--users",
            str(users),
        ]
        self._log = log
        self._process: psutil.Popen | None = None

    def start(self) -> None:
        """Start it, and wait for nothing."""
        self.n_starts += 1
        with self._log.open("ab") as log:
            self._process = psutil.Popen(
                self._command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "MILP_LOG": "json"},
            )

    def result(self, seconds: float | None = 0.0) -> int | None:
        """Its exit code, or ``None`` while it runs."""
        assert self._process is not None
        try:
            return int(self._process.wait(seconds))
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            return None

    def kill(self, kind: str, rng: random.Random) -> int:
        """Kill a part of it with SIGKILL, as soon as that part is at work; how many processes."""
        assert self._process is not None
        since = time.monotonic()
        while not (victims := self._members(kind)):
            if self.result() is not None or time.monotonic() - since > PATIENCE:
                raise RuntimeError(f"there is no {kind} to kill")
            time.sleep(0.05)
        if kind == "worker":
            victims = [rng.choice(victims)]
        family = self._process.children(recursive=True)
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        if kind == "driver":
            self._process.wait()
            _end(family)
        return len(victims)

    def _members(self, kind: str) -> list[psutil.Process]:
        """The processes that a kind of kill is for; workers are those that have users."""
        assert self._process is not None
        if kind == "driver":
            return [self._process]
        wanted = "raylet" if kind == "raylet" else "UserWorker.run"
        return [child for child in self._process.children(recursive=True) if wanted in _name(child)]

    def end(self) -> None:
        """Leave nothing behind."""
        if self._process is not None and self._process.is_running():
            family = dict.fromkeys(self._process.children(recursive=True), "")
            self._process.kill()
            self._process.wait()
            _end(family)


def _name(process: psutil.Process) -> str:
    """Ray's name of a worker, or that of the program."""
    try:
        words = process.cmdline()
        return words[0] if words and words[0].startswith("ray::") else process.name()
    except psutil.NoSuchProcess:
        return ""


def _end(family: list[psutil.Process]) -> None:
    """Ray's processes end by themselves a while after their driver; those that a next start could meet, now.

    Workers are left to their own end: one that publishes after its driver's death is part of the matter.
    """
    for child in family:
        try:
            if "UserWorker" not in _name(child):
                child.kill()
        except psutil.NoSuchProcess:
            continue


def made(run: RunFolder) -> dict[str, str]:
    """User → hash of the current version's manifest, without looking at the weights."""
    store = AdapterStore(run.adapters)
    return {user: store.manifest(user).created for user in store.users()}


def n_made(run: RunFolder) -> int:
    """How many users have an adapter."""
    return len(list(run.adapters.glob("??/??/*/v1/manifest.json")))


def wait_until(batch: Batch, n: int) -> bool:
    """Wait for so many adapters; whether the command still runs then."""
    last, since = n_made(batch.run), time.monotonic()
    while (now := n_made(batch.run)) < n:
        if (code := batch.result()) is not None:
            raise RuntimeError(f"the command ended with {code} by itself; see its log")
        if now > last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise RuntimeError(f"no adapter was made for {PATIENCE:.0f} s")
        time.sleep(0.02)
    return batch.result() is None


def killed_batch(folder: Path, n_users: int, n_kills: int, seed: int) -> dict[str, Any]:
    """Run a batch, kill parts of it ``n_kills`` times, and say what became of the users."""
    rng = random.Random(seed)
    run, users = prepare(folder, n_users, seed)
    batch = Batch(run, users, folder / "log")
    kinds = [KINDS[i % len(KINDS)] for i in range(n_kills)]
    rng.shuffle(kinds)
    moments = sorted(rng.sample(range(1, int(0.9 * n_users)), n_kills))
    n_changed = n_killed = 0
    written: dict[str, str] = {}
    started = time.monotonic()
    try:
        batch.start()
        for kind, moment in zip(kinds, moments, strict=True):
            wait_until(batch, max(moment, len(written) + 1))
            time.sleep(rng.uniform(0.0, 0.5))
            n_killed += batch.kill(kind, rng)
            now = made(run)
            n_changed += sum(now.get(user) != created for user, created in written.items())
            written = now
            print(f"{time.monotonic() - started:5.0f} s  {kind:8s} killed at {len(now)} users", flush=True)
            if kind == "raylet":  # it takes a quarter of a minute until the driver knows
                if batch.result(120.0) is None:
                    raise RuntimeError("the driver outlived its raylet by two minutes")
                batch.end()
            if batch.result() is not None:
                batch.start()
        code = batch.result(None)
    finally:
        batch.end()
    store = AdapterStore(run.adapters)
    found = {user: store.versions(user) for user in store.users()}
    for user in found:
        store.verify(user)
    final = made(run)
    n_changed += sum(final.get(user) != created for user, created in written.items())
    return {
        "n_users": n_users,
        "n_kills": n_kills,
        "n_processes_killed": n_killed,
        "n_starts": batch.n_starts,
        "exit_code": code,
        "n_lost": len({f"u/{i}" for i in range(n_users)} - found.keys()),
        "n_twice": sum(versions != [1] for versions in found.values()),
        "n_changed": n_changed,
        "n_failed": len(run.failed_file.read_text(encoding="utf-8").splitlines()),
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    """Run the batch and judge it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer users and kills")
    parser.add_argument("--seed", type=int, default=0, help="of the users, the kills and their moments")
    arguments = parser.parse_args()
    n_users, n_kills = (40, 3) if arguments.quick else (500, 10)
    with tempfile.TemporaryDirectory() as scratch:
        found = killed_batch(Path(scratch), n_users, n_kills, arguments.seed)
    print(json.dumps(found))
    if any(found[name] for name in ("exit_code", "n_lost", "n_twice", "n_changed", "n_failed")):
        sys.exit(1)


if __name__ == "__main__":
    main()
