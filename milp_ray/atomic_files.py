"""Files that are written whole or not at all: to a temporary name beside them, synced, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file to, which takes its place at the end, and goes after an error.

    A reader sees the old file or the new one. The folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write a file atomically and durably: readers see the old content or the new one, also after a crash.

    Args:
        path: its folder is made where it is missing.
        content: all of the file.
        mode: its permissions; ``None``: those of the file that it replaces, or the usual ones.
    """
    with replacing(path) as temporary:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with os.fdopen(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is None and path.exists():
            shutil.copymode(path, temporary)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Force a file that was written without to the disk, and that it is in its folder."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically; NaN and infinity, which JSON does not have, are refused."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(path: Path, data: Any) -> None:
    """Write YAML atomically."""
    import yaml

    write_text(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110))
