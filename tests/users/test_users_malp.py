"""Rules of the MedicalDialogue reader, on small dialogues with each kind of the real files' noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.users import SplitSection, UsersSection
from milp_ray.errors import MilpError
from milp_ray.users.malp import KIND, read_malp
from milp_ray.users.problems import Problem
from milp_ray.users.readers import read_users
from milp_ray.users.records import User
from milp_ray.users.splits import check_no_leak, split_user


def dialogue(*pairs: tuple[str, str]) -> list[dict[str, dict[str, str]]]:
    return [{str(i): {"Assistant": doctor, "User": patient}} for i, (doctor, patient) in enumerate(pairs)]


def read(tmp_path: Path, *dialogues: Any) -> list[User | Problem]:
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(list(dialogues)), encoding="utf-8")
    return [item for _, item in read_malp(path)]


def read_one(tmp_path: Path, *pairs: tuple[str, str]) -> User:
    [user] = read(tmp_path, dialogue(*pairs))
    assert isinstance(user, User)
    return user


def texts(user: User) -> list[str]:
    return [turn.text for turn in user.history]


def qa(user: User) -> list[tuple[str, str]]:
    return [(example.query, example.response) for example in user.examples]


def test_a_patient_turn_and_the_next_doctor_turn_are_an_example(tmp_path: Path) -> None:
    user = read_one(
        tmp_path,
        ("Doctor: Hello.", '"My knee hurts."'),
        ("Doctor: Since when?", "Patient: Since May."),
        ("Doctor: Rest it.", "Patient: Thank you."),
    )
    assert user.user_id == "malp-talks-0"
    assert texts(user) == ["My knee hurts.", "Since May.", "Thank you."]
    assert qa(user) == [("My knee hurts.", "Since when?"), ("Since May.", "Rest it.")]
    assert {example.kind for example in user.examples} == {KIND}


def test_times_rise_by_turn_so_that_the_split_goes_by_the_dialogue(tmp_path: Path) -> None:
    user = read_one(tmp_path, *((f"Doctor: reply {i}", f"Patient: ask {i}") for i in range(8)))
    split = split_user(user, SplitSection())
    assert [e.query for e in split.train] == [f"ask {i}" for i in range(5)]
    assert [e.query for e in (*split.validation, *split.test)] == ["ask 5", "ask 6"]
    assert [turn.text for turn in split.history] == [f"ask {i}" for i in range(5)]
    check_no_leak(split)


def test_turn_numbers_give_the_order(tmp_path: Path) -> None:
    pairs = dialogue(*((f"d{i}", f"p{i}") for i in range(11)))
    [user] = read(tmp_path, [*pairs[5:], *pairs[:5]])
    assert texts(user) == [f"p{i}" for i in range(11)]


def test_labels_say_who_speaks_whichever_field_they_are_in(tmp_path: Path) -> None:
    user = read_one(
        tmp_path,
        ("Doctor: Hello.", ""),
        ("Patient: May I come?", "Doctor: Tomorrow."),
        ("Patient: Good.", "Doctor: Goodbye."),
    )
    assert qa(user) == [("May I come?", "Tomorrow."), ("Good.", "Goodbye.")]


def test_several_speakers_in_one_field_are_told_apart(tmp_path: Path) -> None:
    field = 'Patient: "It hurts." \n\nDoctor: "Where?"\n\nPatient: "Here: the knee."\n\nMe: "I see."'
    assert qa(read_one(tmp_path, ("Hello.", field))) == [
        ("It hurts.", "Where?"),
        ("Here: the knee.", "I see."),
    ]


def test_a_name_that_labels_lines_again_and_again_is_the_patient(tmp_path: Path) -> None:
    field = "Siva: My father died. \n\nMe: I am sorry. \n\nSiva: Thank you.\n\nDr. Rao: Take care."
    user = read_one(tmp_path, ("Doctor: Hello.", field), ("Bye.", "Siva: Bye.\n\nDr. Rao: Bye."))
    assert texts(user) == ["My father died.", "Thank you.", "Bye."]
    assert ("Thank you.", "Take care.") in qa(user)


def test_the_head_of_a_list_is_no_speaker(tmp_path: Path) -> None:
    user = read_one(tmp_path, ("Doctor: Hi.", "Patient: What now?"), ("Doctor: Do this.\nDiet: no salt.", ""))
    assert qa(user) == [("What now?", "Do this.\nDiet: no salt.")]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ('"My knee hurts."', "My knee hurts."),
        ('Patient: "My knee hurts."', "My knee hurts."),
        ('My knee hurts."', "My knee hurts."),
        ('"My knee hurts.', "My knee hurts."),
        ("“My knee hurts.”", "My knee hurts."),
        ('I said "no" to it.', 'I said "no" to it.'),
        ('"My knee hurts," the patient replies.', "My knee hurts."),
        ('"It hurts," responds the patient.', "It hurts."),
        ('"It hurts," the patient says. "Help!"', "It hurts, Help!"),
        ('"It hurts." (polite response)', "It hurts."),
        ("It hurts (here).", "It hurts (here)."),
    ],
)
def test_stray_quotes_and_narration_are_taken_off(tmp_path: Path, raw: str, clean: str) -> None:
    assert texts(read_one(tmp_path, ("Doctor: Hello.", raw))) == [clean]


@pytest.mark.parametrize("nothing", ["", "  ", '""', "Patient:", "(polite response)", "...", "Note: a talk"])
def test_what_is_no_speech_is_dropped(tmp_path: Path, nothing: str) -> None:
    assert texts(read_one(tmp_path, ("Hello.", "It hurts."), ("Where?", nothing))) == ["It hurts."]


@pytest.mark.parametrize(
    "end",
    [
        "(The conversation ends here)",
        "Patient: Thanks. (End of conversation)",
        'Patient: "Thanks."(Ending the conversation)',
        "Patient: Thanks. *ends call*",
        "Patient: Thanks. (end of dialogue)",
        "End of conversation. If you need another scenario, ask.",
        "Assistant: End of simulation.",
    ],
)
def test_nothing_is_read_after_the_end_of_the_conversation(tmp_path: Path, end: str) -> None:
    user = read_one(
        tmp_path, ("Hello.", "It hurts."), ("Rest.", end), ("Doctor: Anything else?", "Patient: A new case.")
    )
    assert texts(user) == (["It hurts.", "Thanks."] if "Thanks" in end else ["It hurts."])
    assert qa(user) == [("It hurts.", "Rest.")]


def test_to_speak_of_ending_a_conversation_does_not_end_it(tmp_path: Path) -> None:
    user = read_one(tmp_path, ("Hello.", "If you want to end the conversation, say so."), ("No.", "Good."))
    assert len(user.history) == 2


@pytest.mark.parametrize(
    "broken",
    ["Error Networking, check your network", "I'm sorry, as an AI language model I have no network."],
)
def test_nothing_is_read_from_where_the_dialogue_breaks(tmp_path: Path, broken: str) -> None:
    user = read_one(tmp_path, ("Hello.", "It hurts."), ("Rest.", broken), ("Thanks!", "You're welcome, bye."))
    assert texts(user) == ["It hurts."]
    assert qa(user) == [("It hurts.", "Rest.")]


def test_a_dialogue_without_anything_usable_is_a_problem_with_its_index(tmp_path: Path) -> None:
    good = dialogue(("Hello.", "It hurts."))
    secret = "my secret illness"
    bad: list[Any] = [
        dialogue(("Hello.", "Error Networking, check your network"), (secret, secret)),
        [],
        secret,
        [{"0": {"Assistant": secret, "User": 3}}],
        [{"first": {"Assistant": secret, "User": secret}}],
        [{"0": {}, "1": {}}],
    ]
    items = read(tmp_path, good, *bad, good)
    assert isinstance(items[0], User)
    assert isinstance(items[-1], User)
    assert items[-1].user_id == f"malp-talks-{len(items) - 1}"
    problems = items[1:-1]
    assert all(isinstance(item, Problem) for item in problems)
    assert [item.line for item in problems] == [1, 2, 3, 4, 5, 6]
    assert not any(secret in str(item) for item in problems)


def test_an_utterance_with_half_a_surrogate_pair_is_dropped_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    broken = dialogue(("Hello.", "It hurts \ud83d."), ("Since when?", "Since May."), ("Rest it.", "Thanks."))
    path.write_text(json.dumps([broken, dialogue(("Hello.", "I cough."))]), encoding="utf-8")
    loaded = read_users(UsersSection(format="malp", paths=(path,)), seed=0)
    assert [texts(user) for user in loaded.users] == [["Since May.", "Thanks."], ["I cough."]]
    assert qa(loaded.users[0]) == [("Since May.", "Rest it.")]


@pytest.mark.parametrize("content", ["{", '{"0": 1}'])
def test_a_file_of_another_format_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(MilpError, match="list of dialogues"):
        list(read_malp(path))


def test_the_real_files_are_read_nearly_whole_and_clean(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "malp"
    paths = (folder / "dialogues2_cleaned.json", folder / "dialogues_3_cleaned.json")
    loaded = read_users(UsersSection(format="malp", paths=paths), seed=0)
    assert len(loaded.users) + len(loaded.problems) == 149 + 555
    assert len(loaded.problems) < 10
    splits = [split_user(user, SplitSection()) for user in loaded.users]
    for split in splits:
        check_no_leak(split)
    complete = [s for s in splits if s.history and s.train and s.validation and s.test]
    assert len(complete) > 600
    everything = [turn.text for user in loaded.users for turn in user.history]
    everything += [text for user in loaded.users for e in user.examples for text in (e.query, e.response)]
    marks = ("Doctor:", "Patient:", "Error Networking", "End of conversation", "AI language model")
    assert not [text for text in everything if any(mark in text for mark in marks)]
    assert all(text == text.strip() and text for text in everything)
