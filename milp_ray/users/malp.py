"""The MedicalDialogue format of MaLP (Zhang et al. 2024): doctor–patient dialogues, one a patient.

A file is a JSON list of dialogues; a dialogue is a list of one-key objects
``{"<turn number>": {"Assistant": str, "User": str}}``, nominally the doctor's text and then the patient's.
The dialogues are a language model's talk with itself, and the reader undoes the noise of that:

- A label at the start of a line ("Doctor:", "Patient:", "Me:", "Siva:") says who speaks, whichever field it
  is in, and is taken off; one field may hold several speakers. Without a label the field's role holds.
- Quotation marks around an utterance and a narrator's words («the patient replies») are taken off; empty
  utterances, stage directions and what is no valid Unicode are dropped.
- Nothing is read after the conversation's end («(The conversation ends here)», «End of conversation.»).
- Nothing is read from the first network error message («Error Networking, check your network») or the first
  remark of being an AI model: roles are swapped or broken from there on.

The patient's utterances are the history. An utterance of the patient and the doctor's reply right after it
are an example. Times are synthetic, a minute an utterance, so that the split goes by the dialogue's order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from milp_ray.errors import MilpError
from milp_ray.users.problems import Problem
from milp_ray.users.published import clean_text, load_json, synthetic_times
from milp_ray.users.records import Example, Turn, User

DOCTOR = "doctor"
PATIENT = "patient"
KIND = "dialogue"

_FIELDS = (("Assistant", DOCTOR), ("User", PATIENT))
_QUOTES = '"“”'
# Up to four capitalised words and a colon, at the start of a line, perhaps after a quotation mark.
_LABEL = re.compile(r"^[ \t]*[\"“:\s]{0,3}([A-Z][\w.]*(?: [A-Z][\w.]*){0,3}) ?:", re.MULTILINE)
_DOCTOR_LABELS = frozenset({"Doctor", "Me", "Assistant", "AI", "Interviewer", "Physician"})
_PATIENT_LABELS = frozenset({"Patient", "You", "User", "Interviewee"})
_NO_SPEAKER = frozenset({"Note"})
_TALK = r"(?:conversation|dialogue|simulation|call|chat)"
_END = re.compile(
    # In brackets or asterisks anywhere: "(Ending the conversation)", "*Ends call*", "(The chat has ended)".
    rf"[(\[*]\s*(?:the\s+)?(?:end(?:s|ing)?\b[^)\]*]{{0,20}}\b{_TALK}|{_TALK}\s+(?:has\s+)?end(?:s|ed)?\b)"
    # Bare only as the beginning of an utterance: «we can end the conversation here» is speech.
    rf"|^\W*End of (?:the )?{_TALK}\b",
    re.IGNORECASE | re.MULTILINE,
)
_BROKEN = re.compile(
    r"error networking|networking error|AI language model"
    r"|\b(?:as|am|I'm|I’m) an? (?:AI|artificial intelligence)\b",
    re.IGNORECASE,
)
# A narrator within the field: «"My knee hurts," the patient replies.», «"Thank you." (polite response)».
_SAYS = r"(?:repl(?:y|ie[sd])|(?:respond|answer|ask|say|explain|add|admit)(?:s|ed|ted)?|said)"
_NARRATION = re.compile(
    rf"[{_QUOTES}]\s*(?:(?:the patient|the doctor|you|I) {_SAYS}(?: \w+ly)?\b"
    rf"|{_SAYS} the (?:patient|doctor)\b|\([^)]*\bresponse\))[.,]?",
    re.IGNORECASE,
)
_STAGE_DIRECTION = re.compile(r"[(\[*][^)\]*]*[)\]*]\W*")


def read_malp(path: Path) -> Iterator[tuple[int, User | Problem]]:
    """Index and patient, or problem, of every dialogue of a file.

    ``user_id`` is "malp-<file stem>-<index>". A dialogue of which nothing usable is left is a problem.

    Raises:
        MilpError: the file is no JSON list.
    """
    dialogues = load_json(path, "malp", "a list of dialogues")
    if not isinstance(dialogues, list):
        raise MilpError(f"users.paths: {path} holds no list; users.format malp reads a list of dialogues")
    for index, dialogue in enumerate(dialogues):
        yield index, _patient(dialogue, f"malp-{path.stem}-{index}", path, index)


def _patient(dialogue: Any, user_id: str, path: Path, index: int) -> User | Problem:
    fields = _fields(dialogue)
    if isinstance(fields, str):
        return Problem(path, index, f"dialogue {index}: {fields}", user_id)
    turns = utterances(fields)
    times = synthetic_times(len(turns))
    history = tuple(
        Turn(text=text, time=time) for (role, text), time in zip(turns, times, strict=True) if role == PATIENT
    )
    if not history:
        reason = f"dialogue {index}: no utterance of the patient is left in it"
        return Problem(path, index, reason, user_id)
    examples = tuple(
        Example(query=query, response=response, time=time, kind=KIND)
        for (asker, query), (replier, response), time in zip(turns, turns[1:], times, strict=False)
        if (asker, replier) == (PATIENT, DOCTOR)
    )
    return User(user_id=user_id, history=history, examples=examples)


def utterances(fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Cleaned (role, text) of a dialogue, in order, from its (role of the field, text of the field)."""
    found: list[tuple[str, str]] = []
    names = _names(fields)
    for field_role, field_text in fields:
        for role, text in _speakers(field_role, field_text, names):
            if _BROKEN.search(text):
                return found
            end = _END.search(text)
            cleaned = clean_text(_cleaned(text[: end.start()] if end else text))
            if cleaned and role is not None:
                found.append((role, cleaned))
            if end:
                return found
    return found


def _fields(dialogue: Any) -> list[tuple[str, str]] | str:
    """(role of the field, text) in the order of turn numbers, or what is wrong with the dialogue."""
    if not isinstance(dialogue, list):
        return "it is no list of turns"
    numbered: list[tuple[int, dict[str, Any]]] = []
    for position, entry in enumerate(dialogue):
        if not isinstance(entry, dict) or len(entry) != 1:
            return f"turn {position} is no object with one turn number"
        number, turn = next(iter(entry.items()))
        if not number.isdecimal():
            return f"turn {position} has no whole number for a key"
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name, ""), str) for name, _ in _FIELDS):
            return f"turn {position} does not hold texts under Assistant and User"
        numbered.append((int(number), turn))
    numbered.sort(key=lambda pair: pair[0])
    return [(role, turn.get(name, "")) for _, turn in numbered for name, role in _FIELDS]


def _speakers(field_role: str, text: str, names: frozenset[str]) -> Iterator[tuple[str | None, str]]:
    """(role, text) of each speaker within one field; the role is None for a note that nobody speaks."""
    labels = [match for match in _LABEL.finditer(text) if _is_speaker(match[1], names)]
    stops = [*(match.start() for match in labels), len(text)]
    yield field_role, text[: stops[0]]
    for match, stop in zip(labels, stops[1:], strict=True):
        yield _role(match[1]), text[match.end() : stop]


def _names(fields: list[tuple[str, str]]) -> frozenset[str]:
    """Labels that open lines of a dialogue at least twice: persons, rather than the head of a list."""
    counts = Counter(match[1] for _, text in fields for match in _LABEL.finditer(text))
    return frozenset(label for label, count in counts.items() if count > 1)


def _is_speaker(label: str, names: frozenset[str]) -> bool:
    return label in _DOCTOR_LABELS | _PATIENT_LABELS | _NO_SPEAKER | names


def _role(label: str) -> str | None:
    """Whom a label names; a person's name is the patient's unless it has a doctor's title."""
    if label in _NO_SPEAKER:
        return None
    if label in _DOCTOR_LABELS or label.startswith(("Dr ", "Dr.", "Doctor ")):
        return DOCTOR
    return PATIENT


def _cleaned(text: str) -> str:
    """The utterance without narration and quotation marks around it; empty for what is no speech."""
    text, n_narrations = _NARRATION.subn(" ", text)
    if n_narrations:
        text = re.sub(r"\s+", " ", re.sub(f"[{_QUOTES}]", "", text)).strip()
        text = text[:-1] + "." if text.endswith(",") else text
    text = text.strip()
    while text and (text[0] in _QUOTES or text[-1] in _QUOTES):
        n_quotes = sum(character in _QUOTES for character in text)
        around = text[0] in _QUOTES and text[-1] in _QUOTES and n_quotes == 2
        if around or len(text) == 1:
            text = text[1:-1].strip()
        elif n_quotes % 2:  # a stray one, whose partner was cut off or never there
            text = (text[1:] if text[0] in _QUOTES else text[:-1]).strip()
        else:
            break
    if _STAGE_DIRECTION.fullmatch(text) or not any(character.isalnum() for character in text):
        return ""
    return text
