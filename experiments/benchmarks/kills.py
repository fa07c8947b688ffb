"""A long search killed with SIGKILL again and again: nothing is lost, and nothing is done twice.

    .venv/bin/python experiments/benchmarks/kills.py --quick   # 20 trials, one kill; under a minute
    .venv/bin/python experiments/benchmarks/kills.py           # 500 trials, ten kills; ten minutes

The study of endurance.py, real Ray Tune and instant trials, runs in a process of its own. That is killed at
random moments (of the journal's growth, and a random time after), and each time the same study is taken up
by a new process. Before every new start the trials that the journal has are written down. At the end each of
them has to be there as it was, every trial has to have ended once, and no layout may have been tried twice.

Prints a line a session, and one JSON object as its last line; the exit code is 1 where something was lost or
repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from endurance import SHAPES, SPLIT, InstantTrial, long_search, settings

from milp_ray.config.cluster import RaySection
from milp_ray.search.journal import TrialRecord, read_events, read_study
from milp_ray.search.study import JOURNAL_FILE, run_study
from milp_ray.telemetry import ray_session


def drive(folder: Path, n_trials: int) -> None:
    """One session of the study: until it is finished, or this process is killed."""
    with ray_session(RaySection(num_cpus=2, num_gpus=0)):
        run_study(folder, settings(long_search(n_trials)), [SPLIT], SHAPES, None, InstantTrial)


def start(folder: Path, n_trials: int) -> subprocess.Popen[bytes]:
    """A process that drives the study."""
    command = [sys.executable, __file__, "--drive", str(folder), "--trials", str(n_trials)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ended_trials(journal: Path) -> dict[int, TrialRecord]:
    """What the journal knows of trials that are over, by index."""
    return {trial.index: trial for trial in read_study(journal).trials if trial.has_ended}


def killed_study(folder: Path, n_trials: int, n_kills: int, seed: int) -> dict[str, Any]:
    """Run a study, kill it ``n_kills`` times, and say what became of it.

    Raises:
        RuntimeError: a session ended by itself before its time, or the study does not come to its end.
    """
    rng = random.Random(seed)
    journal = folder / JOURNAL_FILE
    written: dict[int, TrialRecord] = {}
    n_lost = n_sessions = 0
    for n_before in [*sorted(rng.sample(range(1, n_trials), n_kills)), n_trials]:
        driver = start(folder, n_trials)
        n_sessions += 1
        if n_before < n_trials:
            while len(ended_trials(journal)) < n_before:
                if driver.poll() is not None:
                    raise RuntimeError(f"session {n_sessions} ended with {driver.returncode} by itself")
                time.sleep(0.05)
            time.sleep(rng.uniform(0.0, 0.5))
            driver.send_signal(signal.SIGKILL)
        if driver.wait() != (-signal.SIGKILL if n_before < n_trials else 0):
            raise RuntimeError(f"session {n_sessions} ended with {driver.returncode}")
        now = ended_trials(journal)
        n_lost += sum(now.get(index) != trial for index, trial in written.items())
        print(f"session {n_sessions:2d}  {len(now):4d} trials have ended", flush=True)
        written = now
    events = read_events(journal)
    ends = Counter(e["index"] for e in events if e["event"] in ("trial_completed", "trial_failed"))
    keys = Counter(e["key"] for e in events if e["event"] == "trial_suggested")
    return {
        "n_trials": len(written),
        "n_kills": n_sessions - 1,
        "n_lost": n_lost,
        "n_ended_twice": sum(count > 1 for count in ends.values()),
        "n_layouts_twice": sum(count > 1 for count in keys.values()),
        "n_started_after_their_end": started_after_their_end(events),
    }


def started_after_their_end(events: list[dict[str, Any]]) -> int:
    """Trials that were run although their end was in the journal."""
    ended: set[int] = set()
    again: set[int] = set()
    for event in events:
        if event["event"] in ("trial_completed", "trial_failed"):
            ended.add(event["index"])
        elif event["event"] == "trial_started" and event["index"] in ended:
            again.add(event["index"])
    return len(again)


def main() -> None:
    """Run the study, or one session of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trials and kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trials", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive is not None:
        drive(arguments.drive, arguments.trials)
        return
    n_trials, n_kills = (20, 1) if arguments.quick else (500, 10)
    with tempfile.TemporaryDirectory() as scratch:
        found = killed_study(Path(scratch) / "study", n_trials, n_kills, arguments.seed)
    print(json.dumps(found))
    if any(count for name, count in found.items() if name not in ("n_trials", "n_kills")):
        sys.exit(1)


if __name__ == "__main__":
    main()
