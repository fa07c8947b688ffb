"""CaSiNo (Chawla et al. 2021): two campsite neighbours who share out food, water and firewood.

A file (``casino_train.json``, ``casino_valid.json``, ``casino_test.json`` of the published split) is a JSON
list of dialogues::

    {"dialogue_id": 548,
     "chat_logs": [{"text": str, "task_data": {…}, "id": "mturk_agent_1"}, …],
     "participant_info": {"mturk_agent_1": {
         "value2issue": {"High": "Food", "Medium": "Water", "Low": "Firewood"},
         "value2reason": {"High": str, "Medium": str, "Low": str},
         "demographics": {"age": 31, …}, "personality": {"svo": str, "big-five": {…}}, "outcomes": {…}}, …},
     "annotations": […]}

Each participant of a dialogue is a user, ``casino-<dialogue_id>-<agent's number>``: nobody is known across
dialogues.

- **Profile**: priorities with their reasons, demographics and personality, in words.
- **History**: the reasons, which a participant wrote down before the talk, each after the name of its item,
  and own utterances that reply to nothing (the one that opens the talk).
- **Examples**: what the neighbour has said since the participant's last utterance → the participant's reply.

Dropped are deals and their acceptance ("Submit-Deal", "Reject-Deal", …: entries with ``task_data``), which
are moves and not speech, and ``outcomes`` and ``annotations``, which come after the talk. Times are
synthetic, a minute an utterance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from milp_ray.errors import MilpError
from milp_ray.users.problems import Problem
from milp_ray.users.published import clean_text, load_json, synthetic_times, without_responses
from milp_ray.users.records import Example, Turn, User

KIND = "negotiation"

_HOLDS = "a list of dialogues with chat_logs and participant_info"
_PRIORITIES = ("High", "Medium", "Low")


def read_casino(path: Path) -> Iterator[tuple[int, User | Problem]]:
    """Index of the dialogue and participant, or problem, for both participants of each dialogue of a file.

    Raises:
        MilpError: the file is no JSON list.
    """
    dialogues = load_json(path, "casino", _HOLDS)
    if not isinstance(dialogues, list):
        raise MilpError(f"users.paths: {path} holds no list; users.format casino reads {_HOLDS}")
    for index, dialogue in enumerate(dialogues):
        reason = _why_not(dialogue)
        if reason is not None:
            yield index, Problem(path, index, f"dialogue {index}: {reason}")
            continue
        for agent, about in sorted(dialogue["participant_info"].items()):
            user_id = clean_text(f"casino-{dialogue['dialogue_id']}-{agent.removeprefix('mturk_agent_')}")
            if user_id is None:
                yield index, Problem(path, index, f"dialogue {index}: an id is no valid Unicode")
            else:
                yield index, _participant(user_id, agent, about, dialogue["chat_logs"], path, index)


def _why_not(dialogue: Any) -> str | None:
    """What is wrong with a dialogue, or ``None``."""
    if not isinstance(dialogue, dict):
        return "it is no object"
    if not isinstance(dialogue.get("dialogue_id"), int | str):
        return "dialogue_id is missing"
    logs = dialogue.get("chat_logs")
    if not isinstance(logs, list) or not all(isinstance(entry, dict) for entry in logs):
        return "chat_logs is no list of objects"
    info = dialogue.get("participant_info")
    if not isinstance(info, dict) or not info or not all(isinstance(about, dict) for about in info.values()):
        return "participant_info does not hold an object for each participant"
    return None


def _participant(
    user_id: str, agent: str, about: Mapping[str, Any], logs: list[dict[str, Any]], path: Path, index: int
) -> User | Problem:
    reasons = _reasons(about)
    said = [(entry.get("id"), clean_text(entry.get("text"))) for entry in logs if not entry.get("task_data")]
    times = synthetic_times(len(reasons) + len(said))
    issues = _mapping(about, "value2issue")
    history = [
        Turn(f"{clean_text(issues.get(priority)) or priority}: {text}", time=time)
        for (priority, text), time in zip(reasons.items(), times, strict=False)
    ]
    examples: list[Example] = []
    heard: list[str] = []
    for (speaker, text), time in zip(said, times[len(reasons) :], strict=True):
        if text is None:
            continue
        if speaker != agent:
            heard.append(text)
        elif heard:
            examples.append(Example("\n".join(heard), text, time, KIND))
            heard = []
        else:
            history.append(Turn(text, time=time))
    if not history and not examples:
        return Problem(path, index, f"dialogue {index}: a participant has neither said nor written", user_id)
    return User(user_id, without_responses(history, examples), tuple(examples), _profile(about, reasons))


def _reasons(about: Mapping[str, Any]) -> dict[str, str]:
    """The participant's own words for each priority that has some, the highest first."""
    reasons = _mapping(about, "value2reason")
    found = {priority: clean_text(reasons.get(priority)) for priority in _PRIORITIES}
    return {priority: text for priority, text in found.items() if text is not None}


def _profile(about: Mapping[str, Any], reasons: Mapping[str, str]) -> str | None:
    issues = _mapping(about, "value2issue")
    lines = [
        f"{priority} priority: {issue}" + (f" ({reasons[priority]})" if priority in reasons else "")
        for priority in _PRIORITIES
        if (issue := clean_text(issues.get(priority))) is not None
    ]
    personality = _mapping(about, "personality")
    traits = _mapping(about, "demographics") | {"social value orientation": personality.get("svo")}
    traits |= _mapping(personality, "big-five")
    lines += [
        f"{name}: {value}" for name, value in traits.items() if isinstance(value, int | float | str) and value
    ]
    return clean_text("\n".join(lines))


def _mapping(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    return dict(value) if isinstance(value, dict) else {}
