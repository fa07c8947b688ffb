"""Rules of the CaSiNo reader, on a small negotiation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.published import SECRET, history, load, pairs, reasons

from milp_ray.errors import MilpError

ME, YOU = "mturk_agent_1", "mturk_agent_2"


def about(**fields: Any) -> dict[str, Any]:
    return {
        "value2issue": {"High": "Water", "Medium": "Food", "Low": "Firewood"},
        "value2reason": {"High": "I hike all day.", "Medium": "We are five.", "Low": "It is warm."},
        "demographics": {"age": 31, "gender": "female"},
        "personality": {"svo": "prosocial", "big-five": {"extraversion": 4.5}},
        "outcomes": {"satisfaction": SECRET},
        **fields,
    }


def talk(*said: tuple[str, str], number: int = 7, **fields: Any) -> dict[str, Any]:
    logs = [
        {"text": text, "task_data": {"deal": 1} if text.endswith("-Deal") else {}, "id": who}
        for who, text in said
    ]
    info = {ME: about(), YOU: about()}
    return {"dialogue_id": number, "chat_logs": logs, "participant_info": info, "annotations": [], **fields}


def write(tmp_path: Path, *dialogues: Any) -> Path:
    path = tmp_path / "casino_train.json"
    path.write_text(json.dumps(dialogues), encoding="utf-8")
    return path


def test_both_participants_are_users_and_their_replies_examples(tmp_path: Path) -> None:
    said = [(ME, "Hi there!"), (YOU, "Hello."), (YOU, "What do you need?"), (ME, "Water."), (YOU, "Fine.")]
    loaded = load("casino", write(tmp_path, talk(*said)))
    assert [user.user_id for user in loaded.users] == ["casino-7-1", "casino-7-2"]
    reasons_given = ["Water: I hike all day.", "Food: We are five.", "Firewood: It is warm."]
    assert history(loaded, "casino-7-1") == [*reasons_given, "Hi there!"]
    assert pairs(loaded, "casino-7-1") == [("Hello.\nWhat do you need?", "Water.")]
    # What follows on an own utterance replies to nothing new.
    assert history(loaded, "casino-7-2") == [*reasons_given, "What do you need?"]
    assert pairs(loaded, "casino-7-2") == [("Hi there!", "Hello."), ("Water.", "Fine.")]


def test_the_profile_tells_priorities_and_the_person_and_not_what_came_after(tmp_path: Path) -> None:
    [user, _] = load("casino", write(tmp_path, talk((ME, "Hi"), (YOU, "Ho")))).users
    assert user.profile is not None
    assert user.profile.splitlines() == [
        "High priority: Water (I hike all day.)",
        "Medium priority: Food (We are five.)",
        "Low priority: Firewood (It is warm.)",
        "age: 31",
        "gender: female",
        "social value orientation: prosocial",
        "extraversion: 4.5",
    ]


def test_deals_are_no_speech(tmp_path: Path) -> None:
    said = [(YOU, "Take it."), (ME, "Submit-Deal"), (YOU, "Reject-Deal"), (ME, "Then so?")]
    assert pairs(load("casino", write(tmp_path, talk(*said))), "casino-7-1") == [("Take it.", "Then so?")]


def test_broken_dialogues_are_problems_with_their_index_and_others_go_on(tmp_path: Path) -> None:
    good = talk((ME, "Hi"), (YOU, "Ho"))
    nothing = {ME: about(value2reason={}), YOU: about()}
    bad = [
        SECRET,
        {**good, "chat_logs": [SECRET]},
        {**good, "participant_info": {ME: SECRET}},
        {**good, "dialogue_id": None},
        talk((YOU, "Ho"), number=8, participant_info=nothing),
    ]
    loaded = load("casino", write(tmp_path, good, *bad))
    assert len(loaded.users) == 3
    found = reasons(loaded)
    assert list(found) == [1, 2, 3, 4, 5]
    assert found[5] == "dialogue 5: a participant has neither said nor written"


@pytest.mark.parametrize("content", ["{", '{"dialogue_id": 1}'])
def test_a_file_of_another_format_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(MilpError, match=r"users\.paths: .*x\.json .*format casino reads a list of dialogues"):
        load("casino", path)


def test_the_real_file_is_read_whole(shared_dir: Path) -> None:
    loaded = load("casino", shared_dir / "data" / "casino" / "casino_test.json")
    assert len(loaded.users) == 200
    assert not loaded.problems
    assert all(user.profile and user.history for user in loaded.users)
    assert not [e for user in loaded.users for e in user.examples if e.response.endswith("-Deal")]
