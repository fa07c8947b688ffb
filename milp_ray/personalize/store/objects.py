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

import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from milp_ray.errors import MilpError
from milp_ray.personalize.store.backend import Leftover
from milp_ray.personalize.store.faults import StoreUnavailableError
from milp_ray.personalize.store.manifest import MANIFEST

_MANIFEST = re.compile(r"v([1-9][0-9]*)-([0-9a-f]{16})\.json")
_HASH = re.compile(r"[0-9a-f]{64}")
_OPTIONS = {"s3": ("region", "scheme", "endpoint_override"), "gs": ("scheme", "endpoint_override")}
_CONNECT_SECONDS, _REQUEST_SECONDS, _RETRY_SECONDS = 10.0, 60.0, 15.0

# Words of the providers' errors (in capitals), and what they mean; the first that fits is told.
_CAUSES = (
    (
        ("NO_SUCH_BUCKET", "BUCKET DOES NOT EXIST"),
        "there is no bucket {bucket}; make it, or name another one",
    ),
    (
        ("CREDENTIALS", "UNAUTHENTICATED", "INVALID_ACCESS_KEY", "INVALIDACCESSKEY", "SIGNATURE", "EXPIRED"),
        "the credentials are missing, expired or wrong; {credentials}",
    ),
    (
        ("ACCESS_DENIED", "PERMISSION_DENIED", "FORBIDDEN", "HTTP STATUS 403", "HTTP RESPONSE CODE: 403"),
        "access is denied: the credentials are missing or may not do this; {credentials}",
    ),
    (
        ("NETWORK_CONNECTION", "CURLCODE", "COULD NOT CONNECT", "TIMED OUT", "TIMEOUT", "UNAVAILABLE"),
        "the server at {server} does not answer; check the network, the region and the endpoint",
    ),
    (("SLOW_DOWN", "THROTTL", "503"), "the server asks for fewer requests; lower personalize.n_workers"),
    (("QUOTA", "STORAGE FULL", "STORAGEFULL", "507"), "it is full; free some space"),
)
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials or an instance role, here and "
    "on every machine with a worker",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS or run `gcloud auth application-default login`, here and on "
    "every machine with a worker",
}


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
        parts = urlsplit(uri)
        self._kind, self._bucket = parts.scheme, parts.netloc
        self._root = "/".join([parts.netloc, *(part for part in parts.path.split("/") if part)])
        self.shown = f"{parts.scheme}://{self._root}"  # without options
        self._options = dict(parse_qsl(parts.query))
        unknown = sorted(self._options.keys() - set(_OPTIONS[self._kind]))
        if unknown:
            raise MilpError(
                f"the store {self.shown} has the unknown option {unknown[0]!r}; allowed after '?': "
                f"{', '.join(_OPTIONS[self._kind])}"
            )
        self._given = filesystem
        self._bucket_seen = False

    @cached_property
    def _files(self) -> Any:
        if self._given is not None:
            return self._given
        from pyarrow import fs

        options = dict(self._options)
        if self._kind == "gs":
            return fs.GcsFileSystem(**options, retry_time_limit=timedelta(seconds=_RETRY_SECONDS))
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint and "endpoint_override" not in options:
            scheme, _, server = endpoint.rpartition("://")
            options |= {"scheme": scheme or "https", "endpoint_override": server.rstrip("/")}
        return fs.S3FileSystem(
            **options,
            connect_timeout=_CONNECT_SECONDS,
            request_timeout=_REQUEST_SECONDS,
            allow_delayed_open=True,  # a small file is then one request
        )

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
        with self._told("read"), self._files.open_input_stream(f"{self._folder(place)}/{path}") as file:
            return bytes(file.read())

    def places(self) -> Iterator[str]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        for first in sorted(info.path for info in self._list(self._root) if not info.is_file):
            depth = len(first.split("/")) + 1
            paths = (info.path.split("/") for info in self._list(first, recursive=True))
            yield from sorted({p[depth] for p in paths if len(p) > depth and _HASH.fullmatch(p[depth])})

    def objects(self) -> Iterator[StoredObject]:
        """Everything under the store, also what is no part of it; a 256th of it is listed at a time."""
        for first in sorted(self._list(self._root), key=lambda info: info.path):
            yield self._stored(first)
            if not first.is_file:
                yield from map(self._stored, self._list(first.path, recursive=True))

    @contextmanager
    def opened(self, stored: StoredObject) -> Iterator[Any]:
        """An object for reading, anywhere in it. Raises ``FileNotFoundError`` where it has gone."""
        with self._told("read"), self._files.open_input_file(stored.path) as file:
            yield file

    # ------------------------------------------------------------------------------------------- writing

    def publish(
        self, place: str, files: Mapping[str, bytes], manifest_of: Callable[[int], bytes]
    ) -> tuple[int, str]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        token, folder, version = secrets.token_hex(8), self._folder(place), 0
        try:
            for name, content in files.items():
                self._write(f"{folder}/{token}/{name}", content)
            version = max(self.find(place), default=0) + 1
            while True:
                self._write(f"{folder}/v{version}-{token}.json", manifest_of(version))
                if self._holders(place).get(version, []) == [token]:
                    return version, f"{version}-{token}"
                self._delete_file(f"{folder}/v{version}-{token}.json")
                # Both may have withdrawn: chance decides which of them is first next time.
                version = max([version, *self.find(place)]) + random.SystemRandom().randint(1, 3)
        except BaseException:
            with suppress(Exception):
                if version:  # a manifest whose answer was lost may be there: it must not outlive its files
                    self._delete_file(f"{folder}/v{version}-{token}.json")
                self._delete_folder(f"{folder}/{token}")
            raise

    def delete(self, place: str) -> bool:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        folder = self._folder(place)
        infos = self._list(folder, recursive=True)
        for info in infos:
            if _MANIFEST.fullmatch(info.path.rpartition("/")[2]):
                self._delete_file(info.path)
        if infos:
            self._delete_folder(folder)
        return bool(infos)

    def delete_version(self, place: str, version: int, spot: str) -> None:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        folder = self._folder(place)
        self._delete_file(f"{folder}/v{spot}.json")
        self._delete_folder(f"{folder}/{spot.rpartition('-')[2]}")

    def leftovers(self, place: str) -> list[Leftover]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        folder = self._folder(place)
        published = {spot.rpartition("-")[2] for spot in self.find(place).values()}
        spots: dict[str, list[Any]] = {}
        for info in self._list(folder, recursive=True):
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
            self._delete_file(path)
        else:
            self._delete_folder(path)
        if not any(info.is_file for info in self._list(self._folder(leftover.place), recursive=True)):
            self._delete_folder(self._folder(leftover.place))

    def check(self, *, writable: bool) -> None:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        from pyarrow.fs import FileType

        with self._told("read"):
            if self._files.get_file_info(self._bucket).type == FileType.NotFound:
                raise StoreUnavailableError(
                    f"the store {self.shown} cannot be read: "
                    + _CAUSES[0][1].format(bucket=repr(self._bucket))
                )
        self._bucket_seen = True
        if writable:
            probe = f"{self._root}/.probe-{secrets.token_hex(8)}"
            self._write(probe, b"can be written")
            self._delete_file(probe)

    # ----------------------------------------------------------------------------------------- internals

    def _stored(self, info: Any) -> StoredObject:
        name = info.path[len(self._root) + 1 :]
        n_bytes = info.size if info.is_file else None
        return StoredObject(info.path, name, f"{self._kind}://{info.path}", n_bytes)

    def _folder(self, place: str) -> str:
        return f"{self._root}/{place[:2]}/{place[2:4]}/{place}"

    def _holders(self, place: str) -> dict[int, list[str]]:
        """The tokens that hold each version's number: one, but while writers of one user meet."""
        holders: dict[int, list[str]] = {}
        for info in self._list(self._folder(place)):
            if match := _MANIFEST.fullmatch(info.path.rpartition("/")[2]):
                holders.setdefault(int(match[1]), []).append(match[2])
        return holders

    def _list(self, folder: str, *, recursive: bool = False) -> list[Any]:
        from pyarrow.fs import FileSelector

        with self._told("read"):
            return list(
                self._files.get_file_info(FileSelector(folder, recursive=recursive, allow_not_found=True))
            )

    def _write(self, path: str, content: bytes) -> None:
        with self._told("write"), self._files.open_output_stream(path) as file:
            file.write(content)

    def _delete_file(self, path: str) -> None:
        with self._told("write"), suppress(FileNotFoundError):
            self._files.delete_file(path)

    def _delete_folder(self, path: str) -> None:
        with self._told("write"), suppress(FileNotFoundError):
            self._files.delete_dir(path)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Word the provider's errors; a missing object stays a ``FileNotFoundError``."""
        try:
            yield
        except OSError as error:
            text = str(error)
            capitals = text.upper()
            if isinstance(error, FileNotFoundError) and not any(w in capitals for w in _CAUSES[0][0]):
                raise
            cause = next((said for words, said in _CAUSES if any(w in capitals for w in words)), None)
            if cause is None:
                cause = f"{type(error).__name__}: {text[:200]}".replace("{", "(").replace("}", ")")
            told = cause.format(
                bucket=repr(self._bucket),
                credentials=_CREDENTIALS[self._kind],
                server=self._server(),
            )
            raise StoreUnavailableError(
                f"the store {self.shown} cannot be {'written' if what == 'write' else 'read'}: {told}. "
                "What was published stays; the same command goes on afterwards"
            ) from None

    def _server(self) -> str:
        given = self._options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
        return given or os.environ.get("AWS_ENDPOINT_URL") or f"the provider of {self._kind}://"


def _seconds(info: Any) -> float:
    return info.mtime.timestamp() if info.mtime is not None else 0.0
