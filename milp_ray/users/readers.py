"""The users of a run, from wherever the configuration says: one door to every format."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.users.amazon_qa import read_amazon_qa
from milp_ray.users.casino import read_casino
from milp_ray.users.lamp import read_lamp
from milp_ray.users.malp import read_malp
from milp_ray.users.memorybank import read_memorybank
from milp_ray.users.personachat import read_personachat
from milp_ray.users.problems import CONSENT_WITHDRAWN, Problem
from milp_ray.users.published import Found
from milp_ray.users.records import Example, User
from milp_ray.users.reddit_msp import read_reddit_msp
from milp_ray.users.reddit_pchatbot import read_reddit_pchatbot
from milp_ray.users.sources import check_file, named_files, shown_source
from milp_ray.users.stream import UserStream

if TYPE_CHECKING:
    from milp_ray.config.users import UsersSection

__all__ = [
    "DatasetDigest",
    "LoadedUsers",
    "Problem",
    "dataset_hash",
    "file_groups",
    "iterate_users",
    "read_users",
    "user_hash",
]


@dataclass(frozen=True, slots=True)
class LoadedUsers:
    """Users in the order of the files, and what was left out.

    ``unknown_fields`` counts, by path ("history[].mood"), fields that the format does not have; they reach
    neither training nor a prompt. ``dataset_hash`` is :func:`dataset_hash` of ``users``.
    """

    users: list[User]
    problems: list[Problem]
    unknown_fields: dict[str, int]
    dataset_hash: str


def read_users(section: UsersSection, seed: int) -> LoadedUsers:
    """All users of a configuration; ``seed`` makes the embedded ones, and files do not depend on it.

    Records that cannot be used are listed as problems and do not stop the rest.

    Raises:
        MilpError: a path is missing or of another format, or no user is left.
    """
    if section.format == "persona_world":
        found = _embedded(section, seed)
        return LoadedUsers(found, [], {}, dataset_hash(found))
    unknown_fields: Counter[str] = Counter()
    users: dict[str, User] = {}
    problems: list[Problem] = []
    for item in iterate_users(section, unknown_fields):
        if isinstance(item, User):
            users[item.user_id] = item
            if len(users) == section.limit:
                break
        else:
            problems.append(item)
            if item.reason == CONSENT_WITHDRAWN and item.user_id is not None:
                users.pop(item.user_id, None)
    if not users:
        raise MilpError(_no_users(section, problems))
    kept = list(users.values())
    return LoadedUsers(kept, problems, dict(sorted(unknown_fields.items())), dataset_hash(kept))


def iterate_users(section: UsersSection, unknown_fields: Counter[str]) -> Iterator[User | Problem]:
    """Users and problems of the files under ``users.paths``, one after the other.

    Only ids are remembered here; what else is held in memory, a published format's reader says.
    A user_id that was given before is a problem, whichever file it stands in, and so is one that has
    withdrawn consent before. Consent that is withdrawn after the user was given out is a problem with that
    user_id.

    Raises:
        MilpError: a path is missing or of another format.
    """
    first_seen: dict[str, str] = {}
    withdrawn: set[str] = set()
    for path, line, item in _records(section, unknown_fields):
        if isinstance(item, Problem):
            if item.reason == CONSENT_WITHDRAWN and item.user_id is not None:
                withdrawn.add(item.user_id)
            yield item
        elif item.user_id in withdrawn:
            yield Problem(path, line, CONSENT_WITHDRAWN, item.user_id)
        elif item.user_id in first_seen:
            reason = f"user_id was given before, at {first_seen[item.user_id]}"
            yield Problem(path, line, reason, item.user_id)
        else:
            first_seen[item.user_id] = f"{Path(path).name}:{line}"
            yield item


def _records(
    section: UsersSection, unknown_fields: Counter[str]
) -> Iterator[tuple[Path | str, int, User | Problem]]:
    """Every record with its file's path or URI and its line; all files are found before one is read."""
    read_together = _READERS_OF_SEVERAL.get(section.format)
    if read_together is not None:
        yield from read_together(_checked(section.paths))
        return
    read = _READERS.get(section.format)
    if read is not None:
        for path in _checked(section.paths):
            for line, item in read(path):
                yield path, line, item
        return
    for file, line, item in UserStream(named_files(section), unknown_fields=unknown_fields).records():
        yield file.name, line, item


class DatasetDigest:
    """:func:`dataset_hash` of users that come one by one."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.n_users = 0

    def add(self, user: User) -> None:
        """Take the next user in."""
        self._digest.update(bytes.fromhex(user_hash(user)))
        self.n_users += 1

    def hexdigest(self) -> str:
        """The hash of the users so far."""
        return self._digest.hexdigest()


def file_groups(section: UsersSection) -> list[tuple[Path | str, ...]]:
    """The files of a configuration, those together that have to be read together."""
    if section.format in _READERS_OF_SEVERAL:
        return [section.paths]
    return [(path,) for path in section.paths]


def _checked(sources: Iterable[Path | str]) -> list[Path]:
    """Files that are all there; the configuration lets no URI of such a format through."""
    paths = [Path(source) for source in sources]
    for path in paths:
        check_file(path)
    return paths


def dataset_hash(users: Iterable[User]) -> str:
    """SHA-256, in hex, over the users' contents in their order; the format they came in does not count."""
    digest = DatasetDigest()
    for user in users:
        digest.add(user)
    return digest.hexdigest()


def user_hash(user: User) -> str:
    """SHA-256, in hex, over everything a user holds, as JSON with sorted keys."""
    content = {
        "user_id": user.user_id,
        "profile": user.profile,
        "consent": user.consent,
        "history": [[turn.role, turn.text, _iso(turn.time)] for turn in user.history],
        "examples": [_example_content(example) for example in user.examples],
    }
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def _example_content(example: Example) -> list[Any]:
    return [
        example.query,
        example.response,
        _iso(example.time),
        example.kind,
        example.answer,
        dict(example.tags),
        *([] if example.rejected is None else [example.rejected]),
    ]


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _embedded(section: UsersSection, seed: int) -> list[User]:
    from milp_ray.users.persona_world import generate_users

    world = section.persona_world
    n_users = world.n_short_users, world.n_long_users
    users = generate_users(*n_users, world.n_examples, seed, long_turns=world.long_turns)[: section.limit]
    if not users:
        raise MilpError("users.persona_world makes no user: set n_short_users or n_long_users to at least 1")
    return users


def _no_users(section: UsersSection, problems: list[Problem]) -> str:
    files = ", ".join(map(shown_source, section.paths))
    if not problems:
        return f"users.paths: {files} hold no record; name files with users in the format {section.format}"
    return (
        f"users.paths: none of {len(problems)} records in {files} can be used; the first: {problems[0]}. "
        f"Mend them, or set users.format (now {section.format}) to what the files are"
    )


# Of datasets of which a file is read by itself.
_READERS: dict[str, Callable[[Path], Iterator[tuple[int, User | Problem]]]] = {
    "malp": read_malp,
    "casino": read_casino,
}
# Of datasets in which several files, or lines in any of them, make one user.
_READERS_OF_SEVERAL: dict[str, Callable[[Sequence[Path]], Iterator[Found]]] = {
    "amazon_qa": read_amazon_qa,
    "reddit_msp": read_reddit_msp,
    "reddit_pchatbot": read_reddit_pchatbot,
    "personachat": read_personachat,
    "lamp": read_lamp,
    "memorybank": read_memorybank,
}
