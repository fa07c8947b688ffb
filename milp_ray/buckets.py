"""A bucket by URI: of S3 and what speaks its protocol, or of Google Cloud Storage, through pyarrow."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from milp_ray.errors import MilpError

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


class Bucket:
    """What lies under one URI; paths are those of the bucket's filesystem, ``root`` among them.

    Args:
        uri: ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``. An S3-compatible server is named by
            ``?endpoint_override=HOST:PORT&scheme=http`` or by ``AWS_ENDPOINT_URL``.
        what: it is for, such as "store", for errors.
        error: their class.
        filesystem: a ``pyarrow.fs.FileSystem`` in place of the provider's.

    Raises:
        MilpError: the URI has an option that is not known.
    """

    def __init__(
        self, uri: str, what: str = "folder", error: type[MilpError] = MilpError, filesystem: Any = None
    ) -> None:
        parts = urlsplit(uri)
        self.kind, self._name = parts.scheme, parts.netloc
        self.root = "/".join([parts.netloc, *(part for part in parts.path.split("/") if part)])
        self.shown = f"{parts.scheme}://{self.root}"  # without options
        self._what, self._error, self._given = what, error, filesystem
        self._options = dict(parse_qsl(parts.query))
        unknown = sorted(self._options.keys() - set(_OPTIONS[self.kind]))
        if unknown:
            raise MilpError(
                f"the {what} {self.shown} has the unknown option {unknown[0]!r}; allowed after '?': "
                f"{', '.join(_OPTIONS[self.kind])}"
            )

    @cached_property
    def _files(self) -> Any:
        if self._given is not None:
            return self._given
        from pyarrow import fs

        options = dict(self._options)
        if self.kind == "gs":
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

    def check(self, *, writable: bool) -> None:
        """Raise if the bucket cannot be read, or written where that is asked."""
        from pyarrow.fs import FileType

        with self._told("read"):
            if self._files.get_file_info(self._name).type == FileType.NotFound:
                raise self._error(
                    f"the {self._what} {self.shown} cannot be read: "
                    + _CAUSES[0][1].format(bucket=repr(self._name))
                )
        if writable:
            probe = f"{self.root}/.probe-{secrets.token_hex(8)}"
            self.write(probe, b"can be written")
            self.delete_file(probe)

    def list(self, folder: str, *, recursive: bool = False) -> list[Any]:
        """What is in a folder, as pyarrow's ``FileInfo``; nothing where there is none."""
        from pyarrow.fs import FileSelector

        with self._told("read"):
            return list(
                self._files.get_file_info(FileSelector(folder, recursive=recursive, allow_not_found=True))
            )

    def read(self, path: str) -> bytes:
        """All of an object. Raises ``FileNotFoundError`` where it is missing."""
        with self._told("read"), self._files.open_input_stream(path) as file:
            return bytes(file.read())

    @contextmanager
    def opened(self, path: str) -> Iterator[Any]:
        """An object for reading, anywhere in it. Raises ``FileNotFoundError`` where it has gone."""
        with self._told("read"), self._files.open_input_file(path) as file:
            yield file

    def write(self, path: str, content: bytes) -> None:
        """An object, whole or not at all."""
        with self._told("write"), self._files.open_output_stream(path) as file:
            file.write(content)

    def delete_file(self, path: str) -> None:
        """Remove an object; no matter if it is gone already."""
        with self._told("write"), suppress(FileNotFoundError):
            self._files.delete_file(path)

    def delete_folder(self, path: str) -> None:
        """Remove a folder with everything in it; no matter if it is gone already."""
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
                bucket=repr(self._name), credentials=_CREDENTIALS[self.kind], server=self._server()
            )
            done = "written" if what == "write" else "read"
            raise self._error(
                f"the {self._what} {self.shown} cannot be {done}: {told}. "
                "What was published stays; the same command goes on afterwards"
            ) from None

    def _server(self) -> str:
        given = self._options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
        return given or os.environ.get("AWS_ENDPOINT_URL") or f"the provider of {self.kind}://"


def is_bucket_uri(place: object) -> bool:
    """Whether something names a place in a bucket."""
    return isinstance(place, str) and urlsplit(place).scheme in _OPTIONS


def child_uri(uri: str, *names: str) -> str:
    """A place below a URI, whose options it keeps."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path="/".join([parts.path.rstrip("/"), *names])))
