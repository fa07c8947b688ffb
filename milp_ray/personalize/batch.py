"""Make every user's adapter: on Ray, in parallel, and never the same one twice.

A user is finished when the store holds a sound adapter of the same fingerprint (layout, training, prompts,
base, seed and the user's own data). So a run that was killed goes on with the same command, and after new
data only the users that it concerns are trained again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.gauges import Gauges
from milp_ray.personalize.governance.stores import remember_store
from milp_ray.personalize.intake import Intake
from milp_ray.personalize.making import load_worker_base, make_adapters
from milp_ray.personalize.pool import MOST_AT_ONCE, WorkerPool
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.store import AdapterStore, run_store
from milp_ray.personalize.tally import BatchSummary, Tally
from milp_ray.personalize.worker import safe_reason
from milp_ray.progress import progress
from milp_ray.telemetry import log_event, ray_session

if TYPE_CHECKING:
    from milp_ray.config.base import BaseSection
    from milp_ray.config.cluster import RaySection
    from milp_ray.config.personalize import PersonalizeSection
    from milp_ray.config.training import TrainingSection
    from milp_ray.config.users import SplitSection
    from milp_ray.personalize.governance.consent import Gate
    from milp_ray.rundir import RunFolder
    from milp_ray.users.problems import Problem
    from milp_ray.users.records import UserSplit
    from milp_ray.users.stream import UserStream

__all__ = [
    "BatchInterrupted",
    "BatchSummary",
    "StreamedSplits",
    "personalize",
    "started_workers",
    "users_at_once",
    "worker_pool",
]

STAGE = "personalize"
_PACKS_AT_ONCE = 4
_RECORDS_BETWEEN_ESTIMATES = 100


class BatchInterrupted(KeyboardInterrupt):
    """Ctrl-C during the batch; ``summary`` counts what is done, which is kept."""

    def __init__(self, summary: BatchSummary) -> None:
        super().__init__(
            f"interrupted: {summary.done} adapters made, {summary.skipped} were finished before; "
            "the same command goes on from here"
        )
        self.summary = summary


class StreamedSplits:
    """The users of a stream, each split in time order when its turn comes and checked to leak nothing.

    ``digest`` is of those that may be trained: who was forgotten or withdrew consent is not in it.

    Args:
        stream: where they come from; it is read once.
        section: the shares of a user's examples.
        gate: who may be trained; who may not be is counted there, and noted if ``store`` has their adapter.
        store: the run's.
    """

    def __init__(self, stream: UserStream, section: SplitSection, gate: Gate, store: AdapterStore) -> None:
        from milp_ray.users.readers import DatasetDigest

        self.stream = stream
        self.digest = DatasetDigest()
        self.n_unserved = 0  # users that have an adapter and may not be served
        self._section = section
        self._gate, self._store = gate, store

    def __iter__(self) -> Iterator[UserSplit | Problem]:
        from milp_ray.users.problems import Problem
        from milp_ray.users.splits import check_no_leak, split_user

        for user in self.stream:
            if isinstance(user, Problem):
                if self._gate.is_about_forgotten(user):
                    continue  # the list of failures would bring the id back into the run
                self.n_unserved += self._gate.note_file([], [user], self._store)
                yield user
                continue
            self.n_unserved += self._gate.note_file([user], [], self._store)
            for admitted in self._gate.admit([user]):
                self.digest.add(self._gate.remaining(admitted))
                try:
                    split = self._gate.trimmed(split_user(admitted, self._section))
                    check_no_leak(split)
                except Exception as error:  # whatever it is, it is this user's, and the others go on
                    yield Problem("record", self.stream.n_records, safe_reason(error), user.user_id)
                else:
                    yield split


def worker_pool(base: BaseSection, section: PersonalizeSection, ray: RaySection) -> WorkerPool:
    """A pool whose workers hold the base: for this stage and, left open, for the ones after it."""
    load = partial(load_worker_base, base, section.gpus_per_worker or 1.0)
    return WorkerPool(load, section=section, threads=ray.threads_per_worker, name="milp")


@contextmanager
def started_workers(
    pool: WorkerPool | None, base: BaseSection, section: PersonalizeSection, ray: RaySection
) -> Iterator[WorkerPool]:
    """``pool``, or one for this stage alone in a Ray session, whose first worker starts.

    It loads its base while the other users are looked through; how many workers are needed is known only
    then.
    """
    with ExitStack() as stack:
        if pool is None:
            stack.enter_context(ray_session(ray))
            pool = stack.enter_context(worker_pool(base, section, ray))
        pool.start(1)
        yield pool


def users_at_once(training: TrainingSection, n_candidates: int = 1) -> int:
    """Users that a worker is given at a time: several packs, so that free slots are filled again.

    ``n_candidates`` layouts race for each of them.
    """
    n_jobs = _PACKS_AT_ONCE * training.pack_size if training.pack_size else MOST_AT_ONCE
    return max(1, n_jobs // n_candidates)


def personalize(
    run: RunFolder,
    splits: Iterable[UserSplit | Problem],
    recipe: Recipe,
    *,
    section: PersonalizeSection,
    ray: RaySection,
    pool: WorkerPool | None = None,
    gauges: Gauges | None = None,
) -> BatchSummary:
    """Train and publish the adapter of every user that does not have it yet.

    Args:
        run: adapters go to ``section.store``, or ``run.adapters``; users that fail to ``run.failed_file``
            with the reason, which never quotes their text.
        splits: users, and records that are none; an iterator is read at most a few thousand ahead of the
            workers (:data:`milp_ray.personalize.hands.LOOKAHEAD`).
        recipe: layout or the rule for it, base, training, prompts and seed, the same for everybody.
        section: how many workers, what each is given, how often a lost worker's user is tried again.
        ray: the cluster; a session that is open is used.
        pool: one of :func:`worker_pool` that is open, to pay once for several stages.
        gauges: where it is told how far the batch is.

    Raises:
        MilpError: the layout is empty, no worker can load the base, the store cannot be written, or the users
            cannot be read.
        BatchInterrupted: on Ctrl-C; what is done is kept.
    """
    if recipe.layout.is_empty:
        raise MilpError(
            "the chosen layout is the empty one (no layer carries a LoRA): there is nothing to train; choose "
            "another layout of the front, for example with choice.rule=best_loss"
        )
    store = run_store(run.store, section)
    store.check()
    remember_store(run, store)
    with ExitStack() as stack:
        bar = stack.enter_context(progress(STAGE, _length(splits), unit="users", pace=True))
        tally = stack.enter_context(Tally(run.failed_file, bar, gauges))
        tally.expect(_length(splits))
        intake = Intake(store, recipe, tally, max_characters=section.max_characters)
        pending = intake.items(_with_progress(splits, tally))
        started = time.perf_counter()
        try:
            first = next(pending, None)
            if first is not None:
                workers = stack.enter_context(started_workers(pool, recipe.base, section, ray))
                outcomes = workers.map(
                    partial(make_adapters, store, recipe),
                    chain([first], pending),
                    key=lambda item: item.split.user_id,
                    size=lambda item: item.size,
                    at_once=users_at_once(recipe.training, recipe.n_candidates),
                )
                for outcome in outcomes:
                    tally.ended(outcome)
            for user_id in intake.revoked:
                store.delete(user_id)
        except KeyboardInterrupt:
            tally.summary.interrupted = True
            raise BatchInterrupted(tally.summary) from None
        finally:
            tally.summary.seconds = time.perf_counter() - started
            counts = tally.summary.to_dict()
            told = {name: n for name, n in counts.items() if name not in ("reasons", "layouts")}
            log_event("personalized", **told)
    return tally.summary


def _with_progress(splits: Iterable[UserSplit | Problem], tally: Tally) -> Iterator[UserSplit | Problem]:
    """The users as they are; how many of a stream there will be is told from time to time."""
    stream = splits.stream if isinstance(splits, StreamedSplits) else None
    for n, split in enumerate(splits):
        yield split
        if stream is not None and n % _RECORDS_BETWEEN_ESTIMATES == 0:
            tally.expect(stream.expected_records())
    if stream is not None:
        tally.expect(stream.expected_records())


def _length(splits: Iterable[UserSplit | Problem]) -> int | None:
    return len(splits) if isinstance(splits, Sized) else None
