"""Show that nothing of a user is left: the run and its store, searched for the id and the contents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.evaluation.scores import read_users_scored
from milp_ray.personalize.governance.given import records_given
from milp_ray.personalize.governance.id_places import is_of_run, is_of_store
from milp_ray.personalize.governance.items import Item, items_of
from milp_ray.personalize.governance.needles import Finder, Finders, IdFinder, ItemFinder
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.governance.scan import Scan, scan_folder
from milp_ray.personalize.governance.scan_bucket import BucketScan, scan_bucket
from milp_ray.personalize.governance.stores import stores_of
from milp_ray.personalize.governance.tombstones import TombstoneFinder
from milp_ray.personalize.store.backend import local_path
from milp_ray.personalize.store.names import hash_id
from milp_ray.personalize.store.objects import ObjectBackend
from milp_ray.users.readers import file_groups, iterate_users, user_hash
from milp_ray.users.records import User
from milp_ray.users.sources import SourceMissingError, shown_source

if TYPE_CHECKING:
    from milp_ray.config.users import UsersSection
    from milp_ray.personalize.store import AdapterStore
    from milp_ray.rundir import RunFolder


@dataclass(slots=True)
class Audit:
    """What was searched and found.

    ``buckets`` are of stores that are no folders of this machine; ``sources`` are the team's own files, no
    part of the run, in which the user still stands, and ``unread_sources`` says which could not be looked
    into.
    """

    scan: Scan = field(default_factory=Scan)
    buckets: list[BucketScan] = field(default_factory=list)
    n_needles: int = 0  # items whose texts and hashes were sought
    sources: list[Path | str] = field(default_factory=list)
    unread_sources: list[str] = field(default_factory=list)
    unfinished: int = 0  # forgettings that have begun and not ended
    n_recorded: int = 0  # signed lines of the run's record, all of which were verified
    n_cut_bytes: int = 0  # at its end, of a line that a crash cut off before it counted

    @property
    def is_clean(self) -> bool:
        """Whether everything could be read and nothing was found."""
        return not (self.found or self.unread or self.unfinished)

    @property
    def found(self) -> list[tuple[str, tuple[str, ...]]]:
        """Files and objects that hold something, and what kinds of things."""
        of_buckets = [(one.uri, one.kinds) for bucket in self.buckets for one in bucket.found]
        return [*((str(one.path), one.kinds) for one in self.scan.found), *of_buckets]

    @property
    def unread(self) -> list[tuple[str, str]]:
        """Files and objects that could not be read or decoded, and why."""
        of_files = [(str(path), why) for path, why in self.scan.unread]
        return [*of_files, *(one for bucket in self.buckets for one in bucket.unread)]

    @property
    def n_objects(self) -> int:
        """Objects in buckets that were searched."""
        return sum(bucket.n_objects for bucket in self.buckets)

    @property
    def n_object_bytes(self) -> int:
        """Bytes of these."""
        return sum(bucket.n_bytes for bucket in self.buckets)


class OtherUsers:
    """Tells whether a word is the id of another user, asking where ids are kept only when it must."""

    def __init__(self, run: RunFolder, store: AdapterStore, section: UsersSection) -> None:
        self._run = run
        self._stores = stores_of(run, store)
        self._section = section
        self._answers: dict[str, bool] = {}

    def knows(self, word: str) -> bool:
        """Whether the word is a user's id."""
        if word not in self._answers:
            place = hash_id(word)
            known = word in self._listed or any(store.backend.find(place) for store in self._stores)
            self._answers[word] = known
        return self._answers[word]

    @cached_property
    def _listed(self) -> set[str]:
        ids = {user.user_id for user in _read(self._section)[0]}
        if self._run.scores_file.is_file():
            ids |= read_users_scored(self._run.scores_file).keys()
        return ids


def finder_of(user_id: str, run: RunFolder, store: AdapterStore, section: UsersSection) -> IdFinder:
    """What finds a user's id in a run, without taking another user's longer id for it."""
    others = OtherUsers(run, store, section)
    return IdFinder(user_id, lambda word: word != user_id and others.knows(word))


def audit_user(
    run: RunFolder,
    store: AdapterStore,
    section: UsersSection,
    user_id: str,
    *,
    also: Sequence[Path] = (),
) -> Audit:
    """Search for a user's id and, where the users' files hold the user, for the texts and their hashes.

    Args:
        run: its folder is searched.
        store: searched too, as are those of earlier configurations; every object of one in a bucket.
        section: where the users' files are, which are read and not searched, as those are that batches
            were given beside them.
        user_id: who.
        also: folders to search beside those, such as Ray's temporary one.
    """
    record = Record(run.path)
    audit = _audit_of(record)
    finders: list[Finder] = [finder_of(user_id, run, store, section)]
    users, audit.sources = _read(section, user_id)
    for given in records_given(run, user_id, besides=section.paths):
        if isinstance(given, MilpError):
            audit.unread_sources.append(str(given))
            continue
        name, found = given
        if name not in audit.sources:
            audit.sources.append(name)
        if isinstance(found, User):
            users.append(found)
    items = [item for user in users if user.user_id == user_id for item in items_of(user)]
    hashes = [user_hash(user) for user in users if user.user_id == user_id]
    if items:
        finders.append(ItemFinder(items, hashes))
    audit.n_needles = len(items)
    _search(audit, Finders(*finders), run, store, also)
    audit.unfinished = int(record.user_key(user_id) in record.state.forgetting)
    return audit


def audit_items(
    run: RunFolder,
    store: AdapterStore,
    items: Sequence[Item],
    also: Sequence[Path] = (),
    *,
    hashes: Iterable[str] = (),
) -> Audit:
    """Search for some items of a user who stays: the texts of those that are known, and all their hashes."""
    audit = _audit_of(Record(run.path))
    sought = {*hashes, *(item.sha256 for item in items)}
    audit.n_needles = len(sought)
    _search(audit, ItemFinder(items, sought), run, store, also)
    return audit


def audit_forgotten(run: RunFolder, store: AdapterStore, also: Sequence[Path] = ()) -> Audit:
    """Search for everybody who was forgotten, of whom only keyed hashes are known."""
    record = Record(run.path)
    audit = _audit_of(record)
    audit.n_needles = len(record.state.forgotten) + len(record.state.forgetting)
    audit.unfinished = len(record.state.forgetting)
    if not audit.n_needles:
        return audit
    _search(audit, TombstoneFinder(record), run, store, also)
    return audit


def _audit_of(record: Record) -> Audit:
    return Audit(n_recorded=record.n_lines, n_cut_bytes=record.n_cut_bytes)


def _search(audit: Audit, finder: Finder, run: RunFolder, store: AdapterStore, also: Sequence[Path]) -> None:
    stores = stores_of(run, store)
    folders = [folder for folder in (local_path(one.uri) for one in stores) if folder is not None]
    roots: list[tuple[Path, Callable[[str], bool]]] = [(run.path, is_of_run)]
    roots += [(folder, is_of_store) for folder in folders]
    roots += [(path, lambda name: False) for path in also]
    done: list[Path] = []
    for root, own in ((path.resolve(), own) for path, own in roots):
        if root.exists() and not any(root.is_relative_to(earlier) for earlier in done):
            scan_folder(root, finder, audit.scan, is_own=own)
            done.append(root)
    for one in stores:
        if isinstance(one.backend, ObjectBackend):
            audit.buckets.append(scan_bucket(one.backend, finder))


def _read(section: UsersSection, user_id: str | None = None) -> tuple[list[User], list[Path | str]]:
    """Users of the configuration's files (``user_id``: that one), and the files in which they stand.

    Of files that make users together, all are named. Files that are gone by now are passed over: the team may
    have removed them.
    """
    if section.format == "persona_world":
        return [], []
    users: list[User] = []
    sources: list[Path | str] = []
    for paths in file_groups(section):
        with suppress(SourceMissingError):
            for found in iterate_users(section.model_copy(update={"paths": paths}), Counter()):
                if user_id is None or found.user_id == user_id:
                    shown = [path if isinstance(path, Path) else shown_source(path) for path in paths]
                    sources.extend(one for one in shown if one not in sources)
                    if isinstance(found, User):
                        users.append(found)
    return users, sources
