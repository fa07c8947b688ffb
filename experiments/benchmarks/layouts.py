"""Per-user layouts: one for all, a race, or a portfolio. Quality on held-out queries against cost.

    .venv/bin/python experiments/benchmarks/layouts.py --quick   # under a minute
    .venv/bin/python experiments/benchmarks/layouts.py           # five minutes: more users

The layouts are those of the demo's front, measured as in its search (memory stage alone, half of the epochs)
on probe users of PersonaWorld, who are none of the users that follow. Those get adapters by the demo's
recipe: all under the layout that the demo chose; all under the front's best by validation loss; by a race of
four, for each user on the user's own validation examples; by a portfolio; and the last two also with layouts
that are larger than the chosen one among them. Each way answers the users' held-out queries. Shown are the
differences to the chosen layout for all (paired by user, 95 % bootstrap intervals over users), and what was
paid for them: optimizer steps, seconds of the processor (one thread), and the parameters that the store then
holds.

Prints a table, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from milp_ray.config.personalize import PersonalizeSection
from milp_ray.config_loader import load_config
from milp_ray.evaluation.bootstrap import difference_interval, interval
from milp_ray.evaluation.metrics import fact_accuracy, rouge_l
from milp_ray.memory.architecture import adapter_parameters
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.objectives import ADAPTER_PARAMETERS, VALIDATION_LOSS
from milp_ray.personalize.layouts.evidence import rule_of
from milp_ray.personalize.layouts.race import CHOICE, Entrant, train_decided
from milp_ray.personalize.layouts.rule import FOR_ALL, Candidate, Decision
from milp_ray.personalize.recipe import Recipe
from milp_ray.search.choice import FrontPoint
from milp_ray.search.journal import StudyState, TrialRecord
from milp_ray.training.adapters import Adapter
from milp_ray.training.base import load_base
from milp_ray.training.generation import Questions, generate
from milp_ray.training.job import Job
from milp_ray.training.response_loss import Wanted, response_losses
from milp_ray.training.text import query_prompt
from milp_ray.training.train import train
from milp_ray.users.persona_world import generate_users
from milp_ray.users.records import UserSplit
from milp_ray.users.splits import split_user
from milp_ray.users.traits import TRAITS, user_traits

DEMO = Path(__file__).resolve().parents[1] / "demo.yaml"
CHOSEN = "10000011-r64"
FRONT = (
    *("11111111-r96", "10001011-r96", CHOSEN, "10001001-r32", "10110111-r16", "10001001-r8", "10100001-r8"),
    *("10010001-r8", "10000000-r8"),
)
QUICK_FRONT = (FRONT[1], CHOSEN, FRONT[3], FRONT[5])
MEASURES = {"loss": "Loss (nats) ↓", "rouge_l": "ROUGE-L ↑", "facts": "Fact accuracy (%) ↑"}
PROBE_SEED, USER_SEED = 1, 2  # of PersonaWorld; the demo's is 0


@dataclass
class Way:
    """One way to give users layouts: what they got, and what it cost."""

    name: str
    adapters: dict[str, Adapter] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    scores: dict[str, list[float]] = field(default_factory=dict)


class Bench:
    """The base, the recipe, the users, and the study that layouts are decided by."""

    def __init__(self, front: Sequence[str], probes: Sequence[UserSplit], users: Sequence[UserSplit]) -> None:
        self.config = load_config(DEMO)
        self.base = load_base(self.config.base)
        self.users = users
        layouts = {key: _layout(key) for key in front}
        self.candidates = {
            key: Candidate(layout, adapter_parameters(layout, self.base.shapes))
            for key, layout in layouts.items()
        }
        # Adapter, steps and seconds by user and layout: nobody is trained twice under one without a race.
        self._trained: dict[tuple[str, str], tuple[Adapter, int, float]] = {}
        config = self.config
        self.recipe = Recipe(layouts[CHOSEN], config.base, config.training, config.prompt, config.seed)
        self.front, self.state = self._study(probes)

    def _study(self, probes: Sequence[UserSplit]) -> tuple[list[FrontPoint], StudyState]:
        """What a search has measured of the front's layouts on the probe users."""
        epochs = self.config.search.trial_epochs
        section = self.config.training.model_copy(
            update={"memory_epochs": epochs, "instruction_epochs": epochs}
        )
        points, state = [], StudyState()
        traits = zip(*(user_traits(split) for split in probes), strict=True)
        state.probe_traits = {name: list(own) for name, own in zip(TRAITS, traits, strict=True)}
        for index, (key, candidate) in enumerate(self.candidates.items()):
            jobs = [
                Job(f"{place}", split, candidate.layout, frozenset({"memory"}), seed=place)
                for place, split in enumerate(probes)
            ]
            results = train(self.base, jobs, section, self.config.prompt)
            losses = [result.validation_loss or 0.0 for result in results]
            values = {
                VALIDATION_LOSS.name: fmean(losses),
                ADAPTER_PARAMETERS.name: float(candidate.parameters),
            }
            metrics = {**values, "per_user": {VALIDATION_LOSS.name: losses}}
            trial = TrialRecord(index, 0, {}, candidate.layout, "sobol", "completed", metrics)
            state.trials.append(trial)
            points.append(FrontPoint(index, candidate.layout, values))
            print(
                f"measured {key}: {values[VALIDATION_LOSS.name]:.4f} on {len(probes)} probe users", flush=True
            )
        return points, state

    def for_all(self, name: str, key: str) -> Way:
        """One layout for everybody."""
        own = self.candidates[key]
        decision = Decision((own,), own, "chosen", FOR_ALL)
        return self._train(name, [decision] * len(self.users))

    def decided(self, name: str, **section: Any) -> Way:
        """As ``personalize.layout`` and its options say."""
        rule = rule_of(self.state, self.front, self.candidates[CHOSEN], PersonalizeSection(**section))
        if rule.refusal:
            print(f"{name}: everybody gets the chosen layout, as {rule.refusal}")
        return self._train(name, [rule.decide(split) for split in self.users])

    def _train(self, name: str, decisions: Sequence[Decision]) -> Way:
        way = Way(name)
        both = dict(zip((split.user_id for split in self.users), decisions, strict=True))
        alone = {user: own.layouts[0].key for user, own in both.items() if not own.is_race}
        missing = [
            split for split in self.users if (split.user_id, alone.get(split.user_id)) not in self._trained
        ]
        found, seconds = self._run([(split, both[split.user_id]) for split in missing])
        for user, (adapter, steps) in found.items():
            if user in alone:
                self._trained[user, alone[user]] = adapter, steps, seconds / len(found)
            else:
                way.adapters[user] = adapter
                way.steps += steps
                way.seconds += seconds / len(found)
        for pair in alone.items():
            adapter, steps, spent = self._trained[pair]
            way.adapters[pair[0]] = adapter
            way.steps += steps
            way.seconds += spent
        print(f"{name}: {way.seconds:.0f} s", flush=True)
        return way

    def _run(
        self, wanted: Sequence[tuple[UserSplit, Decision]]
    ) -> tuple[dict[str, tuple[Adapter, int]], float]:
        """Adapter and steps by user, and the seconds of the processor that all of them took."""
        recipe, found = self.recipe, {}

        def ended(key: str, result: Any, facts: Any) -> None:
            found[key] = result.adapter, facts.get(CHOICE, {}).get("steps", result.steps)

        def failed(key: str, error: Exception) -> None:
            raise error

        entrants = [
            Entrant(split.user_id, split, recipe.parts(split), recipe.seed_of(split.user_id), decision)
            for split, decision in wanted
        ]
        began = time.process_time()
        train_decided(self.base, entrants, recipe.training, recipe.prompt, on_result=ended, on_failure=failed)
        return found, time.process_time() - began

    def score(self, way: Way) -> None:
        """Held-out loss, ROUGE-L and fact accuracy of every user."""
        section, prompt = self.config.evaluation, self.recipe.prompt
        adapters = [way.adapters[split.user_id] for split in self.users]
        wanted = [
            Wanted(split.test, None, adapter) for split, adapter in zip(self.users, adapters, strict=True)
        ]
        losses = response_losses(self.base, wanted, prompt)
        asked = [
            Questions([query_prompt(example.query, prompt) for example in split.test], adapter)
            for split, adapter in zip(self.users, adapters, strict=True)
        ]
        answers = generate(
            self.base, asked, max_new_tokens=section.max_new_tokens, batch_size=section.batch_size
        )
        way.scores = {name: [] for name in MEASURES}
        for split, own, told in zip(self.users, losses, answers, strict=True):
            pairs = list(zip(told, split.test, strict=True))
            facts = [fact_accuracy(answer, example.answer) for answer, example in pairs]
            way.scores["loss"].append(fmean(nll / n for nll, n in own))
            way.scores["rouge_l"].append(fmean(rouge_l(answer, e.response) for answer, e in pairs))
            way.scores["facts"].append(100 * fmean(fact for fact in facts if fact is not None))

    def row(self, way: Way, beside: Way) -> dict[str, Any]:
        """What is shown of a way."""
        taken = Counter(adapter.layout.key for adapter in way.adapters.values())
        held, before = (
            sum(self.candidates[adapter.layout.key].parameters for adapter in one.adapters.values())
            for one in (way, beside)
        )
        row: dict[str, Any] = {
            "way": way.name,
            "taken": dict(taken.most_common()),
            "n_other": len(self.users) - taken[CHOSEN],
            "steps_ratio": way.steps / beside.steps,
            "seconds_a_user": way.seconds / len(self.users),
            "seconds_ratio": way.seconds / beside.seconds,
            "parameters_ratio": held / before,
        }
        for name in MEASURES:
            mean = interval(way.scores[name])
            difference = difference_interval(way.scores[name], beside.scores[name])
            row[name] = mean.to_dict() if mean else None
            row[f"{name}_difference"] = difference.to_dict() if difference else None
        return row


def _layout(key: str) -> CanonicalLayout:
    mask, rank = key.split("-r")
    return CanonicalLayout(tuple(bit == "1" for bit in mask), int(rank))


def _splits(n_short: int, n_long: int, seed: int) -> list[UserSplit]:
    section = load_config(DEMO).users
    n_examples = section.persona_world.n_examples
    return [split_user(user, section.split) for user in generate_users(n_short, n_long, n_examples, seed)]


def table_of(rows: Sequence[dict[str, Any]], n_users: int) -> Table:
    """The rows as they are printed."""
    table = Table(
        title=f"Held-out queries of {n_users} users: the chosen layout for all, and differences to it",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    names = ("Layout of a user", "Other", *MEASURES.values(), "Steps", "Time", "Size")
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right", no_wrap=True)
    for place, row in enumerate(rows):
        cells = []
        for name in MEASURES:
            found, digits = row[name if place == 0 else f"{name}_difference"], 3 if name == "loss" else 1
            shape = f"{{:{'' if place == 0 else '+'}.{digits}f}}"
            mean, low, high = (shape.format(found[part]) for part in ("mean", "low", "high"))
            cells.append(f"{mean} [{low}, {high}]".replace("-", "−"))
        costs = [f"{row[name]:.2f} ×" for name in ("steps_ratio", "seconds_ratio", "parameters_ratio")]
        table.add_row(row["way"], f"{row['n_other']}", *cells, *costs)
    return table


def main() -> None:
    """Give users layouts in all ways, and print what they are worth and cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer users and layouts, under a minute")
    parser.add_argument("--users", type=int, help="how many users, a quarter of them long [20; quick: 3]")
    parser.add_argument("--probes", type=int, help="how many probe users, at least 3 [8; quick: 4]")
    arguments = parser.parse_args()
    n_users = arguments.users or (3 if arguments.quick else 20)
    n_probes = arguments.probes or (4 if arguments.quick else 8)
    probes = _splits(n_probes - n_probes // 4, n_probes // 4, PROBE_SEED)
    users = _splits(n_users - n_users // 4, n_users // 4, USER_SEED)
    torch.set_num_threads(1)
    bench = Bench(QUICK_FRONT if arguments.quick else FRONT, probes, users)
    best = min(bench.front, key=lambda point: point.values[VALIDATION_LOSS.name]).layout.key
    ways = [
        bench.for_all("chosen, for all", CHOSEN),
        bench.for_all("best loss, for all", best),
        bench.decided("race", layout="race"),
        bench.decided("portfolio", layout="portfolio"),
    ]
    if not arguments.quick:
        ways += [
            bench.decided("race, any size", layout="race", max_growth=None),
            bench.decided("portfolio, any size", layout="portfolio", max_growth=None),
        ]
    for way in ways:
        bench.score(way)
    rows = [bench.row(way, ways[0]) for way in ways]
    Console(width=140, highlight=False).print(table_of(rows, n_users))
    settings = {"n_users": n_users, "n_probe_users": n_probes, "chosen": CHOSEN, "best": best}
    print(json.dumps({**settings, "ways": rows}))


if __name__ == "__main__":
    main()
