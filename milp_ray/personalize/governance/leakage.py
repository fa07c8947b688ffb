"""The leakage audit: are secrets of one user's history found through another user's adapter?

Random canaries are planted in some users' histories and the users' adapters are trained anew, with the run's
layout and recipe, in the memory of the pool's workers: nothing is published, and no canary is printed, stored
or logged. Each canary's exposure (:mod:`milp_ray.personalize.governance.exposure`) and whether greedy
decoding completes it from the words before the secret are measured under

- the user's own adapter: what it is there for;
- every other audited user's: must be no more than under the base;
- the base alone;
- as a control, the adapter of the same user, recipe and seed without the canaries.

Log-perplexities are of the canary alone behind the fixed phrase of histories. A worker measures the adapters
that it has trained, so that none ever leaves it. The same seed gives the same audit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from milp_ray.errors import MilpError
from milp_ray.personalize.batch import users_at_once
from milp_ray.personalize.governance.canaries import SPACES, CanarySheet, draw_sheet, plant
from milp_ray.personalize.governance.exposure import exposure
from milp_ray.personalize.governance.leakage_result import Found, leakage_result
from milp_ray.progress import progress
from milp_ray.users.records import UserSplit

if TYPE_CHECKING:
    from milp_ray.config.evaluation import EvaluationSection
    from milp_ray.personalize.pool import WorkerPool
    from milp_ray.personalize.recipe import Recipe
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.training.data import Sequence as TokenSequence
    from milp_ray.training.job import JobResult

OWN, CONTROL, BASE = "own", "control", "base"


@dataclass(frozen=True, slots=True)
class LeakageOptions:
    """What an audit plants and compares."""

    n_users: int = 8  # at most; at least two are needed
    n_canaries: int = 4  # a user, each a sentence of its own
    n_candidates: int = 1000  # other secrets of the space, which bound the exposure that can be seen
    repeats: int = 1  # times that each canary stands in its history
    space: str = "words"  # of SPACES
    seed: int = 0
    control: bool = True  # train each user without canaries, too


@dataclass(frozen=True, slots=True)
class _Item:
    """One adapter to be made and measured; ``split`` is ``None`` for the base."""

    key: str
    split: UserSplit | None = None
    parts: frozenset[str] = frozenset()
    seed: int = 0

    @property
    def size(self) -> int:
        """Characters to train on."""
        if self.split is None:
            return 1
        turns = sum(len(turn.text) for turn in self.split.history)
        return 1 + turns + sum(len(e.query) + len(e.response) for e in self.split.train)


def audit_leakage(
    splits: Sequence[UserSplit],
    recipe: Recipe,
    options: LeakageOptions,
    evaluation: EvaluationSection,
    *,
    pool: WorkerPool,
    file: TextIO | None = None,
) -> dict[str, Any]:
    """Plant, train, measure and compare.

    Args:
        splits: the run's users.
        recipe: what their adapters are made from.
        options: how many users and canaries.
        evaluation: batch size, and the bootstrap of the intervals.
        pool: open workers that hold the base.
        file: where progress is shown; standard output unless given.

    Returns:
        What :func:`milp_ray.personalize.governance.leakage_result.leakage_result` returns.

    Raises:
        MilpError: the layout is empty, fewer than two users have a history that is trained on, the base's
            tokenizer cannot tell secrets apart, or an adapter could not be made.
    """
    if recipe.layout.is_empty:
        raise MilpError("the chosen layout is the empty one: there are no adapters to audit; choose another")
    users = audited_users(splits, recipe, options)
    space = SPACES[options.space]
    sheet = draw_sheet(len(users), options.n_canaries, options.n_candidates, space=space, seed=options.seed)
    items = [_Item(BASE)]
    for i, split in enumerate(users):
        planted = plant(split, sheet.turns_of(i), repeats=options.repeats, seed=options.seed)
        for kind, one in [(OWN, planted), (CONTROL, split)][: 2 if options.control else 1]:
            items.append(_Item(f"{kind} {i}", one, recipe.parts(one), recipe.seed_of(split.user_id)))
    measure = partial(_measure, sheet, recipe, evaluation.batch_size)
    found: dict[str, Found] = {}
    with progress("leakage", len(items), unit="adapters", file=file) as bar:
        for outcome in pool.map(
            measure,
            items,
            key=lambda item: item.key,
            size=lambda item: item.size,
            at_once=users_at_once(recipe.training),
        ):
            if outcome.failed:
                raise MilpError(f"an adapter of the audit could not be made or measured: {outcome.reason}")
            found[outcome.key] = outcome.value
            bar.advance()
    return leakage_result(
        [split.user_id for split in users],
        base=found[BASE],
        own=[found[f"{OWN} {i}"] for i in range(len(users))],
        control=[found[f"{CONTROL} {i}"] for i in range(len(users))] if options.control else None,
        options=options,
        space=space,
        layout=recipe.layout.key,
        evaluation=evaluation,
    )


def audited_users(splits: Sequence[UserSplit], recipe: Recipe, options: LeakageOptions) -> list[UserSplit]:
    """A seeded sample of the users whose history is trained on, without what is held out for tests.

    Raises:
        MilpError: there are fewer than two.
    """
    able = [split for split in splits if "memory" in recipe.parts(split)]
    if min(len(able), options.n_users) < 2:
        raise MilpError(
            f"{len(able)} of {len(splits)} users have a history that is trained on, and {options.n_users} "
            "are asked for: an audit needs two, to look for one's secrets through the other's adapter; "
            "give more users, or set training.memory_epochs above 0"
        )
    chosen = random.Random(f"audited users {options.seed}").sample(
        range(len(able)), min(len(able), options.n_users)
    )
    return [able[i] for i in sorted(chosen)]


# --------------------------------------------------------------------------------------------- in a worker


def _measure(
    sheet: CanarySheet,
    recipe: Recipe,
    batch_size: int,
    base: Base,
    items: Sequence[_Item],
    report: Callable[[int, Any], None],
) -> None:
    """Train some adapters and measure all canaries under each; only the measures go back."""
    from milp_ray.training.job import Job
    from milp_ray.training.train import train

    ready: dict[int, Adapter | None] = {}
    jobs = []
    for place, item in enumerate(items):
        if item.split is None:
            ready[place] = None
        else:
            jobs.append(Job(str(place), item.split, recipe.layout, item.parts, item.seed))

    def ended(result: JobResult) -> None:
        ready[int(result.job_id)] = result.adapter

    train(
        base,
        jobs,
        recipe.training,
        recipe.prompt,
        on_result=ended,
        on_failure=lambda job_id, error: report(int(job_id), error),
    )
    exposures = _exposures(sheet, recipe, batch_size, base, list(ready.values()))
    extracted = _extracted(sheet, recipe, batch_size, base, list(ready.values()))
    for place, bits, said in zip(ready, exposures, extracted, strict=True):
        if np.isfinite(bits).all():
            report(place, Found(bits, said))
        else:
            report(place, MilpError("training diverged: losses are not finite; lower training.learning_rate"))


def _exposures(
    sheet: CanarySheet, recipe: Recipe, batch_size: int, base: Base, adapters: Sequence[Adapter | None]
) -> list[NDArray[np.float64]]:
    """For each adapter the exposure of every secret, shape ``(n_canaries, n_users)``."""
    from milp_ray.training.response_loss import losses_under

    sequences = _sequences(sheet, recipe, base)
    losses = losses_under(base, adapters, [sequences] * len(adapters), batch_size=batch_size)
    n_users = len(sheet.secrets[0])
    found = []
    for own in losses:
        nats = np.array([total for total, _ in own]).reshape(len(sheet.sentences), -1)
        bits = exposure(nats[:, :n_users], nats[:, n_users:])
        found.append(bits if np.isfinite(nats).all() else np.full_like(bits, np.nan))
    return found


def _sequences(sheet: CanarySheet, recipe: Recipe, base: Base) -> list[TokenSequence]:
    """All texts of all sentences, in the order of the sheet, as a history of that one turn is trained on."""
    from milp_ray.training.data import memory_set

    limit = recipe.training.max_length or base.context_length
    sequences: list[TokenSequence] = []
    for sentence in range(len(sheet.sentences)):
        turns = tuple(sheet.turns(sentence))
        alone = UserSplit("canaries", None, turns, (), (), ())
        own = memory_set(alone, base, recipe.prompt, max_length=limit, block_turns=1)
        if len(own) != len(turns):
            raise MilpError(
                f"a canary has more tokens than training.max_length or the context allow ({limit}); raise it"
            )
        if len({sequence.ids for sequence in own}) < len(turns):
            raise MilpError(
                "the base's tokenizer writes different secrets with the same tokens, so they cannot be told "
                f"apart; choose another kind of secret (one of {', '.join(SPACES)})"
            )
        sequences += own
    return sequences


def _extracted(
    sheet: CanarySheet, recipe: Recipe, batch_size: int, base: Base, adapters: Sequence[Adapter | None]
) -> list[NDArray[np.bool_]]:
    """For each adapter whether it says each secret after the words before it, ``(n_canaries, n_users)``."""
    from milp_ray.training.generation import Questions, generate

    prompts = [recipe.prompt.history + beginning for beginning in sheet.beginnings()]
    n_tokens = max(base.count_tokens([f" {text}" for own in sheet.secrets for text in own]))
    asked = [Questions(prompts, adapter) for adapter in adapters]
    answers = generate(base, asked, max_new_tokens=n_tokens, batch_size=batch_size)
    return [
        np.array(
            [
                [answer.startswith(secret) for secret in own]
                for answer, own in zip(said, sheet.secrets, strict=True)
            ]
        )
        for said in answers
    ]
