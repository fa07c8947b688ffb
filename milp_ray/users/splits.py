"""A user's examples split in time order, with nothing of what is held out left in what is trained on.

The leaks that this module closes, all of which real histories have:

- a turn said at or after the first held-out example (it may quote or follow from it);
- a turn that repeats a held-out query or response, whatever its time;
- a training example that repeats a held-out pair.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from milp_ray.errors import MilpError
from milp_ray.users.records import Example, Turn, User, UserSplit

if TYPE_CHECKING:
    from milp_ray.config.users import SplitSection

_Timed = TypeVar("_Timed", Turn, Example)
_BEFORE_ALL = datetime.min.replace(tzinfo=UTC)

# A held-out text of fewer words is sought as a whole turn only: "a turtle" within "I have a turtle" is a fact
# that the user told, and the memory is there to keep it.
MIN_WORDS_WITHIN = 4


def split_user(user: User, section: SplitSection) -> UserSplit:
    """Split a user's examples, in time order, into train, validation and test; keep the history clean.

    Shares are rounded to whole examples (70/10/20 by default). Where there are few, the order of need is
    train, test, validation: no example makes three empty parts; one goes to train; two go to train and test;
    from three on each part has at least one. A part whose share is 0 stays empty.

    Records without a time take that of the record before them in the file, so that the order of the file is
    kept. Turns are dropped that are at or after the first held-out example's time, or equal a held-out query
    or response, or contain one of at least :data:`MIN_WORDS_WITHIN` words (case, accents' encoding,
    punctuation and spacing do not count). Training examples that repeat a held-out query with its response
    are dropped, after the parts are cut.
    """
    examples = _timed(user.examples)
    n_train, n_validation = part_sizes(len(examples), section)
    train = [example for example, _ in examples[:n_train]]
    held_out = [example for example, _ in examples[n_train:]]
    first = next((time for _, time in examples[n_train:] if time is not None), None)
    held_out_pairs = {_pair(example) for example in held_out}
    traces = _Traces(held_out)
    return UserSplit(
        user_id=user.user_id,
        profile=user.profile,
        history=tuple(
            turn
            for turn, time in _timed(user.history)
            if not _at_or_after(time, first) and not traces.are_in(turn.text)
        ),
        train=tuple(example for example in train if _pair(example) not in held_out_pairs),
        validation=tuple(held_out[:n_validation]),
        test=tuple(held_out[n_validation:]),
    )


def check_no_leak(split: UserSplit) -> None:
    """Assert what :func:`split_user` promises, on a split from anywhere.

    Raises:
        MilpError: a part is later than the one after it, a turn is at or after the first held-out example or
            repeats held-out text, or a training example repeats a held-out pair.
    """
    held_out = [*split.validation, *split.test]
    traces = _Traces(held_out)
    first = min((_utc(example.time) for example in held_out if example.time is not None), default=None)
    turn_times = [None if turn.time is None else _utc(turn.time) for turn in split.history]
    pairs = {_pair(example) for example in held_out}
    findings = {
        "examples out of time order": _n_descents([*split.train, *split.validation, *split.test]),
        "turns at or after the first held-out example": sum(_at_or_after(time, first) for time in turn_times),
        "turns that repeat a held-out query or response": sum(traces.are_in(t.text) for t in split.history),
        "training examples that repeat a held-out one": sum(_pair(e) in pairs for e in split.train),
    }
    found = [f"{count} {what}" for what, count in findings.items() if count]
    if found:
        raise MilpError(
            f"user {split.user_id!r}: {'; '.join(found)}. Validation and test must stay out of training and "
            "prompts: make splits with milp_ray.users.splits.split_user"
        )


def without_traces(turns: Iterable[Turn], held_out: Iterable[Example]) -> tuple[Turn, ...]:
    """The turns that repeat nothing of what is held out, by the rule of :func:`split_user`."""
    traces = _Traces(held_out)
    return tuple(turn for turn in turns if not traces.are_in(turn.text))


class _Traces:
    """The texts of held-out examples, normalised, and whether another text repeats one of them."""

    def __init__(self, held_out: Iterable[Example]) -> None:
        texts = {normalised(text) for example in held_out for text in (example.query, example.response)}
        self._whole = texts
        # Spaces around make a match begin and end at words.
        self._within = tuple(sorted(f" {text} " for text in texts if len(text.split()) >= MIN_WORDS_WITHIN))

    def are_in(self, text: str) -> bool:
        normal = normalised(text)
        padded = f" {normal} "
        return normal in self._whole or any(trace in padded for trace in self._within)


def normalised(text: str) -> str:
    """``text`` in lower case with one space between words, without punctuation; itself if it is all signs."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words) or text.strip()


def part_sizes(n: int, section: SplitSection) -> tuple[int, int]:
    """Numbers of train and validation examples that :func:`split_user` makes of ``n``; the rest is test."""
    shares = {"train": section.train, "test": 1.0 - section.train - section.validation}
    shares["validation"] = section.validation
    in_order_of_need = [part for part, share in shares.items() if share > 0.0]
    least = dict.fromkeys(shares, 0) | dict.fromkeys(in_order_of_need[:n], 1)
    n_train = min(max(_rounded(n * section.train), least["train"]), n - least["test"] - least["validation"])
    most_validation = n - n_train - least["test"]
    n_validation = min(max(_rounded(n * section.validation), least["validation"]), most_validation)
    return n_train, n_validation


def _rounded(value: float) -> int:
    """The nearest whole number, halves up; the tiny term keeps 0.7 × 10 and the like from falling short."""
    return math.floor(value + 0.5 + 1e-9)


def _timed(records: Sequence[_Timed]) -> list[tuple[_Timed, datetime | None]]:
    """Records in time order, each with its time in UTC; without one it has that of the record before it."""
    found: list[tuple[_Timed, datetime | None]] = []
    time: datetime | None = None
    for record in records:
        time = time if record.time is None else _utc(record.time)
        found.append((record, time))
    found.sort(key=lambda pair: pair[1] or _BEFORE_ALL)
    return found


def _at_or_after(time: datetime | None, first: datetime | None) -> bool:
    return time is not None and first is not None and time >= first


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _n_descents(examples: Sequence[Example]) -> int:
    times = [_utc(example.time) for example in examples if example.time is not None]
    return sum(later < earlier for earlier, later in itertools.pairwise(times))


def _pair(example: Example) -> tuple[str, str]:
    return normalised(example.query), normalised(example.response)
