"""What a run remembers about people without knowing them: consent, what was forgotten, by whom and when.

    RUN/governance/key             32 random bytes, the run's own (mode 600)
                  /records.jsonl   one signed line an event, only ever appended to
                  /head            how many lines there are, and the last one's signature; signed

A user stands there as a keyed hash of the id, an item as a keyed hash of its content, so that the record
itself tells nothing about anybody: it only lets a run recognise an id that it is given. (Who has the key can
try ids; keep a run folder as you keep its users' file.) Each line is signed with the key and carries the
signature of the line before it, so that no line can be changed or taken out of the middle unnoticed; the
head, written after each line, tells of lines that were cut off at the end. What cannot be read or does not
verify is an error rather than an empty record: nobody is trained or served then. What nothing in the folder
can tell is that the whole of it was exchanged for an older copy, or removed with its key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from milp_ray.atomic_files import sync_folder, write_bytes
from milp_ray.errors import MilpError
from milp_ray.personalize.governance.retention import now
from milp_ray.personalize.store.names import hash_id
from milp_ray.run_mirror import GOVERNANCE, push_now

KEY_BYTES = 32
_OWNER_ALONE = 0o600
ConsentState = Literal["given", "withdrawn", "absent"]


@dataclass(frozen=True, slots=True)
class Consent:
    """What is known of a user's consent, since when, and whether a person or the users' file said so."""

    state: ConsentState
    source: Literal["command", "file"]
    time: str


@dataclass(slots=True)
class State:
    """What the lines add up to; users and items are keyed hashes."""

    forgetting: dict[str, dict[str, Any]] = field(default_factory=dict)  # begun and not ended: the first line
    forgotten: dict[str, dict[str, Any]] = field(default_factory=dict)  # ended: the signed-off line
    consent: dict[str, Consent] = field(default_factory=dict)
    items: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # user → item → first line
    items_done: dict[str, set[str]] = field(default_factory=dict)

    def apply(self, line: Mapping[str, Any]) -> None:
        """Take one line in."""
        user, event = line["user"], line["event"]
        if event == "forget_begun":
            self.forgetting.setdefault(user, dict(line))
        elif event == "forgotten":
            self.forgetting.pop(user, None)
            self.forgotten[user] = dict(line)
            self.consent.pop(user, None)
            self.items.pop(user, None)
            self.items_done.pop(user, None)
        elif event == "item_forget_begun":
            own = self.items.setdefault(user, {})
            for item in line["items"]:
                own.setdefault(item, dict(line))
        elif event == "items_forgotten":
            self.items_done.setdefault(user, set()).update(line["items"])
        elif event == "consent":
            self.consent[user] = Consent(line["state"], line["source"], line["time"])
        else:
            raise ValueError(f"unknown event {event!r}")


@dataclass(frozen=True, slots=True)
class _Head:
    """How many lines a record has, the last one's signature, and when it was written."""

    n: int
    last: str
    time: str


class Record:
    """The record of the run in ``folder``; there may be none yet.

    Raises:
        MilpError: it is damaged, was changed or cut off, or lacks its key or head.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / GOVERNANCE / "records.jsonl"
        self._key_path = folder / GOVERNANCE / "key"
        self._head_path = folder / GOVERNANCE / "head"
        self.state = State()
        self.n_lines = 0
        self.n_cut_bytes = 0  # at the end, of a line that a crash cut off; it was never acknowledged
        self._last_signature = ""
        self._whole_bytes = 0
        # In this order: whoever is appending writes the line first and the head after it.
        self._key = self._read_key()
        self._head = self._read_head()
        self._read()

    # ----------------------------------------------------------------------------------------- asking

    def user_key(self, user_id: str) -> str:
        """The keyed hash that a user stands under; "" where the run has no key, and so no line on anybody."""
        return self.place_key(hash_id(user_id))

    def place_key(self, place: str) -> str:
        """As :meth:`user_key`, of the hash of an id, by which adapters are filed."""
        return self._keyed(f"user\0{place}") if self._key else ""

    def item_key(self, user: str, item_hash: str) -> str:
        """The keyed hash of one item of a user, who is given as :meth:`user_key` says."""
        return self._keyed(f"item\0{user}\0{item_hash}") if self._key else ""

    def is_forgotten(self, user_id: str) -> bool:
        """Whether the user was forgotten, or a forgetting has begun: from its first moment on."""
        user = self.user_key(user_id)
        return user in self.state.forgotten or user in self.state.forgetting

    # ---------------------------------------------------------------------------------------- writing

    def ensure_key(self) -> None:
        """Make the run's key, where there is none."""
        if self._key:
            return
        self._key = secrets.token_bytes(KEY_BYTES)
        try:
            # The head goes first: where there is a key there is a head, unless somebody took it away.
            self._write_head()
            write_bytes(self._key_path, self._key, mode=_OWNER_ALONE)
        except BaseException:
            self._key = b""  # nothing may be signed with a key that is not on the disk
            raise
        push_now(self._folder)

    def append(self, event: str, user: str, by: str, **facts: Any) -> dict[str, Any]:
        """Write one line, on the disk and in the run's bucket before this returns; the caller holds the run.

        What the users' file says waits for what is taken to the bucket from time to time: there may be very
        many such lines, and the next stage that reads the file writes any that were lost.

        Args:
            event: a kind that :class:`State` knows.
            user: as :meth:`user_key` gives it.
            by: who answers for it.
            facts: counts and names; never an id, a path of a user's, or a text.

        Raises:
            MilpError: the bucket cannot be written, or another machine works on the run; the line is here.
        """
        self.ensure_key()
        if self._head.n < self.n_lines:  # a crash came between a line and its head
            self._write_head()
        line: dict[str, Any] = {
            "n": self.n_lines + 1,
            "event": event,
            "time": _now(),
            "by": by,
            "user": user,
            **facts,
            "previous": self._last_signature,
        }
        line["signature"] = self._keyed(_canonical(line))
        with self.path.open("ab") as file:
            file.truncate(self._whole_bytes)  # of a line that a crash cut off
            content = json.dumps(line, allow_nan=False).encode("ascii") + b"\n"
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path.parent)
        self._take(line, len(content))
        self.n_cut_bytes = 0
        self._write_head()
        if facts.get("source") != "file":
            push_now(self._folder)
        return line

    # -------------------------------------------------------------------------------------- internals

    def _read_key(self) -> bytes:
        try:
            key = self._key_path.read_bytes()
        except FileNotFoundError:
            return b""
        if len(key) != KEY_BYTES:
            raise self._damaged(f"{self._key_path.name} has {len(key)} bytes instead of {KEY_BYTES}")
        return key

    def _read_head(self) -> _Head:
        try:
            line = json.loads(self._head_path.read_bytes())
            if not self._key:
                if line["n"]:
                    raise self._damaged(f"{self._key_path.name} is missing")
                return _Head(0, "", "")  # a crash came between the first head and the key
            signature = line.pop("signature")
            if not hmac.compare_digest(signature, self._keyed(f"head\0{_canonical(line)}")):
                raise ValueError("changed")
            return _Head(int(line["n"]), str(line["last"]), str(line["time"]))
        except FileNotFoundError:
            if not self._key:
                return _Head(0, "", "")
            raise self._damaged(
                f"{self._head_path.name} is missing, so that its end cannot be checked"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._damaged(f"{self._head_path.name} is not what was written") from None

    def _write_head(self) -> None:
        time = _now()
        line = {"n": self.n_lines, "last": self._last_signature, "time": time}
        signature = self._keyed(f"head\0{_canonical(line)}")
        content = json.dumps({**line, "signature": signature}).encode("ascii") + b"\n"
        write_bytes(self._head_path, content, mode=_OWNER_ALONE)
        self._head = _Head(self.n_lines, self._last_signature, time)

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            content = b""
        if not self._key and content:
            raise self._damaged(f"{self._key_path.name} is missing")
        *lines, cut = content.split(b"\n")
        self.n_cut_bytes = len(cut)
        for number, text in enumerate(lines, start=1):
            try:
                line = json.loads(text)
                signature = line.pop("signature")
                sound = hmac.compare_digest(signature, self._keyed(_canonical(line)))
                sound = sound and line["previous"] == self._last_signature and line["n"] == number
                if not sound:
                    raise ValueError("changed")
                self._take({**line, "signature": signature}, len(text) + 1)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise self._damaged(f"line {number} is not what was written") from None
            if number == self._head.n and signature != self._head.last:
                raise self._damaged(f"line {number} is not the one that {self._head_path.name} names")
        self._check_end()

    def _check_end(self) -> None:
        """Refuse a record that ends before the line that the head names."""
        missing = self._head.n - self.n_lines
        if missing > 0:
            cut = f" and {self.n_cut_bytes} bytes of a line that is cut off" if self.n_cut_bytes else ""
            raise self._damaged(
                f"it holds {self.n_lines} whole lines{cut}, and {self._head.n} were written, the last on "
                f"{self._head.time[:19]}: its end is missing"
            )

    def _take(self, line: Mapping[str, Any], n_bytes: int) -> None:
        self.state.apply(line)
        self.n_lines += 1
        self._whole_bytes += n_bytes
        self._last_signature = str(line["signature"])

    def _keyed(self, text: str) -> str:
        return hmac.new(self._key, text.encode("utf-8"), hashlib.sha256).hexdigest()

    def _damaged(self, why: str) -> MilpError:
        return MilpError(
            f"{self.path} is damaged ({why}): it cannot be told who was forgotten or withdrew consent, so "
            "nobody is trained or served. Restore the folder from a copy"
        )


def _now() -> str:
    return now().isoformat(timespec="milliseconds")


def _canonical(line: Mapping[str, Any]) -> str:
    return json.dumps(line, sort_keys=True, separators=(",", ":"), allow_nan=False)
