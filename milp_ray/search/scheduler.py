"""The Tune scheduler that ends trials at rungs; the rule itself is :func:`milp_ray.search.rungs.promoted`.

Asynchronous: a trial is judged the moment it reaches a rung, against whatever has reached it by then, and
waits for nobody. So with several workers it depends on their timing which trials are stopped; what a trial
that is not stopped measures does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import TrialScheduler

from milp_ray.search.rungs import RUNG, RungRecord, promoted
from milp_ray.search.searcher import KeepWorkers

if TYPE_CHECKING:
    from milp_ray.config.search import EarlyStoppingSection


class RungScheduler(KeepWorkers):
    """Lets a trial go on from a rung when it is in the best 1/η of those that have reached the rung so far.

    Every trial counts, whether it runs, was stopped or has completed, the one being judged included. A trial
    that is measured again (after a lost worker) takes the place of its own earlier record.

    The searcher is told of a stopped trial as of any other that ended, by ``on_trial_complete`` with the last
    result, which here is a rung's: it has the key :data:`milp_ray.search.rungs.RUNG` and no final values.

    Args:
        n_workers: idle workers that are kept for the next trials.
        section: η, and how many records a rung needs before a trial is stopped there.
        objectives: names of the study's objectives; see :meth:`RungRecord.objectives`.
        records: what earlier sessions of the study saw.
        on_rung: called with every record as it comes, before the trial is judged.
    """

    def __init__(
        self,
        n_workers: int,
        section: EarlyStoppingSection,
        objectives: Sequence[str],
        records: Iterable[RungRecord] = (),
        *,
        on_rung: Callable[[RungRecord], None] | None = None,
    ) -> None:
        super().__init__(n_workers)
        self._section = section
        self._objectives = tuple(objectives)
        self._on_rung = on_rung
        self._rungs: dict[int, dict[int, tuple[float, ...]]] = {}  # rung → trial → values
        self._n_stopped = 0
        for record in records:
            self._add(record)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Judge a trial that has reached a rung."""
        if RUNG not in result:
            return str(TrialScheduler.CONTINUE)
        record = RungRecord.from_dict(result, trial=trial.config["trial"])
        self._add(record)
        if self._on_rung is not None:
            self._on_rung(record)
        if self._goes_on(record):
            return str(TrialScheduler.CONTINUE)
        self._n_stopped += 1
        return str(TrialScheduler.STOP)

    def debug_string(self) -> str:
        """One line for Tune's reports."""
        counts = ", ".join(f"{len(trials)} at rung {rung}" for rung, trials in sorted(self._rungs.items()))
        return f"Early stopping: {counts or 'no rung reached'}; {self._n_stopped} stopped"

    def __getstate__(self) -> dict[str, Any]:
        """Without the callback: Tune pickles it for a restore, which is not how studies resume."""
        return {**self.__dict__, "_on_rung": None}

    def _add(self, record: RungRecord) -> None:
        self._rungs.setdefault(record.rung, {})[record.trial] = record.objectives(self._objectives)

    def _goes_on(self, record: RungRecord) -> bool:
        records = self._rungs[record.rung]
        return len(records) < self._section.min_records or promoted(records, record.trial, self._section.eta)
