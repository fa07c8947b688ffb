"""A user's single items (turns, examples, the profile): how each is named without being quoted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from milp_ray.errors import MilpError
from milp_ray.personalize.governance.record import Record
from milp_ray.users.records import Example, Turn, User, UserSplit

if TYPE_CHECKING:
    from milp_ray.config.users import UsersSection

Data = TypeVar("Data", User, UserSplit)

_PLACE = re.compile(r"(?:history|examples):\d+|profile")
_HASH = re.compile(r"[0-9a-f]{8,64}")
_ALLOWED = (
    "an item is history:N, examples:N (from 0, in the order of the file), profile, or the beginning (8 "
    "digits or more) of a hash that `milp-ray items` prints"
)


@dataclass(frozen=True, slots=True)
class Item:
    """One item: where it stands in the user's record, the hash of its content, and its texts."""

    place: str
    sha256: str
    texts: tuple[str, ...]
    time: str | None = None


def items_of(user: User) -> Iterator[Item]:
    """A user's items, in the order of the file."""
    for index, turn in enumerate(user.history):
        time = None if turn.time is None else turn.time.isoformat()
        yield Item(f"history:{index}", turn_hash(turn), (turn.text,), time)
    for index, example in enumerate(user.examples):
        time = None if example.time is None else example.time.isoformat()
        yield Item(f"examples:{index}", example_hash(example), (example.query, example.response), time)
    if user.profile is not None:
        yield Item("profile", profile_hash(user.profile), (user.profile,))


def turn_hash(turn: Turn) -> str:
    """SHA-256 of what a turn says; its time does not count, so that a repetition is the same item."""
    return _hash("turn", turn.role, turn.text)


def example_hash(example: Example) -> str:
    """SHA-256 of a query with its response."""
    return _hash("example", example.query, example.response)


def profile_hash(profile: str) -> str:
    """SHA-256 of a profile."""
    return _hash("profile", profile)


def without_items(split: UserSplit, record: Record) -> UserSplit:
    """The split less the items that the user's list of excluded ones names.

    They are taken out of the parts after these were made: nothing moves from a held-out part to training
    because something else was forgotten.
    """
    return _without(split, record, ("train", "validation", "test"))


def user_without_items(user: User, record: Record) -> User:
    """The user less the items that the user's list of excluded ones names."""
    return _without(user, record, ("examples",))


def resolve(named: Sequence[str], user: User | None) -> list[str]:
    """The hashes of the items that are named; ``@FILE`` names the items in a file, one a line.

    Raises:
        MilpError: a name is none, or means no item or several.
    """
    hashes: dict[str, None] = {}
    known = list(items_of(user)) if user is not None else []
    for name in _lines(named):
        if len(name) == 64 and _HASH.fullmatch(name):
            hashes[name] = None  # also of an item that has been taken out of the file
            continue
        if not (_PLACE.fullmatch(name) or _HASH.fullmatch(name)):
            raise MilpError(f"{name!r} names no item; {_ALLOWED}")
        if user is None:
            raise MilpError(
                f"{name!r} cannot be looked up: the users' files do not hold the user; give the whole hash "
                "of the item (64 digits)"
            )
        found = {item.sha256 for item in known if item.place == name or item.sha256.startswith(name)}
        if len(found) != 1:
            raise MilpError(
                f"{name!r} means {len(found)} items of the user, who has {len(user.history)} turns and "
                f"{len(user.examples)} examples; {_ALLOWED}"
            )
        hashes[found.pop()] = None
    if not hashes:
        raise MilpError(f"no item is named; {_ALLOWED}")
    return list(hashes)


def find_user(section: UsersSection, seed: int, user_id: str) -> User | None:
    """One user of a configuration, read without the others being kept; ``None`` where there is none.

    Raises:
        MilpError: a file is missing or of another format.
    """
    from collections import Counter

    from milp_ray.users.readers import iterate_users, read_users

    if section.format == "persona_world":
        users = read_users(section, seed).users
        return next((user for user in users if user.user_id == user_id), None)
    for found in iterate_users(section, Counter()):
        if isinstance(found, User) and found.user_id == user_id:
            return found
    return None


def _without(data: Data, record: Record, parts: Sequence[str]) -> Data:
    """A user's data less what the user's list of excluded items names; ``parts`` are those with examples."""
    key = record.user_key(data.user_id)
    excluded = record.state.items.get(key, {})
    if not excluded:
        return data

    def is_kept(sha256: str) -> bool:
        return record.item_key(key, sha256) not in excluded

    left: dict[str, Any] = {
        part: tuple(example for example in getattr(data, part) if is_kept(example_hash(example)))
        for part in parts
    }
    left["history"] = tuple(turn for turn in data.history if is_kept(turn_hash(turn)))
    if data.profile is not None and not is_kept(profile_hash(data.profile)):
        left["profile"] = None
    return replace(data, **left)


def _lines(named: Sequence[str]) -> Iterator[str]:
    for name in named:
        if not name.startswith("@"):
            yield name.strip().lower()
            continue
        try:
            text = Path(name[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MilpError(
                f"--item {name}: the file cannot be read ({type(error).__name__}); give one with an item "
                "a line"
            ) from None
        yield from (line.strip().lower() for line in text.splitlines() if line.strip())


def _hash(*parts: str) -> str:
    content = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
