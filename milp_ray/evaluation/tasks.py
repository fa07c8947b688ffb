"""Questions with a closed set of answers: yes or no, one of some labels, a rating (LaMP, Salemi et al. 2024).

Each parser says what an answer in free words is taken for, and ``None`` where it cannot be told; the measures
say what such an answer counts as. Nothing here raises because of an answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from milp_ray.evaluation.metrics import words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from milp_ray.config.evaluation import EvaluationSection

    Array = NDArray[np.float64]

_NUMBER = re.compile(r"(?<![\w.])[-−+]?\d+(?:[.,]\d+)?(?!\w)")


def closed_questions(section: EvaluationSection) -> list[Any]:
    """What decides how answers to closed questions are read, in plain types; nothing for free answers."""
    closed = {"classification": list(section.labels), "rating": list(section.scale)}
    return [section.task, closed[section.task]] if section.task in closed else []


# --------------------------------------------------------------------------------------------- yes or no


def parse_yes_no(text: str) -> bool | None:
    """What the first "yes" or "no" among a text's words says; ``None`` where there is neither."""
    return next((word == "yes" for word in words(text) if word in ("yes", "no")), None)


def yes_no_accuracy(response: str, wanted: str) -> float | None:
    """1.0 where a response says yes or no as the wanted one does, else 0.0 (PLUM, Magister et al. 2024).

    ``None`` where the wanted response does not *begin* with either word: it answers another kind of question.
    A response with neither word is wrong.
    """
    first = words(wanted)[:1]
    if first not in (["yes"], ["no"]):
        return None
    return float(parse_yes_no(response) == (first == ["yes"]))


# ------------------------------------------------------------------------------------------------ labels


def parse_label(text: str, labels: Sequence[str]) -> int | None:
    """Which label a text names, as its index; ``None`` where it names none.

    The whole text first, then the label that stands in it earliest as a whole phrase, and of several at one
    place the longest. Case and the amount of white space do not matter.
    """
    plain = " ".join(text.lower().split())
    exact = [i for i, label in enumerate(labels) if " ".join(label.lower().split()) == plain]
    if exact:
        return exact[0]
    places = [
        (found.start(), -len(label), i)
        for i, label in enumerate(labels)
        if (found := _phrase(label).search(plain)) is not None
    ]
    return min(places)[2] if places else None


def accuracy(given: Sequence[int | None], wanted: Sequence[int]) -> float | None:
    """Share of right labels, in [0, 1]; one that could not be parsed is wrong. ``None`` without any."""
    if not wanted:
        return None
    return sum(g == w for g, w in zip(given, wanted, strict=True)) / len(wanted)


def macro_f1(given: Sequence[int | None], wanted: Sequence[int]) -> float | None:
    """Mean F1 over the labels that were wanted or given, in [0, 1]; ``None`` without any.

    An answer that could not be parsed is one more of its wanted label that was missed, and none of another.
    """
    if not wanted:
        return None
    n_labels = 1 + max(*wanted, *(-1 if g is None else g for g in given))
    return float(macro_f1_of(label_counts(given, wanted, n_labels).sum(axis=0)))


def label_counts(given: Sequence[int | None], wanted: Sequence[int], n_labels: int) -> Array:
    """An answer's share in each label's counts, shape ``(n_answers, 3 · n_labels)``: hits, given, wanted."""
    import numpy as np

    counts = np.zeros((len(wanted), 3, n_labels))
    for row, (g, w) in enumerate(zip(given, wanted, strict=True)):
        counts[row, 2, w] = 1
        if g is not None:
            counts[row, 1, g] = 1
            counts[row, 0, w] = g == w
    return counts.reshape(len(wanted), 3 * n_labels)


def macro_f1_of(counts: Array) -> Array:
    """Macro-F1 of sums of :func:`label_counts`, shape ``(..., 3 · n_labels)`` → ``(...)``; NaN of nothing."""
    import numpy as np

    hits, given, wanted = np.split(counts, 3, axis=-1)
    occurrences = given + wanted
    occurs = occurrences > 0
    f1 = np.where(occurs, 2.0 * hits / np.where(occurs, occurrences, 1.0), 0.0)
    n_labels = occurs.sum(axis=-1)
    return np.where(n_labels > 0, f1.sum(axis=-1) / np.maximum(1, n_labels), np.nan)


# ----------------------------------------------------------------------------------------------- ratings


def parse_rating(text: str, lowest: float, highest: float) -> float | None:
    """The first number in a text; ``None`` where there is none, or where it lies outside of the scale.

    "4", "4.5", "4,5" and "4/5" are numbers; "4th" and "v2" are not.
    """
    found = _NUMBER.search(text)
    if found is None:
        return None
    value = float(found.group().replace(",", ".").replace("−", "-"))
    return value if lowest <= value <= highest else None


def rating_error(given: float | None, wanted: float, lowest: float, highest: float) -> float:
    """Distance of a rating from the wanted one, in points of the scale.

    A rating that could not be parsed counts as the end of the scale that is farther away, as LaMP has it.
    """
    return max(wanted - lowest, highest - wanted) if given is None else abs(given - wanted)


def mae(errors: Sequence[float]) -> float | None:
    """Mean absolute error, in points of the scale; ``None`` without any."""
    return sum(errors) / len(errors) if errors else None


def rmse(errors: Sequence[float]) -> float | None:
    """Root mean squared error, in points of the scale; never below :func:`mae`. ``None`` without any."""
    return math.sqrt(sum(error * error for error in errors) / len(errors)) if errors else None


@lru_cache(maxsize=1024)
def _phrase(label: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(' '.join(label.lower().split()))}(?!\w)")
