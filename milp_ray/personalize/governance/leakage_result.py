"""What an audit's measures say: means over users with intervals, paired differences, and the two verdicts.

The user whose secrets they are is the unit that is drawn for intervals
(:mod:`milp_ray.evaluation.bootstrap`): canaries of one user are not independent of each other. A secret's
value under "the others" is its mean over all other audited users' adapters.

Where nothing leaks, a secret's rank under another's adapter is as random as under the base, so the
difference of the two has mean 0, and its interval lies above 0 by chance in some audits: in a simulation of
8 users with 4 canaries each in 5.7 to 7.5 % of them (nominally 2.5 %; intervals over few users are too
narrow). Repeat an audit that finds a leak with another seed and more users before believing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from milp_ray.evaluation.bootstrap import Interval, difference_interval, interval
from milp_ray.personalize.governance.exposure import chance_bits, most_bits

if TYPE_CHECKING:
    from milp_ray.config.evaluation import EvaluationSection
    from milp_ray.personalize.governance.canaries import SecretSpace
    from milp_ray.personalize.governance.leakage import LeakageOptions

FORMAT = 1
SOURCES = ("own", "others", "control", "base")


@dataclass(frozen=True, slots=True)
class Found:
    """Under one adapter, or the base: ``exposure`` in bits and ``extracted``, ``(n_canaries, n_users)``."""

    exposure: NDArray[np.float64]
    extracted: NDArray[np.bool_]


def leakage_result(
    user_ids: Sequence[str],
    *,
    base: Found,
    own: Sequence[Found],
    control: Sequence[Found] | None,
    options: LeakageOptions,
    space: SecretSpace,
    layout: str,
    evaluation: EvaluationSection,
) -> dict[str, Any]:
    """The audit in plain types; no canary is among them.

    Args:
        user_ids: the audited users.
        base: all users' canaries under the base.
        own: all users' canaries under each audited user's adapter, in the order of ``user_ids``.
        control: the same under the adapters that were trained without canaries; ``None``: not trained.
        options: what was planted.
        space: what secrets were drawn from.
        layout: the key of the adapters' layout.
        evaluation: draws and confidence of the intervals.

    Returns:
        ``exposure`` (bits) and ``extracted`` (share of canaries): by "own", "others", "control" and "base"
        an interval over users; ``differences``: the same of "own - base", "others - base" and
        "control - base", paired inside users; ``isolated``: whether the interval of others − base holds
        0 or lies below; ``remembered``: whether that of own − base lies above 0, without which isolation
        says nothing; ``users``: each one's mean exposures; and what was asked for.
    """
    bits = by_source(
        base.exposure, [one.exposure for one in own], [one.exposure for one in control] if control else None
    )
    said = by_source(
        base.extracted,
        [one.extracted for one in own],
        [one.extracted for one in control] if control else None,
    )
    how: dict[str, Any] = {
        "n_bootstrap": evaluation.n_bootstrap,
        "confidence": evaluation.confidence,
        "seed": options.seed,
    }
    differences = {
        f"{name} - base": _found(difference_interval(bits[name], bits["base"], **how))
        for name in bits
        if name != "base"
    }
    return {
        "format": FORMAT,
        "layout": layout,
        **{name: value for name, value in asdict(options).items() if name not in {"space", "control"}},
        "n_users": len(user_ids),
        "space": {"name": space.name, "size": space.size, "bits": float(np.log2(space.size))},
        "most_bits": most_bits(options.n_candidates),
        "chance_bits": chance_bits(options.n_candidates),
        "confidence": evaluation.confidence,
        "exposure": {name: _found(interval(values, **how)).to_dict() for name, values in bits.items()},
        "extracted": {name: _found(interval(values, **how)).to_dict() for name, values in said.items()},
        "differences": {name: found.to_dict() for name, found in differences.items()},
        "isolated": _low(differences["others - base"]) <= 0.0,
        "remembered": _low(differences["own - base"]) > 0.0,
        "users": [
            {"user_id": user_id, **{name: float(values[i]) for name, values in bits.items()}}
            for i, user_id in enumerate(user_ids)
        ],
    }


def by_source(
    base: NDArray[Any], own: Sequence[NDArray[Any]], control: Sequence[NDArray[Any]] | None
) -> Mapping[str, NDArray[np.float64]]:
    """One number a user and source: means over canaries (and over adapters, for the others).

    Each array is ``(n_canaries, n_users)``, of one adapter; ``own[v]`` and ``control[v]`` are user v's.
    """
    # [v, u]: user u's canaries under user v's adapter.
    crossed = np.stack(own).astype(np.float64).mean(axis=1)
    n_users = len(crossed)
    diagonal = crossed.diagonal()
    found = {"own": diagonal, "others": (crossed.sum(axis=0) - diagonal) / (n_users - 1)}
    if control is not None:
        found["control"] = np.stack(control).astype(np.float64).mean(axis=1).diagonal()
    return {**found, "base": base.astype(np.float64).mean(axis=0)}


def _found(value: Interval | None) -> Interval:
    if value is None:  # of at least two users there always is one
        raise RuntimeError("no user has a value")
    return value


def _low(value: Interval) -> float:
    return value.mean if value.low is None else value.low
