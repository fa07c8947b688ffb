"""Where users files are: a file or a folder, on a disk or by URI, found and opened, never read whole.

A source is a path, ``file://…``, ``s3://BUCKET/…``, ``gs://BUCKET/…`` (through pyarrow), or any URI that an
installed fsspec filesystem knows. A folder means every users file in it and below, in the order of their
names; what begins with "." or "_" (``_SUCCESS``) and what is no users file is passed over.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

from milp_ray.errors import MilpError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from milp_ray.config.users import UsersSection

Format = Literal["jsonl", "parquet"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson.gz": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_ARROW_SCHEMES = frozenset({"s3", "gs", "gcs"})
_READ_AHEAD = 1 << 18  # bytes of a file that are asked for at once


@dataclass(frozen=True)
class UsersFile:
    """One file with users; ``name`` is how messages call it, without credentials and options of a URI."""

    name: str
    format: Format
    n_bytes: int
    path: str
    filesystem: FileSystem | None = None  # None: a local file

    @property
    def is_compressed(self) -> bool:
        """Whether it is to be read through gzip."""
        return self.path.lower().endswith(".gz")

    def open(self) -> IO[bytes]:
        """The file's bytes as they lie there, to be read from the beginning and, for Parquet, anywhere."""
        if self.filesystem is None:
            return Path(self.path).open("rb", buffering=_READ_AHEAD)
        if self.format == "parquet":
            return cast(IO[bytes], self.filesystem.open_input_file(self.path))
        stream = self.filesystem.open_input_stream(self.path, compression=None, buffer_size=_READ_AHEAD)
        return io.BufferedReader(_Forward(stream), _READ_AHEAD)


class _Forward(io.RawIOBase):
    """A stream of a filesystem that is read from its beginning to its end, and knows how far it is."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._n_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._n_bytes += len(content)
        return len(content)

    def tell(self) -> int:
        return self._n_bytes

    def close(self) -> None:
        self._stream.close()
        super().close()


class SourceMissingError(MilpError):
    """A path or URI at which there are no users: the mistake of a configuration, or a file that has gone."""


def find_users_files(uris: Iterable[str]) -> list[UsersFile]:
    """The users files that paths and URIs mean; what each holds is told by its name.

    Raises:
        MilpError: there is nothing, nothing readable, or no users file.
    """
    found = [file for uri in uris for file in _find(uri, "--users")]
    if not found:
        raise MilpError("--users names nothing; give a file, a folder or a URI")
    return found


def named_files(section: UsersSection) -> list[UsersFile]:
    """The files of a configuration's users, in its format; a folder that a URI names is what is in it.

    Raises:
        SourceMissingError: there is nothing at a path or URI.
        MilpError: a URI cannot be opened, or the format is none of files that can be streamed.
    """
    if section.format not in ("jsonl", "parquet"):
        raise MilpError(f"users.format {section.format}: only jsonl and parquet files are streamed")
    found: list[UsersFile] = []
    for source in section.paths:
        if isinstance(source, Path):
            check_file(source)
            found.append(UsersFile(str(source), section.format, source.stat().st_size, str(source)))
        else:
            found += files_at(source, section.format)
    return found


def files_at(uri: str, wanted: str) -> list[UsersFile]:
    """The files that a URI of a configuration means.

    Raises:
        SourceMissingError: there is nothing.
        MilpError: the URI cannot be opened, or a file is of another format than is ``wanted``.
    """
    found = _find(uri, "users.paths")
    for file in found:
        if file.format != wanted:
            raise MilpError(
                f"users.paths: {file.name} is of the format {file.format}, and users.format is {wanted}; set "
                "that to what the files are, or name others"
            )
    return found


def shown_source(source: Path | str) -> str:
    """A path or URI of a configuration as messages call it, without a URI's options."""
    return str(source) if isinstance(source, Path) else source.partition("?")[0]


def lasting_source(uri: str) -> str:
    """A path or URI as a run folder keeps it: a path in full, a URI without credentials."""
    parts = urlsplit(uri)
    if "://" not in uri or parts.scheme == "file":
        return str(Path(parts.path if "://" in uri else uri).expanduser().absolute())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def check_file(path: Path) -> None:
    """Raise a :class:`SourceMissingError` unless a path of a configuration is a file."""
    if path.is_file():
        return
    what = "is a folder" if path.is_dir() else "does not exist"
    raise SourceMissingError(
        f"users.paths: {path} {what}; name files, relative to the working directory or in full "
        "(or set users.format to persona_world for the embedded users)"
    )


def _find(uri: str, asked: str) -> list[UsersFile]:
    """``asked`` is the option or key that the URI was given by, for messages."""
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme in {"", "file"}:
        path = Path(urlsplit(uri).path if scheme else uri).expanduser()
        if not path.exists():
            raise SourceMissingError(f"{asked} {path}: there is no such file or folder")
        if path.is_dir():
            found = [_local(file) for file in sorted(path.rglob("*")) if _counts(file.relative_to(path))]
            return _some([file for file in found if file is not None], f"{asked} {path}")
        return _some([_local(path)], f"{asked} {path}")
    return _find_remote(uri, scheme, asked)


def _find_remote(uri: str, scheme: str, asked: str) -> list[UsersFile]:
    from pyarrow import fs

    filesystem, path = _filesystem(uri, scheme, asked)
    prefix = f"{scheme}://"
    shown = f"{asked} {prefix}{path}"
    try:
        about = filesystem.get_file_info(path)
        if about.type == fs.FileType.NotFound:
            raise SourceMissingError(f"{shown}: there is no such file or folder")
        if about.type == fs.FileType.File:
            return _some([_remote(about, prefix, filesystem)], shown)
        listed = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except OSError as error:
        raise MilpError(f"{shown} cannot be listed: {first_line(error)}") from None
    inside = [entry for entry in listed if entry.type == fs.FileType.File]
    inside = [entry for entry in inside if _counts(Path(entry.path[len(path) :].lstrip("/")))]
    found = [_remote(entry, prefix, filesystem) for entry in sorted(inside, key=lambda entry: entry.path)]
    return _some([file for file in found if file is not None], shown)


def _filesystem(uri: str, scheme: str, asked: str) -> tuple[FileSystem, str]:
    from pyarrow import fs

    # The URI itself is in no message: it may hold credentials.
    try:
        if scheme in _ARROW_SCHEMES:
            if not urlsplit(uri).netloc:
                raise ValueError("it names no bucket")
            return cast("tuple[FileSystem, str]", fs.FileSystem.from_uri(uri))
        from fsspec.core import url_to_fs

        other, path = url_to_fs(uri)
        return fs.PyFileSystem(fs.FSSpecHandler(other)), path
    except (OSError, ValueError, ImportError) as error:
        raise MilpError(
            f"{asked} {scheme}://…: it cannot be opened ({first_line(error)}); give a path, file://…, "
            "s3://BUCKET/…, gs://BUCKET/…, or install the fsspec filesystem of this scheme"
        ) from None


def _local(path: Path) -> UsersFile | None:
    kind = _format_of(path.name)
    return None if kind is None else UsersFile(str(path), kind, path.stat().st_size, str(path))


def _remote(about: Any, prefix: str, filesystem: FileSystem) -> UsersFile | None:
    kind = _format_of(about.base_name)
    return kind and UsersFile(prefix + about.path, kind, about.size or 0, about.path, filesystem)


def _format_of(name: str) -> Format | None:
    return next((kind for suffix, kind in _FORMATS.items() if name.lower().endswith(suffix)), None)


def _counts(inside: Path) -> bool:
    return _format_of(inside.name) is not None and not any(part[0] in "._" for part in inside.parts)


def _some(found: Iterable[UsersFile | None], shown: str) -> list[UsersFile]:
    files = [file for file in found if file is not None]
    if not files:
        raise MilpError(f"{shown}: no users file is there; their names end in {', '.join(_FORMATS)}")
    return files


def first_line(error: BaseException) -> str:
    """The first line of a message of a filesystem, or its class where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def pieces_of(stream: IO[bytes], most: int) -> Iterator[bytes | None]:
    """Lines of a stream; one of more than ``most`` bytes is passed over and comes as ``None``."""
    while line := stream.readline(most + 1):
        if len(line) <= most:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(most)
        yield None
