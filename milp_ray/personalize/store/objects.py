"""A store in an object storage: S3 and what speaks its protocol, or Google Cloud Storage, through pyarrow.

    BUCKET/PREFIX/ab/cd/<sha256 of the user id>/<token>/adapter_config.json
                                               /<token>/adapter_model.safetensors
                                               /v1-<token>.json              the manifest of version 1

There is no rename: files go under a token that nobody else has, and the manifest, one object that is there
whole or not at all, publishes them. A writer that finds another's manifest of its number beside its own
withdraws and takes a later one; listings are consistent on both providers, so that of two writers at least
the later one sees the other. A token without a manifest is what a writer left that was killed.
"""

from __future__ import annotations

import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from milp_ray.buckets import Bucket
from milp_ray.personalize.store.backend import Leftover
from milp_ray.personalize.store.faults import StoreUnavailableError
from milp_ray.personalize.store.manifest import MANIFEST

_MANIFEST = re.compile(r"v([1-9][0-9]*)-([0-9a-f]{16})\.json")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object: where it is in the bucket, its name in the store, and its size (``None``: a folder)."""

    path: str
    name: str
    uri: str
    n_bytes: int | None


class ObjectBackend:
    """Versions as objects in a bucket; see :class:`~milp_ray.personalize.store.backend.Backend`.

    Args:
        uri: ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``. An S3-compatible server is named by
            ``?endpoint_override=HOST:PORT&scheme=http`` or by ``AWS_ENDPOINT_URL``.
        filesystem: a ``pyarrow.fs.FileSystem`` in place of the provider's.
    """

    def __init__(self, uri: str, filesystem: Any = None) -> None:
        self._bucket = Bucket(uri, "store", StoreUnavailableError, filesystem)
        self._root = self._bucket.root
        self.shown = self._bucket.shown
        self._bucket_seen = False

    # ------------------------------------------------------------------------------------------- reading

    def find(self, place: str) -> dict[int, str]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        holders = self._holders(place)
        if not holders and not self._bucket_seen:
            self.check(writable=False)  # a bucket that is not there is listed as an empty one
        # Two of one number: one of the writers is about to withdraw, or was killed before it could.
        return {number: f"{number}-{min(holders[number])}" for number in sorted(holders)}

    def read(self, place: str, spot: str, name: str) -> bytes:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        path = f"v{spot}.json" if name == MANIFEST else f"{spot.rpartition('-')[2]}/{name}"
        return self._bucket.read(f"{self._folder(place)}/{path}")

    def places(self) -> Iterator[str]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        for first in sorted(info.path for info in self._bucket.list(self._root) if not info.is_file):
            depth = len(first.split("/")) + 1
            paths = (info.path.split("/") for info in self._bucket.list(first, recursive=True))
            yield from sorted({p[depth] for p in paths if len(p) > depth and _HASH.fullmatch(p[depth])})

    def objects(self) -> Iterator[StoredObject]:
        """Everything under the store, also what is no part of it; a 256th of it is listed at a time."""
        for first in sorted(self._bucket.list(self._root), key=lambda info: info.path):
            yield self._stored(first)
            if not first.is_file:
                yield from map(self._stored, self._bucket.list(first.path, recursive=True))

    @contextmanager
    def opened(self, stored: StoredObject) -> Iterator[Any]:
        """An object for reading, anywhere in it. Raises ``FileNotFoundError`` where it has gone."""
        with self._bucket.opened(stored.path) as file:
            yield file

    # ------------------------------------------------------------------------------------------- writing

    def publish(
        self, place: str, files: Mapping[str, bytes], manifest_of: Callable[[int], bytes]
    ) -> tuple[int, str]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        token, folder, version = secrets.token_hex(8), self._folder(place), 0
        try:
            for name, content in files.items():
                self._bucket.write(f"{folder}/{token}/{name}", content)
            version = max(self.find(place), default=0) + 1
            while True:
                self._bucket.write(f"{folder}/v{version}-{token}.json", manifest_of(version))
                if self._holders(place).get(version, []) == [token]:
                    return version, f"{version}-{token}"
                self._bucket.delete_file(f"{folder}/v{version}-{token}.json")
                # Both may have withdrawn: chance decides which of them is first next time.
                version = max([version, *self.find(place)]) + random.SystemRandom().randint(1, 3)
        except BaseException:
            with suppress(Exception):
                if version:  # a manifest whose answer was lost may be there: it must not outlive its files
                    self._bucket.delete_file(f"{folder}/v{version}-{token}.json")
                self._bucket.delete_folder(f"{folder}/{token}")
            raise

    def delete(self, place: str) -> bool:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        folder = self._folder(place)
        infos = self._bucket.list(folder, recursive=True)
        for info in infos:
            if _MANIFEST.fullmatch(info.path.rpartition("/")[2]):
                self._bucket.delete_file(info.path)
        if infos:
            self._bucket.delete_folder(folder)
        return bool(infos)

    def delete_version(self, place: str, version: int, spot: str) -> None:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        folder = self._folder(place)
        self._bucket.delete_file(f"{folder}/v{spot}.json")
        self._bucket.delete_folder(f"{folder}/{spot.rpartition('-')[2]}")

    def leftovers(self, place: str) -> list[Leftover]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        folder = self._folder(place)
        published = {spot.rpartition("-")[2] for spot in self.find(place).values()}
        spots: dict[str, list[Any]] = {}
        for info in self._bucket.list(folder, recursive=True):
            if info.is_file:
                spot = info.path[len(folder) + 1 :].partition("/")[0]
                match = _MANIFEST.fullmatch(spot)
                if (match[2] if match else spot) not in published:
                    spots.setdefault(spot, []).append(info)
        now = time.time()
        return [
            Leftover(place, spot, now - max(_seconds(info) for info in infos), sum(i.size for i in infos))
            for spot, infos in sorted(spots.items())
        ]

    def remove(self, leftover: Leftover) -> None:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        path = f"{self._folder(leftover.place)}/{leftover.spot}"
        if _MANIFEST.fullmatch(leftover.spot):
            self._bucket.delete_file(path)
        else:
            self._bucket.delete_folder(path)
        if not any(info.is_file for info in self._bucket.list(self._folder(leftover.place), recursive=True)):
            self._bucket.delete_folder(self._folder(leftover.place))

    def check(self, *, writable: bool) -> None:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        self._bucket.check(writable=writable)
        self._bucket_seen = True

    # ----------------------------------------------------------------------------------------- internals

    def _stored(self, info: Any) -> StoredObject:
        name = info.path[len(self._root) + 1 :]
        n_bytes = info.size if info.is_file else None
        return StoredObject(info.path, name, f"{self._bucket.kind}://{info.path}", n_bytes)

    def _folder(self, place: str) -> str:
        return f"{self._root}/{place[:2]}/{place[2:4]}/{place}"

    def _holders(self, place: str) -> dict[int, list[str]]:
        """The tokens that hold each version's number: one, but while writers of one user meet."""
        holders: dict[int, list[str]] = {}
        for info in self._bucket.list(self._folder(place)):
            if match := _MANIFEST.fullmatch(info.path.rpartition("/")[2]):
                holders.setdefault(int(match[1]), []).append(match[2])
        return holders


def _seconds(info: Any) -> float:
    return info.mtime.timestamp() if info.mtime is not None else 0.0
