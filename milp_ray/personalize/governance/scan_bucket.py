"""Every object of a store in a bucket shown to a finder, some at a time and each piece by piece.

Memory is bounded by :data:`AT_ONCE` pieces, however many objects there are and however large they are; the
time is that of downloading the store once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from milp_ray.personalize.governance.id_places import is_of_store
from milp_ray.personalize.governance.scan import UNDECODABLE, in_decoded, in_pieces, told

if TYPE_CHECKING:
    from milp_ray.personalize.governance.needles import Finder
    from milp_ray.personalize.store.objects import ObjectBackend, StoredObject

AT_ONCE = 8  # objects that are read at the same time: a request's wait is longer than the search


@dataclass(frozen=True, slots=True)
class FoundObject:
    """An object that holds something of someone, by its URI, and what kinds of things."""

    uri: str
    kinds: tuple[str, ...]


@dataclass(slots=True)
class BucketScan:
    """What of a bucket was looked at, and what could not be."""

    uri: str
    n_objects: int = 0
    n_bytes: int = 0
    found: list[FoundObject] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)  # URI, and why


@dataclass(frozen=True, slots=True)
class _Look:
    uri: str
    n_bytes: int | None  # None: a folder, which is a name alone
    kinds: tuple[str, ...]
    unread: str | None = None


def scan_bucket(backend: ObjectBackend, finder: Finder) -> BucketScan:
    """Look at every object of a store and at every name.

    Raises:
        StoreUnavailableError: the bucket does not answer.
    """
    scan = BucketScan(backend.shown)
    for look in _looks(backend, finder):
        if look.n_bytes is not None:
            scan.n_objects += 1
            scan.n_bytes += look.n_bytes
        if look.kinds:
            scan.found.append(FoundObject(look.uri, look.kinds))
        if look.unread is not None:
            scan.unread.append((look.uri, look.unread))
    return scan


def _looks(backend: ObjectBackend, finder: Finder) -> Iterator[_Look]:
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="audit") as threads:
        waiting: deque[Future[_Look]] = deque()
        for stored in backend.objects():
            waiting.append(threads.submit(_look_at, backend, stored, finder))
            if len(waiting) > AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _look_at(backend: ObjectBackend, stored: StoredObject, finder: Finder) -> _Look:
    kinds = set(told(finder.look_at_name(stored.name), "in its name"))
    unread = None
    if stored.n_bytes:
        try:
            with backend.opened(stored) as file:
                is_own = is_of_store(stored.name)
                inside, head, tail = in_pieces(file, stored.n_bytes, finder, is_own=is_own)
                kinds |= inside
                try:
                    kinds |= in_decoded(file, head, tail, finder, is_own=is_own)
                except UNDECODABLE as error:
                    # Its raw bytes were looked at; what it compresses could not be.
                    unread = f"cannot be decoded ({type(error).__name__})"
        except FileNotFoundError:
            unread = None  # removed meanwhile
    return _Look(stored.uri, stored.n_bytes, tuple(sorted(kinds)), unread)
