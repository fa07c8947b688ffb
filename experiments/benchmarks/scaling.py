"""Studies of several workers and of many trials, in real Ray Tune: trials sleep as long as they would train.

    .venv/bin/python experiments/benchmarks/scaling.py --quick   # under a minute
    .venv/bin/python experiments/benchmarks/scaling.py           # half an hour and more

Sleeping takes no core, so that a machine of two holds any number of workers; all else is a real search.

- *workers*: the same study with 1, 2 and 4 workers; its proposals are the repeatable ones, so that it is the
  same trials. Efficiency is the time with one worker over w times that with w: of the study, from the first
  trial's start to the last one's end, and of the whole, with Ray's start and end. The overhead of a trial is
  the time from the end of one to the start of the next one in the same process.
- *large*: 64 workers, 2,000 trials of a base of 32 layers, half of them the surrogate's. How long Tune's
  controller was held up by the searcher and in one of its own steps (its waits for trials left out), the
  driver's memory, what the journal costs, and how long a suggestion takes at the end.

Prints a table, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
from endurance import SHAPES, SPLIT, DriverMemory, InstantTrial, settings, what_it_holds
from ray.tune.execution.tune_controller import TuneController

from milp_ray.config.cluster import RaySection
from milp_ray.config.search import SearchSection, SurrogateSection
from milp_ray.memory.architecture import FfnShapes
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.resident_memory import peak_memory
from milp_ray.search.journal import read_events
from milp_ray.search.study import JOURNAL_FILE, run_study
from milp_ray.search.timeline import idle_share
from milp_ray.telemetry import ray_session

LLAMA = FfnShapes(  # 7B
    n_layers=32,
    modules=(("gate_proj", 4096, 11008), ("up_proj", 4096, 11008), ("down_proj", 11008, 4096)),
)
# Environment variables that reach the trials' processes: where they write when they worked, and how fast a
# trial is.
LOG_FOLDER, LONGEST = "SCALING_LOG_FOLDER", "SCALING_LONGEST_SECONDS"


class SleepingTrial(InstantTrial):
    """Takes the time of a forward pass through all layers, and of a backward pass down to the lowest LoRA."""

    def step(self) -> dict[str, Any]:
        """The values, after a while; when it was is written beside them."""
        began = time.time()
        layout = CanonicalLayout.from_dict(self.config["layout"])
        lowest = min(layout.layers, default=layout.n_layers)
        # The forward pass is half of the longest trial.
        self.seconds = float(os.environ[LONGEST]) * (1.0 - 0.5 * lowest / layout.n_layers)
        values = super().step()
        with Path(os.environ[LOG_FOLDER], str(os.getpid())).open("a", encoding="utf-8") as file:
            file.write(f"{began} {time.time()}\n")
        return values


@dataclass(frozen=True)
class Work:
    """When the trials of a study ran: (start, end) one after another, for each of their processes."""

    processes: Sequence[Sequence[tuple[float, float]]]

    @classmethod
    def read(cls, folder: Path) -> Work:
        """What the trials' processes wrote."""
        lines = [path.read_text(encoding="utf-8").split("\n")[:-1] for path in sorted(folder.iterdir())]
        times = [[tuple(float(t) for t in line.split()) for line in own] for own in lines]
        return cls([sorted((start, end) for start, end in own) for own in times])

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        spans = [span for own in self.processes for span in own]
        return max(end for _, end in spans) - min(start for start, _ in spans)

    @property
    def trial_seconds(self) -> float:
        """Of all trials together."""
        return sum(end - start for own in self.processes for start, end in own)

    @property
    def gaps(self) -> list[float]:
        """From the end of each trial to the start of the next one in its process."""
        return [start - end for own in self.processes for (_, end), (start, _) in pairwise(own)]

    @property
    def most_at_once(self) -> int:
        """Trials at the same time."""
        changes = sorted(c for own in self.processes for start, end in own for c in ((start, 1), (end, -1)))
        return int(np.cumsum([change for _, change in changes]).max())


def study_of_workers(scratch: Path, n_workers: int, n_trials: int, longest: float) -> dict[str, float]:
    """The same study with some number of workers."""
    search = SearchSection(
        n_trials=n_trials,
        n_initial=n_trials // 3,
        batch_size=4,
        proposals="repeatable",
        lookahead=12,
        surrogate=SurrogateSection(inference="map"),
    )
    started = time.perf_counter()
    with trials_log(scratch / f"log-{n_workers}", longest) as log, sessions_of(n_workers) as opened:
        began, cpu = time.perf_counter(), time.process_time()
        run_study(scratch / f"workers-{n_workers}", settings(search), [SPLIT], SHAPES, None, SleepingTrial)
        cpu = time.process_time() - cpu
        seconds = time.perf_counter() - began
        work = Work.read(log)
    return {
        "n_workers": n_workers,
        "seconds": work.seconds,
        "whole_seconds": time.perf_counter() - started,
        "ray_start_seconds": opened,
        "study_start_and_end_seconds": seconds - work.seconds,
        "trial_seconds": work.trial_seconds,
        "most_at_once": work.most_at_once,
        "overhead_ms_mean": 1000 * float(np.mean(work.gaps)),
        "overhead_ms_p95": 1000 * float(np.percentile(work.gaps, 95)),
        "driver_cpu_ms": 1000 * cpu / n_trials,
    }


def scaling(runs: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The runs with their efficiencies, against the first one, which has one worker."""
    return [
        {
            **run,
            "efficiency": runs[0]["seconds"] / (run["n_workers"] * run["seconds"]),
            "whole_efficiency": runs[0]["whole_seconds"] / (run["n_workers"] * run["whole_seconds"]),
        }
        for run in runs
    ]


def large_study(scratch: Path, n_workers: int, n_trials: int, longest: float) -> dict[str, float]:
    """Many workers, and trials as short as the machine's own speed allows."""
    n_cpus = min(n_workers, os.cpu_count() or 1)
    search = SearchSection(
        n_trials=n_trials,
        n_initial=n_trials // 2,
        batch_size=n_workers,
        cpus_per_trial=n_cpus / n_workers,
        surrogate=SurrogateSection(inference="map"),
    )
    memory, folder = DriverMemory(), scratch / "large"
    with trials_log(scratch / "log-large", longest) as log, sessions_of(n_cpus), controller_steps() as steps:
        started, cpu = time.perf_counter(), time.process_time()
        # Reading the memory of all processes takes this one 0.2 s and more: rarely.
        with peak_memory(interval=0.12 * n_trials) as peak:
            run_study(folder, settings(search), [SPLIT], LLAMA, memory.watch, SleepingTrial)
        cpu = time.process_time() - cpu
        seconds = time.perf_counter() - started
        work = Work.read(log)
    events = read_events(folder / JOURNAL_FILE)
    idle = idle_share(events)
    held = what_it_holds(folder, memory)
    return {
        **held,
        "n_workers": n_workers,
        "most_at_once": work.most_at_once,
        "seconds": seconds,
        "trial_seconds_mean": work.trial_seconds / held["n_trials"],
        "idle_share": float("nan") if idle is None else idle,
        "suggestion_seconds_at_the_end": suggestion_seconds(events),
        # The first step asks for all processes.
        "controller_first_step_seconds": steps[0][0],
        "controller_max_step_seconds": max(seconds for seconds, _ in steps[1:]),
        "controller_max_step_cpu_seconds": max(cpu for _, cpu in steps[1:]),
        "driver_cpu_ms": 1000 * cpu / held["n_trials"],
        "peak_mib_of_all_processes": peak.mib,
    }


def suggestion_seconds(events: Sequence[dict[str, Any]]) -> float:
    """Seconds a suggestion took in the last three whole batches."""
    suggested = [event["batch"] for event in events if event["event"] == "trial_suggested" and event["batch"]]
    sizes = {batch: len(list(group)) for batch, group in groupby(suggested)}
    seconds = {e["batch"]: float(e["seconds"]) for e in events if e["event"] == "batch_proposed"}
    whole = [batch for batch in seconds if sizes[batch] == max(sizes.values())][-3:]
    return sum(seconds[batch] for batch in whole) / sum(sizes[batch] for batch in whole)


@contextmanager
def trials_log(folder: Path, longest: float) -> Iterator[Path]:
    """Tell trials where to write when they ran, and how long the longest of them takes, seconds."""
    folder.mkdir()
    os.environ |= {LOG_FOLDER: str(folder), LONGEST: str(longest)}
    yield folder


@contextmanager
def sessions_of(n_cpus: int) -> Iterator[float]:
    """Ray with so many CPUs; the seconds that its start took."""
    with ray_session(RaySection(num_cpus=n_cpus, num_gpus=0)) as session:
        yield session.seconds


@contextmanager
def controller_steps() -> Iterator[list[tuple[float, float]]]:
    """Seconds, and seconds of its core, of each step of Tune's controller, without its waits.

    It waits for events, and sleeps where no trial runs and none is suggested.
    """
    steps: list[tuple[float, float]] = []
    waited = 0.0
    step, wait, sleep, thread = TuneController.step, ray.wait, time.sleep, threading.get_ident()

    def timed_step(self: TuneController) -> None:
        nonlocal waited
        waited, started, cpu = 0.0, time.perf_counter(), time.thread_time()
        step(self)
        steps.append((time.perf_counter() - started - waited, time.thread_time() - cpu))

    def timed(waiting: Callable[..., Any]) -> Callable[..., Any]:
        def timed_waiting(*args: Any, **kwargs: Any) -> Any:
            nonlocal waited
            started = time.perf_counter()
            try:
                return waiting(*args, **kwargs)
            finally:
                if threading.get_ident() == thread:
                    waited += time.perf_counter() - started

        return timed_waiting

    TuneController.step, ray.wait, time.sleep = timed_step, timed(wait), timed(sleep)
    try:
        yield steps
    finally:
        TuneController.step, ray.wait, time.sleep = step, wait, sleep


def show_workers(runs: Sequence[dict[str, float]]) -> None:
    """A line a number of workers."""
    print("         study: seconds  efficiency  whole: seconds  efficiency  overhead: mean  95 %  CPU, ms")
    for run in runs:
        print(
            f"{run['n_workers']:.0f} workers {run['seconds']:12.1f}  {run['efficiency']:10.3f}"
            f"  {run['whole_seconds']:14.1f}  {run['whole_efficiency']:10.3f}"
            f"  {run['overhead_ms_mean']:14.0f}  {run['overhead_ms_p95']:4.0f}  {run['driver_cpu_ms']:7.0f}"
        )
    starts = ", ".join(f"{run['ray_start_seconds']:.1f}" for run in runs)
    around = ", ".join(f"{run['study_start_and_end_seconds']:.1f}" for run in runs)
    print(f"Ray started in {starts} s; before the first trial and after the last one {around} s")


def show_large(found: dict[str, float]) -> None:
    """What the large study cost."""
    busy = found["n_workers"] * found["suggestion_seconds_at_the_end"]
    print(
        f"large study  {found['n_trials']} trials of {found['trial_seconds_mean']:.1f} s in "
        f"{found['seconds']:.0f} s, {found['most_at_once']} at once, {found['duplicates']} layouts twice\n"
        f"  controller blocked for {found['controller_max_block_seconds']:.3f} s at most by the searcher\n"
        f"             {found['controller_max_step_seconds']:.3f} s for its longest step, of which at most "
        f"{found['controller_max_step_cpu_seconds']:.3f} s of work;\n"
        f"             {found['controller_first_step_seconds']:.2f} s for the first: all processes start\n"
        f"  driver     {found['driver_cpu_ms']:.0f} ms of CPU a trial; {found['memory_mib']:.0f} MiB, "
        f"{found['memory_growth']:+.1%} after the first fifth\n"
        f"  memory     {found['peak_mib_of_all_processes']:.0f} MiB of all processes\n"
        f"  journal    replayed in {found['replay_seconds']:.3f} s\n"
        f"  suggestion {found['suggestion_seconds_at_the_end']:.2f} s each at the end: "
        f"trials of {busy:.0f} s keep {found['n_workers']} workers busy\n"
        f"  idle       {found['idle_share']:.0%} of slot-time for want of a suggestion"
    )


def main() -> None:
    """Run the studies and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer workers and shorter trials")
    parser.add_argument("--only", choices=("workers", "large"), help="one of the parts")
    arguments = parser.parse_args()
    quick = arguments.quick
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.only != "large":
            counts, n_trials, longest = ((1, 2), 12, 0.6) if quick else ((1, 2, 4), 96, 6.0)
            runs = [study_of_workers(Path(scratch), n, n_trials, longest) for n in counts]
            figures["workers"] = scaling(runs)
            show_workers(figures["workers"])
        if arguments.only != "workers":
            n_workers, n_trials, longest = (8, 60, 0.6) if quick else (64, 2000, 12.0)
            figures["large"] = large_study(Path(scratch), n_workers, n_trials, longest)
            show_large(figures["large"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
