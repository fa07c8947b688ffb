"""What a worker does with the users of an update: train, measure, publish or leave the old version.

Only small numbers go back. Nothing is published before the guard has been asked, so a worker that is lost
leaves every user either with the old version or with one that was found good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.personalize.intake import Item
from milp_ray.personalize.layouts.race import Entrant, train_decided
from milp_ray.personalize.making import ends_all, publish
from milp_ray.personalize.provenance import Provenance
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.store import AdapterStore, hash_id
from milp_ray.personalize.update.guard import Guarded, Verdict, verdicts
from milp_ray.personalize.update.journal import KEPT
from milp_ray.personalize.update.plan import Anew, Continue, training_data, update_training
from milp_ray.training.job import JobResult

if TYPE_CHECKING:
    from milp_ray.config.update import UpdateSection
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.training.job import Job
    from milp_ray.users.records import Example

ABOVE_TOLERANCE = "loss on earlier held-out examples grew by more than update.guard.tolerance"
Report = Callable[[int, Any], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One user on the way to a worker, and what is to be done."""

    item: Item
    plan: Anew | Continue

    @property
    def user_id(self) -> str:
        """The user."""
        return self.item.split.user_id

    @property
    def guard(self) -> tuple[Example, ...]:
        """The examples that the guard measures on."""
        return self.plan.news.guard if isinstance(self.plan, Continue) else ()

    @property
    def size(self) -> int:
        """Characters to train on: longer users are begun first."""
        if isinstance(self.plan, Anew):
            return self.item.size
        news = self.plan.news
        turns = sum(len(turn.text) for turn in news.new_turns)
        return turns + sum(len(e.query) + len(e.response) for e in news.new_examples)


def update_adapters(
    store: AdapterStore,
    recipe: Recipe,
    section: UpdateSection,
    base: Base,
    tasks: Sequence[Task],
    report: Report,
) -> None:
    """Do what is planned for some users; a reply each as soon as it is known.

    Raises:
        CannotGoOnError: the store cannot be read or written.
    """
    work = _Work(store, recipe, section, base, report)
    anew: dict[str, _Turn] = {}
    continued: dict[str, _Turn] = {}
    for place, task in enumerate(tasks):
        try:
            with ends_all():
                if store.has(task.user_id, task.item.fingerprint):
                    # An earlier worker was lost after it had published and before its reply arrived.
                    report(place, _made(store, task))
                    continue
                turn = work.begin(place, task)
        except MilpError as error:
            report(place, error)
        else:
            (anew if turn.before is None else continued)[hash_id(task.user_id)] = turn
    work.make_anew(anew)
    work.carry_on(continued)


@dataclass(frozen=True, slots=True)
class _Turn:
    """One user's turn: the adapter to continue and the job (``None``: nothing to train on), or neither.

    ``made_from`` is what a version that comes of it will have seen.
    """

    place: int
    task: Task
    job: Job | None
    made_from: Provenance
    before: Adapter | None = None
    n_replayed: int = 0


class _Work:
    """What all users of a call share."""

    def __init__(
        self, store: AdapterStore, recipe: Recipe, section: UpdateSection, base: Base, report: Report
    ) -> None:
        self._store, self._recipe, self._section = store, recipe, section
        self._base, self._report = base, report
        self._training = update_training(recipe.training, section)

    def begin(self, place: int, task: Task) -> _Turn:
        """Say what a user's adapter is trained on, and load the version to continue.

        Raises:
            MilpError: it cannot be read.
        """
        from milp_ray.training.job import Job

        recipe, item, plan = self._recipe, task.item, task.plan
        name, seed = hash_id(task.user_id), recipe.seed_of(task.user_id)
        if isinstance(plan, Anew):
            return _Turn(place, task, None, Provenance.of(item.made.digest, item.split))
        before = self._store.load(task.user_id, version=plan.version)
        # Another seed than the version's own, so that sample and order differ from one update to the next.
        seed = (seed + plan.version) % 2**31
        data = training_data(item.split, plan.news, self._section, seed)
        parts = replace(recipe, training=self._training).parts(data)
        return _Turn(
            place,
            task,
            Job(name, data, before.layout, parts, seed, start=before) if parts else None,
            Provenance.of(item.made.digest, plan.news.trained_on(item.split)),
            before,
            len(data.history) + len(data.train) - plan.news.n_new,
        )

    def make_anew(self, turns: Mapping[str, _Turn]) -> None:
        """Train from fresh weights, and publish each as it ends."""
        items = {key: turn.task.item for key, turn in turns.items()}
        entrants = [
            Entrant(key, item.split, item.parts, self._recipe.seed_of(item.split.user_id), item.made.decision)
            for key, item in items.items()
        ]
        train_decided(
            self._base,
            entrants,
            self._recipe.training,
            self._recipe.prompt,
            on_result=lambda key, result, facts: self._publish(turns[key], result, facts),
            on_failure=lambda key, error: self._report(turns[key].place, error),
        )

    def carry_on(self, turns: Mapping[str, _Turn]) -> None:
        """Continue adapters; publish those that pass the guard."""
        from milp_ray.training.train import train

        results = train(
            self._base,
            [turn.job for turn in turns.values() if turn.job is not None],
            self._training,
            self._recipe.prompt,
            on_failure=lambda job_id, error: self._report(turns[job_id].place, error),
        )
        trained = [(turns[result.job_id], result) for result in results]
        guarded = [
            Guarded(turn.task.guard, turn.before, result.adapter)
            for turn, result in trained
            if turn.before is not None and result.adapter is not None
        ]
        tolerance = self._section.guard.tolerance
        found = verdicts(self._base, guarded, self._recipe.prompt, tolerance)
        for (turn, result), verdict in zip(trained, found, strict=True):
            if verdict.holds:
                self._publish(turn, result, self._facts(turn, verdict))
            else:
                self._keep(turn, result, verdict)
        for turn in turns.values():
            if turn.job is None and turn.before is not None:
                # Only what is held out has changed: the weights stand for the user's data as it is now.
                same = JobResult("", turn.before, None, 0, 0, 0.0, 0.0, [])
                self._publish(turn, same, self._facts(turn, Verdict(0, None, None, tolerance)))

    def _facts(self, turn: _Turn, verdict: Verdict) -> dict[str, Any]:
        plan = turn.task.plan
        if not isinstance(plan, Continue):
            raise RuntimeError("only a version that is continued has such facts")
        return {
            **plan.layout_choice,
            "continued_from": plan.version,
            "n_new": plan.news.n_new,
            "n_replayed": turn.n_replayed,
            "guard": verdict.to_dict(),
        }

    def _publish(self, turn: _Turn, result: JobResult, facts: Mapping[str, Any]) -> None:
        try:
            with ends_all():
                publish(self._store, self._recipe, self._base, turn.task.item, result, turn.made_from, facts)
                made = _made(self._store, turn.task)
        except MilpError as error:
            self._report(turn.place, error)
        else:
            self._report(turn.place, made)

    def _keep(self, turn: _Turn, result: JobResult, verdict: Verdict) -> None:
        facts = self._facts(turn, verdict)
        kept = {
            "outcome": KEPT,
            "reason": ABOVE_TOLERANCE,
            "version": facts["continued_from"],
            "fingerprint": turn.task.item.fingerprint,
            **facts,
        }
        self._report(turn.place, {**kept, **_cost(result.steps, result.tokens, result.seconds)})


def _made(store: AdapterStore, task: Task) -> dict[str, Any]:
    """The reply for a user who has a new version."""
    manifest = store.manifest(task.user_id)
    meta = manifest.meta
    found = {"version": manifest.version, **_cost(meta["steps"], meta["tokens"], meta["seconds"])}
    if "continued_from" in meta:
        return {"outcome": "updated", "reason": None, "guard": meta["guard"], **found}
    reason = task.plan.reason if isinstance(task.plan, Anew) else "another command made it meanwhile"
    return {"outcome": "anew", "reason": reason, **found}


def _cost(steps: int, tokens: int, seconds: float) -> dict[str, Any]:
    return {"steps": steps, "tokens": tokens, "seconds": round(seconds, 3)}
