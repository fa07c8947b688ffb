"""New history: an adapter continued with it, against the old version and against training on everything.

    .venv/bin/python experiments/benchmarks/updating.py --quick   # under a minute
    .venv/bin/python experiments/benchmarks/updating.py           # minutes: more users

Users of PersonaWorld at two times (milp_ray.users.persona_world.change): between them three facts change,
two are told for the first time, and three are not mentioned again. Their first history makes the old version.
Then it is continued as `milp-ray update` does, with what is new alone and with replay, and everything is
trained on again from the beginning. Shows the share of right answers to held-out
questions about old, changed and new facts (mean over users, 95 % bootstrap interval), the share of answers
about changed facts that tell the value of before, the seconds of training a user, and how often the guard
would keep the old version. All with the layout that the demo chose and its recipe, in packs. Seconds are
those of the processor, which other work on the machine does not lengthen as it does those of the clock.

Prints a table, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from milp_ray.config.training import TrainingSection
from milp_ray.config.update import UpdateSection
from milp_ray.config_loader import load_config
from milp_ray.evaluation.bootstrap import interval
from milp_ray.evaluation.metrics import fact_accuracy
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.provenance import Provenance
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.update.guard import Guarded, Verdict, verdicts
from milp_ray.personalize.update.plan import training_data, update_training
from milp_ray.training.adapters import Adapter
from milp_ray.training.base import Base, load_base
from milp_ray.training.generation import Questions, generate
from milp_ray.training.job import Job
from milp_ray.training.text import query_prompt
from milp_ray.training.train import train
from milp_ray.users.persona_world.change import CHANGED, NEW, OLD, ChangingUser, changing_users
from milp_ray.users.records import UserSplit

DEMO = Path(__file__).resolve().parents[1] / "demo.yaml"
LAYOUT = CanonicalLayout((True, False, False, False, False, False, True, True), 64)
STATES = (OLD, CHANGED, NEW)


@dataclass
class Way:
    """One way to have adapters for what users have said by now."""

    name: str
    adapters: list[Adapter]
    seconds: float  # of training, a user
    guard: list[Verdict] | None = None


class Bench:
    """The users, the base and the recipe."""

    def __init__(self, users: Sequence[ChangingUser]) -> None:
        config = load_config(DEMO)
        self.users = users
        self.config = config
        self.base: Base = load_base(config.base)
        self.recipe = Recipe(LAYOUT, config.base, config.training, config.prompt, config.seed)

    def train(
        self,
        name: str,
        splits: Sequence[UserSplit],
        starts: Sequence[Adapter] | None,
        section: TrainingSection,
    ) -> Way:
        """Adapters of all users, in packs."""
        jobs = []
        for i, split in enumerate(splits):
            start = None if starts is None else starts[i]
            parts = self.recipe.parts(split)
            seed = self.recipe.seed_of(split.user_id) + (start is not None)
            jobs.append(Job(str(i), split, LAYOUT, parts, seed, start=start))
        began = time.process_time()
        results = train(self.base, jobs, section, self.recipe.prompt)
        seconds = (time.process_time() - began) / len(jobs)
        return Way(name, [result.adapter for result in results if result.adapter is not None], seconds)

    def update(self, name: str, old: Way, section: UpdateSection) -> Way:
        """The old adapters continued, and what the guard says of each."""
        news = [Provenance.of("", user.before).news(user.after) for user in self.users]
        splits = [
            training_data(user.after, own, section, self.recipe.seed_of(user.after.user_id) + 1)
            for user, own in zip(self.users, news, strict=True)
        ]
        way = self.train(name, splits, old.adapters, update_training(self.recipe.training, section))
        guarded = [
            Guarded(own.guard, before, after)
            for own, before, after in zip(news, old.adapters, way.adapters, strict=True)
        ]
        way.guard = verdicts(self.base, guarded, self.recipe.prompt, section.guard.tolerance)
        return way

    def score(self, way: Way) -> dict[str, Any]:
        """What a table row says."""
        asked = [
            Questions([query_prompt(e.query, self.recipe.prompt) for e in user.after.test], adapter)
            for user, adapter in zip(self.users, way.adapters, strict=True)
        ]
        section = self.config.evaluation
        answers = generate(
            self.base, asked, max_new_tokens=section.max_new_tokens, batch_size=section.batch_size
        )
        row: dict[str, Any] = {"way": way.name, "seconds_a_user": round(way.seconds, 3), "by_user": {}}
        for state in STATES:
            values = [
                fmean(
                    fact_accuracy(answer, example.answer) or 0.0
                    for answer, example in zip(own, user.after.test, strict=True)
                    if example.tags["state"] == state
                )
                for own, user in zip(answers, self.users, strict=True)
            ]
            row["by_user"][state] = [round(value, 4) for value in values]
            found = interval(values)
            row[state] = None if found is None else found.to_dict()
        stale = [
            fact_accuracy(answer, example.tags["earlier"]) or 0.0
            for own, user in zip(answers, self.users, strict=True)
            for answer, example in zip(own, user.after.test, strict=True)
            if example.tags["state"] == CHANGED
        ]
        row["earlier_value"] = fmean(stale)
        if way.guard is not None:
            changes = [v.after / v.before - 1.0 for v in way.guard if v.before and v.after is not None]
            row["guard_loss_change_median"] = median(changes)
            row["guard_loss_fell_share"] = fmean(change <= 0.0 for change in changes)
            row["kept_by_guard"] = fmean(not verdict.holds for verdict in way.guard)
        return row


def table_of(rows: Sequence[dict[str, Any]], n_users: int) -> Table:
    """The rows as they are printed."""
    table = Table(title=f"Right answers (%) of {n_users} users", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", *(f"{state} facts" for state in STATES), "earlier value", "s a user", "guard keeps old"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        shares = [
            f"{100 * found['mean']:.0f} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
            for found in (row[state] for state in STATES)
        ]
        kept = f"{row['kept_by_guard']:.0%}" if "kept_by_guard" in row else ""
        table.add_row(
            row["way"], *shares, f"{100 * row['earlier_value']:.0f}", f"{row['seconds_a_user']:.2f}", kept
        )
    return table


def main() -> None:
    """Train in all ways, and print what they know and cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer users, under a minute")
    parser.add_argument("--users", type=int, help="how many users, at least 2 [40; quick: 4]")
    parser.add_argument("--seed", type=int, default=0, help="of the users")
    arguments = parser.parse_args()
    bench = Bench(changing_users(arguments.users or (4 if arguments.quick else 40), arguments.seed))
    training = bench.recipe.training
    old = bench.train("old version", [user.before for user in bench.users], None, training)
    everything = [user.after for user in bench.users]
    ways = [
        old,
        bench.update("updated, new data alone", old, UpdateSection(data="new")),
        bench.update("updated, with replay", old, UpdateSection(data="replay")),
        bench.train("everything again", everything, None, training),
    ]
    rows = [bench.score(way) for way in ways]
    Console(width=120, highlight=False).print(table_of(rows, len(bench.users)))
    print(json.dumps({"n_users": len(bench.users), "seed": arguments.seed, "ways": rows}))


if __name__ == "__main__":
    main()
