"""BLEU and distinct-n: what n-grams of answers say, from counts that can be kept and summed.

The counts of an answer (:data:`BLEU_COUNTS`, :func:`new_n_grams`) hold nothing of its text, so a scores file
can have them as columns, and both measures of any set of answers follow from sums over its rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_ORDERS = 4
# An answer's n-grams that the reference has, too, for n = 1 … 4; its tokens; the reference's tokens.
BLEU_COUNTS = ("match_1", "match_2", "match_3", "match_4", "n_words", "n_reference_words")

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_RULES = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),  # symbols of ASCII stand alone
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),  # so do stops and commas, but between digits
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def bleu_tokens(text: str) -> list[str]:
    """The tokens of a text as BLEU counts them: the "13a" rules of WMT's mteval script, case kept."""
    line = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        line = line.replace(entity, character)
    line = f" {line} "
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return line.split()


def bleu_counts(prediction: str, reference: str) -> tuple[int, ...]:
    """One answer's counts, in the order of :data:`BLEU_COUNTS`; each n-gram of the reference matches once."""
    given, wanted = bleu_tokens(prediction), bleu_tokens(reference)
    matches = ((_counted(given, n) & _counted(wanted, n)).total() for n in range(1, _ORDERS + 1))
    return *matches, len(given), len(wanted)


def bleu_statistics(counts: Array) -> Array:
    """Counts of answers, shape ``(..., 6)``, as what may be summed, shape ``(..., 10)``.

    These are the counts and, behind them, how many n-grams each answer has: a sum of lengths does not tell.
    """
    import numpy as np

    n_words = counts[..., _ORDERS, None]
    totals = np.maximum(0.0, n_words - np.arange(_ORDERS))
    return np.concatenate([counts, totals], axis=-1)


def bleu(statistics: Array, *, effective_order: bool = False) -> Array:
    """BLEU × 100 of (sums of) statistics, shape ``(..., 10)`` → ``(...)`` in [0, 100] (Papineni et al. 2002).

    An order without a match counts as 1/2, 1/4, … of a match, the first, second, … such (method 3 of Chen and
    Cherry 2014; the default of WMT and sacreBLEU); 0 where not even one token matches.

    Args:
        statistics: sums of :func:`bleu_statistics` over the answers that are taken together.
        effective_order: leave out the orders that answers are too short for, as is done for single sentences;
            otherwise they make BLEU 0.
    """
    import numpy as np

    matches, totals = statistics[..., :_ORDERS], statistics[..., _ORDERS + 2 :]
    length, reference_length = statistics[..., _ORDERS], statistics[..., _ORDERS + 1]
    there = totals > 0
    halvings = np.cumsum(there & (matches == 0), axis=-1)
    smoothed = np.where(matches > 0, matches, 0.5**halvings)
    logs = np.log(np.where(there, smoothed / np.where(there, totals, 1.0), 1.0))
    n_there = there.sum(-1)
    defined = (matches[..., 0] > 0) & (effective_order | (n_there == _ORDERS))
    brevity = np.minimum(0.0, 1.0 - reference_length / np.where(length > 0, length, 1.0))
    score = 100.0 * np.exp(logs.sum(-1) / np.maximum(1, n_there) + brevity)
    return np.where(defined, np.minimum(100.0, score), 0.0)


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU × 100 of answers taken together, one reference each, in [0, 100]; 0 where there is no answer."""
    import numpy as np

    rows = [bleu_counts(*pair) for pair in zip(predictions, references, strict=True)]
    counts = np.array(rows, dtype=np.float64).reshape(-1, len(BLEU_COUNTS))
    return float(bleu(bleu_statistics(counts).sum(axis=0)))


def sentence_bleu(prediction: str, reference: str) -> float:
    """BLEU × 100 of one answer, in [0, 100], with as many orders as it has n-grams for."""
    import numpy as np

    counts = np.array(bleu_counts(prediction, reference), dtype=np.float64)
    return float(bleu(bleu_statistics(counts), effective_order=True))


def new_n_grams(responses: Sequence[str], n: int) -> list[int]:
    """For each response, how many different n-grams it has that no earlier one has; case does not matter.

    Their sum over the number of all n-grams is :func:`distinct_n` of the responses.
    """
    seen: set[tuple[str, ...]] = set()
    found = []
    for response in responses:
        before = len(seen)
        seen.update(_counted(bleu_tokens(response.lower()), n))
        found.append(len(seen) - before)
    return found


def distinct_n(responses: Sequence[str], n: int) -> float | None:
    """Different n-grams over all n-grams of some responses, in (0, 1] (Li et al. 2016); ``None`` without any.

    It falls with the number of responses, so only equally many of them are comparable.
    """
    total = sum(max(0, len(bleu_tokens(response.lower())) - n + 1) for response in responses)
    return sum(new_n_grams(responses, n)) / total if total else None


def _counted(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
