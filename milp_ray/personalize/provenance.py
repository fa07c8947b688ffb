"""What an adapter was trained on, by hashes: enough to tell later what is new, and no text.

The hashes stand in the version's manifest. They are salted, with a salt for each version, so that the same
sentence of two users or versions cannot be recognised by comparing them. Who holds a manifest can still
check a guess of a sentence; with a key the manifest's personal part is encrypted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from milp_ray.users.records import Example, Turn, UserSplit
from milp_ray.users.splits import without_traces

_Record = TypeVar("_Record", Turn, Example)
_HASH_BYTES = 8  # of a user's items; among 10,000 of them two agree by chance once in 10¹¹ users
_SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class News:
    """A user's data now, beside what an adapter was trained on.

    ``guard`` are the validation examples of that adapter, as far as they are still there: they stay out of
    ``new_turns`` and ``new_examples``. ``n_gone`` counts what was trained on and is not there any more:
    edited or removed, or held out by now.
    """

    earlier_turns: tuple[Turn, ...]
    new_turns: tuple[Turn, ...]
    earlier_examples: tuple[Example, ...]
    new_examples: tuple[Example, ...]
    guard: tuple[Example, ...]
    n_gone: int

    @property
    def n_new(self) -> int:
        """Turns and examples to train on that the adapter has not seen."""
        return len(self.new_turns) + len(self.new_examples)

    def trained_on(self, split: UserSplit) -> UserSplit:
        """``split`` without what an update leaves out: what a version that continues the adapter has seen."""
        return UserSplit(
            user_id=split.user_id,
            profile=split.profile,
            history=(*self.earlier_turns, *self.new_turns),
            train=(*self.earlier_examples, *self.new_examples),
            validation=split.validation,
            test=split.test,
        )


@dataclass(frozen=True, slots=True)
class Provenance:
    """The recipe's digest, and a hash of every turn and example; ``validation`` was held out."""

    recipe: str
    salt: bytes
    history: tuple[bytes, ...]
    train: tuple[bytes, ...]
    validation: tuple[bytes, ...]

    @classmethod
    def of(cls, recipe_digest: str, split: UserSplit) -> Provenance:
        """Of an adapter that was trained on ``split`` under a recipe."""
        salt = os.urandom(_SALT_BYTES)
        return cls(
            recipe_digest,
            salt,
            _hashes(split.history, salt),
            _hashes(split.train, salt),
            _hashes(split.validation, salt),
        )

    def to_dict(self) -> dict[str, str]:
        """Plain text, for a manifest."""
        hashes = {"history": self.history, "train": self.train, "validation": self.validation}
        found = {"salt": self.salt, **{name: b"".join(value) for name, value in hashes.items()}}
        return {"recipe": self.recipe} | {
            name: base64.b64encode(value).decode("ascii") for name, value in found.items()
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Provenance | None:
        """What a manifest says; ``None`` where it says nothing that can be read."""
        try:
            recorded = meta["made_from"]
            parts = {
                name: base64.b64decode(recorded[name], validate=True)
                for name in ("salt", "history", "train", "validation")
            }
            salt = parts.pop("salt")
            return cls(str(recorded["recipe"]), salt, **{name: _cut(part) for name, part in parts.items()})
        except (KeyError, TypeError, ValueError):
            return None

    def news(self, split: UserSplit) -> News:
        """What of a user's data is new since, and what is gone; a text that is said again is new."""
        earlier_turns, new_turns, n_gone = _parted(split.history, self.history, self.salt)
        earlier_examples, new_examples, n_gone_examples = _parted(split.train, self.train, self.salt)
        # What was held out then may be training data now; the test part is not for decisions.
        guard, _, _ = _parted((*split.train, *split.validation), self.validation, self.salt)
        held_out = set(_hashes(guard, self.salt))
        hashes = _hashes(new_examples, self.salt)
        return News(
            earlier_turns=earlier_turns,
            new_turns=without_traces(new_turns, guard),
            earlier_examples=earlier_examples,
            new_examples=tuple(e for e, own in zip(new_examples, hashes, strict=True) if own not in held_out),
            guard=guard,
            n_gone=n_gone + n_gone_examples,
        )


def _parted(
    records: Sequence[_Record], known: Iterable[bytes], salt: bytes
) -> tuple[tuple[_Record, ...], tuple[_Record, ...], int]:
    """Records that are known, those that are not, and how many of the known ones are missing."""
    left = Counter(known)
    found: list[_Record] = []
    others: list[_Record] = []
    for record, own in zip(records, _hashes(records, salt), strict=True):
        (found if left[own] > 0 else others).append(record)
        left[own] -= left[own] > 0
    return tuple(found), tuple(others), left.total()


def _hashes(records: Iterable[Turn | Example], salt: bytes) -> tuple[bytes, ...]:
    return tuple(
        hashlib.blake2b(_content(record), digest_size=_HASH_BYTES, key=salt).digest() for record in records
    )


def _content(record: Turn | Example) -> bytes:
    """What training sees of a record; times are not among it."""
    texts = (
        ["turn", record.role, record.text]
        if isinstance(record, Turn)
        else ["example", record.query, record.response]
    )
    return json.dumps(texts, separators=(",", ":")).encode("ascii")


def _cut(content: bytes) -> tuple[bytes, ...]:
    if len(content) % _HASH_BYTES:
        raise ValueError("not a whole number of hashes")
    return tuple(content[i : i + _HASH_BYTES] for i in range(0, len(content), _HASH_BYTES))
