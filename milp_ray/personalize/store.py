"""The adapter store: one PEFT folder a user and version, there whole or not at all.

    ROOT/ab/cd/<sha256 of the user id>/v1/adapter_config.json
                                         adapter_model.safetensors
                                         manifest.json
                                      /v2/…

A version is written to a hidden folder beside its place, synced, and renamed into place: that one rename
publishes it, and the highest version is the current one. Its manifest is written last and holds the SHA-256
of every file and of itself, so that what was damaged later is refused by name rather than served.

A user id is opaque and may hold anything (slashes, "..", NUL, any length): only its hash reaches a path, and
two levels of folders of 256 keep every listing short, however many users there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout

if TYPE_CHECKING:
    from milp_ray.training.adapters import Adapter

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
REQUIRED_FILES = ("adapter_config.json", "adapter_model.safetensors")

_VERSION = re.compile(r"v([1-9][0-9]*)")
_ABANDONED_AFTER_SECONDS = 3600.0  # a hidden folder that old belongs to no writer that still lives
_LONGEST_SHOWN_ID = 80


class AdapterMissingError(MilpError):
    """The store holds no adapter of the user."""


class AdapterDamagedError(MilpError):
    """What the store holds of the user is not what was published."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known about one published adapter."""

    user_id: str
    version: int
    layout: CanonicalLayout
    fingerprint: str  # hash of everything that the adapter was made from
    created: str  # UTC, ISO 8601
    meta: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]  # name → {"sha256": …, "bytes": …}


class AdapterStore:
    """Adapters of many users under one root folder (local, or any shared filesystem with atomic renames).

    Instances hold nothing but the root, so that they can be sent to workers and made anew at will.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    # ----------------------------------------------------------------------------------------- writing

    def publish(
        self, user_id: str, adapter: Adapter, meta: Mapping[str, Any], *, fingerprint: str = ""
    ) -> int:
        """Add an adapter as the user's next version, which makes it the current one.

        Args:
            user_id: any string.
            adapter: what training returned.
            meta: JSON-able facts for the manifest (numbers, names; never a user's text).
            fingerprint: hash of what it was made from; :meth:`has` compares it.

        Returns:
            The version's number.
        """
        from milp_ray.training.adapters import save_adapter

        place = self._place(user_id)
        place.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place)
        hidden = place / f".new-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            save_adapter(adapter, hidden)
            while True:
                version = max(self.versions(user_id), default=0) + 1
                manifest = Manifest(
                    user_id=user_id,
                    version=version,
                    layout=adapter.layout,
                    fingerprint=fingerprint,
                    created=datetime.now(UTC).isoformat(timespec="milliseconds"),
                    meta=dict(meta),
                    files=_describe_files(hidden),
                )
                _write_synced(hidden / MANIFEST, _encode(manifest))
                _sync(hidden)
                try:
                    hidden.rename(place / f"v{version}")
                    break
                except OSError:
                    # Another writer of the same user took this number; a folder never replaces a full one.
                    if not (place / f"v{version}").exists():
                        raise
            for folder in (place, place.parent, place.parent.parent, self.root):
                _sync(folder)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        return version

    def delete(self, user_id: str) -> bool:
        """Remove every version of a user's adapter; whether there was anything.

        The user's folder disappears from its place at once; a deletion that is interrupted afterwards is
        finished by repeating it.
        """
        place = self._place(user_id)
        doomed = place.with_name(f".deleted-{place.name}-{secrets.token_hex(8)}")
        was_there = True
        try:
            place.rename(doomed)
        except FileNotFoundError:
            was_there = False
        if not place.parent.is_dir():
            return False
        for leftover in place.parent.glob(f".deleted-{place.name}-*"):
            shutil.rmtree(leftover)
            was_there = True
        _sync(place.parent)
        return was_there

    # ----------------------------------------------------------------------------------------- reading

    def has(self, user_id: str, fingerprint: str) -> bool:
        """Whether the current adapter is sound and was made from exactly what ``fingerprint`` stands for.

        Reads and hashes the files, so that a damaged adapter is made again by the next run.
        """
        try:
            return self.verify(user_id).fingerprint == fingerprint
        except (AdapterMissingError, AdapterDamagedError):
            return False

    def load(self, user_id: str, *, version: int | None = None) -> Adapter:
        """A user's adapter, checked against its manifest; the current version unless another is named.

        Raises:
            AdapterMissingError: there is none.
            AdapterDamagedError: a file of it is missing or is not the one that was published.
        """
        from milp_ray.training.adapters import load_adapter

        return load_adapter(self.folder(user_id, version=version))

    def folder(self, user_id: str, *, version: int | None = None) -> Path:
        """The PEFT folder of a user's adapter, checked as :meth:`load` does."""
        manifest = self.verify(user_id, version=version)
        return self._place(user_id) / f"v{manifest.version}"

    def verify(self, user_id: str, *, version: int | None = None) -> Manifest:
        """Check every file of an adapter; its manifest. Raises as :meth:`load` does."""
        manifest = self.manifest(user_id, version=version)
        folder = self._place(user_id) / f"v{manifest.version}"
        for name, described in manifest.files.items():
            problem = _problem(folder / name, described)
            if problem:
                raise _damaged(user_id, manifest.version, f"{name} {problem}")
        return manifest

    def manifest(self, user_id: str, *, version: int | None = None) -> Manifest:
        """The manifest of a user's adapter; the manifest itself is checked, the other files are not."""
        versions = self.versions(user_id)
        if not versions or (version is not None and version not in versions):
            what = "adapter" if version is None else f"version {version} of an adapter"
            raise AdapterMissingError(
                f"{self.root} holds no {what} of user {shown(user_id)}; run `milp-ray personalize` for a run "
                "that has this user"
            )
        number = versions[-1] if version is None else version
        return _read_manifest(self._place(user_id) / f"v{number}", user_id, number)

    def versions(self, user_id: str) -> list[int]:
        """Numbers of the user's published versions, ascending; the last one is the current."""
        try:
            names = os.listdir(self._place(user_id))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for match in map(_VERSION.fullmatch, names) if match)

    def users(self) -> Iterator[str]:
        """Ids of the users that have an adapter, in no order of meaning; nothing grows with their number.

        Raises:
            AdapterDamagedError: a user's folder does not say whose it is.
        """
        for place in self._places():
            numbers = [int(match[1]) for match in map(_VERSION.fullmatch, os.listdir(place)) if match]
            if numbers:
                yield _read_manifest(place / f"v{max(numbers)}", None, max(numbers)).user_id

    # ---------------------------------------------------------------------------------------- internals

    def _place(self, user_id: str) -> Path:
        digest = hash_id(user_id)
        return self.root / digest[:2] / digest[2:4] / digest

    def _places(self) -> Iterator[Path]:
        for first in _subfolders(self.root):
            for second in _subfolders(first):
                yield from _subfolders(second)


def hash_id(user_id: str) -> str:
    """SHA-256 of an id, in hexadecimal; lone surrogates, which strict UTF-8 refuses, are let through."""
    return hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()


def shown(user_id: str) -> str:
    """An id as it may stand in a message: quoted, escaped and not too long."""
    text = json.dumps(user_id)
    return text if len(text) <= _LONGEST_SHOWN_ID else text[:_LONGEST_SHOWN_ID] + '…"'


def _damaged(user_id: str | None, version: int, what: str) -> AdapterDamagedError:
    whose = "an adapter" if user_id is None else f"the adapter of user {shown(user_id)}"
    return AdapterDamagedError(
        f"{whose}, version {version}: {what}; it is not served. Personalise the user again, or restore it"
    )


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Sync and hash what stands in a folder; the two files of PEFT's format must be there."""
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    missing = set(REQUIRED_FILES) - {path.name for path in files}
    if missing:
        raise RuntimeError(f"saving an adapter left no {', '.join(sorted(missing))}")
    described = {}
    for path in files:
        _sync(path)
        described[path.name] = {"sha256": _hash_file(path), "bytes": path.stat().st_size}
    return described


def _problem(path: Path, described: Mapping[str, Any]) -> str | None:
    """What is wrong with a file, or ``None``."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if size != described["bytes"]:
        return f"has {size} bytes instead of {described['bytes']}"
    return None if _hash_file(path) == described["sha256"] else "is damaged (its SHA-256 differs)"


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode(manifest: Manifest) -> bytes:
    body = {
        "format": FORMAT,
        "user_id": manifest.user_id,
        "version": manifest.version,
        "layout": manifest.layout.to_dict(),
        "fingerprint": manifest.fingerprint,
        "created": manifest.created,
        "meta": manifest.meta,
        "files": manifest.files,
    }
    return (json.dumps({**body, "sha256": _hash_body(body)}, indent=1) + "\n").encode("ascii")


def _hash_body(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _read_manifest(folder: Path, user_id: str | None, version: int) -> Manifest:
    """Read and check a manifest; ``user_id`` is whose it must be, where that is known."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        body = {key: value for key, value in content.items() if key != "sha256"}
        sound = _hash_body(body) == content["sha256"]
    except FileNotFoundError:
        raise _damaged(user_id, version, f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise _damaged(user_id, version, f"{MANIFEST} is damaged (not readable)") from None
    if not sound:
        raise _damaged(user_id, version, f"{MANIFEST} is damaged (its SHA-256 differs)")
    if body["format"] != FORMAT:
        raise MilpError(
            f"{MANIFEST} of an adapter has format {body['format']}, this version reads {FORMAT}; "
            "use the version of milp_ray that wrote it, or personalise the users again"
        )
    belongs = body["version"] == version and hash_id(body["user_id"]) == folder.parent.name
    if not belongs or not all(Path(name).name == name for name in body["files"]):
        raise _damaged(user_id, version, f"{MANIFEST} belongs to another place in the store")
    return Manifest(
        user_id=body["user_id"],
        version=body["version"],
        layout=CanonicalLayout.from_dict(body["layout"]),
        fingerprint=body["fingerprint"],
        created=body["created"],
        meta=body["meta"],
        files=body["files"],
    )


def _subfolders(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _remove_abandoned(place: Path) -> None:
    """Remove what a writer that was killed left behind; a folder young enough to be in use stays."""
    for leftover in place.glob(".new-*"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
