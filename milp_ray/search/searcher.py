"""Tune's side of a study: a searcher that passes on to the conductor, and two helpers that Tune needs.

State lives in the journal alone: Tune's own saves of the searcher are empty on purpose.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from milp_ray.search.measure import BEGAN
from milp_ray.search.results import METRICS
from milp_ray.search.rungs import RUNG
from milp_ray.search.trial import FAILED, TrialFailed

if TYPE_CHECKING:
    from milp_ray.search.conductor import Conductor
    from milp_ray.search.trial_host import Seats

_PER_USER = "per_user"


class LayoutSearcher(Searcher):
    """Hands the conductor's trials to Tune and their ends back; never computes a proposal itself.

    No metric is declared: a failed trial reports none, and what is optimised is the conductor's business.
    Trials that Tune names but this process did not suggest are ignored, as is a second end of one. Where
    trials share processes, ``seats`` says at which of them a trial is.
    """

    def __init__(self, conductor: Conductor, seats: Seats | None = None) -> None:
        super().__init__(metric=None, mode=None)
        self._conductor = conductor
        self._seats = seats
        self._index: dict[str, int] = {}  # Tune's trial id → ours
        self._unexplained: set[str] = set()  # errored; the reason comes by another way, a moment later
        self.max_block_seconds = 0.0  # the longest that Tune's controller, which calls this, had to wait
        self.failure: Exception | None = None  # of the conductor: the study cannot go on

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """The conductor limits concurrency itself; Tune's limiter would lose results of resumed trials."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next trial's config; ``None``: ask again later; FINISHED: there are no more."""
        self._explain_leftovers()
        with self._controller_waits():
            trial = self._conductor.next_trial()
        if trial is None:
            return None
        if trial == "finished":
            return Searcher.FINISHED
        self._index[trial_id] = trial.index
        config = {"trial": trial.index, "key": trial.layout.key, "layout": trial.layout.to_dict()}
        return config if self._seats is None else {**config, "host": self._seats.take(trial.index)}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record the end of a trial; ``error`` comes once, after Tune's last retry."""
        if trial_id not in self._index:
            return
        if self._seats is not None:
            self._seats.leave(self._index[trial_id])
        if error or result is None:
            self._unexplained.add(trial_id)
            return
        index = self._index.pop(trial_id)
        with self._controller_waits():
            if FAILED in result:
                self._conductor.fail(index, str(result[FAILED]))
            elif RUNG in result:  # the last that a trial has reported which the scheduler stopped
                seconds = float(result["seconds_at_rung"])
                self._conductor.stop(index, int(result[RUNG]), int(result["epoch"]), seconds)
            else:
                self._conductor.complete(index, reported(result))

    def give_back(self, trial_id: str) -> bool:
        """Let a trial that errored wait to be run again; whether that is done."""
        if trial_id not in self._unexplained or not self._conductor.give_back(self._index[trial_id]):
            return False
        self._unexplained.discard(trial_id)
        del self._index[trial_id]
        return True

    def explain_error(self, trial_id: str, reason: str) -> None:
        """Record why a trial errored for good."""
        if trial_id in self._unexplained:
            self._unexplained.discard(trial_id)
            with self._controller_waits():
                self._conductor.fail(self._index.pop(trial_id), reason)

    def finish(self) -> None:
        """Record what is still unexplained once Tune has ended, and the longest wait."""
        self._explain_leftovers()
        self._conductor.end_session(round(self.max_block_seconds, 4))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a study is resumed from its journal."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the conductor: Tune pickles its searcher for a restore, which is not how studies resume."""
        return {**self.__dict__, "_conductor": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> LayoutSearcher:
        """Itself: there is one journal."""
        return self

    @contextmanager
    def _controller_waits(self) -> Iterator[None]:
        """Measure for how long Tune's controller, which does nothing else meanwhile, waits in here."""
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error
            raise
        finally:
            self.max_block_seconds = max(self.max_block_seconds, time.perf_counter() - started)

    def _explain_leftovers(self) -> None:
        for trial_id in sorted(self._unexplained):
            self.explain_error(trial_id, "the trial ended with an error")


def reported(result: Mapping[str, Any]) -> dict[str, Any]:
    """The trial's own part of Tune's result, without Tune's bookkeeping and not flattened (``a/b``)."""
    prefix = f"{_PER_USER}/"
    per_user = result.get(_PER_USER) or {
        name.removeprefix(prefix): values for name, values in result.items() if name.startswith(prefix)
    }
    kept = {name: result[name] for name in (*METRICS, BEGAN) if name in result}
    return {**kept, _PER_USER: per_user}


class ErrorReasons(tune.Callback):
    """Tells the searcher why a trial errored, which Tune tells callbacks only.

    Tune tries a trial again that loses its process, ``max_failures`` times, but not one that is given to an
    idle process which is gone already, as all of a node's are after the node's end. That one is given back.
    """

    def __init__(self, searcher: LayoutSearcher, max_failures: int = 0) -> None:
        self._searcher = searcher
        self._max_failures = max_failures

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called after the searcher's ``on_trial_complete(error=True)``."""
        error = _error_of(trial)
        is_lost = isinstance(error, RayActorError)
        may_go_on = is_lost and trial.run_metadata.num_failures <= self._max_failures
        if may_go_on and self._searcher.give_back(trial.trial_id):
            return
        self._searcher.explain_error(trial.trial_id, error_reason(error))


def _error_of(trial: Any) -> BaseException | None:
    """What a trial ended with; Tune itself looks where it copies that to from time to time only."""
    written = getattr(trial, "pickled_error_file", None)
    if written is not None and Path(written).exists():
        error: BaseException = cloudpickle.loads(Path(written).read_bytes())
        return error
    found: BaseException | None = trial.get_pickled_error()
    return found


class FailureStops(tune.Stopper):
    """Ends the search when the conductor has failed.

    What fails as a trial ends Tune takes for that trial's failure, and runs the trial again.
    """

    def __init__(self, searcher: LayoutSearcher) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped for what it reports."""
        return False

    def stop_all(self) -> bool:
        """Whether the search cannot go on."""
        return self._searcher.failure is not None


class KeepWorkers(FIFOScheduler):
    """First in, first out, and idle workers are kept until the search ends.

    Between two batches no trial waits, and Tune then keeps one idle worker and ends the others, each of which
    has cost seconds of imports and a loaded base. Raising what its cache may hold keeps them. The cache is
    not part of Tune's interface: where it is not found, workers are started anew, and nothing else changes.
    """

    def __init__(self, n_workers: int) -> None:
        super().__init__()
        self._n_workers = n_workers
        self._is_raised = False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Raise the cache's limit when the first trial comes."""
        if not self._is_raised:
            self._is_raised = True
            # Schedulers are handed a wrapper that warns of what is not meant for them.
            controller = vars(tune_controller).get("_tune_controller", tune_controller)
            cache = getattr(controller, "_actor_cache", None)
            if cache is not None and hasattr(cache, "increase_max"):
                cache.increase_max(trial.placement_group_factory, by=self._n_workers)
        super().on_trial_add(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any, **_: Any) -> None:
        """None: Tune starts trials that wait in their order by itself.

        FIFO would look all trials through at every step; and to one that is chosen here Tune would give the
        next worker that becomes free, and end the process that is starting for it.
        """


def error_reason(error: BaseException | None) -> str:
    """A trial's error in words, without any text of a user: ours in full, others by their class."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else error
    if isinstance(cause, TrialFailed):
        return str(cause)
    return type(cause).__name__ if cause is not None else "the trial ended with an error"
