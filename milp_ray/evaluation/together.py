"""Measures of a method's answers taken together: BLEU, perplexity, distinct-n, and those of closed questions.

Perplexity, corpus BLEU and what LaMP asks for (accuracy, macro-F1, MAE, RMSE) are taken over all answers at
once, as in the literature, so that a user weighs by the number of answers. Distinct-n is a user's, since it
falls with the number of answers that share a vocabulary; it, yes/no accuracy, BLEU of single answers and
Persona-F1 are means over users. The intervals are over users throughout, and differences draw the same users
for both methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from milp_ray.evaluation.bootstrap import Interval, difference_interval, interval, pooled_interval
from milp_ray.evaluation.measures import FURTHER_MEASURES, TASK_MEASURES, Measure
from milp_ray.evaluation.ngrams import BLEU_COUNTS, bleu, bleu_statistics
from milp_ray.evaluation.slices import encoded
from milp_ray.evaluation.tasks import label_counts, macro_f1_of, rating_error

if TYPE_CHECKING:
    import pyarrow as pa

    from milp_ray.config.evaluation import EvaluationSection

Array = NDArray[np.float64]
Columns = Mapping[str, Array]

TOGETHER: dict[str, Measure] = {**TASK_MEASURES, **FURTHER_MEASURES}
_DECIMALS = 6
_NUMBERS = (
    *("loss", "n_tokens", "persona_f1", "new_1", "new_2", "yes_no", "wanted", "given"),
    *BLEU_COUNTS,
)


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a measure comes from rows: statistics of each (NaN: none), and the value of a sum of them."""

    statistics: Callable[[Columns], Array]  # → (n_rows, k)
    value: Callable[[Array], Array]  # (…, k) → (…)
    by_user: bool = False  # the value is taken of each user, and the mean over users is the measure


def compare_together(
    table: pa.Table,
    methods: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    section: EvaluationSection,
    draws: Mapping[str, Any],
) -> dict[str, Any]:
    """The measures of :data:`TOGETHER` that the data has.

    Args:
        table: as :func:`milp_ray.evaluation.scores.read_scores` gives it; of several seeds, the rows of all.
        methods: to be measured.
        pairs: methods whose difference is wanted, the first minus the second.
        section: what the queries ask for.
        draws: ``n_bootstrap``, ``confidence`` and ``seed`` of the intervals.

    Returns:
        ``scores[method][measure]`` = ``{mean, low, high, n_users, n_examples}`` (different examples) and
        ``differences["milp - base"][measure]`` = ``{mean, low, high, n_users}``, in plain types.
    """
    user_ids, users = encoded(table, "user_id")
    names, method_of = encoded(table, "method")
    numbers = {name: table[name].to_numpy().astype(np.float64) for name in _NUMBERS}
    examples = table["example"].to_numpy().astype(np.int64)
    kinds = _kinds(section, numbers)
    scores: dict[str, dict[str, Any]] = {method: {} for method in methods}
    differences: dict[str, dict[str, Any]] = {f"{a} - {b}": {} for a, b in pairs if {a, b} <= set(methods)}
    for name, kind in kinds.items():
        sums = {}
        for method in methods:
            rows = method_of == names.index(method)
            sums[method], known = _by_user(kind, numbers, rows, users, len(user_ids))
            found = _measure(kind, sums[method], draws)
            if found is not None:
                n_examples = len(np.unique(np.stack([users[known], examples[known]]), axis=1).T)
                scores[method][name] = {**_rounded(found), "n_examples": n_examples}
        for first, second in pairs:
            if {first, second} <= sums.keys():
                difference = _difference(kind, sums[first], sums[second], draws)
                if difference is not None:
                    differences[f"{first} - {second}"][name] = _rounded(difference)
    return {"scores": scores, "differences": differences}


def present(comparison: Mapping[str, Any], names: Mapping[str, Measure]) -> list[str]:
    """Those of some measures that at least one method has; none in a comparison of an earlier version."""
    scores = comparison.get("together", {}).get("scores", {})
    return [name for name in names if any(name in cells for cells in scores.values())]


def _kinds(section: EvaluationSection, numbers: Columns) -> dict[str, _Kind]:
    """The measures that answers can have, by name."""
    kinds = {
        "yes_no": _mean_of("yes_no"),
        "bleu": _Kind(_bleu_rows, bleu),
        "sentence_bleu": _Kind(_sentence_bleu_rows, _ratio, by_user=True),
        "perplexity": _Kind(_nll_rows, lambda sums: np.exp(_ratio(sums))),
        "distinct_1": _distinct(1),
        "distinct_2": _distinct(2),
        "persona_f1_share": _mean_of("persona_f1", 0.01),
    }
    if section.task == "classification":
        kinds |= _classification(max(len(section.labels), *_labels_of(numbers)))
    elif section.task == "rating":
        kinds |= _rating(*section.scale)
    return kinds


def _classification(n_labels: int) -> dict[str, _Kind]:
    def counts(columns: Columns) -> Array:
        asked = ~np.isnan(columns["wanted"])
        given = [None if np.isnan(label) else int(label) for label in columns["given"][asked]]
        found = np.full((len(asked), 3 * n_labels), np.nan)
        found[asked] = label_counts(given, columns["wanted"][asked].astype(int).tolist(), n_labels)
        return found

    return {
        "accuracy": _share_of_asked(lambda c: c["given"] == c["wanted"]),
        "macro_f1": _Kind(counts, macro_f1_of),
        "unparsed": _share_of_asked(lambda c: np.isnan(c["given"])),
    }


def _rating(lowest: float, highest: float) -> dict[str, _Kind]:
    def errors(columns: Columns) -> Array:
        pairs = zip(columns["given"], columns["wanted"], strict=True)
        return np.array([rating_error(None if np.isnan(g) else g, w, lowest, highest) for g, w in pairs])

    return {
        "mae": _share_of_asked(errors),
        "rmse": _Kind(lambda c: _of_asked(c, errors(c) ** 2), lambda sums: np.sqrt(_ratio(sums))),
        "unparsed": _share_of_asked(lambda c: np.isnan(c["given"])),
    }


def _labels_of(numbers: Columns) -> list[int]:
    """One more than the largest label of the rows, which another list of labels may have named."""
    labels = np.concatenate([numbers["wanted"], numbers["given"], [0.0]])
    return [int(np.nanmax(labels)) + 1]


# ----------------------------------------------------------------------------------------- rows → statistics


def _counts(columns: Columns) -> Array:
    return np.stack([columns[name] for name in BLEU_COUNTS], axis=1)


def _bleu_rows(columns: Columns) -> Array:
    return bleu_statistics(_counts(columns))


def _sentence_bleu_rows(columns: Columns) -> Array:
    counts = _counts(columns)
    known = ~np.isnan(counts).any(axis=1)
    scores = np.full(len(counts), np.nan)
    scores[known] = bleu(bleu_statistics(counts[known]), effective_order=True)
    return np.stack([scores, np.ones(len(scores))], axis=1)


def _nll_rows(columns: Columns) -> Array:
    return np.stack([columns["loss"] * columns["n_tokens"], columns["n_tokens"]], axis=1)


def _distinct(n: int) -> _Kind:
    def rows(columns: Columns) -> Array:
        return np.stack([columns[f"new_{n}"], np.maximum(0.0, columns["n_words"] - n + 1)], axis=1)

    return _Kind(rows, _ratio, by_user=True)


def _mean_of(name: str, scale: float = 1.0) -> _Kind:
    """The mean over users of the mean of a column."""
    return _Kind(lambda c: np.stack([scale * c[name], np.ones(len(c[name]))], axis=1), _ratio, by_user=True)


def _share_of_asked(column: Callable[[Columns], Array]) -> _Kind:
    """The mean over all answers to closed questions."""
    return _Kind(lambda c: _of_asked(c, column(c)), _ratio)


def _of_asked(columns: Columns, values: Array) -> Array:
    asked = ~np.isnan(columns["wanted"])
    return np.stack([np.where(asked, values, np.nan), np.ones(len(asked))], axis=1)


def _ratio(sums: Array) -> Array:
    """The first statistic over the second; NaN where that is 0."""
    divisor = sums[..., 1]
    return np.where(divisor > 0, sums[..., 0] / np.where(divisor > 0, divisor, 1.0), np.nan)


# ---------------------------------------------------------------------------------------- statistics → cells


def _by_user(
    kind: _Kind, numbers: Columns, rows: NDArray[np.bool_], users: NDArray[np.int64], n_users: int
) -> tuple[Array, NDArray[np.int64]]:
    """Sums of the statistics, shape ``(n_users, k)`` with NaN for users without any; and which rows count."""
    statistics = kind.statistics({name: column[rows] for name, column in numbers.items()})
    known = ~np.isnan(statistics).any(axis=1)
    places = users[rows][known]
    summed = [np.bincount(places, column, minlength=n_users) for column in statistics[known].T]
    sums = np.stack(summed, axis=1).astype(np.float64)  # without any row, bincount gives integers
    sums[np.bincount(places, minlength=n_users) == 0] = np.nan
    return sums, np.flatnonzero(rows)[known]


def _measure(kind: _Kind, sums: Array, draws: Mapping[str, Any]) -> Interval | None:
    if kind.by_user:
        return interval(kind.value(sums), **draws)
    return pooled_interval(sums[~np.isnan(sums[:, 0])], kind.value, **draws)


def _difference(kind: _Kind, first: Array, second: Array, draws: Mapping[str, Any]) -> Interval | None:
    """Between two methods, over the users that both have."""
    if kind.by_user:
        return difference_interval(kind.value(first), kind.value(second), **draws)
    both = ~np.isnan(first[:, 0] + second[:, 0])
    pair = np.stack([first[both], second[both]], axis=1)
    return pooled_interval(pair, lambda sums: kind.value(sums[:, 0]) - kind.value(sums[:, 1]), **draws)


def _rounded(found: Interval) -> dict[str, float | int | None]:
    values = found.to_dict()
    return {
        name: round(value, _DECIMALS) if isinstance(value, float) else value for name, value in values.items()
    }
