"""``updates.jsonl``: the users whose adapter an update did not replace, and why.

An update that the guard has refused is not tried again while data, recipe, configuration and the version to
continue are the same: the line names them in one hash. Lines are added as users end, the latest of a user
counts, and at the end the file is written anew without what no longer holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.atomic_files import write_text
from milp_ray.personalize.store import hash_id

if TYPE_CHECKING:
    from milp_ray.config.update import UpdateSection

KEPT, FAILED = "kept", "failed"


def decision_of(version: int, fingerprint: str, section: UpdateSection) -> str:
    """Hash of everything that a refusal depends on."""
    made_from = [version, fingerprint, section.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode("ascii")).hexdigest()


@dataclass(frozen=True, slots=True)
class Refused:
    """An update that the guard refused: the version that stays, and the fingerprint that was wanted."""

    version: int
    fingerprint: str


def refused_updates(path: Path) -> dict[str, Refused]:
    """The refused updates of a journal's file, by the hash of the user's id; none where there is no file."""
    return {
        hash_id(line["user_id"]): Refused(line["version"], line["fingerprint"])
        for line in _kept_lines(path)
        if "version" in line and "fingerprint" in line
    }


class Journal:
    """The file, open for one update; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, dict[str, Any]] = {}  # by the hash of the user's id

    def __enter__(self) -> Journal:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = {hash_id(line["user_id"]): line for line in _kept_lines(self._path)}
        # Failures are tried again, and half a line of a killed process ends here.
        self._write_all()
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._write_all()

    def kept(self, user_id: str, decision: str) -> dict[str, Any] | None:
        """The refusal of exactly this update, if there was one."""
        line = self._lines.get(hash_id(user_id))
        return line if line is not None and line.get("decision") == decision else None

    def add(self, user_id: str, outcome: str, reason: str, **facts: Any) -> None:
        """Note that a user's adapter was not replaced."""
        line = {"user_id": user_id, "outcome": outcome, "reason": reason, **facts}
        self._lines[hash_id(user_id)] = line
        self._file.write(_encoded(line))
        self._file.flush()

    def drop(self, user_id: str) -> None:
        """A user's adapter is up to date: an earlier line holds no longer."""
        self._lines.pop(hash_id(user_id), None)

    def _write_all(self) -> None:
        write_text(self._path, "".join(_encoded(line) for line in self._lines.values()))


def _kept_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines about kept versions; what is none is passed over, such as half a line of a killed process."""
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.get("outcome") == KEPT and isinstance(line.get("user_id"), str):
            yield line


def _encoded(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
