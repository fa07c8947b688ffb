"""The same search with a process and a base for each trial, and with trials that share a process and a pack.

    .venv/bin/python experiments/benchmarks/sharing.py --quick     # a minute or two on two idle cores
    .venv/bin/python experiments/benchmarks/sharing.py             # ten minutes

The demo's search over its embedded users and base, initial points only (nothing is fitted), on all cores of
the machine (``--cores``), a few rounds in turn. Of each way it prints, medians over the rounds: trials a
minute from the first end to the last, seconds from Tune's start to the last end (processes start in it),
CPU seconds of all processes, and the most memory at one time (proportional set size). Then the largest
difference of a trial's validation loss to that of the first way, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from milp_ray.config import Config
from milp_ray.config.cluster import RaySection
from milp_ray.config_loader import load_config
from milp_ray.pipeline.probes import probe_users
from milp_ray.resident_memory import peak_memory
from milp_ray.search.journal import read_events
from milp_ray.search.study import JOURNAL_FILE, StudySettings, run_study
from milp_ray.search.timeline import sessions, trial_lives
from milp_ray.telemetry import ray_session
from milp_ray.training.shapes import base_shapes
from milp_ray.users.readers import read_users
from milp_ray.users.splits import split_user

DEMO = Path(__file__).parent.parent / "demo.yaml"


def ways(n_cores: int) -> dict[str, dict[str, Any]]:
    """Settings of the search, by its processes × the trials of each; a process has a thread a CPU."""
    return {
        f"{n_cores} × 1": {},
        f"{n_cores} × 2": {"trials_per_process": 2},
        f"{n_cores} × 4": {"trials_per_process": 4},
        f"1 × {2 * n_cores}": {"cpus_per_trial": n_cores, "trials_per_process": 2 * n_cores},
    }


def one_search(config: Config, search: dict[str, Any], n_trials: int, n_cores: int) -> dict[str, Any]:
    """What a search took, and its losses."""
    section = config.search.model_copy(update={"n_trials": n_trials, "n_initial": n_trials, **search})
    ray = RaySection(num_cpus=n_cores, threads_per_worker=int(section.cpus_per_trial))
    config = config.model_copy(update={"search": section, "ray": ray})
    users = read_users(config.users, config.seed).users
    splits = [split_user(user, config.users.split) for user in users]
    probes = probe_users(splits, section.n_probe_users, config.seed)
    with tempfile.TemporaryDirectory() as folder, ray_session(ray):
        before = cpu_seconds()
        with peak_memory(interval=1.0) as peak:
            result = run_study(Path(folder), StudySettings.of(config), probes, base_shapes(config.base))
        used = cpu_seconds() - before
        events = read_events(Path(folder) / JOURNAL_FILE)
    ends = sorted(life.ended for life in trial_lives(events) if life.ended is not None)
    return {
        "trials_a_minute": 60 * (len(ends) - 1) / (ends[-1] - ends[0]),
        "seconds": ends[-1] - sessions(events)[0].start,
        "cpu_seconds": used,
        "peak_mib": peak.mib,
        "trial_seconds": sum(trial.metrics["seconds"] for trial in result.trials),
        "losses": [trial.metrics["validation_loss"] for trial in result.trials],
    }


def cpu_seconds() -> float:
    """Of this process, everything that it started and that still runs, and what has ended of that."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of a few trials")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    rounds, n_trials = (1, 8) if options.quick else (options.rounds, options.trials)
    config = load_config(DEMO)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways(options.cores)}
    for _ in range(rounds):
        for name, search in ways(options.cores).items():
            found[name].append(one_search(config, search, n_trials, options.cores))
            print(f"{name:8s}" + _line(found[name][-1]), flush=True)
    # The first way's, first round.
    first = next(iter(found.values()))[0]["losses"]
    figures: dict[str, Any] = {}
    print(f"\nmedians over {rounds} rounds of {n_trials} trials")
    for name, runs in found.items():
        figures[name] = {key: median(run[key] for run in runs) for key in runs[0] if key != "losses"}
        apart = max(abs(a - b) for run in runs for a, b in zip(run["losses"], first, strict=True))
        figures[name]["loss_apart"] = apart
        print(f"{name:8s}{_line(figures[name])}, losses within {apart:.1e}")
    print(json.dumps({"rounds": rounds, "n_trials": n_trials, "cores": options.cores, **figures}))


def _line(run: dict[str, Any]) -> str:
    return (
        f"{run['trials_a_minute']:6.1f} trials a minute, {run['seconds']:6.1f} s in all, "
        f"{run['cpu_seconds']:6.0f} CPU-seconds, {run['peak_mib']:6.0f} MiB"
    )


if __name__ == "__main__":
    main()
