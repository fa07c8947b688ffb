"""From judgements to win rates, and to their agreement with people: plain types, no I/O.

A user's share of wins is the mean over the user's queries, so every user weighs the same, and intervals are
over users (:mod:`milp_ray.evaluation.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from milp_ray.evaluation.bootstrap import Interval, interval, pooled_interval
from milp_ray.evaluation.slices import encoded
from milp_ray.methods import label

if TYPE_CHECKING:
    import pyarrow as pa

    from milp_ray.evaluation.human import HumanChoice

Array = NDArray[np.float64]
_DECIMALS = 6


def win_rates(table: pa.Table, draws: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Wins, ties and losses of every pair of methods under every judge, in the order of their names.

    Args:
        table: as :func:`milp_ray.evaluation.judgements.read_judgements` gives it.
        draws: ``n_bootstrap``, ``confidence`` and ``seed`` of the intervals.

    Returns:
        A dict a pair and judge: ``method``, ``against``, ``judge``, both labels, ``n_users``,
        ``n_examples``; the counts ``n_wins``, ``n_ties``, ``n_losses``; and ``wins``, ``ties``, ``losses``,
        ``net`` (wins − losses), each ``{mean, low, high, n_users}`` as shares over users.
    """
    found = []
    for (method, against, judge), rows in _calls(table):
        users = encoded(rows, "user_id")[1]
        choice = rows["choice"].to_numpy().astype(np.float64)
        kinds = {"wins": choice > 0, "ties": choice == 0, "losses": choice < 0, "net": choice}
        shares = {name: interval(_mean_by_user(values, users), **draws) for name, values in kinds.items()}
        found.append(
            {
                "method": method,
                "against": against,
                "judge": judge,
                "label": label(method),
                "against_label": label(against),
                "n_users": len(np.unique(users)),
                "n_examples": len(rows),
                **{f"n_{name}": int(kinds[name].sum()) for name in ("wins", "ties", "losses")},
                **{name: _rounded(share) for name, share in shares.items()},
            }
        )
    return found


def agreement(
    table: pa.Table, choices: Sequence[HumanChoice], draws: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """How far each judge chooses as people did, on the queries that both have judged.

    Accuracy is the share of equal choices (win, tie, loss), and Pearson's correlation is between the choices
    as 1, 0 and −1, as the MiLP paper reports them. A human choice counts for either order of its two methods.

    Args:
        table: as for :func:`win_rates`.
        choices: what people chose; several of one pair all count.
        draws: as for :func:`win_rates`.

    Returns:
        A dict a pair and judge: ``method``, ``against``, ``judge``, ``n_choices`` (of people on the pair),
        ``n_matched`` (that the judge has judged, too), ``accuracy`` and ``pearson``, each ``{mean, low, high,
        n_users}`` or ``None`` (no match; for Pearson also where one side always chooses the same).
    """
    found = []
    for (method, against, judge), rows in _calls(table):
        judged = {(row["user_id"], row["example"]): row["choice"] for row in rows.to_pylist()}
        about = [oriented for one in choices if (oriented := one.oriented(method, against)) is not None]
        matched = [
            (one, judged[one.user_id, one.example]) for one in about if (one.user_id, one.example) in judged
        ]
        sums = _agreement_sums(matched)
        found.append(
            {
                "method": method,
                "against": against,
                "judge": judge,
                "n_choices": len(about),
                "n_matched": len(matched),
                "accuracy": _rounded(pooled_interval(sums, lambda s: s[:, 6] / s[:, 0], **draws)),
                "pearson": _rounded(pooled_interval(sums, _pearson, **draws)),
            }
        )
    return found


def _agreement_sums(matched: Sequence[tuple[HumanChoice, int]]) -> Array:
    """By user the sums of 1, h, j, h², j², h·j and [h = j], shape ``(n_users, 7)``."""
    sums: dict[str, Array] = {}
    for one, judge in matched:
        human = one.choice
        row = [1, human, judge, human**2, judge**2, human * judge, human == judge]
        sums[one.user_id] = sums.get(one.user_id, np.zeros(7)) + np.array(row, dtype=np.float64)
    return np.stack(list(sums.values())) if sums else np.zeros((0, 7))


def _pearson(sums: Array) -> Array:
    n, human, judge, human_2, judge_2, product = sums[:, :6].T
    covariance = n * product - human * judge
    spread = (n * human_2 - human**2) * (n * judge_2 - judge**2)
    return np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1.0)), np.nan)


def _calls(table: pa.Table) -> list[tuple[tuple[str, str, str], pa.Table]]:
    """The table's rows by method, other method and judge."""
    import pyarrow.compute as pc

    columns = [table[name].to_pylist() for name in ("method", "against", "judge")]
    found = []
    for call in sorted(set(zip(*columns, strict=True))):
        mask = None
        for name, value in zip(("method", "against", "judge"), call, strict=True):
            equal = pc.equal(table[name], value)
            mask = equal if mask is None else pc.and_(mask, equal)
        found.append((call, table.filter(mask)))
    return found


def _mean_by_user(values: Array | NDArray[np.bool_], users: NDArray[np.int64]) -> Array:
    counts = np.bincount(users)
    return np.asarray(np.bincount(users, values.astype(np.float64)) / counts)


def _rounded(found: Interval | None) -> dict[str, float | int | None] | None:
    if found is None:
        return None
    return {
        name: round(value, _DECIMALS) if isinstance(value, float) else value
        for name, value in found.to_dict().items()
    }
