"""PersonaChat (Zhang et al. 2018) as CSV: two speakers get to know each other, each with a given persona.

Two tables are told apart by their columns; files may be gzipped:

- ``Persona, chat`` (and an index column), as PersonaChat is passed on as one ``personality.csv``: the lines
  of ``chat`` are the speakers' in turn, and the persona is that of the **second**; the first's is not given.
- ``user 1 personas, user 2 personas, Best Generated Conversation``, Synthetic-Persona-Chat (Jandaghi et al.
  2023): lines begin with "User 1:" or "User 2:", a line without goes on with the one before, and both are
  users.

A persona is a user, whatever the conversation it is played in: ``personachat-<hash of the persona>``, with
the persona as profile. In the order of conversations, the earlier half of a user's replies is history, with
utterances that open a conversation; the later half are examples, what the other has said → the reply. Turns
that say the same as an example's response are dropped. Times are synthetic, a minute an utterance of the
user. All conversations are in memory at once, since a persona's may stand anywhere.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from milp_ray.errors import MilpError
from milp_ray.users.problems import Problem
from milp_ray.users.published import (
    Exchange,
    Found,
    clean_text,
    earlier_half_as_history,
    open_file,
    synthetic_times,
)
from milp_ray.users.records import Turn, User
from milp_ray.users.splits import normalised

KIND = "chat"

_ONE_PERSONA = ("Persona", "chat")
_TWO_PERSONAS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
_LABEL = re.compile(r"\s*user ([12])\s*:\s*(.*)", re.IGNORECASE)
_NO_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)

_Speech = tuple[int, str]  # which speaker (1 or 2), and what


@dataclass
class _Person:
    path: Path
    line: int  # of the first conversation's row
    profile: str
    spoken: list[tuple[str | None, str]] = field(default_factory=list)  # what was replied to, and the reply


def read_personachat(paths: Sequence[Path]) -> Iterator[Found]:
    """Personas of all files, in the order of their first rows; a place is the line where that row ends.

    Raises:
        MilpError: a file is no CSV with the columns of either table.
    """
    people: dict[str, _Person] = {}
    for path in paths:
        for number, row in _rows(path):
            conversation = row if isinstance(row, Problem) else _conversation(row)
            if isinstance(conversation, Problem):
                yield path, number, conversation
            elif isinstance(conversation, str):
                yield path, number, Problem(path, number, conversation)
            else:
                personas, speeches = conversation
                for speaker, persona in personas.items():
                    own_id = hashlib.sha256(normalised(persona).encode()).hexdigest()[:12]
                    person = people.setdefault(own_id, _Person(path, number, persona))
                    person.spoken.extend(_spoken_by(speaker, speeches))
    for own_id, person in people.items():
        user_id = f"personachat-{own_id}"
        times = synthetic_times(len(person.spoken))
        replies, others = _replies(person, times)
        history, examples = earlier_half_as_history(replies, others, KIND)
        if history or examples:
            yield person.path, person.line, User(user_id, history, examples, person.profile)
        else:
            reason = "the persona's speaker says nothing"
            yield person.path, person.line, Problem(person.path, person.line, reason, user_id)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str | None] | Problem]]:
    """Line and row of a table that has the columns; a row that cannot be read is a problem."""
    with open_file(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text)
        try:
            columns = set(reader.fieldnames or ())
        except _NO_GZIP:
            raise MilpError(f"users.paths: {path} is no sound gzip file; compress it anew") from None
        except (csv.Error, UnicodeDecodeError):
            columns = set()
        if not (columns.issuperset(_ONE_PERSONA) or columns.issuperset(_TWO_PERSONAS)):
            raise MilpError(
                f"users.paths: {path} has not the columns {', '.join(_ONE_PERSONA)}, nor "
                f"{', '.join(_TWO_PERSONAS)}; users.format personachat reads CSV with either"
            )
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield reader.line_num, Problem(path, reader.line_num, "the row is no CSV")
            except (UnicodeDecodeError, *_NO_GZIP):
                reason = "the file is no valid UTF-8, or no sound gzip file, from here on"
                yield reader.line_num + 1, Problem(path, reader.line_num + 1, reason)
                return
            else:
                yield reader.line_num, row


def _conversation(row: Mapping[str, str | None]) -> tuple[dict[int, str], list[_Speech]] | str:
    """The known persona of each speaker and what is said, or what is wrong with the row."""
    if set(_ONE_PERSONA) <= row.keys():
        known, chat = {2: clean_text(row["Persona"])}, clean_text(row["chat"])
        lines = [line.strip() for line in (chat or "").splitlines() if line.strip()]
        speeches = [(1 + position % 2, line) for position, line in enumerate(lines)]
    else:
        known = {speaker: clean_text(row[f"user {speaker} personas"]) for speaker in (1, 2)}
        speeches = _labelled(clean_text(row[_TWO_PERSONAS[2]]) or "")
    personas = {speaker: persona for speaker, persona in known.items() if persona is not None}
    if len(personas) < len(known):
        return "a persona is missing or empty"
    return (personas, speeches) if speeches else "the conversation is missing or empty"


def _labelled(conversation: str) -> list[_Speech]:
    speeches: list[_Speech] = []
    for line in conversation.splitlines():
        label = _LABEL.fullmatch(line)
        if label:
            speeches.append((int(label[1]), label[2].strip()))
        elif speeches and line.strip():
            speaker, text = speeches[-1]
            speeches[-1] = (speaker, f"{text} {line.strip()}".strip())
    return [(speaker, text) for speaker, text in speeches if text]


def _spoken_by(speaker: int, speeches: list[_Speech]) -> Iterator[tuple[str | None, str]]:
    """Each utterance of a speaker after what the other has said since the one before, if anything."""
    heard: list[str] = []
    for who, text in speeches:
        if who != speaker:
            heard.append(text)
            continue
        yield "\n".join(heard) or None, text
        heard = []


def _replies(person: _Person, times: Sequence[datetime]) -> tuple[list[Exchange], list[Turn]]:
    replies, others = [], []
    for (query, text), time in zip(person.spoken, times, strict=True):
        if query is None:
            others.append(Turn(text, time=time))
        else:
            replies.append(Exchange(query, text, time))
    return replies, others
