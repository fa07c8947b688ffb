"""The stage that scores every method on every user's held-out queries, on the pool's workers.

Finished users are kept in parts as the stage goes, so that a stage that was killed goes on with the same
call, and at the end merged into one scores file. That file remembers what each user's rows were made from:
a rerun scores only the users for whom something has changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.config.methods import MethodsSection
from milp_ray.errors import MilpError
from milp_ray.evaluation.compare import compare
from milp_ray.evaluation.scores import Row, read_scores, read_users_scored, write_scores
from milp_ray.evaluation.tasks import closed_questions
from milp_ray.personalize.batch import users_at_once
from milp_ray.personalize.recipe import Maker, Recipe
from milp_ray.personalize.store import AdapterMissingError, AdapterStore, hash_id
from milp_ray.personalize.tally import count_reason
from milp_ray.personalize.update.journal import refused_updates
from milp_ray.progress import progress

if TYPE_CHECKING:
    import pyarrow as pa

    from milp_ray.config.evaluation import EvaluationSection
    from milp_ray.personalize.pool import Outcome, WorkerPool
    from milp_ray.rundir import RunFolder
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.users.records import UserSplit

STAGE = "evaluate"
FORMAT = 2  # raised when the same user and recipe would be scored differently
PARTS_FOLDER = "scores"  # in the run folder, while the stage is not finished
FAILED_FILE = "failed_evaluation.jsonl"
_PART_USERS = 64  # users a part at most
_PART_SECONDS = 20.0  # and the most work, on the clock, that a kill can cost


def evaluate(
    run: RunFolder,
    splits: Iterable[UserSplit],
    recipe: Recipe,
    section: EvaluationSection,
    *,
    pool: WorkerPool,
    store: AdapterStore | None = None,
    settings: MethodsSection | None = None,
) -> dict[str, Any]:
    """Score the methods on every user, write ``scores.parquet``, and compare.

    A user that fails is written to ``failed_evaluation.jsonl`` with the reason (never a text) and left out of
    the comparison; the others go on.

    Args:
        run: where scores and failures go.
        splits: the users.
        recipe: what their adapters are made from.
        section: which methods, and how answers are generated and compared.
        pool: open workers that hold the base (:func:`milp_ray.personalize.batch.worker_pool`).
        store: the users' adapters; ``None``: the full method trains them here.
        settings: what the methods have to set; ``None``: their defaults.

    Returns:
        What :func:`milp_ray.evaluation.compare.compare` returns, and ``n_failed``, ``failed_reasons`` (reason
        without its particulars → users), ``n_reused`` (users scored by an earlier call), ``n_without_test``,
        and ``n_kept_versions``: users whose adapter is older than their data, because the guard refused its
        update; they are scored with that adapter, which is the one that serves them.

    Raises:
        MilpError: no user could be scored.
    """
    settings = settings or MethodsSection()
    ledger = _Ledger(run, recipe, section, settings, store)
    score = partial(_score, store, recipe, section, settings)
    with progress(STAGE, len(splits) if isinstance(splits, Sized) else None, unit="users") as bar:
        with _PartWriter(run.path / PARTS_FOLDER) as parts, _Failures(run.path / FAILED_FILE) as failures:
            for outcome in pool.map(
                score,
                ledger.pending(splits, bar.advance),
                key=lambda item: item.split.user_id,
                size=_size,
                at_once=users_at_once(recipe.training),
            ):
                if outcome.failed:
                    failures.add(outcome)
                else:
                    parts.add(outcome.key, ledger.wanted[outcome.key], outcome.value)
                bar.advance(note=f"{failures.count} failed" if failures.count else None)
        ledger.merge()
    table = read_scores(run.scores_file)
    if not len(table):
        raise MilpError(_nothing_scored(failures, ledger))
    return {
        **compare(table, section, recipe.seed),
        "n_failed": failures.count,
        "failed_reasons": dict(failures.reasons),
        "n_reused": ledger.n_reused,
        "n_without_test": ledger.n_without_test,
        "n_kept_versions": ledger.n_kept_versions,
    }


@dataclass(frozen=True, slots=True)
class _Item:
    """One user on the way to a worker."""

    split: UserSplit
    adapter_fingerprint: str
    kept_version: int | None = None  # the current one, where the guard refused to bring it up to date


class _Ledger:
    """Which users are scored already, by an earlier call, and from what."""

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        section: EvaluationSection,
        settings: MethodsSection,
        store: AdapterStore | None,
    ) -> None:
        self._file = run.scores_file
        self._parts = run.path / PARTS_FOLDER
        self._maker = Maker(recipe)
        self.methods = section.methods
        self._how = [FORMAT, sorted(section.methods), section.max_new_tokens, *closed_questions(section)]
        # Without defaults, so that what is new to the package does not make scores old.
        given = settings.model_dump(mode="json", exclude_defaults=True)
        self._how += [given] if given else []
        self._scored: dict[str, set[str]] = {}
        for source in self._sources():
            for user_id, made_from in read_users_scored(source).items():
                self._scored.setdefault(user_id, set()).add(made_from)
        self.wanted: dict[str, str] = {}  # user id → fingerprint of what is to be scored
        self.n_reused = 0
        self.n_without_test = 0
        self.n_kept_versions = 0
        self._store = store if "milp" in section.methods else None
        self._refused = refused_updates(run.updates_file) if self._store is not None else {}

    def pending(self, splits: Iterable[UserSplit], on_reused: Any) -> Iterator[_Item]:
        """The users that are still to be scored."""
        for split in splits:
            if split.user_id in self.wanted:
                continue  # the same id again: the batch has recorded it as a mistake of the data
            adapter_fingerprint = self._maker.of(split).fingerprint
            kept_version = self._kept_version(split.user_id, adapter_fingerprint)
            self.wanted[split.user_id] = self._fingerprint(split, adapter_fingerprint, kept_version)
            self.n_without_test += not split.test
            self.n_kept_versions += kept_version is not None and bool(split.test)
            if self.wanted[split.user_id] in self._scored.get(split.user_id, ()):
                self.n_reused += 1
                on_reused()
            else:
                yield _Item(split, adapter_fingerprint, kept_version)

    def merge(self) -> None:
        """Make one file of what is wanted out of the earlier one and the parts."""
        sources = self._sources()
        if sources == [self._file] and read_users_scored(self._file) == self.wanted:
            return
        kept: dict[str, str] = {}
        write_scores(self._file, self._wanted_rows(sources, kept), kept)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _wanted_rows(self, sources: Sequence[Path], kept: dict[str, str]) -> Iterator[pa.Table]:
        """The rows to keep, a source at a time; ``kept`` is filled with their users on the way."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for source in sources:
            users = read_users_scored(source)
            new = [
                user
                for user, made_from in users.items()
                if self.wanted.get(user) == made_from and user not in kept
            ]
            kept.update({user: users[user] for user in new})
            table = read_scores(source)
            yield table.filter(pc.is_in(table["user_id"], value_set=pa.array(new, pa.string())))

    def _sources(self) -> list[Path]:
        parts = sorted(self._parts.glob("part-*.parquet")) if self._parts.is_dir() else []
        return [path for path in (self._file, *parts) if path.is_file()]

    def _kept_version(self, user_id: str, adapter_fingerprint: str) -> int | None:
        """The user's current version, where exactly the update to this data was refused."""
        refused = self._refused.get(hash_id(user_id))
        if self._store is None or refused is None or refused.fingerprint != adapter_fingerprint:
            return None
        # The batch may have made another one since.
        versions = self._store.versions(user_id)
        return refused.version if versions and versions[-1] == refused.version else None

    def _fingerprint(self, split: UserSplit, adapter_fingerprint: str, kept_version: int | None) -> str:
        test = [[e.query, e.response, e.kind, e.answer, sorted(e.tags.items())] for e in split.test]
        data: list[Any] = [self._how, adapter_fingerprint, split.profile, test]
        if kept_version is not None:
            data.append(kept_version)
        return hashlib.sha256(json.dumps(data).encode("ascii")).hexdigest()


class _PartWriter:
    """Keeps finished users' rows, in parts that are each written whole; also on an interruption."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[Row] = []
        self._users: dict[str, str] = {}
        self._written = time.monotonic()

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def add(self, user_id: str, made_from: str, rows: list[Row]) -> None:
        """Keep one user's rows, which may be none."""
        self._users[user_id] = made_from
        self._rows += rows
        if len(self._users) >= _PART_USERS or time.monotonic() - self._written > _PART_SECONDS:
            self._flush()

    def _flush(self) -> None:
        if self._users:
            number = sum(1 for _ in self._folder.glob("part-*.parquet")) if self._folder.is_dir() else 0
            write_scores(self._folder / f"part-{number:06d}.parquet", self._rows, self._users)
        self._rows, self._users, self._written = [], {}, time.monotonic()


class _Failures:
    """The failed users of this call, a line each as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.reasons: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Users that failed."""
        return self.reasons.total()

    def __enter__(self) -> _Failures:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self.count:
            self._path.unlink()

    def add(self, outcome: Outcome) -> None:
        """Write one line."""
        line = {
            "user_id": outcome.key,
            "error": outcome.error,
            "reason": outcome.reason,
            "attempts": outcome.attempts,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        count_reason(self.reasons, str(outcome.reason))


def _score(
    store: AdapterStore | None,
    recipe: Recipe,
    section: EvaluationSection,
    settings: MethodsSection,
    base: Base,
    items: Sequence[_Item],
    report: Callable[[int, Any], None],
) -> None:
    """Score some users; runs in a worker."""
    from milp_ray.evaluation.user import Subject, evaluate_users

    subjects: dict[int, Subject] = {}
    for place, item in enumerate(items):
        try:
            adapter = _stored(store, recipe, section, item)
        except MilpError as error:
            report(place, error)
        else:
            subjects[place] = Subject(item.split, adapter, recipe.seed_of(item.split.user_id))
    rows = evaluate_users(
        base,
        list(subjects.values()),
        section.methods,
        recipe.layout,
        recipe.training,
        recipe.prompt,
        section,
        settings=settings,
    )
    for place, own in zip(subjects, rows, strict=True):
        report(place, own)


def _stored(
    store: AdapterStore | None, recipe: Recipe, section: EvaluationSection, item: _Item
) -> Adapter | None:
    """The user's adapter, where the full method is to use it."""
    split = item.split
    if store is None or "milp" not in section.methods or not split.test or recipe.layout.is_empty:
        return None
    try:
        manifest = store.verify(split.user_id)
    except AdapterMissingError:
        # One reason for all such users, so that they are counted together.
        raise MilpError(
            "no adapter in the store: the user failed in the personalize stage, or that has not run"
        ) from None
    if manifest.fingerprint != item.adapter_fingerprint and manifest.version != item.kept_version:
        raise MilpError(
            "the stored adapter was made from another layout, recipe or data than this run's; "
            "run the personalize stage again"
        )
    return store.load(split.user_id, version=manifest.version)


def _size(item: _Item) -> int:
    """Characters to train on and to read: longer users are begun first."""
    turns = sum(len(turn.text) for turn in item.split.history)
    return turns + sum(len(example.query) for example in (*item.split.train, *item.split.test))


def _nothing_scored(failures: _Failures, ledger: _Ledger) -> str:
    if failures.count:
        reason, count = failures.reasons.most_common(1)[0]
        return f"no user could be evaluated: {failures.count} failed, {count} of them because: {reason}"
    if ledger.n_without_test < len(ledger.wanted):
        return f"{', '.join(ledger.methods)} apply to none of {len(ledger.wanted)} users; name other methods"
    return (
        f"none of {len(ledger.wanted)} users has test examples, so there is nothing to evaluate; lower "
        "users.split.train or users.split.validation, or give users more examples"
    )
