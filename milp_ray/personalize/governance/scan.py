"""Every byte of a folder's files, also of those that compress what they hold, shown to a finder.

A file's raw bytes are looked at as they are (JSON, HTML, logs, the headers of safetensors, pickles). Beside
that, Parquet is decoded (its pages are compressed), and zip, gzip, bzip2, xz and zstd are opened, also inside
each other.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def scan_folder(root: Path, finder: Finder, scan: Scan) -> None:
    """Look at every file under ``root`` and at every name; links are not followed, their targets' names are
    looked at.
    """
    for folder, folders, files in os.walk(root, onerror=lambda error: _unread(scan, error)):
        folders.sort()
        for name in sorted(folders):
            kinds = finder.look_at_name(name)
            if kinds:
                scan.found.append(Found(Path(folder, name), told(kinds, "in its name")))
        for name in sorted(files):
            scan_file(Path(folder, name), finder, scan)


def scan_file(path: Path, finder: Finder, scan: Scan) -> None:
    """Look at one file and its name."""
    kinds = set(told(finder.look_at_name(path.name), "in its name"))
    try:
        if path.is_symlink():
            kinds |= finder.look_at_name(os.readlink(path))
        elif path.is_file():
            with path.open("rb") as file:
                scan.n_bytes += os.fstat(file.fileno()).st_size
                kinds |= _in_file(file, finder)
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


def _in_file(file: io.BufferedReader, finder: Finder) -> set[str]:
    if os.fstat(file.fileno()).st_size == 0:
        return set()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        kinds = finder.look(content)
        head, tail = content[:8], content[-4:]
    return kinds | in_decoded(file, head, tail, finder)


def in_pieces(file: Any, n_bytes: int, finder: Finder) -> tuple[set[str], bytes, bytes]:
    """What is in the raw bytes of a file that cannot be mapped; its first eight and last four bytes.

    Of the file no more than a piece is in memory, and no more is read than the finder can find something in.
    """
    file.seek(0)
    content = file.read(_FIRST)
    head = content[:8]
    left = finder.reach(content, n_bytes)
    kinds: set[str] = set()
    fresh = content = content[:left]
    while fresh:
        kinds |= finder.look(content)
        left -= len(fresh)
        fresh = file.read(min(_CHUNK, left))
        content = content[-finder.longest :] + fresh
    file.seek(max(0, n_bytes - 4))
    return kinds, head, file.read(4)


def in_decoded(file: Any, head: bytes, tail: bytes, finder: Finder) -> set[str]:
    """What is in a file by what it compresses, told by its first eight and last four bytes."""
    if head[:4] == tail == b"PAR1":
        return _in_parquet(file, finder)
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


def _in_parquet(file: Any, finder: Finder) -> set[str]:
    """Look at the strings and bytes of every column and at the metadata, as they are before encoding."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: set[str] = set()
    file.seek(0)
    try:
        with pq.ParquetFile(file) as parquet:
            for key, value in (parquet.metadata.metadata or {}).items():
                kinds |= finder.look(key + b"\n" + value)
            for batch in parquet.iter_batches(batch_size=4096):
                for column in batch.columns:
                    if not pa.types.is_primitive(column.type):
                        kinds |= finder.look(_cells(column))
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
