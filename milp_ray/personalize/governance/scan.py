"""Every byte of a folder's files, also of those that compress what they hold, shown to a finder.

A file's raw bytes are looked at as they are (JSON, HTML, logs, the headers of safetensors, pickles). Beside
that, Parquet is decoded (its pages are compressed), and zip, gzip, bzip2, xz and zstd are opened, also inside
each other. In a file that the program writes itself, an id that could be any word counts only where ids stand
(:mod:`milp_ray.personalize.governance.id_places`).
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import mmap
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milp_ray.personalize.governance.id_places import USER_ID, USERS_KEYS, quoted_ids
from milp_ray.personalize.governance.needles import Finder

_CHUNK = 8 << 20
_FIRST = 1 << 16  # bytes by which it is told how much of a content can hold anything
_DEEPEST = 4  # archives inside archives
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_ZSTD = b"\x28\xb5\x2f\xfd"
# What broken archives raise.
UNDECODABLE = (
    ValueError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    RuntimeError,
)


@dataclass(frozen=True, slots=True)
class Found:
    """A file that holds something of someone, and what kinds of things; never the things themselves."""

    path: Path
    kinds: tuple[str, ...]


@dataclass(slots=True)
class Scan:
    """What was looked at, and what could not be."""

    n_files: int = 0
    n_bytes: int = 0
    found: list[Found] = field(default_factory=list)
    unread: list[tuple[Path, str]] = field(default_factory=list)


def scan_folder(
    root: Path, finder: Finder, scan: Scan, *, is_own: Callable[[str], bool] = lambda name: False
) -> None:
    """Look at every file under ``root`` and at every name; links are not followed, their targets' names are
    looked at.

    Args:
        root: the folder.
        finder: what is sought.
        scan: takes in what is found.
        is_own: whether the program writes the file of this name, relative to ``root``.
    """
    for folder, folders, files in os.walk(root, onerror=lambda error: _unread(scan, error)):
        folders.sort()
        for name in sorted(folders):
            kinds = finder.look_at_name(name)
            if kinds:
                scan.found.append(Found(Path(folder, name), told(kinds, "in its name")))
        for name in sorted(files):
            path = Path(folder, name)
            scan_file(path, finder, scan, is_own=is_own(path.relative_to(root).as_posix()))


def scan_file(path: Path, finder: Finder, scan: Scan, *, is_own: bool = False) -> None:
    """Look at one file and its name."""
    kinds = set(told(finder.look_at_name(path.name), "in its name"))
    try:
        if path.is_symlink():
            kinds |= finder.look_at_name(os.readlink(path))
        elif path.is_file():
            with path.open("rb") as file:
                scan.n_bytes += os.fstat(file.fileno()).st_size
                kinds |= _in_file(file, finder, is_own)
        scan.n_files += 1
    except FileNotFoundError:
        return  # a temporary file of another process
    except UNDECODABLE as error:
        # Its raw bytes were looked at; what it compresses could not be.
        scan.unread.append((path, f"cannot be decoded ({type(error).__name__})"))
    except OSError as error:
        _unread(scan, error, path)
    if kinds:
        scan.found.append(Found(path, tuple(sorted(kinds))))


def _in_file(file: io.BufferedReader, finder: Finder, is_own: bool) -> set[str]:
    if os.fstat(file.fileno()).st_size == 0:
        return set()
    words = finder.among_words() if is_own else finder
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        kinds = words.look(content)
        if words is not finder:
            kinds |= finder.look(quoted_ids(content))
        head, tail = content[:8], content[-4:]
    return kinds | in_decoded(file, head, tail, finder, is_own=is_own)


def in_pieces(
    file: Any, n_bytes: int, finder: Finder, *, is_own: bool = False
) -> tuple[set[str], bytes, bytes]:
    """What is in the raw bytes of a file that cannot be mapped; its first eight and last four bytes.

    Of the file no more than a piece is in memory, and no more is read than the finder can find something in.
    (JSON of the program's own is small in a store, and read as a whole where ids in it are sought.)
    """
    words = finder.among_words() if is_own else finder
    kinds: set[str] = set()
    file.seek(0)
    content = file.read(_FIRST)
    head = content[:8]
    if words is not finder and head[:1] == b"{":
        kinds |= finder.look(quoted_ids(content + file.read()))
        file.seek(len(content))
    left = words.reach(content, n_bytes)
    fresh = content = content[:left]
    while fresh:
        kinds |= words.look(content)
        left -= len(fresh)
        fresh = file.read(min(_CHUNK, left))
        content = content[-finder.longest :] + fresh
    file.seek(max(0, n_bytes - 4))
    return kinds, head, file.read(4)


def in_decoded(file: Any, head: bytes, tail: bytes, finder: Finder, *, is_own: bool = False) -> set[str]:
    """What is in a file by what it compresses, told by its first eight and last four bytes."""
    if head[:4] == tail == b"PAR1":
        return _in_parquet(file, finder, is_own)
    return _in_archive(file, head, finder, 0)


def _in_archive(file: Any, head: bytes, finder: Finder, depth: int) -> set[str]:
    """What is in a compressed file; nothing is in another one."""
    if depth >= _DEEPEST:
        return set()
    if head[:4] == b"PK\x03\x04":
        kinds: set[str] = set()
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                kinds |= finder.look_at_name(member.filename)
                with archive.open(member) as inside:
                    kinds |= _in_stream(inside, finder, depth)
        return kinds
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            file.seek(0)
            with opener(file) as inside:
                return _in_stream(inside, finder, depth)
    if head.startswith(_ZSTD):
        import pyarrow as pa

        file.seek(0)
        with pa.CompressedInputStream(file, "zstd") as inside:
            return _in_stream(inside, finder, depth)
    return set()


def _in_stream(stream: Any, finder: Finder, depth: int) -> set[str]:
    """Look at decompressed content, piece by piece; pieces overlap, so that nothing falls between two."""
    kinds: set[str] = set()
    content = stream.read(_CHUNK)
    if len(content) < _CHUNK:
        return finder.look(content) | _in_archive(io.BytesIO(content), content[:8], finder, depth + 1)
    while content:
        kinds |= finder.look(content)
        fresh = stream.read(_CHUNK)
        content = content[-finder.longest :] + fresh if fresh else b""
    return kinds


def _in_parquet(file: Any, finder: Finder, is_own: bool) -> set[str]:
    """Look at the strings and bytes of every column and at the metadata, as they are before encoding.

    Beside a column of ids the others hold words: tags, and names of methods.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: set[str] = set()
    file.seek(0)
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            is_own = is_own or USER_ID in schema.names
            words = finder.among_words() if is_own else finder
            for key, value in (parquet.metadata.metadata or {}).items():
                is_by_user = key.decode("utf-8", "replace") in USERS_KEYS
                kinds |= (finder if is_by_user else words).look(key + b"\n" + value)
            for batch in parquet.iter_batches(batch_size=4096):
                for name, column in zip(schema.names, batch.columns, strict=True):
                    if not pa.types.is_primitive(column.type):
                        kinds |= (finder if name == USER_ID else words).look(_cells(column))
    except pa.ArrowException as error:
        raise ValueError(type(error).__name__) from None
    return kinds


def _cells(column: Any) -> bytes:
    """The different values of a column, quoted: whole cells are told from parts of longer ones."""
    import pyarrow as pa

    values = column.unique() if pa.types.is_string(column.type) else column
    cells = {json.dumps(value, default=_plain, ensure_ascii=False) for value in values.to_pylist()}
    return "\n".join(sorted(cells)).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def told(kinds: set[str], where: str) -> tuple[str, ...]:
    """Kinds of things, and where they are."""
    return tuple(sorted(f"{kind} {where}" for kind in kinds))


def _unread(scan: Scan, error: OSError, path: Path | None = None) -> None:
    scan.unread.append((path or Path(str(error.filename)), f"cannot be read ({type(error).__name__})"))


def walk(root: Path) -> Iterator[Path]:
    """Every file under a folder, links not followed."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(files))
