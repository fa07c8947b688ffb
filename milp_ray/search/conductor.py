"""Which trial comes next, when a batch is asked for, and when a study is over. Knows the journal, not Tune.

The rule that makes a study the same whatever the number of workers: a batch is proposed once every earlier
trial has ended, from all of them in the order of their index. Results are taken whenever they come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from milp_ray.search.candidates import initial_points
from milp_ray.search.journal import Journal, TrialRecord
from milp_ray.search.observations import observations
from milp_ray.search.results import StudyResult, study_result
from milp_ray.search.suggest import Question
from milp_ray.telemetry import log_event

if TYPE_CHECKING:
    from milp_ray.config import SearchSection
    from milp_ray.memory.space import SearchSpace
    from milp_ray.search.suggest import Proposal, Proposer

SOBOL = "sobol"


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is."""

    n_ended: int
    n_failed: int
    n_trials: int
    hypervolume: float | None
    is_suggesting: bool  # the next batch is being proposed


class Conductor:
    """Hands out trials and records what becomes of them.

    Trials that an earlier process suggested and did not finish are handed out again, with the same index
    and layout.
    """

    def __init__(
        self,
        journal: Journal,
        space: SearchSpace,
        section: SearchSection,
        seed: int,
        proposer: Proposer,
        on_progress: Callable[[StudyProgress], None] | None = None,
    ) -> None:
        self._journal = journal
        self._space = space
        self._section = section
        self._proposer = proposer
        self._on_progress = on_progress
        self._running: set[int] = set()  # handed out by this process and not ended
        self._is_suggesting = False
        self._top_up_initial(seed)

    @property
    def is_over(self) -> bool:
        """Whether every trial that there will be has ended."""
        return self._journal.state.finished is not None

    def next_trial(self) -> TrialRecord | Literal["finished"] | None:
        """The trial to run now; ``None``: ask again later; "finished": there will be no more."""
        waiting = self._waiting()
        if waiting is None:
            if len(self._trials) >= self._section.n_trials or self._is_exhausted():
                self._finish_if_over()
                return "finished"
            if not all(trial.has_ended for trial in self._trials) or not self._take_proposals():
                return None
            waiting = self._waiting()
        limit = self._section.max_concurrent_trials
        if waiting is None or (limit is not None and len(self._running) >= limit):
            return None
        self._running.add(waiting.index)
        self._journal.append("trial_started", index=waiting.index)
        return waiting

    def complete(self, index: int, metrics: Mapping[str, Any]) -> None:
        """Record a trial's values; one whose objectives are missing or not finite has failed.

        A second end of the same trial changes nothing.
        """
        broken = [name for name in self._section.objectives if not _is_finite(metrics.get(name))]
        if broken:
            self.fail(index, f"no finite value for {', '.join(broken)}")
        elif self._ends_now(index):
            self._journal.append("trial_completed", index=index, metrics=_json_ready(metrics))
            log_event("trial_completed", index=index, key=self._trials[index].layout.key)
            self._after_end()

    def fail(self, index: int, reason: str) -> None:
        """Record that a trial failed for good; ``reason`` holds no text of a user."""
        if self._ends_now(index):
            self._journal.append("trial_failed", index=index, reason=reason)
            log_event("trial_failed", index=index, key=self._trials[index].layout.key, reason=reason)
            self._after_end()

    def result(self) -> StudyResult:
        """The study as it stands."""
        return study_result(self._journal.state)

    # ------------------------------------------------------------------------------------------ internals

    @property
    def _trials(self) -> list[TrialRecord]:
        return self._journal.state.trials

    def _waiting(self) -> TrialRecord | None:
        """The first trial that nobody runs and that has not ended."""
        return next((t for t in self._trials if not t.has_ended and t.index not in self._running), None)

    def _ends_now(self, index: int) -> bool:
        self._running.discard(index)
        return not self._trials[index].has_ended

    def _after_end(self) -> None:
        self._finish_if_over()
        self._report()

    def _is_exhausted(self) -> bool:
        return len(self._journal.state.keys) >= self._space.n_canonical

    def _finish_if_over(self) -> None:
        if self.is_over or not all(trial.has_ended for trial in self._trials):
            return
        if len(self._trials) >= self._section.n_trials:
            self._journal.append("study_finished", reason="all trials have ended")
        elif self._is_exhausted():
            self._journal.append("study_finished", reason="every layout of the space has been measured")

    def _top_up_initial(self, seed: int) -> None:
        """Suggest the initial trials, or those of them that are missing."""
        if any(trial.batch > 0 for trial in self._trials):
            return
        points = initial_points(self._space, self._section.n_initial, seed)
        self._suggest([(point, SOBOL) for point in points[len(self._trials) :]], batch=0)

    def _take_proposals(self) -> bool:
        """Ask for the next batch, or take it in if it is there; whether there are new trials."""
        batch = max((trial.batch for trial in self._trials), default=0) + 1
        if not self._is_suggesting:
            n = min(self._section.batch_size, self._section.n_trials - len(self._trials))
            ended = observations(self._trials, self._section.objectives)
            self._proposer.submit(Question(tuple(ended), self.result().reference, batch, n))
            self._is_suggesting = True
            self._report()
        proposals: list[Proposal] | None = self._proposer.poll()
        if proposals is None:
            return False
        self._is_suggesting = False
        self._suggest([(proposal.raw, proposal.generator) for proposal in proposals], batch)
        self._report()
        return True

    def _suggest(self, points: list[tuple[dict[str, Any], str]], batch: int) -> None:
        events = []
        for index, (raw, generator) in enumerate(points, start=len(self._trials)):
            layout = self._space.layout(raw).canonical()
            events.append(
                {
                    "event": "trial_suggested",
                    "index": index,
                    "batch": batch,
                    "raw": raw,
                    "layout": layout.to_dict(),
                    "key": layout.key,
                    "generator": generator,
                }
            )
        if events:
            self._journal.append_all(events)

    def _report(self) -> None:
        if self._on_progress is None:
            return
        result = self.result()
        self._on_progress(
            StudyProgress(
                n_ended=sum(trial.has_ended for trial in self._trials),
                n_failed=result.n_failed,
                n_trials=self._section.n_trials,
                hypervolume=result.hypervolume,
                is_suggesting=self._is_suggesting,
            )
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _json_ready(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Plain numbers; an extra that is not finite becomes ``None``."""
    return {name: _plain(value) for name, value in metrics.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _json_ready(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
