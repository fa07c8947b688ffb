"""Make every user's adapter under one layout: on Ray, in parallel, and never the same one twice.

A user is finished when the store holds a sound adapter of the same fingerprint (layout, training, prompts,
base, seed and the user's own data). So a run that was killed goes on with the same command, and after new
data only the users that it concerns are trained again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.personalize.pool import MOST_AT_ONCE, Outcome, WorkerPool
from milp_ray.personalize.provenance import Provenance
from milp_ray.personalize.recipe import Recipe, fingerprint
from milp_ray.personalize.store import AdapterStore, hash_id, run_store
from milp_ray.progress import Progress, progress
from milp_ray.telemetry import log_event, ray_session

if TYPE_CHECKING:
    from milp_ray.config import BaseSection, PersonalizeSection, RaySection, TrainingSection
    from milp_ray.rundir import RunFolder
    from milp_ray.training.base import Base
    from milp_ray.training.job import JobResult
    from milp_ray.users.records import UserSplit

STAGE = "personalize"
_PACKS_AT_ONCE = 4


@dataclass(slots=True)
class BatchSummary:
    """Counts of one call: users made anew, users that were finished before, and users that failed."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    retried: int = 0  # users whose worker was lost and that were tried again
    steps: int = 0
    tokens: int = 0
    bytes: int = 0  # of the adapters made
    training_seconds: float = 0.0  # of all workers together
    seconds: float = 0.0  # on the clock
    peak_rss_mib: float = 0.0  # of the largest worker
    interrupted: bool = False

    @property
    def n_users(self) -> int:
        """Users that were looked at."""
        return self.done + self.skipped + self.failed

    def to_dict(self) -> dict[str, Any]:
        """The counts in plain types."""
        return {"n_users": self.n_users, **asdict(self)}


class BatchInterrupted(KeyboardInterrupt):
    """Ctrl-C during the batch; ``summary`` counts what is done, which is kept."""

    def __init__(self, summary: BatchSummary) -> None:
        super().__init__(
            f"interrupted: {summary.done} adapters made, {summary.skipped} were finished before; "
            "the same command goes on from here"
        )
        self.summary = summary


def worker_pool(base: BaseSection, section: PersonalizeSection, ray: RaySection) -> WorkerPool:
    """A pool whose workers hold the base: for this stage and, left open, for the ones after it."""
    return WorkerPool(partial(_load_base, base), section=section, threads=ray.threads_per_worker, name="milp")


def users_at_once(training: TrainingSection) -> int:
    """Users that a worker is given at a time: several packs, so that free slots are filled again."""
    return _PACKS_AT_ONCE * training.pack_size if training.pack_size else MOST_AT_ONCE


def personalize(
    run: RunFolder,
    splits: Iterable[UserSplit],
    recipe: Recipe,
    *,
    section: PersonalizeSection,
    ray: RaySection,
    pool: WorkerPool | None = None,
) -> BatchSummary:
    """Train and publish the adapter of every user that does not have it yet.

    Args:
        run: adapters go to ``section.store``, or ``run.adapters``; users that fail to ``run.failed_file``
            with the reason, which never quotes their text.
        splits: users; an iterator is read at most a few thousand ahead of the workers.
        recipe: layout, base, training, prompts and seed, the same for everybody.
        section: how many workers, what each is given, how often a lost worker's user is tried again.
        ray: the cluster; a session that is open is used.
        pool: one of :func:`worker_pool` that is open, to pay once for several stages.

    Raises:
        MilpError: the layout is empty, the store cannot be written, or no worker can load the base.
        BatchInterrupted: on Ctrl-C; what is done is kept.
    """
    if recipe.layout.is_empty:
        raise MilpError(
            "the chosen layout is the empty one (no layer carries a LoRA): there is nothing to train; choose "
            "another layout of the front, for example with choice.rule=best_loss"
        )
    store = run_store(run.adapters, section)
    store.check()
    with ExitStack() as stack:
        bar = stack.enter_context(progress(STAGE, _length(splits), unit="users"))
        failures = stack.enter_context(_Failures(run.failed_file))
        batch = _Batch(store, recipe, bar, failures)
        pending = batch.pending(splits)
        started = time.perf_counter()
        try:
            first = next(pending, None)
            if first is not None:
                if pool is None:
                    stack.enter_context(ray_session(ray))
                    pool = stack.enter_context(worker_pool(recipe.base, section, ray))
                # One worker loads its base while the other users are looked through; how many are needed
                # is known only then.
                pool.start(1)
                batch.run(pool, _chain(first, pending))
        except KeyboardInterrupt:
            batch.summary.interrupted = True
            raise BatchInterrupted(batch.summary) from None
        finally:
            batch.summary.seconds = time.perf_counter() - started
            log_event("personalized", **batch.summary.to_dict())
    return batch.summary


@dataclass(frozen=True, slots=True)
class Item:
    """One user on the way to a worker."""

    split: UserSplit
    fingerprint: str
    parts: frozenset[str]

    @property
    def size(self) -> int:
        """Characters to train on: longer users are begun first."""
        turns = sum(len(turn.text) for turn in self.split.history)
        return turns + sum(len(e.query) + len(e.response) for e in self.split.train)


class _Batch:
    """The users of one call on their way through, and the counts."""

    def __init__(self, store: AdapterStore, recipe: Recipe, bar: Progress, failures: _Failures) -> None:
        self.summary = BatchSummary()
        self._store = store
        self._recipe = recipe
        self._bar = bar
        self._failures = failures

    def pending(self, splits: Iterable[UserSplit]) -> Iterator[Item]:
        """Users that are to be trained; the others are counted as they come by."""
        digest = self._recipe.digest()
        seen: set[bytes] = set()
        for split in splits:
            key = bytes.fromhex(hash_id(split.user_id))
            parts = self._recipe.parts(split)
            if key in seen:
                self._fail(split.user_id, "DuplicateUser", "the user id occurs more than once")
            elif not parts:
                self._fail(split.user_id, "NoData", _nothing_to_train(split))
            elif self._store.has(split.user_id, made_from := fingerprint(digest, split)):
                self.summary.skipped += 1
                self._bar.advance(note=self._note())
            else:
                yield Item(split, made_from, parts)
            seen.add(key)

    def run(self, pool: WorkerPool, items: Iterable[Item]) -> None:
        """Train every item and count what becomes of it."""
        function = partial(_make_adapters, self._store, self._recipe)
        at_once = users_at_once(self._recipe.training)
        for outcome in pool.map(
            function, items, key=lambda i: i.split.user_id, size=lambda i: i.size, at_once=at_once
        ):
            self._count(outcome)

    def _count(self, outcome: Outcome) -> None:
        summary = self.summary
        summary.retried += outcome.attempts > 1
        if outcome.failed:
            self._fail(outcome.key, str(outcome.error), str(outcome.reason), outcome.attempts)
            return
        made: dict[str, Any] = outcome.value
        summary.done += 1
        summary.steps += made["steps"]
        summary.tokens += made["tokens"]
        summary.bytes += made["bytes"]
        summary.training_seconds += made["seconds"]
        summary.peak_rss_mib = max(summary.peak_rss_mib, made["peak_rss_mib"])
        self._bar.advance(note=self._note())
        log_event("adapter_made", user=outcome.key, worker=outcome.worker, seconds=round(outcome.seconds, 3))

    def _fail(self, user_id: str, error: str, reason: str, attempts: int = 0) -> None:
        self.summary.failed += 1
        self._failures.add(user_id, error, reason, attempts)
        self._bar.advance(note=self._note())
        log_event("user_failed", user=user_id, error=error, attempts=attempts)

    def _note(self) -> str:
        counts = {"finished before": self.summary.skipped, "failed": self.summary.failed}
        return ", ".join(f"{n} {what}" for what, n in counts.items() if n)


class _Failures:
    """``failed.jsonl``: the failed users of the latest call, a line each as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Failures:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, user_id: str, error: str, reason: str, attempts: int) -> None:
        """Write one line."""
        line = {"user_id": user_id, "error": error, "reason": reason, "attempts": attempts}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _load_base(section: BaseSection) -> Base:
    """Load the base in a worker; what training needs is imported while the worker starts, not by a user."""
    import milp_ray.training.train  # noqa: F401
    from milp_ray.training.base import load_base

    return load_base(section)


def _make_adapters(
    store: AdapterStore,
    recipe: Recipe,
    base: Base,
    items: Sequence[Item],
    report: Callable[[int, Any], None],
) -> None:
    """Train some users' adapters in a worker and publish each as it ends; only small numbers go back."""
    from milp_ray.training.job import Job
    from milp_ray.training.train import train

    places: dict[str, int] = {}
    jobs: list[Job] = []
    for place, item in enumerate(items):
        user_id = item.split.user_id
        if store.has(user_id, item.fingerprint):
            # An earlier worker was lost after it had published and before its reply arrived.
            report(place, _made(store, user_id))
            continue
        job_id, seed = hash_id(user_id), recipe.seed_of(user_id)
        places[job_id] = place
        jobs.append(Job(job_id, item.split, recipe.layout, item.parts, seed))

    digest = recipe.digest()

    def ended(result: JobResult) -> None:
        place = places[result.job_id]
        made_from = Provenance.of(digest, items[place].split)
        try:
            publish(store, recipe, base, items[place], result, made_from)
        except MilpError as error:
            report(place, error)
        else:
            report(place, _made(store, items[place].split.user_id))

    train(
        base,
        jobs,
        recipe.training,
        recipe.prompt,
        on_result=ended,
        on_failure=lambda job_id, error: report(places[job_id], error),
    )


def publish(
    store: AdapterStore,
    recipe: Recipe,
    base: Base,
    item: Item,
    result: JobResult,
    made_from: Provenance,
    more: Mapping[str, Any] | None = None,
) -> int:
    """Publish what training returned for a user; the version's number.

    ``made_from`` is what the weights were trained on, ``more`` further facts for the manifest.

    Raises:
        MilpError: the weights are not finite.
    """
    if result.adapter is None:
        raise RuntimeError("training returned no adapter for a layout that is not empty")
    if not all(bool(tensor.isfinite().all()) for tensor in result.adapter.tensors.values()):
        raise MilpError(
            "training diverged: weights are not finite; lower training.learning_rate or training.lora_alpha"
        )
    meta = {
        "seed": recipe.seed_of(item.split.user_id),
        "base": base.model_id,
        "revision": base.revision,
        "parts": sorted(item.parts),
        "n_turns": len(item.split.history),
        "n_train": len(item.split.train),
        "validation_loss": _finite(result.validation_loss),
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
        "peak_rss_mib": round(result.peak_rss_mib, 1),
        "curve": [{k: _finite(v) for k, v in point.items()} for point in result.curve],
        "made_from": made_from.to_dict(),
        **(more or {}),
    }
    return store.publish(item.split.user_id, result.adapter, meta, fingerprint=item.fingerprint)


def _made(store: AdapterStore, user_id: str) -> dict[str, Any]:
    manifest = store.manifest(user_id)
    numbers = {name: manifest.meta[name] for name in ("steps", "tokens", "seconds", "peak_rss_mib")}
    return {"version": manifest.version, "bytes": manifest.n_bytes, **numbers}


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: ``None`` stands for both."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nothing_to_train(split: UserSplit) -> str:
    if not split.history and not split.train:
        return "the user has neither a history nor training examples: there is nothing to train on"
    return (
        f"the user has {len(split.history)} turns and {len(split.train)} training examples, but the epochs "
        "of the parts that they are for are 0; raise training.memory_epochs or training.instruction_epochs"
    )


def _length(splits: Iterable[UserSplit]) -> int | None:
    return len(splits) if isinstance(splits, Sized) else None


def _chain(first: Item, rest: Iterator[Item]) -> Iterator[Item]:
    yield first
    yield from rest
