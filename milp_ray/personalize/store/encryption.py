"""Encryption at rest: AES-256-GCM under one key, which stays with each process that reads it.

A sealed file is a nonce of 12 bytes, the encrypted content, and a tag of 16 bytes that proves that neither
the content nor its context (whose file it is, and its name) was changed. A key is told apart by a fingerprint
that is stored beside the file, so that a wrong one is named instead of looking like damage.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from milp_ray.personalize.store.faults import KeyProblemError

if TYPE_CHECKING:
    from milp_ray.config.personalize import EncryptionSection

KEY_BYTES = 32
_NONCE_BYTES = 12
_MAKE_ONE = "make one with `openssl rand -base64 32`"


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where a key is to be found; holds no key, so that it can be sent to workers and written to logs."""

    kind: str  # "variable" or "file"
    name: str

    @classmethod
    def of(cls, section: EncryptionSection) -> KeySource | None:
        """The source that a configuration names, or ``None`` where nothing is encrypted."""
        if section.key_env is not None:
            return cls("variable", section.key_env)
        if section.key_file is not None:
            return cls("file", str(section.key_file))
        return None

    def __str__(self) -> str:
        return f"the {self.kind} {self.name}"

    def cipher(self) -> Cipher:
        """The cipher of the key.

        Raises:
            KeyProblemError: there is no key there, or what is there is none.
        """
        return Cipher(_parse(self._read(), str(self)), str(self))

    def _read(self) -> str:
        if self.kind == "variable":
            text = os.environ.get(self.name, "")
            if not text.strip():
                raise KeyProblemError(
                    f"the environment variable {self.name}, which is to hold the encryption key, is not set; "
                    f"set it here and on every machine with a worker ({_MAKE_ONE})"
                )
            return text
        try:
            return Path(self.name).expanduser().read_text(encoding="ascii")
        except FileNotFoundError:
            raise KeyProblemError(
                f"there is no file {self.name}, which is to hold the encryption key; put it here and on "
                f"every machine with a worker ({_MAKE_ONE})"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise KeyProblemError(
                f"the file {self.name}, which is to hold the encryption key, cannot be read "
                f"({type(error).__name__}); it holds {KEY_BYTES} bytes in base64 or hexadecimal"
            ) from None


class Cipher:
    """Seals and opens files under one key; ``source`` says in messages where the key came from."""

    def __init__(self, key: bytes, source: str) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._aead = AESGCM(key)
        self._source = source
        self.key_id = hashlib.sha256(b"milp_ray key id\0" + key).hexdigest()[:12]

    def __repr__(self) -> str:
        return f"Cipher(key {self.key_id})"

    def seal(self, content: bytes, context: bytes) -> bytes:
        """Encrypt ``content``; only :meth:`open` with an equal ``context`` gives it back."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, content, context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """Decrypt what :meth:`seal` returned.

        Raises:
            ValueError: it was changed, or sealed with another key or context.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return self._aead.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
        except InvalidTag:
            raise ValueError("the content is not what was sealed") from None

    def check(self, key_id: str, what: str) -> None:
        """Refuse to open what another key has sealed.

        Raises:
            KeyProblemError: ``key_id`` is not this key's.
        """
        if key_id != self.key_id:
            raise KeyProblemError(
                f"{what} is encrypted with the key {key_id}, and {self._source} holds the key {self.key_id}; "
                "give the key that it was encrypted with"
            )


def no_key(key_id: str, what: str) -> KeyProblemError:
    """The error of reading something sealed where no key is configured."""
    return KeyProblemError(
        f"{what} is encrypted with the key {key_id}, and no key is given; name its variable in "
        "personalize.encryption.key_env (or --key-env), or its file in key_file (or --key-file)"
    )


def _parse(text: str, source: str) -> bytes:
    """The key in ``text``: base64 (44 characters) or hexadecimal (64)."""
    compact = "".join(text.split())
    try:
        hexadecimal = re.fullmatch(r"[0-9a-fA-F]{64}", compact)
        key = bytes.fromhex(compact) if hexadecimal else base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise KeyProblemError(
            f"{source} holds no encryption key: it must be {KEY_BYTES} bytes in base64 (44 characters) or "
            f"hexadecimal (64), and has {len(compact)} characters; {_MAKE_ONE}"
        )
    return key
