"""Where a store's files lie: what a place must offer, and which place a URI names.

Files of one user stand under one *place*, the hash of the user's id. A version is a set of files with a
manifest; it exists from the moment that its manifest does, and not before. A *spot* is where a version's
files are; only the backend that returned it can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from milp_ray.errors import MilpError

# A writer is alive for less than this: what is unfinished and older belongs to none.
ABANDONED_AFTER_SECONDS = 3600.0
_PLACES = "a folder, s3://BUCKET/… or gs://BUCKET/…"


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that belongs to no published version: an upload or a deletion that did not end."""

    place: str  # hash of the user's id
    spot: str
    seconds_old: float
    n_bytes: int


class Backend(Protocol):
    """Folders of versions; every method raises ``StoreUnavailableError`` where the place does not answer."""

    def find(self, place: str) -> dict[int, str]:
        """The published versions of a user, ascending, and the spot of each; one listing, whatever the
        number of users.
        """

    def read(self, place: str, spot: str, name: str) -> bytes:
        """One file of a version. Raises ``FileNotFoundError`` where it is missing."""

    def publish(
        self, place: str, files: Mapping[str, bytes], manifest_of: Callable[[int], bytes]
    ) -> tuple[int, str]:
        """Add a version: files first, manifest last; its number and its spot.

        Two writers at the same time get two numbers. ``manifest_of`` makes the manifest of a number.
        """

    def delete(self, place: str) -> bool:
        """Remove everything of a user, unfinished uploads included; whether there was anything.

        No version exists from the first moment on; repeating it finishes what was interrupted.
        """

    def delete_version(self, place: str, version: int, spot: str) -> None:
        """Remove one version; it does not exist from the first moment on."""

    def places(self) -> Iterator[str]:
        """Every place with files, in the order of the hashes; memory does not grow with their number."""

    def leftovers(self, place: str) -> list[Leftover]:
        """What lies at a place and belongs to no version."""

    def remove(self, leftover: Leftover) -> None:
        """Remove a leftover; no matter if it is gone already."""

    def check(self, *, writable: bool) -> None:
        """Raise ``StoreUnavailableError`` if the store cannot be read, or written where that is asked."""


def open_backend(uri: str) -> Backend:
    """The backend that a URI names; nothing is read or made yet.

    Raises:
        MilpError: the URI is none that a store can have.
    """
    from milp_ray.personalize.store.local import LocalBackend

    parts = urlsplit(uri)
    if len(parts.scheme) < 2:  # a plain path, which on no system begins with two letters and a colon
        if not uri.strip():
            raise MilpError(f"the store {uri!r} is empty; give {_PLACES}")
        return LocalBackend(Path(uri).expanduser())
    if parts.scheme == "file":
        if parts.netloc not in {"", "localhost"} or not parts.path:
            raise MilpError(f"the store {uri!r} names no folder; write file:///path/to/folder")
        return LocalBackend(Path(parts.path))
    if parts.scheme not in {"s3", "gs"}:
        raise MilpError(f"the store {uri!r} begins with {parts.scheme}://; give {_PLACES}")
    if not parts.hostname:
        raise MilpError(f"the store {uri!r} names no bucket; write {parts.scheme}://BUCKET/path")
    if "@" in parts.netloc or parts.port is not None:
        raise MilpError(
            f"a store's URI must hold a bucket and a path alone ({parts.scheme}://BUCKET/path): credentials "
            "come from the environment or the provider's own files"
        )
    from milp_ray.personalize.store.objects import ObjectBackend

    return ObjectBackend(uri)


def local_path(uri: str) -> Path | None:
    """The folder that a URI names, or ``None`` where it is no local one."""
    parts = urlsplit(uri)
    if len(parts.scheme) < 2:
        return Path(uri).expanduser()
    return Path(parts.path) if parts.scheme == "file" else None
