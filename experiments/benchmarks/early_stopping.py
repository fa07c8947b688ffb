"""What a rung costs, how well it foretells a trial's end, and what stopping there would have lost.

    .venv/bin/python experiments/benchmarks/early_stopping.py                       # minutes
    .venv/bin/python experiments/benchmarks/early_stopping.py --quick               # under a minute
    .venv/bin/python experiments/benchmarks/early_stopping.py search.trial_epochs=6 # any other setting

Measures the first layouts of the demo's search on its probe users in this process, with a rung at each of a
trial's epochs but the last and without any. Then replays RungScheduler's decisions over them, in the order of
their index. Seconds are those of this process on the CPU. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from milp_ray.config import Config
from milp_ray.config_loader import load_config
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.pipeline.probes import probe_users
from milp_ray.search.candidates import initial_points
from milp_ray.search.front import pareto_front
from milp_ray.search.measure import Measurement, TrialTask, trial_parts
from milp_ray.search.rungs import RungRecord, promoted
from milp_ray.search.study import StudySettings, trial_task
from milp_ray.telemetry import prepare_worker
from milp_ray.training.base import Base, load_base
from milp_ray.training.job import planned_epochs
from milp_ray.users.readers import read_users
from milp_ray.users.splits import split_user

DEMO = Path(__file__).resolve().parent.parent / "demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer layouts")
    parser.add_argument("--layouts", type=int, default=16)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of experiments/demo.yaml"
    )
    args = parser.parse_args()
    config = load_config(DEMO, args.overrides)
    prepare_worker(1)
    base = load_base(config.base)
    task = task_of(config)
    space = SearchSpace.for_base(config.space, base.shapes)
    points = initial_points(space, 4 if args.quick else args.layouts, config.seed)
    layouts = [space.layout(point).canonical() for point in points]
    measured(base, layouts[0], task)  # imports and caches
    rows = [compare(base, layout, task) for layout in layouts]
    print(json.dumps(summary(rows, task, config)))


def task_of(config: Config) -> TrialTask:
    """The demo's trial with a rung at every epoch but the last."""
    users = read_users(config.users, config.seed).users
    splits = probe_users([split_user(u, config.users.split) for u in users], config.search.n_probe_users, 0)
    task = trial_task(StudySettings.of(config), splits)
    n_epochs = planned_epochs(task.training, trial_parts(config.search.trial_stages))
    return replace(task, rungs=tuple(range(1, n_epochs)))


def measured(base: Base, layout: CanonicalLayout, task: TrialTask) -> dict[str, Any]:
    """A trial's rungs and final values, with the CPU seconds up to each."""
    started = time.process_time()
    rungs, seconds = [], []
    with Measurement(base, layout, task) as measurement:
        while measurement.has_rungs_left:
            rungs.append(measurement.next_rung())
            seconds.append(time.process_time() - started)
        final = measurement.finish()
    seconds.append(time.process_time() - started)
    return {"rungs": rungs, "seconds": seconds, "final": final}


def compare(base: Base, layout: CanonicalLayout, task: TrialTask) -> dict[str, Any]:
    """One layout with no rung, with the first one, and with all of them."""
    row: dict[str, Any] = {"key": layout.key}
    for name, rungs in (("none", ()), ("one", task.rungs[:1]), ("all", task.rungs)):
        row[name] = measured(base, layout, replace(task, rungs=rungs))
    for objective in KNOWN_OBJECTIVES:
        assert row["none"]["final"][objective] == row["all"]["final"][objective], "a rung changed a value"
    final = row["none"]["final"]
    at_rungs = " ".join(f"{rung['validation_loss_at_rung']:.3f}" for rung in row["all"]["rungs"])
    cpu = " ".join(f"{row[name]['seconds'][-1]:5.2f}" for name in ("none", "one", "all"))
    print(
        f"{layout.key[:28]:28s} {final['adapter_parameters']:8d} parameters; loss {at_rungs} "
        f"→ {final['validation_loss']:.3f}, ROUGE-L {final['rouge_l']:5.1f}; CPU s {cpu}",
        flush=True,
    )
    return row


def summary(rows: list[dict[str, Any]], task: TrialTask, config: Config) -> dict[str, Any]:
    """Costs relative to a trial without rungs, rank correlations, and what each η would have done."""
    final = [row["none"]["final"] for row in rows]
    loss = [values["validation_loss"] for values in final]
    rouge = [-values["rouge_l"] for values in final]
    told: dict[str, Any] = {"n_layouts": len(rows), "n_epochs": len(task.rungs) + 1}
    for name in ("one", "all"):
        ratios = [row[name]["seconds"][-1] / row["none"]["seconds"][-1] for row in rows]
        told[f"cost_with_{name}"] = round(statistics.median(ratios), 3)
    for k, epoch in enumerate(task.rungs):
        at_rung = [row["all"]["rungs"][k]["validation_loss_at_rung"] for row in rows]
        share = [row["all"]["seconds"][k] / row["none"]["seconds"][-1] for row in rows]
        told[f"epoch_{epoch}"] = {
            "spearman_with_loss": round(spearman(at_rung, loss), 3),
            "spearman_with_rouge_l": round(spearman(at_rung, rouge), 3),
            "cost_of_a_stopped_trial": round(statistics.median(share), 3),
            **{f"eta_{eta}": replay(rows, k, eta, config) for eta in (2, 3, 4)},
        }
    return told


def replay(rows: list[dict[str, Any]], k: int, eta: int, config: Config) -> dict[str, Any]:
    """Which of the trials one rung would have stopped, and how much of the final front with them."""
    names = config.search.objectives
    signs = [KNOWN_OBJECTIVES[name].sign for name in names]
    front = set(pareto_front([[row["none"]["final"][name] for name in names] for row in rows], signs))
    records: dict[int, tuple[float, ...]] = {}
    stopped: set[int] = set()
    for trial, row in enumerate(rows):
        records[trial] = RungRecord.from_dict(row["all"]["rungs"][k], trial=trial).objectives(names)
        enough = len(records) >= config.search.early_stopping.min_records
        if enough and not promoted(records, trial, eta):
            stopped.add(trial)
    # A rung at one epoch costs the same whichever epoch it is; a stopped trial ends where it is reached.
    spent = 0.0
    for trial, row in enumerate(rows):
        up_to_rung = row["one"]["seconds"][0] if k == 0 else row["all"]["seconds"][k]
        spent += up_to_rung if trial in stopped else row["one"]["seconds"][-1]
    without = sum(row["none"]["seconds"][-1] for row in rows)
    return {
        "n_stopped": len(stopped),
        "front": len(front),
        "front_stopped": len(front & stopped),
        "cpu_against_no_rung": round(spent / without, 3),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values, which means over many tokens never are, would be ranked by place."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


if __name__ == "__main__":
    main()
