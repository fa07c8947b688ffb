"""A store in a folder, on a disk or on any shared filesystem whose renames are atomic.

    ROOT/ab/cd/<sha256 of the user id>/v1/adapter_config.json
                                         adapter_model.safetensors
                                         manifest.json
                                      /v2/…

A version is written to a hidden folder beside its place, synced, and renamed into place: that one rename
publishes it. Two levels of 256 folders keep every listing short, however many users there are.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from milp_ray.atomic_files import sync_folder
from milp_ray.personalize.store.backend import ABANDONED_AFTER_SECONDS, Leftover
from milp_ray.personalize.store.faults import StoreUnavailableError
from milp_ray.personalize.store.manifest import MANIFEST

_VERSION = re.compile(r"v([1-9][0-9]*)")
_HASH = re.compile(r"[0-9a-f]{64}")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class LocalBackend:
    """Versions as folders under ``root``; see :class:`~milp_ray.personalize.store.backend.Backend`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # ------------------------------------------------------------------------------------------- reading

    def find(self, place: str) -> dict[int, str]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        with self._told("read"):
            try:
                names = os.listdir(self.folder(place))
            except (FileNotFoundError, NotADirectoryError):
                return {}
        numbers = sorted(int(match[1]) for match in map(_VERSION.fullmatch, names) if match)
        return {number: f"v{number}" for number in numbers}

    def read(self, place: str, spot: str, name: str) -> bytes:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        with self._told("read"):
            return (self.folder(place) / spot / name).read_bytes()

    def folder(self, place: str) -> Path:
        """The folder of a user's versions."""
        return self.root / place[:2] / place[2:4] / place

    def places(self) -> Iterator[str]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        with self._told("read"):
            for first in _subfolders(self.root):
                for second in _subfolders(first):
                    # A deletion that was interrupted counts: ".deleted-<hash>-<token>".
                    names = {path.name.removeprefix(".deleted-")[:64] for path in _subfolders(second)}
                    yield from sorted(name for name in names if _HASH.fullmatch(name))

    # ------------------------------------------------------------------------------------------- writing

    def publish(
        self, place: str, files: Mapping[str, bytes], manifest_of: Callable[[int], bytes]
    ) -> tuple[int, str]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        folder = self.folder(place)
        hidden = folder / f".new-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            with self._told("write"):
                hidden.mkdir(parents=True)
                _remove_abandoned(folder)
                for name, content in files.items():
                    _write_synced(hidden / name, content)
                while True:
                    version = max(self.find(place), default=0) + 1
                    _write_synced(hidden / MANIFEST, manifest_of(version))
                    sync_folder(hidden)
                    try:
                        hidden.rename(folder / f"v{version}")
                        break
                    except OSError:
                        # Another writer took this number; a folder never replaces a full one.
                        if not (folder / f"v{version}").exists():
                            raise
                for above in (folder, folder.parent, folder.parent.parent, self.root):
                    sync_folder(above)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        return version, f"v{version}"

    def delete(self, place: str) -> bool:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        folder = self.folder(place)
        with self._told("write"):
            was_there = True
            try:
                folder.rename(folder.with_name(f".deleted-{place}-{secrets.token_hex(8)}"))
            except FileNotFoundError:
                was_there = False
            if not folder.parent.is_dir():
                return False
            for leftover in folder.parent.glob(f".deleted-{place}-*"):
                shutil.rmtree(leftover)
                was_there = True
            sync_folder(folder.parent)
        return was_there

    def delete_version(self, place: str, version: int, spot: str) -> None:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        folder = self.folder(place)
        with self._told("write"):
            doomed = folder / f".deleted-{spot}-{secrets.token_hex(8)}"
            (folder / spot).rename(doomed)
            shutil.rmtree(doomed)
            sync_folder(folder)

    def leftovers(self, place: str) -> list[Leftover]:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        folder = self.folder(place)
        found = []
        with self._told("read"):
            for path in [*folder.glob(".new-*"), *folder.glob(".deleted-*")]:
                found.append(_leftover(place, path, path.name.startswith(".deleted-")))
            for path in folder.parent.glob(f".deleted-{place}-*"):
                found.append(_leftover(place, path, is_doomed=True))
        return found

    def remove(self, leftover: Leftover) -> None:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        with self._told("write"), suppress(FileNotFoundError):
            shutil.rmtree(leftover.spot)
            with suppress(OSError):  # other versions are there
                self.folder(leftover.place).rmdir()

    def check(self, *, writable: bool) -> None:
        """See :class:`~milp_ray.personalize.store.backend.Backend`."""
        with self._told("write" if writable else "read"):
            if self.root.exists() and not self.root.is_dir():
                raise StoreUnavailableError(f"the store {self.root} is a file; give a folder")
            if writable:
                self.root.mkdir(parents=True, exist_ok=True)
                probe = self.root / f".probe-{secrets.token_hex(8)}"
                try:
                    _write_synced(probe, bytes(4096))
                finally:
                    probe.unlink(missing_ok=True)
            elif self.root.exists():
                os.listdir(self.root)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Word the errors of a disk; a missing file stays what it is."""
        try:
            yield
        except FileNotFoundError:
            if what == "read":
                raise
            raise StoreUnavailableError(
                f"the store {self.root} cannot be written: a folder in it was removed meanwhile (was the "
                "user deleted, or the store moved?). Run the same command again"
            ) from None
        except OSError as error:
            if error.errno in _FULL:
                cause = "its disk is full (or the quota is reached); free some space"
            elif error.errno in _READ_ONLY:
                cause = "it is read-only for this user; change its permissions or mount it writable"
                if what == "read":
                    cause = "this user may not read it; change its permissions"
            else:
                cause = f"{error.strerror or type(error).__name__}"
            raise StoreUnavailableError(
                f"the store {self.root} cannot be {'written' if what == 'write' else 'read'}: {cause}. "
                "What was published stays; the same command goes on afterwards"
            ) from None


def _leftover(place: str, path: Path, is_doomed: bool) -> Leftover:
    """``is_doomed``: it is being deleted, so that its age says nothing for it."""
    try:
        age = float("inf") if is_doomed else time.time() - path.stat().st_mtime
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except FileNotFoundError:
        age, size = 0.0, 0
    return Leftover(place, str(path), age, size)


def _subfolders(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        yield folder / name


def _remove_abandoned(folder: Path) -> None:
    """Remove what a writer that was killed left behind; a folder young enough to be in use stays."""
    for leftover in folder.glob(".new-*"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > ABANDONED_AFTER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
