"""What a paper's first table tells of a dataset: users, examples by part, lengths of histories and examples.

Everything is counted after the split, and so as it is trained and tested on: a history without what is held
out, and training examples that repeat nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from milp_ray.users.published import IDEOGRAPHS
from milp_ray.users.records import UserSplit

Count = Callable[[Sequence[str]], list[int]]  # texts → how long each is

# An ideograph is a word, for want of spaces between Chinese or Japanese ones; "don't" is one.
_WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W{IDEOGRAPHS}]+(?:['’][^\W{IDEOGRAPHS}]+)*")


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, median, smallest and largest of some numbers; all 0 where there are none."""

    mean: float
    median: float
    smallest: int
    largest: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Spread:
        """Summarise numbers."""
        if not numbers:
            return cls(0.0, 0.0, 0, 0)
        return cls(fmean(numbers), float(median(numbers)), min(numbers), max(numbers))


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long texts are in one unit: a user's whole history, a turn, a query and a response of any part."""

    history: Spread
    turn: Spread
    query: Spread
    response: Spread


@dataclass(frozen=True, slots=True)
class DatasetStatistics:
    """Figures of a dataset; ``lengths`` are by unit ("words", "tokens"), ``kinds`` count examples by kind."""

    n_users: int
    n_profiles: int
    n_untested: int  # users without a test example
    n_train: int
    n_validation: int
    n_test: int
    kinds: dict[str, int]
    turns_a_user: Spread
    examples_a_user: Spread
    lengths: dict[str, Lengths]


def count_words(texts: Sequence[str]) -> list[int]:
    """Number of words of each text; an ideograph counts as one."""
    return [sum(1 for _ in _WORD.finditer(text)) for text in texts]


def dataset_statistics(splits: Iterable[UserSplit], units: Mapping[str, Count]) -> DatasetStatistics:
    """Figures of some users' splits, which are taken once; ``units`` are what lengths are counted in."""
    profiles = untested = 0
    n_parts = [0, 0, 0]
    kinds: dict[str, int] = {}
    turns: list[int] = []
    examples: list[int] = []
    counted = {unit: _Counted(count) for unit, count in units.items()}
    for split in splits:
        parts = (split.train, split.validation, split.test)
        of_all = [example for part in parts for example in part]
        profiles += split.profile is not None
        untested += not split.test
        n_parts = [total + len(part) for total, part in zip(n_parts, parts, strict=True)]
        turns.append(len(split.history))
        examples.append(len(of_all))
        for example in of_all:
            kinds[example.kind] = kinds.get(example.kind, 0) + 1
        for lengths in counted.values():
            lengths.add([turn.text for turn in split.history], [(e.query, e.response) for e in of_all])
    return DatasetStatistics(
        n_users=len(turns),
        n_profiles=profiles,
        n_untested=untested,
        n_train=n_parts[0],
        n_validation=n_parts[1],
        n_test=n_parts[2],
        kinds=dict(sorted(kinds.items())),
        turns_a_user=Spread.of(turns),
        examples_a_user=Spread.of(examples),
        lengths={unit: lengths.summary() for unit, lengths in counted.items()},
    )


class _Counted:
    """Lengths in one unit, gathered user by user."""

    def __init__(self, count: Count) -> None:
        self._count = count
        self._histories: list[int] = []
        self._turns: list[int] = []
        self._queries: list[int] = []
        self._responses: list[int] = []

    def add(self, turns: Sequence[str], pairs: Sequence[tuple[str, str]]) -> None:
        of_turns = self._count(turns)
        self._histories.append(sum(of_turns))
        self._turns += of_turns
        self._queries += self._count([query for query, _ in pairs])
        self._responses += self._count([response for _, response in pairs])

    def summary(self) -> Lengths:
        numbers = (self._histories, self._turns, self._queries, self._responses)
        return Lengths(*(Spread.of(of_one) for of_one in numbers))
