"""The manifest of one published adapter: written last, and what every read is checked against.

It holds the SHA-256 and the size of every file as stored, and the SHA-256 of itself. With a key, what says
something about the user (the id, the fingerprint of the data, the training's facts) stands in it sealed, and
the seal covers the rest of the manifest, so that without the key it cannot be forged either.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.store.encryption import Cipher, no_key
from milp_ray.personalize.store.faults import AdapterDamagedError
from milp_ray.personalize.store.names import hash_id, shown, shown_place

MANIFEST = "manifest.json"
FORMAT = 2
READABLE = (1, 2)  # 1 had neither precision nor encryption: float32 in the clear
_PERSONAL = ("user_id", "fingerprint", "meta")  # sealed where there is a key


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known about one published adapter.

    ``is_sealed`` says that the personal part was not opened, for want of a key: ``user_id`` and
    ``fingerprint`` are then empty and ``meta`` has no entries.
    """

    user_id: str
    version: int
    layout: CanonicalLayout
    fingerprint: str  # hash of everything that the adapter was made from
    created: str  # UTC, ISO 8601
    meta: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]  # name → {"sha256": …, "bytes": …}, as stored
    precision: Mapping[str, Any] = field(default_factory=lambda: {"name": "float32"})
    key_id: str | None = None  # of the key that everything personal is encrypted with
    retention: Mapping[str, Any] | None = None  # purpose, days, expires; in the clear, so that it can be kept
    is_sealed: bool = False

    @property
    def n_bytes(self) -> int:
        """Size of the adapter's files as stored, the manifest not counted."""
        return sum(int(described["bytes"]) for described in self.files.values())


def describe(content: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def problem_of(content: bytes, described: Mapping[str, Any]) -> str | None:
    """What is wrong with a file's content, or ``None``."""
    if len(content) != described["bytes"]:
        return f"has {len(content)} bytes instead of {described['bytes']}"
    if hashlib.sha256(content).hexdigest() != described["sha256"]:
        return "is damaged (its SHA-256 differs)"
    return None


def damaged(user_id: str | None, place: str, version: int, what: str) -> AdapterDamagedError:
    """The error of something that is not as it was published; ``user_id`` where it is known.

    Where it is not, the user is named by the beginning of ``place``, the hash of the id.
    """
    whose = f"the adapter of user {shown_place(place) if user_id is None else shown(user_id)}"
    return AdapterDamagedError(
        f"{whose}, version {version}: {what}; it is not served. Personalise the user again, or restore it"
    )


def encode_manifest(manifest: Manifest, cipher: Cipher | None) -> bytes:
    """The file of a manifest, sealed where there is a cipher."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": manifest.version,
        "layout": manifest.layout.to_dict(),
        "created": manifest.created,
        "precision": dict(manifest.precision),
        "files": manifest.files,
    }
    if manifest.retention is not None:
        body["retention"] = dict(manifest.retention)
    personal = {"user_id": manifest.user_id, "fingerprint": manifest.fingerprint, "meta": manifest.meta}
    if cipher is None:
        body |= personal
    else:
        body["key_id"] = cipher.key_id
        content = json.dumps(personal, allow_nan=False).encode("ascii")
        body["sealed"] = base64.b64encode(cipher.seal(content, _canonical(body))).decode("ascii")
    return _encode(body)


def decode_manifest(
    content: bytes,
    place: str,
    version: int,
    *,
    user_id: str | None = None,
    cipher: Cipher | None = None,
    open_sealed: bool = True,
) -> Manifest:
    """Read and check the file of a manifest.

    Args:
        content: the file.
        place: hash of the user's id, by which the manifest was found.
        version: number by which it was found.
        user_id: whose it must be, where that is known; for messages.
        cipher: opens what is sealed.
        open_sealed: whether a sealed manifest without a cipher is an error; otherwise it comes unopened.

    Raises:
        AdapterDamagedError: it is not what was written, or belongs to another user or version.
        KeyProblemError: it is sealed, and the key is missing or another one.
        MilpError: another version of this package wrote it, in a format that this one cannot read.
    """
    try:
        body = json.loads(content)
        stated = body.pop("sha256")
        sound = hashlib.sha256(_canonical(body)).hexdigest() == stated and _encode(body) == content
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise damaged(user_id, place, version, f"{MANIFEST} is damaged (not readable)") from None
    if not sound:
        raise damaged(user_id, place, version, f"{MANIFEST} is damaged (its SHA-256 differs)")
    if body["format"] not in READABLE:
        raise MilpError(
            f"{MANIFEST} of an adapter has format {body['format']}, this version reads {READABLE[-1]} and "
            "older; use the version of milp_ray that wrote it, or personalise the users again"
        )
    if body["version"] != version or not all(Path(name).name == name for name in body["files"]):
        raise damaged(user_id, place, version, f"{MANIFEST} belongs to another place in the store")
    key_id, is_sealed = body.get("key_id"), False
    if key_id is not None:
        whose = "an adapter" if user_id is None else f"the adapter of user {shown(user_id)}"
        if cipher is None and open_sealed:
            raise no_key(key_id, whose)
        if cipher is None:
            is_sealed = True
            body |= {"user_id": "", "fingerprint": "", "meta": {}}
        else:
            cipher.check(key_id, whose)
            body |= _opened(body, cipher, user_id, place, version)
    if not is_sealed and hash_id(body["user_id"]) != place:
        raise damaged(user_id, place, version, f"{MANIFEST} belongs to another place in the store")
    return Manifest(
        user_id=body["user_id"],
        version=body["version"],
        layout=CanonicalLayout.from_dict(body["layout"]),
        fingerprint=body["fingerprint"],
        created=body["created"],
        meta=body["meta"],
        files=body["files"],
        precision=body.get("precision", {"name": "float32"}),
        key_id=key_id,
        retention=body.get("retention"),
        is_sealed=is_sealed,
    )


def _opened(
    body: dict[str, Any], cipher: Cipher, user_id: str | None, place: str, version: int
) -> dict[str, Any]:
    sealed = base64.b64decode(body["sealed"])
    rest = {name: value for name, value in body.items() if name != "sealed"}
    try:
        personal = json.loads(cipher.open(sealed, _canonical(rest)))
    except ValueError:
        raise damaged(user_id, place, version, f"{MANIFEST} was changed by someone without the key") from None
    return {name: personal[name] for name in _PERSONAL}


def _encode(body: Mapping[str, Any]) -> bytes:
    sha256 = hashlib.sha256(_canonical(body)).hexdigest()
    return (json.dumps({**body, "sha256": sha256}, indent=1, allow_nan=False) + "\n").encode("ascii")


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
