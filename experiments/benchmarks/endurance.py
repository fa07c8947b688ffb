"""A long search in real Ray Tune whose trials take no time: what the search itself costs and holds.

    .venv/bin/python experiments/benchmarks/endurance.py --quick   # under a minute
    .venv/bin/python experiments/benchmarks/endurance.py           # minutes: 500 trials, and a fit of 20 s

Two studies, one after the other, with everything real but the training:

- *long*: many trials, MAP fits. Growth of this process's memory after the first fifth of the trials, seconds
  to replay the journal, layouts that were tried twice.
- *slow fits*: few trials of half a second, NUTS fits that take far longer. The longest time that Tune's
  controller was blocked by the searcher, and the share of slot-time that stood idle for want of a suggestion.

Prints a table, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from headline import with_headline
from ray import tune

from milp_ray.config.base import BaseSection
from milp_ray.config.cluster import RaySection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.search import SearchSection, SpaceSection, SurrogateSection
from milp_ray.config.training import TrainingSection
from milp_ray.memory.architecture import FfnShapes
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.conductor import StudyProgress
from milp_ray.search.journal import read_events, read_study
from milp_ray.search.study import JOURNAL_FILE, StudySettings, run_study
from milp_ray.search.timeline import idle_share
from milp_ray.telemetry import ray_session
from milp_ray.users.records import Example, UserSplit

SHAPES = FfnShapes(n_layers=16, modules=(("up_proj", 128, 512), ("down_proj", 512, 128)))
SPLIT = UserSplit("u", None, (), (), (Example("a", "b"),), ())


class InstantTrial(tune.Trainable):
    """A made-up loss and ROUGE-L of the layout, and its size: three layers matter, a high rank a little."""

    seconds = 0.0

    def setup(self, config: dict[str, Any], task: object = None) -> None:
        """Nothing is loaded."""

    def step(self) -> dict[str, Any]:
        """The values, at once."""
        time.sleep(self.seconds)
        layout = CanonicalLayout.from_dict(self.config["layout"])
        rank = layout.rank or 1
        good = sum(weight for layer, weight in ((2, 0.5), (7, 0.3), (13, 0.2)) if layer in layout.layers)
        loss = 3.0 - good - 0.05 * math.log2(rank) + 0.01 * len(layout.layers)
        size = len(layout.layers) * rank * 1000
        values = {"validation_loss": loss, "rouge_l": 40 * good - 0.3 * len(layout.layers)}
        return {**values, "adapter_parameters": size, "seconds": self.seconds, tune.result.DONE: True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        return True


class ShortTrial(InstantTrial):
    """The same, in half a second."""

    seconds = 0.5


def settings(search: SearchSection) -> StudySettings:
    """A study's settings; what concerns training is not used."""
    return StudySettings(
        base=BaseSection(),
        space=SpaceSection(),
        training=TrainingSection(),
        prompt=PromptSection(),
        search=search,
        evaluation=EvaluationSection(),
        seed=0,
    )


def long_search(n_trials: int) -> SearchSection:
    """A search of many trials: a fifth of them initial ones, then MAP fits for two dozen batches."""
    return SearchSection(
        n_trials=n_trials,
        n_initial=n_trials // 5,
        batch_size=max(4, n_trials // 25),
        objectives=("validation_loss", "rouge_l", "adapter_parameters"),
        surrogate=SurrogateSection(inference="map"),
    )


def long_study(folder: Path, n_trials: int) -> dict[str, float]:
    """Many instant trials."""
    memory = DriverMemory()
    started = time.perf_counter()
    run_study(folder, settings(long_search(n_trials)), [SPLIT], SHAPES, memory.watch, InstantTrial)
    return {"seconds": time.perf_counter() - started, **what_it_holds(folder, memory)}


class DriverMemory:
    """Resident memory of this process when each trial ended, MiB."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.mib: list[float] = []

    def watch(self, progress: StudyProgress) -> None:
        """To be called with a study's progress."""
        if progress.n_ended > len(self.mib):
            self.mib.append(self._process.memory_info().rss / 2**20)


def what_it_holds(folder: Path, memory: DriverMemory) -> dict[str, float]:
    """Of a study that has ended: trials, repeats, replay, memory, and the controller's longest wait."""
    started = time.perf_counter()
    state = read_study(folder / JOURNAL_FILE)
    replay = time.perf_counter() - started
    return {
        "n_trials": len(state.completed),
        "duplicates": len(state.trials) - len(state.keys),
        "replay_seconds": replay,
        "memory_mib": memory.mib[-1],
        "memory_growth": memory.mib[-1] / memory.mib[len(state.trials) // 5 - 1] - 1.0,
        "controller_max_block_seconds": longest_block(folder),
    }


def slow_fits(folder: Path, n_batches: int, warmup_steps: int, num_samples: int) -> dict[str, float]:
    """Trials of half a second beside NUTS fits."""
    n_initial = 20
    search = SearchSection(
        n_trials=n_initial + 4 * n_batches,
        n_initial=n_initial,
        batch_size=4,
        surrogate=SurrogateSection(inference="nuts", warmup_steps=warmup_steps, num_samples=num_samples),
    )
    run_study(folder, settings(search), [SPLIT], SHAPES, None, ShortTrial)
    events = read_events(folder / JOURNAL_FILE)
    fits = [float(event["seconds"]) for event in events if event["event"] == "batch_proposed"]
    idle = idle_share(events)
    return {
        "longest_fit_seconds": max(fits),
        "controller_max_block_seconds": longest_block(folder),
        "idle_share": math.nan if idle is None else idle,
    }


def longest_block(folder: Path) -> float:
    """Seconds that Tune's controller waited for the searcher at the most."""
    events = read_events(folder / JOURNAL_FILE)
    return max(float(e["max_block_seconds"]) for e in events if e["event"] == "session_ended")


def main() -> None:
    """Run both studies and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer trials and shorter fits, under a minute")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as scratch, ray_session(RaySection(num_cpus=2, num_gpus=0)):
        found = long_study(Path(scratch) / "long", 30 if quick else 500)
        slow = slow_fits(Path(scratch) / "slow", 1 if quick else 3, *((16, 8) if quick else (16384, 4096)))
    print(f"long study   {found['n_trials']} trials in {found['seconds']:.0f} s, {found['duplicates']} twice")
    print(f"  journal    replayed in {found['replay_seconds']:.3f} s")
    print(f"  memory     {found['memory_mib']:.0f} MiB, {found['memory_growth']:+.1%} after the first fifth")
    print(f"  controller blocked for {found['controller_max_block_seconds']:.3f} s at most")
    print(f"slow fits    {slow['longest_fit_seconds']:.1f} s the longest")
    print(f"  controller blocked for {slow['controller_max_block_seconds']:.3f} s at most")
    print(f"  idle       {slow['idle_share']:.0%} of slot-time for want of a suggestion")
    block = max(found.pop("controller_max_block_seconds"), slow.pop("controller_max_block_seconds"))
    figures = {**found, **slow, "controller_max_block_seconds": block}
    print(json.dumps(with_headline("endurance", figures, keep=not quick)))


if __name__ == "__main__":
    main()
