"""How a user is named in paths and in messages: pure functions of an id."""

from __future__ import annotations

import hashlib
import json

_LONGEST_SHOWN_ID = 80


def hash_id(user_id: str) -> str:
    """SHA-256 of an id, in hexadecimal; lone surrogates, which strict UTF-8 refuses, are let through."""
    return hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()


def shown(user_id: str) -> str:
    """An id as it may stand in a message: quoted, escaped and not too long."""
    text = json.dumps(user_id)
    return text if len(text) <= _LONGEST_SHOWN_ID else text[:_LONGEST_SHOWN_ID] + '…"'


def shown_place(place: str) -> str:
    """The hash of an id as it may stand in a message where the id is not known: its beginning."""
    return f"#{place[:12]}"
