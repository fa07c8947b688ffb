"""The stage that continues users' adapters with what is new, on the batch's workers.

A user is up to date when the store holds a sound adapter of the same fingerprint, however it was made, whose
period has not ended; so a killed update goes on with the same command, and users without news cost one look
at their manifest.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.personalize.batch import started_workers, users_at_once
from milp_ray.personalize.governance.stores import remember_store
from milp_ray.personalize.intake import Item
from milp_ray.personalize.recipe import Maker, Recipe
from milp_ray.personalize.store import (
    AdapterDamagedError,
    AdapterMissingError,
    AdapterStore,
    hash_id,
    run_store,
)
from milp_ray.personalize.update.journal import FAILED, KEPT, Journal, decision_of
from milp_ray.personalize.update.plan import Anew, Continue, plan_of
from milp_ray.personalize.update.summary import OUTCOMES, UpdateSummary
from milp_ray.personalize.update.worker import Task, update_adapters
from milp_ray.progress import Progress, progress
from milp_ray.telemetry import log_event

if TYPE_CHECKING:
    from milp_ray.config.cluster import RaySection
    from milp_ray.config.personalize import PersonalizeSection
    from milp_ray.config.update import UpdateSection
    from milp_ray.personalize.pool import Outcome, WorkerPool
    from milp_ray.personalize.recipe import Made
    from milp_ray.rundir import RunFolder
    from milp_ray.users.records import UserSplit

STAGE = "update"
_MOST_AT_ONCE = 32  # users of a worker whose old and new weights wait for the guard at a time


class UpdateInterrupted(KeyboardInterrupt):
    """Ctrl-C during an update; ``summary`` counts what is done, which is kept."""

    def __init__(self, summary: UpdateSummary) -> None:
        users = summary.users
        super().__init__(
            f"interrupted: {users['updated']} adapters updated, {users['anew']} made anew, "
            f"{users['kept']} old versions kept; the same command goes on from here"
        )
        self.summary = summary


def update(
    run: RunFolder,
    splits: Iterable[UserSplit],
    recipe: Recipe,
    *,
    section: UpdateSection,
    personalize: PersonalizeSection,
    ray: RaySection,
    pool: WorkerPool | None = None,
) -> UpdateSummary:
    """Bring users' adapters up to date with their data.

    A user with news has the current version continued: trained on what is new (and a sample of what was
    before, as ``section.data`` says), from the version's weights. Where that costs more than
    ``section.guard.tolerance`` on what was held out from the version, the version stays. A user without an
    adapter, or whose adapter has expired, or whose earlier data or whose recipe has changed, has one made
    from the beginning.

    Args:
        run: its store is updated; who keeps an old version or fails goes to ``run.updates_file`` with the
            reason, which never quotes their text.
        splits: users with their data as it is now.
        recipe: of all adapters.
        section: how adapters are continued.
        personalize: the store, the workers.
        ray: the cluster; a session that is open is used. None is opened where there is nothing to do.
        pool: one of :func:`milp_ray.personalize.batch.worker_pool` that is open.

    Raises:
        MilpError: the layout is empty, the store cannot be written, or no worker can load the base.
        UpdateInterrupted: on Ctrl-C; what is done is kept.
    """
    if recipe.layout.is_empty:
        raise MilpError(
            "the chosen layout is the empty one (no layer carries a LoRA): there is no adapter to update; "
            "choose another layout of the front, for example with choice.rule=best_loss"
        )
    store = run_store(run.store, personalize)
    store.check()
    remember_store(run, store)
    with ExitStack() as stack:
        bar = stack.enter_context(
            progress(STAGE, len(splits) if isinstance(splits, Sized) else None, unit="users")
        )
        journal = stack.enter_context(Journal(run.updates_file))
        work = _Update(store, recipe, section, journal, bar)
        pending = work.pending(splits)
        started = time.perf_counter()
        try:
            first = next(pending, None)
            if first is not None:
                workers = stack.enter_context(started_workers(pool, recipe.base, personalize, ray))
                work.run(workers, chain([first], pending))
        except KeyboardInterrupt:
            work.summary.interrupted = True
            raise UpdateInterrupted(work.summary) from None
        finally:
            work.summary.seconds = time.perf_counter() - started
            log_event("updated", **{k: v for k, v in work.summary.to_dict().items() if k != "reasons"})
    return work.summary


class _Update:
    """The users of one call on their way through."""

    def __init__(
        self,
        store: AdapterStore,
        recipe: Recipe,
        section: UpdateSection,
        journal: Journal,
        bar: Progress,
    ) -> None:
        self.summary = UpdateSummary()
        self._store = store
        self._recipe = recipe
        self._section = section
        self._journal = journal
        self._bar = bar
        self._decisions: dict[str, str] = {}  # of users on the way to a worker

    def pending(self, splits: Iterable[UserSplit]) -> Iterator[Task]:
        """Users with something to do; the others are counted as they come by."""
        maker = Maker(self._recipe)
        seen: set[bytes] = set()
        for split in splits:
            key = bytes.fromhex(hash_id(split.user_id))
            if key in seen:
                self._fail(split.user_id, "DuplicateUser", "the user id occurs more than once")
            elif (task := self._task(split, maker)) is not None:
                yield task
            seen.add(key)

    def _task(self, split: UserSplit, maker: Maker) -> Task | None:
        """What is to be done for a user; ``None`` where that is nothing, or was refused before."""
        made = maker.of(split)
        plan = self._plan(split, made)
        if plan is None:
            return None
        item = Item(split, made, self._recipe.parts(split))
        if isinstance(plan, Anew) and not item.parts:
            self._fail(split.user_id, "NoData", "the user has no history and no examples to train on")
            return None
        return Task(item, plan)

    def _plan(self, split: UserSplit, made: Made) -> Anew | Continue | None:
        """What the store's version is to be brought up to date by; ``None``, and counted, as above."""
        user_id, made_from = split.user_id, made.fingerprint
        try:
            manifest = self._store.verify(user_id)
        except AdapterMissingError:
            return Anew("the user had no adapter")
        except AdapterDamagedError:
            return Anew("the stored version is damaged")
        if self._store.is_expired(manifest):
            return Anew("the stored version has expired")  # also where an update of it was refused
        if manifest.fingerprint == made_from:
            self._journal.drop(user_id)
            self._count("unchanged")
            return None
        decision = decision_of(manifest.version, made_from, self._section)
        refused = self._journal.kept(user_id, decision)
        if refused is not None:
            self._count(KEPT, str(refused["reason"]))
            return None
        self._decisions[user_id] = decision
        return plan_of(split, manifest, made.digest)

    def run(self, pool: WorkerPool, tasks: Iterable[Task]) -> None:
        """Work on every task and count what becomes of it."""
        for outcome in pool.map(
            partial(update_adapters, self._store, self._recipe, self._section),
            tasks,
            key=lambda task: task.user_id,
            size=lambda task: task.size,
            at_once=min(users_at_once(self._recipe.training), _MOST_AT_ONCE),
        ):
            self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        self.summary.retried += outcome.attempts > 1
        user_id = outcome.key
        decision = self._decisions.pop(user_id, "")
        if outcome.failed:
            self._fail(user_id, str(outcome.error), str(outcome.reason), outcome.attempts)
            return
        made: dict[str, Any] = outcome.value
        if made["outcome"] == KEPT:
            facts = {name: made[name] for name in ("version", "fingerprint", "n_new", "n_replayed", "guard")}
            self._journal.add(user_id, KEPT, made["reason"], **facts, decision=decision)
        else:
            self._journal.drop(user_id)
        log_event("user_updated", user=hash_id(user_id), outcome=made["outcome"], version=made["version"])
        self._count(made["outcome"], made["reason"], made)

    def _fail(self, user_id: str, error: str, reason: str, attempts: int = 0) -> None:
        self._journal.add(user_id, FAILED, reason, error=error, attempts=attempts)
        log_event("user_failed", user=hash_id(user_id), error=error, attempts=attempts)
        self._count(FAILED, reason)

    def _count(self, outcome: str, reason: str | None = None, made: dict[str, Any] | None = None) -> None:
        self.summary.count(outcome, reason, made)
        counts = ((self.summary.users[name], label) for name, label in OUTCOMES.items() if name != "updated")
        self._bar.advance(note=", ".join(f"{n} {label}" for n, label in counts if n))
