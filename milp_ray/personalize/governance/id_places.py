"""Where users' ids stand in the files that a run and a store write, whose other words are the program's own.

An id may be any string, also one that these files hold for another reason: "milp" is a method, "reason" a
key, "1" a tag. In a file of the program's own such a plain id counts only where ids stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from milp_ray.personalize.store.manifest import MANIFEST
from milp_ray.run_mirror import ADAPTERS, GOVERNANCE, INDEX
from milp_ray.run_paths import RunPaths

if TYPE_CHECKING:
    from milp_ray.personalize.governance.needles import Buffer

USER_ID = "user_id"  # the column and the field that say whose a row, a line or a manifest is
USERS_KEYS = frozenset({"milp_ray.users", "users", "probe_users"})  # of maps by id, and of lists of ids
_STORED = re.compile(r"adapter_config\.json|adapter_model\.safetensors|v\d+-\w+\.json|" + re.escape(MANIFEST))
_RUN = RunPaths(Path())
_FIRST_PARTS = {
    path.parts[0]
    for path in (getattr(_RUN, name) for name, what in vars(RunPaths).items() if isinstance(what, property))
    if isinstance(path, Path) and path.parts
}
_OF_RUN = (_FIRST_PARTS | {GOVERNANCE, INDEX, "failed_evaluation.jsonl", "scores"}) - {ADAPTERS}


def is_of_run(name: str) -> bool:
    """Whether a run writes the file of this name, relative to its folder."""
    first = PurePosixPath(name).parts[0]
    return first in _OF_RUN or (first == ADAPTERS and is_of_store(name))


def is_of_store(name: str) -> bool:
    """Whether a store writes the file of this name."""
    return _STORED.fullmatch(PurePosixPath(name).name) is not None


def ids_in(data: Any, *, by_user: bool = False) -> Iterator[str]:
    """The ids in decoded JSON; ``by_user``: it is a list of ids, or a map with ids for keys."""
    if isinstance(data, str):
        if by_user:
            yield data
    elif isinstance(data, list):
        for value in data:
            yield from ids_in(value, by_user=by_user and isinstance(value, str))
    elif isinstance(data, dict):
        if by_user:
            yield from data
        for name, value in data.items():
            yield from ids_in(value, by_user=is_about_users(name, value))


def is_about_users(name: str, value: Any) -> bool:
    """Whether a member's value is an id, a list of ids, or a map with ids for keys."""
    return name == USER_ID if isinstance(value, str) else name in USERS_KEYS


def quoted_ids(content: Buffer) -> bytes:
    """The ids in a file of JSON or JSON lines, quoted; a line that is broken stands there as it is."""
    if content[:1] not in (b"{", b"["):
        return b""
    raw = bytes(content)
    try:
        return _quoted(json.loads(raw))
    except (ValueError, RecursionError):
        return b"\n".join(map(_quoted_in_line, raw.splitlines()))


def _quoted_in_line(line: bytes) -> bytes:
    try:
        return _quoted(json.loads(line))
    except (ValueError, RecursionError):
        return line


def _quoted(data: Any) -> bytes:
    return "\n".join(json.dumps(user_id) for user_id in ids_in(data)).encode("ascii")
