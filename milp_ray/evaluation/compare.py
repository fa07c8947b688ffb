"""From single scores to the comparison of methods: means over users with intervals, in plain types.

Nothing here does I/O or needs a model: a scores table in, a JSON-able dict out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from milp_ray.evaluation.bootstrap import Interval, difference_interval, interval
from milp_ray.evaluation.measures import MEASURES
from milp_ray.evaluation.slices import HISTORY_LABELS, TAG_LABELS, Groups, Slice, encoded, make_slices
from milp_ray.evaluation.together import compare_together
from milp_ray.methods import in_order, label, short_label

if TYPE_CHECKING:
    import pyarrow as pa

    from milp_ray.config.evaluation import EvaluationSection

Vector = NDArray[np.float64]

# Pairs whose difference is reported: the first minus the second.
PAIRS = (("milp", "base"), ("milp", "text_prompt"))
# What is told of the slices by tag, of which there are many.
_TAG_MEASURES = ("fact_accuracy", "rouge_l")
_DECIMALS = 6  # of every number that comes out: the rest is noise and makes files long


@dataclass(frozen=True)
class _Columns:
    """A scores table as arrays, one entry a row."""

    users: NDArray[np.int64]
    n_users: int
    methods: list[str]
    method_of: NDArray[np.int64]
    n_tokens: Vector
    values: dict[str, Vector]  # measure → value, NaN for none
    groups: Groups

    @classmethod
    def of(cls, table: pa.Table) -> _Columns:
        user_ids, users = encoded(table, "user_id")
        methods, method_of = encoded(table, "method")
        return cls(
            users=users,
            n_users=len(user_ids),
            methods=methods,
            method_of=method_of,
            n_tokens=table["n_tokens"].to_numpy().astype(np.float64),
            values={name: table[name].to_numpy().astype(np.float64) for name in MEASURES},
            groups=Groups.of(table),
        )

    def rows_of(self, method: str) -> NDArray[np.bool_]:
        return self.method_of == self.methods.index(method)

    def by_user(self, measure: str, mask: NDArray[np.bool_]) -> tuple[Vector, int]:
        """Each user's mean over the masked rows, shape ``(n_users,)`` with NaN for none; and the rows used.

        A loss is averaged over the tokens of a user's answers, everything else over the answers.
        """
        rows = mask & ~np.isnan(self.values[measure])
        weights = self.n_tokens[rows] if measure == "loss" else np.ones(int(rows.sum()))
        totals = np.bincount(self.users[rows], self.values[measure][rows] * weights, minlength=self.n_users)
        counts = np.bincount(self.users[rows], weights, minlength=self.n_users)
        means = np.full(self.n_users, np.nan)
        np.divide(totals, counts, out=means, where=counts > 0)
        return means, int(rows.sum())


def compare(
    table: pa.Table,
    section: EvaluationSection,
    seed: int,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    *,
    answers: pa.Table | None = None,
) -> dict[str, Any]:
    """Compare the methods of a scores table.

    Returns a dict of plain types:

    * ``scores[method][slice][measure]`` = ``{mean, low, high, n_users, n_examples}`` (see
      :mod:`milp_ray.evaluation.slices` for the slices' keys);
    * ``differences["milp - base"][slice][measure]`` = ``{mean, low, high, n_users}``, paired inside users;
    * ``together``: what :func:`milp_ray.evaluation.together.compare_together` gives, the measures of all
      answers of a method taken together;
    * ``slices[slice]`` = ``{label, history, kind, exposure, tag, value, n_users, n_examples}``;
    * ``methods``, ``labels``, ``short_labels``, ``n_users``, ``n_users_fits``,
      ``n_users_long``, ``confidence``, ``n_bootstrap``.

    A measure that no answer has is absent. ``mean`` is over users; ``low`` and ``high`` are ``None`` where
    fewer than two users have a value.

    Args:
        table: as :func:`milp_ray.evaluation.scores.read_scores` gives it.
        section: confidence and number of draws.
        seed: of the draws.
        pairs: of methods whose difference is told, the first minus the second, where both are there.
        answers: every single answer, where the rows of ``table`` are means over some; ``None``: ``table``.
    """
    columns = _Columns.of(table)
    methods = in_order(columns.methods)
    pieces = make_slices(columns.groups) if len(table) else []
    fits = len(np.unique(columns.users[columns.groups.fits]))
    draws: dict[str, Any] = {
        "n_bootstrap": section.n_bootstrap,
        "confidence": section.confidence,
        "seed": seed,
    }
    scores: dict[str, dict[str, Any]] = {method: {} for method in methods}
    differences: dict[str, dict[str, Any]] = {f"{a} - {b}": {} for a, b in pairs if {a, b} <= set(methods)}
    sizes: dict[str, Any] = {}
    for piece in pieces:
        mask = columns.groups.mask(piece)
        sizes[piece.key] = _size(piece, columns, mask)
        masks = {method: mask & columns.rows_of(method) for method in methods}
        for measure in _TAG_MEASURES if piece.tag else MEASURES:
            per_user: dict[str, Vector] = {}
            for method in methods:
                values, n_examples = columns.by_user(measure, masks[method])
                per_user[method] = values
                found = interval(values, **draws)
                if found is not None:
                    cell = scores[method].setdefault(piece.key, {})
                    cell[measure] = {**_rounded(found), "n_examples": n_examples}
            for first, second in pairs:
                if {first, second} <= per_user.keys():
                    difference = difference_interval(per_user[first], per_user[second], **draws)
                    if difference is not None:
                        cell = differences[f"{first} - {second}"].setdefault(piece.key, {})
                        cell[measure] = _rounded(difference)
    return {
        "methods": methods,
        "labels": {method: label(method) for method in methods},
        "short_labels": {method: short_label(method) for method in methods},
        "scores": scores,
        "differences": differences,
        "together": compare_together(table if answers is None else answers, methods, PAIRS, section, draws),
        "slices": sizes,
        "n_users": columns.n_users,
        "n_users_fits": fits,
        "n_users_long": columns.n_users - fits,
        "confidence": section.confidence,
        "n_bootstrap": section.n_bootstrap,
    }


def measured(comparison: dict[str, Any]) -> list[str]:
    """The measures that at least one method has over all queries, in the order of the tables."""
    cells = [slices.get("all", {}) for slices in comparison["scores"].values()]
    return [name for name in MEASURES if any(name in cell for cell in cells)]


def main_measure(comparison: dict[str, Any]) -> str | None:
    """What tables by kind show: fact accuracy where it is known, else ROUGE-L."""
    present = measured(comparison)
    return next((name for name in ("fact_accuracy", "rouge_l") if name in present), None)


def group_label(piece: dict[str, Any]) -> str:
    """The heading that a slice stands under: a length of history, or a tag."""
    return TAG_LABELS[piece["tag"]] if piece["tag"] else HISTORY_LABELS[piece["history"]]


def _rounded(found: Interval) -> dict[str, float | int | None]:
    values = found.to_dict()
    return {
        name: round(value, _DECIMALS) if isinstance(value, float) else value for name, value in values.items()
    }


def _size(piece: Slice, columns: _Columns, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """What a slice is, and how many users and different examples it has."""
    most = max((int((mask & columns.rows_of(method)).sum()) for method in columns.methods), default=0)
    return {
        "label": piece.label,
        "history": piece.history,
        "kind": piece.kind,
        "exposure": piece.exposure,
        "tag": piece.tag,
        "value": piece.value,
        "n_users": len(np.unique(columns.users[mask])),
        "n_examples": most,
    }
