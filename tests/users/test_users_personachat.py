"""Rules of the PersonaChat reader, on small tables of both kinds."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from support.published import SECRET, history, load, pairs, reasons

from milp_ray.errors import MilpError

ONE = ("", "Persona", "chat")
TWO = ("user 1 personas", "user 2 personas", "Best Generated Conversation")


def write(tmp_path: Path, columns: tuple[str, ...], *rows: tuple[str, ...], name: str = "c.csv") -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    path = tmp_path / name
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def chat(*lines: str) -> str:
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["personality.csv", "personality.csv.gz"])
def test_the_persona_is_the_second_speaker_s(tmp_path: Path, name: str) -> None:
    said = chat("hi , what do you do ?", "i hunt .", "where ?", "in the woods .", "alone ?", "with my dog .")
    loaded = load("personachat", write(tmp_path, ONE, ("0", "i hunt. i bake.", said), name=name))
    [user] = loaded.users
    assert user.profile == "i hunt. i bake."
    assert history(loaded, user.user_id) == ["i hunt ."]
    assert pairs(loaded, user.user_id) == [("where ?", "in the woods ."), ("alone ?", "with my dog .")]


def test_a_persona_is_one_user_in_all_conversations_and_files(tmp_path: Path) -> None:
    one = write(tmp_path, ONE, ("0", "I hunt.", chat("a ?", "b .")), ("1", "I bake.", chat("c ?", "d .")))
    two = write(tmp_path, ONE, ("0", "i hunt", chat("e ?", "f .")), name="d.csv")
    loaded = load("personachat", one, two)
    hunter, baker = loaded.users
    assert (hunter.profile, baker.profile) == ("I hunt.", "I bake.")
    assert history(loaded, hunter.user_id) == ["b ."]
    assert pairs(loaded, hunter.user_id) == [("e ?", "f .")]


def test_both_speakers_of_a_synthetic_conversation_are_users(tmp_path: Path) -> None:
    said = "User 1: Hi!\nUser 2: Hello.\nHow are you?\nUser 1: Fine.\nUser 1: And you?\nUser 2: Well."
    loaded = load("personachat", write(tmp_path, TWO, ("I sail.\nI sing.", "I ski.", said)))
    first, second = loaded.users
    assert (first.profile, second.profile) == ("I sail.\nI sing.", "I ski.")
    assert history(loaded, first.user_id) == ["Hi!", "And you?"]
    assert pairs(loaded, first.user_id) == [("Hello. How are you?", "Fine.")]
    assert history(loaded, second.user_id) == ["Hello. How are you?"]
    assert pairs(loaded, second.user_id) == [("Fine.\nAnd you?", "Well.")]


def test_broken_rows_are_problems_and_others_go_on(tmp_path: Path) -> None:
    rows = [("0", " ", SECRET), ("1", SECRET, " "), ("2",), ("3", SECRET, "only the other speaks")]
    loaded = load("personachat", write(tmp_path, ONE, *rows, ("4", "I hunt.", chat("a ?", "b ."))))
    assert len(loaded.users) == 1
    assert reasons(loaded) == {
        2: "a persona is missing or empty",
        3: "the conversation is missing or empty",
        4: "a persona is missing or empty",
        5: "the persona's speaker says nothing",
    }


def test_a_file_that_ends_in_no_text_is_read_as_far_as_it_is_sound(tmp_path: Path) -> None:
    path = write(tmp_path, ONE, ("0", "I hunt.", chat("a ?", "b .")))
    padding = "".join(f"{i},I bake {i}.,c\n" for i in range(2000)).encode()  # more than a reader's buffer
    path.write_bytes(path.read_bytes() + padding + b"\xff\xfe\n")
    loaded = load("personachat", path)
    assert loaded.users[0].profile == "I hunt."
    assert loaded.problems[0].reason.startswith("the file is no valid UTF-8")


def test_a_gzip_file_that_is_cut_before_its_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.csv.gz"
    path.write_bytes(gzip.compress(b"Persona,chat\n" * 100)[:15])
    with pytest.raises(MilpError, match=r"c\.csv\.gz is no sound gzip file"):
        load("personachat", path)


@pytest.mark.parametrize("content", [b"persona,chat\n1,2\n", b"", b"\xff\xfe"])
def test_a_table_without_the_columns_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(content)
    with pytest.raises(MilpError, match=r"c\.csv has not the columns Persona, chat, nor user 1 personas"):
        load("personachat", path)
