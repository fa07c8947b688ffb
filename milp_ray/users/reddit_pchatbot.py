"""The form of PChatbot (Qian et al. 2021), for Weibo, Reddit and the like: posts and responses with users.

A line of a file, plain or gzipped, has six columns between tabs::

    post    post's user    post's time    response    response's user    response's time

A time is a whole number of seconds (from an arbitrary beginning where the dataset hides it). Texts come with
a space between words, also Chinese ones; there the spaces are taken out again, as MSP does (Zhong et al.
2022), and those between words of other scripts are kept.

Who responded is the user, ``pchatbot-<id>``. In the order of time, the earlier half of a user's responses is
history, together with what the same user has posted, each post once; the later half are examples, post →
response. Dropped are users who have posted only, and turns that say the same as an example's response. All
pairs of all files are in memory at once, since the pairs of a user may stand anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from milp_ray.errors import MilpError
from milp_ray.users.problems import Problem
from milp_ray.users.published import (
    IDEOGRAPHS,
    Exchange,
    Found,
    clean_text,
    earlier_half_as_history,
    read_lines,
    unix_time,
)
from milp_ray.users.records import Turn, User

KIND = "post"

_COLUMNS = ("post", "post's user", "post's time", "response", "response's user", "response's time")
_CJK = f"\u2e80-\u303f{IDEOGRAPHS}\uff00-\uffef"  # with the punctuation and full-width forms of theirs
_SPACE_BESIDE_CJK = re.compile(rf"(?<=[{_CJK}]) +| +(?=[{_CJK}])")


@dataclass
class _Person:
    path: Path
    line: int  # of the first response
    replies: list[Exchange] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Pair:
    post: str
    poster: str
    posted: datetime
    response: str
    responder: str
    responded: datetime


def read_reddit_pchatbot(paths: Sequence[Path]) -> Iterator[Found]:
    """Users of all files, in the order of their first responses; a place is the line of that.

    Raises:
        MilpError: no line of a file has the columns.
    """
    people: dict[str, _Person] = {}
    posts: dict[str, dict[tuple[datetime, str], None]] = {}  # of a user, each once
    for path in paths:
        n_pairs = 0
        for number, line in read_lines(path):
            pair = line if isinstance(line, Problem) else _pair(path, number, line)
            if isinstance(pair, Problem):
                yield path, number, pair
                continue
            n_pairs += 1
            reply = Exchange(pair.post, pair.response, pair.responded)
            people.setdefault(pair.responder, _Person(path, number)).replies.append(reply)
            posts.setdefault(pair.poster, {})[pair.posted, pair.post] = None
        if not n_pairs:
            raise MilpError(
                f"users.paths: no line of {path} has the columns {', '.join(_COLUMNS)} between tabs, with "
                "times in whole seconds; users.format reddit_pchatbot reads those"
            )
    for own_id, person in people.items():
        own_posts = [Turn(text, time=time) for time, text in posts.get(own_id, ())]
        history, examples = earlier_half_as_history(person.replies, own_posts, KIND)
        yield person.path, person.line, User(f"pchatbot-{own_id}", history, examples)


def _pair(path: Path, number: int, line: str) -> _Pair | Problem:
    columns = line.split("\t")
    if len(columns) != len(_COLUMNS):
        return Problem(path, number, f"the line has {len(columns)} columns, not {len(_COLUMNS)}")
    post, posted = _text(columns[0]), unix_time(columns[2])
    response, responded = _text(columns[3]), unix_time(columns[5])
    poster, responder = columns[1].strip(), columns[4].strip()
    if not (post and poster and posted and response and responder and responded):
        values = (post, poster, posted, response, responder, responded)
        missing = [name for name, value in zip(_COLUMNS, values, strict=True) if not value]
        return Problem(path, number, f"the {' and the '.join(missing)} cannot be read")
    return _Pair(post, poster, posted, response, responder, responded)


def _text(column: str) -> str | None:
    return clean_text(_SPACE_BESIDE_CJK.sub("", column))
