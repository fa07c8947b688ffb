"""Training users as it was decided: one layout each, or a race among several.

A race is synchronous successive halving inside the worker that has the users. All candidates of all users
are trained to the first rung in the same packs and measured there on the user's own validation examples; the
better ones of each user go on from where they paused, the others give their slots to jobs that wait. A
candidate's job is that of a run with this layout for all: same data, same seed, and a schedule over all
epochs. So the winner ends with the weights that it would have there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.personalize.layouts.rule import Decision
from milp_ray.personalize.layouts.rungs import race_rungs

if TYPE_CHECKING:
    from milp_ray.config.prompt import PromptSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.training.base import Base
    from milp_ray.training.checkpoint import KeptJobs
    from milp_ray.training.job import Job, JobResult
    from milp_ray.users.records import UserSplit

CHOICE = "layout_choice"  # the key of a manifest's facts
# What paused jobs may hold of a worker's memory: weights and two moments in float32.
_MOST_KEPT_BYTES = 512 << 20
_BYTES_A_PARAMETER = 12

OnResult = Callable[[str, "JobResult", Mapping[str, Any]], None]
OnFailure = Callable[[str, MilpError], None]


@dataclass(frozen=True, slots=True)
class Entrant:
    """One user to be trained: under one layout, or under those that race for it.

    ``key`` is the user's name among the jobs of a call; ``parts`` and ``seed`` are those of
    :class:`milp_ray.training.job.Job`.
    """

    key: str
    split: UserSplit
    parts: frozenset[str]
    seed: int
    decision: Decision

    def job(self, place: int, job_id: str) -> Job:
        """The job of a candidate."""
        from milp_ray.training.job import Job

        return Job(job_id, self.split, self.decision.candidates[place].layout, self.parts, self.seed)


def train_decided(
    base: Base,
    entrants: Sequence[Entrant],
    training: TrainingSection,
    prompt: PromptSection,
    *,
    on_result: OnResult,
    on_failure: OnFailure,
) -> None:
    """Train every user as decided; the base is left bit for bit as it was.

    Args:
        base: the frozen base.
        entrants: the users; their keys are different.
        training: the recipe.
        prompt: the fixed phrases.
        on_result: called with (key, result, facts) as soon as a user's adapter is there. Of a race it is the
            winner's result, its ``seconds`` those of all its parts. ``facts`` are for the manifest: which
            layout, why, and of a race the standings and all that was paid; empty where one layout is for all.
        on_failure: called with (key, error) of a user who gets no adapter; the others do.
    """
    from milp_ray.training.train import train

    alone = {entrant.key: entrant for entrant in entrants if not entrant.decision.is_race}
    if alone:
        train(
            base,
            [entrant.job(0, key) for key, entrant in alone.items()],
            training,
            prompt,
            on_result=lambda result: on_result(
                result.job_id, result, choice_facts(alone[result.job_id].decision, 0)
            ),
            on_failure=on_failure,
        )
    for heat in _heats([entrant for entrant in entrants if entrant.decision.is_race]):
        _Heat(base, heat, training, prompt, on_result, on_failure).run()


def choice_facts(decision: Decision, place: int, **more: Any) -> dict[str, Any]:
    """What a manifest says of the decision, candidate ``place`` having been taken."""
    if decision.mode == "chosen":
        return {}
    taken, chosen = decision.candidates[place], decision.chosen
    facts = {
        "mode": decision.mode,
        "layout": taken.layout.key,
        "chosen": chosen.layout.key,
        "reason": decision.reason,
        "parameters": taken.parameters,
        "chosen_parameters": chosen.parameters,
        **decision.facts,
        **more,
    }
    return {CHOICE: facts}


def _heats(racers: Sequence[Entrant]) -> Iterator[list[Entrant]]:
    """Users who race together: of the same candidates and epochs, and no more than memory holds paused."""
    by_kind: dict[Any, list[Entrant]] = {}
    for racer in racers:
        by_kind.setdefault((racer.decision.layouts, racer.parts), []).append(racer)
    for alike in by_kind.values():
        parameters = sum(candidate.parameters for candidate in alike[0].decision.candidates)
        most = max(1, _MOST_KEPT_BYTES // max(1, _BYTES_A_PARAMETER * parameters))
        yield from (alike[i : i + most] for i in range(0, len(alike), most))


@dataclass(slots=True)
class _Standing:
    """A candidate of a user: its losses by epoch, and what it has cost so far."""

    losses: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    is_out: bool = False
    result: JobResult | None = None

    def saw(self, epoch: int, loss: float | None, steps: int, seconds: float) -> None:
        """It was measured after ``epoch`` epochs; ``seconds`` are new ones."""
        self.losses[epoch] = loss if loss is not None and math.isfinite(loss) else math.inf
        self.steps = steps
        self.seconds += seconds

    @property
    def epoch(self) -> int:
        """Where it was measured last; 0 where it never was."""
        return max(self.losses, default=0)

    @property
    def loss(self) -> float:
        """Its last loss; infinite where there is none."""
        return self.losses.get(self.epoch, math.inf)


class _Heat:
    """Users of the same candidates and epochs, on one base together."""

    def __init__(
        self,
        base: Base,
        racers: Sequence[Entrant],
        training: TrainingSection,
        prompt: PromptSection,
        on_result: OnResult,
        on_failure: OnFailure,
    ) -> None:
        from milp_ray.training.checkpoint import KeptJobs
        from milp_ray.training.job import planned_epochs

        self._base, self._training, self._prompt = base, training, prompt
        self._on_result, self._on_failure = on_result, on_failure
        self._racers = {racer.key: racer for racer in racers}
        decision = racers[0].decision
        n_candidates = len(decision.candidates)
        self._standings = {key: [_Standing() for _ in range(n_candidates)] for key in self._racers}
        self._n_epochs = planned_epochs(training, racers[0].parts)
        self._rungs = race_rungs(n_candidates, self._n_epochs, decision.reduction)
        self._kept: KeptJobs = KeptJobs()
        self._jobs: dict[str, tuple[str, int]] = {}  # job id → user's key and candidate

    def run(self) -> None:
        """The race from the start to the winners' last epoch."""
        from milp_ray.training.train import train, train_until

        shared: dict[str, Any] = {"checkpoint_dir": self._kept, "on_failure": self._fail}
        for rung in self._rungs:
            paused = train_until(
                self._base, self._going(), self._training, self._prompt, epoch=rung.epoch, **shared
            )
            for part in paused:
                key, place = self._jobs[part.job_id]
                standing = self._standings[key][place]
                standing.saw(rung.epoch, part.validation_loss, part.steps, part.seconds)
            for key in self._racers:
                self._cut(key, rung.n_kept)
        train(
            self._base,
            self._going(),
            self._training,
            self._prompt,
            checkpoint_every_epoch=False,
            on_result=self._finish,
            **shared,
        )

    def _going(self) -> list[Job]:
        """Jobs of the candidates that are not out; those of one layout next to each other share a rack."""
        n_candidates = len(next(iter(self._standings.values())))
        jobs = []
        for place in range(n_candidates):
            for key, racer in self._racers.items():
                if not self._standings[key][place].is_out:
                    job_id = f"{key}/{place}"
                    self._jobs[job_id] = key, place
                    jobs.append(racer.job(place, job_id))
        return jobs

    def _left(self, key: str) -> list[int]:
        return [place for place, standing in enumerate(self._standings[key]) if not standing.is_out]

    def _order(self, key: str, places: Sequence[int]) -> list[int]:
        """Best first: the lower loss, of equals the smaller adapter, then the chosen one, which stands first.

        Where nobody has a loss (validation examples too long to be kept) there is nothing to go by, and the
        chosen one comes first.
        """
        standings, candidates = self._standings[key], self._racers[key].decision.candidates
        if all(standings[place].loss == math.inf for place in places):
            return sorted(places)
        return sorted(places, key=lambda i: (standings[i].loss, candidates[i].parameters, i))

    def _cut(self, key: str, n_kept: int) -> None:
        for place in self._order(key, self._left(key))[n_kept:]:
            self._take_out(key, place)

    def _take_out(self, key: str, place: int) -> None:
        self._standings[key][place].is_out = True
        self._kept.forget(f"{key}/{place}")

    def _fail(self, job_id: str, error: MilpError) -> None:
        """A candidate cannot go on; its user fails only where no other is left."""
        key, place = self._jobs[job_id]
        self._take_out(key, place)
        if not self._left(key):
            self._on_failure(key, error)
        else:
            self._end(key)

    def _finish(self, result: JobResult) -> None:
        key, place = self._jobs[result.job_id]
        standing = self._standings[key][place]
        standing.saw(self._n_epochs, result.validation_loss, result.steps, result.seconds)
        standing.result = result
        self._end(key)

    def _end(self, key: str) -> None:
        """Hand out the winner once all that are left have come to their end."""
        left, standings = self._left(key), self._standings[key]
        if any(standings[place].result is None for place in left):
            return
        winner = self._order(key, left)[0]
        result = standings[winner].result
        if result is None:
            raise RuntimeError("the winner of a race has no result")
        facts = choice_facts(self._racers[key].decision, winner, **self._account(key, winner))
        for standing in standings:
            standing.result = None  # weights need not wait for the others of the heat
        self._on_result(key, replace(result, seconds=standings[winner].seconds), facts)

    def _account(self, key: str, winner: int) -> dict[str, Any]:
        """The standings, the winner first; what all of it cost; and the chosen layout's loss beside."""
        standings, candidates = self._standings[key], self._racers[key].decision.candidates
        order = sorted(
            range(len(standings)), key=lambda i: (i != winner, -standings[i].epoch, standings[i].loss)
        )
        beside = standings[0].epoch
        return {
            "standings": [
                {
                    "layout": candidates[i].layout.key,
                    "epoch": standings[i].epoch,
                    "validation_loss": _rounded(standings[i].loss),
                    "steps": standings[i].steps,
                }
                for i in order
            ],
            "steps": sum(standing.steps for standing in standings),
            "own_steps": standings[winner].steps,
            "seconds": round(sum(standing.seconds for standing in standings), 3),
            "own_seconds": round(standings[winner].seconds, 3),
            "beside_chosen": {
                "epoch": beside,
                "taken": _rounded(standings[winner].losses.get(beside, math.inf)),
                "chosen": _rounded(standings[0].loss),
            },
        }


def _rounded(loss: float) -> float | None:
    return round(loss, 6) if math.isfinite(loss) else None
