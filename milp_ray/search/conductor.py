"""Which trial comes next, when a batch is asked for, and when a study is over. Knows the journal, not Tune.

No trial slot waits for a fit where that can be helped: a batch is asked for while earlier trials run, which
it takes as pending. Which trials those are is one of two rules (``search.proposals``):

- *repeatable*: the newest ``search.lookahead`` trials before the batch, ended or not. A batch is asked for
  once all trials older than those have ended. The study is the same whatever the number of workers, however
  long trials and fits take; unless trials are stopped early by what others have shown by then
  (:mod:`milp_ray.search.scheduler`).
- *greedy*: the trials that have not ended. A batch is asked for as soon as fewer trials wait than there are
  slots. Nothing that is known is left out and nobody waits for a straggler, but what is proposed depends on
  the order in which trials end. (With one worker there is one order.)

Either way the journal says which trials a batch was proposed around, before it is proposed: a study that is
resumed asks the same question again.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from milp_ray.search.candidates import initial_points
from milp_ray.search.journal import AskedBatch, Journal, TrialRecord
from milp_ray.search.measure import BEGAN
from milp_ray.search.observations import observations
from milp_ray.search.results import RunningHypervolume, StudyResult, study_result
from milp_ray.search.rungs import RungRecord
from milp_ray.search.suggest import Question
from milp_ray.telemetry import log_event

if TYPE_CHECKING:
    from milp_ray.config.search import SearchSection
    from milp_ray.memory.space import SearchSpace
    from milp_ray.search.suggest import Proposal, Proposer

SOBOL = "sobol"
WARM_START = "warm_start"  # from the front of an earlier search
_LOOK_AGAIN = 5.0  # seconds between two looks at the cluster, for nodes that came or went


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is."""

    n_ended: int
    n_failed: int
    n_stopped: int  # early, by the scheduler
    n_trials: int
    hypervolume: float | None
    is_suggesting: bool  # the next batch is being proposed
    n_running: int = 0
    n_idle: int = 0  # slots that wait for a layout
    suggestion_seconds: float | None = None  # of the latest batch that this process asked for
    best: Mapping[str, float] = field(default_factory=dict)  # objective → the best value of any trial
    gpu_memory_mib: float | None = None  # of the trial that held most; none on CPUs
    startup_seconds: float | None = None  # of the trial whose end is told
    ended: TrialRecord | None = None  # the trial whose end is told


class Conductor:
    """Hands out trials and records what becomes of them.

    Trials that an earlier process suggested and did not finish are handed out again, with the same index
    and layout. ``n_slots`` is how many trials can run at once, ``n_processes`` (as many unless given) in how
    many processes; ``count_slots`` says how many slots there are now, where that may change. ``portfolio``
    are raw points, all different, that take the place of the first initial ones.

    No more trials are handed out than there are slots, or ``search.max_concurrent_trials`` where that is
    given: Tune would ask for a new process for each one more, though another is about to become free.
    """

    def __init__(
        self,
        journal: Journal,
        space: SearchSpace,
        section: SearchSection,
        seed: int,
        proposer: Proposer,
        on_progress: Callable[[StudyProgress], None] | None = None,
        n_slots: int = 1,
        portfolio: Sequence[Mapping[str, Any]] = (),
        *,
        n_processes: int | None = None,
        count_slots: Callable[[], int] | None = None,
    ) -> None:
        self._journal = journal
        self._space = space
        self._section = section
        self._proposer = proposer
        self._on_progress = on_progress
        self._n_slots = n_slots
        self._count_slots = count_slots
        self._looked = time.monotonic()  # when the slots were counted
        self._n_processes = n_slots if n_processes is None else n_processes
        self._hypervolume = RunningHypervolume()
        self._running: set[int] = set()  # handed out by this process and not ended
        self._handed_out: dict[int, float] = {}  # when, of those that run
        self._suggestion_seconds: float | None = None
        self._most_gpu_mib: float | None = None
        self._n_given_back: Counter[int] = Counter()
        self._asked_at: float | None = None  # when this process asked for the batch that is being proposed
        self._top_up_initial(seed, portfolio)

    @property
    def is_over(self) -> bool:
        """Whether every trial that there will be has ended."""
        return self._journal.state.finished is not None

    @property
    def rungs(self) -> Sequence[RungRecord]:
        """What trials were worth at rungs, in this process and in earlier ones, in the journal's order."""
        return self._journal.state.rungs

    def next_trial(self) -> TrialRecord | Literal["finished"] | None:
        """The trial to run now; ``None``: ask again later; "finished": there will be no more."""
        self._look_around()
        self._keep_proposing()
        waiting = self._journal.state.unfinished - self._running
        if not waiting:
            # One that runs may yet be given back.
            if self._are_all_suggested() and not self._running:
                self._finish_if_over()
                return "finished"
            return None
        if len(self._running) >= (self._section.max_concurrent_trials or self._n_slots):
            return None
        trial = self._trials[min(waiting)]
        self._running.add(trial.index)
        self._handed_out[trial.index] = time.time()
        self._journal.append("trial_started", index=trial.index)
        self._keep_proposing()  # one trial fewer waits
        return trial

    def complete(self, index: int, metrics: Mapping[str, Any]) -> None:
        """Record a trial's values; one whose objectives are missing or not finite has failed.

        A second end of the same trial changes nothing. ``began``, when the trial's process was ready, is
        recorded as ``startup_seconds`` since the trial was handed out: imports and the base, where it has to
        be loaded, retries included.
        """
        metrics = dict(metrics)
        began, handed_out = metrics.pop(BEGAN, None), self._handed_out.get(index)
        if began is not None and handed_out is not None:
            metrics["startup_seconds"] = round(max(0.0, began - handed_out), 3)
        broken = [name for name in self._section.objectives if not _is_finite(metrics.get(name))]
        if broken:
            self.fail(index, f"no finite value for {', '.join(broken)}")
        elif self._ends_now(index):
            self._journal.append("trial_completed", index=index, metrics=_json_ready(metrics))
            log_event("trial_completed", index=index, key=self._trials[index].layout.key)
            self._after_end(index)

    def fail(self, index: int, reason: str) -> None:
        """Record that a trial failed for good; ``reason`` holds no text of a user."""
        if self._ends_now(index):
            self._journal.append("trial_failed", index=index, reason=reason)
            log_event("trial_failed", index=index, key=self._trials[index].layout.key, reason=reason)
            self._after_end(index)

    def give_back(self, index: int) -> bool:
        """A trial has lost its process before it began: it waits again, unless that comes again and again."""
        self._n_given_back[index] += 1
        if self._n_given_back[index] > self._section.max_failures:
            return False
        self._running.discard(index)
        log_event("trial_given_back", index=index)
        return True

    def reached_rung(self, record: RungRecord) -> None:
        """Record what partial training gave; a trial that is run again reaches its rungs again."""
        values = record.to_dict()
        place = {name: values.pop(name) for name in ("rung", "epoch")}
        self._journal.append("trial_rung", index=values.pop("trial"), **place, values=values)

    def stop(self, index: int, rung: int, epoch: int, seconds: float) -> None:
        """Record that a trial was stopped early, after ``seconds`` of training; it has no values."""
        if self._ends_now(index):
            self._journal.append("trial_stopped", index=index, rung=rung, epoch=epoch, seconds=seconds)
            log_event("trial_stopped", index=index, key=self._trials[index].layout.key, epoch=epoch)
            self._after_end(index)

    def begin_session(self) -> None:
        """Record that this process takes the study up."""
        self._journal.append("session_started", n_slots=self._n_slots, n_processes=self._n_processes)

    def end_session(self, max_block_seconds: float) -> None:
        """Record the longest time that Tune's controller waited for the searcher in this process."""
        self._journal.append("session_ended", max_block_seconds=max_block_seconds)

    def result(self) -> StudyResult:
        """The study as it stands."""
        return study_result(self._journal.state)

    # ------------------------------------------------------------------------------------------ internals

    @property
    def _trials(self) -> list[TrialRecord]:
        return self._journal.state.trials

    def _look_around(self) -> None:
        """Every few seconds: have nodes come or gone?"""
        if self._count_slots is None or time.monotonic() - self._looked < _LOOK_AGAIN:
            return
        self._looked = time.monotonic()
        n_slots = self._count_slots()
        if n_slots != self._n_slots:
            log_event("slots_changed", slots=n_slots, before=self._n_slots)
            self._n_slots = n_slots
            self._journal.append("slots_changed", n_slots=n_slots)
            self._report()

    def _are_all_suggested(self) -> bool:
        return len(self._trials) >= self._section.n_trials or self._is_exhausted()

    def _ends_now(self, index: int) -> bool:
        self._running.discard(index)
        self._handed_out.pop(index, None)
        return not self._trials[index].has_ended

    def _after_end(self, index: int) -> None:
        self._finish_if_over()
        self._report(self._trials[index])

    def _is_exhausted(self) -> bool:
        return len(self._journal.state.keys) >= self._space.n_canonical

    def _finish_if_over(self) -> None:
        if self.is_over or self._journal.state.unfinished:
            return
        if len(self._trials) >= self._section.n_trials:
            self._journal.append("study_finished", reason="all trials have ended")
        elif self._is_exhausted():
            self._journal.append("study_finished", reason="every layout of the space has been measured")

    def _top_up_initial(self, seed: int, portfolio: Sequence[Mapping[str, Any]]) -> None:
        """Suggest the initial trials, or those of them that are missing."""
        if any(trial.batch > 0 for trial in self._trials):
            return
        n_initial = self._section.n_initial
        tried = {self._space.layout(point).canonical().key for point in portfolio}
        # As many more Sobol points as may fall on the portfolio's.
        sobol = [
            point
            for point in initial_points(self._space, n_initial + len(portfolio), seed)
            if self._space.layout(point).canonical().key not in tried
        ]
        points = [(dict(point), WARM_START) for point in portfolio] + [(point, SOBOL) for point in sobol]
        self._suggest(points[len(self._trials) : n_initial], batch=0)

    def _keep_proposing(self) -> None:
        """Take in the batch that has been proposed, and ask for the next one where it is time to."""
        state = self._journal.state
        if state.asked is None and not self._are_all_suggested():
            pending = self._pending()
            if pending is None:
                return
            batch = max((trial.batch for trial in self._trials), default=0) + 1
            n = min(self._section.batch_size, self._section.n_trials - len(self._trials))
            self._journal.append("batch_asked", batch=batch, n=n, pending=pending)
        if state.asked is not None and self._asked_at is None:
            self._proposer.submit(self._question(state.asked))
            self._asked_at = time.monotonic()
            self._report()
        if state.asked is not None:
            self._take_proposals(state.asked)

    def _pending(self) -> list[int] | None:
        """The trials that a batch asked for now is proposed around; ``None``: it is not time to ask."""
        not_ended = sorted(self._journal.state.unfinished)
        if self._section.proposals == "greedy":
            n_waiting = len(not_ended) - len(self._running)
            # Some trial must have ended, or there is nothing to propose from.
            return not_ended if n_waiting < self._n_slots and len(not_ended) < len(self._trials) else None
        # Half of the trials at the least are proposed from.
        n_newest = min(self._section.lookahead, len(self._trials) // 2)
        newest = list(range(len(self._trials) - n_newest, len(self._trials)))
        return newest if set(not_ended) <= set(newest) else None

    def _question(self, asked: AskedBatch) -> Question:
        # A kill may have cut the batch's trials off in the middle of being written.
        before = [trial for trial in self._trials if trial.batch < asked.batch]
        pending = set(asked.pending)
        ended = [trial for trial in before if trial.index not in pending]
        return Question(
            observations=tuple(observations(ended, self._section.objectives, self.rungs)),
            batch=asked.batch,
            n=asked.n,
            pending=tuple(trial.layout for trial in before if trial.index in pending),
        )

    def _take_proposals(self, asked: AskedBatch) -> None:
        proposals: list[Proposal] | None = self._proposer.poll()
        if proposals is None or self._asked_at is None:
            return
        seconds, self._asked_at = time.monotonic() - self._asked_at, None
        self._suggestion_seconds = seconds
        n_there = sum(trial.batch == asked.batch for trial in self._trials)
        self._suggest([(p.raw, p.generator) for p in proposals[n_there:]], asked.batch, seconds)
        self._report()

    def _suggest(
        self, points: list[tuple[dict[str, Any], str]], batch: int, seconds: float | None = None
    ) -> None:
        """Record new trials, and in the same write that their batch (``seconds`` given) has been proposed."""
        events: list[dict[str, Any]] = []
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
        if seconds is not None:
            events.append({"event": "batch_proposed", "batch": batch, "seconds": round(seconds, 3)})
        if events:
            self._journal.append_all(events)

    def _report(self, ended: TrialRecord | None = None) -> None:
        if self._on_progress is None:
            return
        state = self._journal.state
        self._on_progress(
            StudyProgress(
                n_ended=len(state.ended),
                n_failed=state.count("failed"),
                n_stopped=state.count("stopped"),
                n_trials=self._section.n_trials,
                hypervolume=self._hypervolume.of(state),
                is_suggesting=self._asked_at is not None,
                n_running=len(self._running),
                n_idle=0 if self._are_all_suggested() else max(0, self._n_slots - len(self._running)),
                suggestion_seconds=self._suggestion_seconds,
                best=self._hypervolume.best(state),
                gpu_memory_mib=self._gpu_memory(ended),
                startup_seconds=None if ended is None else ended.metrics.get("startup_seconds"),
                ended=ended,
            )
        )

    def _gpu_memory(self, ended: TrialRecord | None) -> float | None:
        """The most that any trial of this process has held."""
        held = None if ended is None else ended.metrics.get("peak_gpu_mib")
        if held is not None:
            self._most_gpu_mib = max(self._most_gpu_mib or 0.0, float(held))
        return self._most_gpu_mib


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
