"""Rules of the PChatbot reader, on a few pairs of posts and responses."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from support.published import SECRET, history, load, pairs, reasons

from milp_ray.errors import MilpError


def pair(post: str, poster: str, posted: int | str, response: str, responder: str, responded: int) -> str:
    return "\t".join(map(str, (post, poster, posted, response, responder, responded))) + "\n"


def write(tmp_path: Path, *lines: str, name: str = "reddit.txt") -> Path:
    path = tmp_path / name
    content = "".join(lines).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def replies(n: int, responder: str = "2") -> list[str]:
    return [pair(f"Post {i} here", "1", 100 + i, f"Reply {i} of mine", responder, 200 + i) for i in range(n)]


@pytest.mark.parametrize("name", ["reddit.txt", "reddit.txt.gz"])
def test_the_earlier_half_of_the_replies_is_history_and_the_later_examples(tmp_path: Path, name: str) -> None:
    lines = replies(5)
    loaded = load("reddit_pchatbot", write(tmp_path, *reversed(lines), name=name))
    [user] = loaded.users
    assert user.user_id == "pchatbot-2"
    assert history(loaded, user.user_id) == ["Reply 0 of mine", "Reply 1 of mine"]
    assert pairs(loaded, user.user_id) == [(f"Post {i} here", f"Reply {i} of mine") for i in (2, 3, 4)]


def test_own_posts_are_history_once_each_in_their_place(tmp_path: Path) -> None:
    own = [pair("I posted this", "2", 150, f"Answer {i}", "3", 300 + i) for i in range(2)]
    loaded = load("reddit_pchatbot", write(tmp_path, *own, *replies(3)))
    assert [user.user_id for user in loaded.users] == ["pchatbot-3", "pchatbot-2"]
    assert history(loaded, "pchatbot-2") == ["I posted this", "Reply 0 of mine"]


def test_who_posts_and_never_replies_is_no_user(tmp_path: Path) -> None:
    loaded = load("reddit_pchatbot", write(tmp_path, *replies(2)))
    assert [user.user_id for user in loaded.users] == ["pchatbot-2"]


def test_a_reply_said_again_later_is_no_history(tmp_path: Path) -> None:
    lines = [
        pair(f"P{i}", "1", i, text, "2", 10 + i) for i, text in enumerate(["Thanks!", "a", "thanks", "b"])
    ]
    assert history(load("reddit_pchatbot", write(tmp_path, *lines)), "pchatbot-2") == ["a"]


def test_spaces_between_chinese_words_are_taken_out_and_others_kept(tmp_path: Path) -> None:
    line = pair("酒酿 小 圆子 ， new York 风格", "1", 1, "200万 湖人 要 了", "2", 2)
    loaded = load("reddit_pchatbot", write(tmp_path, line))
    assert pairs(loaded, "pchatbot-2") == [("酒酿小圆子，new York风格", "200万湖人要了")]


def test_users_go_on_over_files(tmp_path: Path) -> None:
    first, second = replies(4)[:2], replies(4)[2:]
    one, two = write(tmp_path, *second, name="1.txt"), write(tmp_path, *first, name="2.txt")
    loaded = load("reddit_pchatbot", one, two)
    assert history(loaded, "pchatbot-2") == ["Reply 0 of mine", "Reply 1 of mine"]


def test_broken_lines_are_problems_and_others_go_on(tmp_path: Path) -> None:
    bad = [
        f"{SECRET}\n",
        pair(SECRET, "1", SECRET, SECRET, "2", 2),
        pair(SECRET, "1", 1, " ", "", 2),
    ]
    loaded = load("reddit_pchatbot", write(tmp_path, *bad, *replies(2)))
    assert len(loaded.users) == 1
    assert reasons(loaded) == {
        1: "the line has 1 columns, not 6",
        2: "the post's time cannot be read",
        3: "the response and the response's user cannot be read",
    }


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MilpError, match=r"no line of .* has the columns post, post's user"):
        load("reddit_pchatbot", write(tmp_path, "a\tb\n"))
