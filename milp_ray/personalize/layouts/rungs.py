"""Where a race cuts: successive halving (Jamieson and Talwalkar 2016) over a user's epochs. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rung:
    """After ``epoch`` epochs, counted through all stages, the best ``n_kept`` layouts go on."""

    epoch: int
    n_kept: int


def race_rungs(n_layouts: int, n_epochs: int, reduction: int) -> tuple[Rung, ...]:
    """The rungs of a race of ``n_layouts`` over ``n_epochs``: each lets one in ``reduction`` go on.

    There are as many as it takes to leave one layout; the last one lies at ``n_epochs`` / ``reduction``, the
    one before at ``reduction`` times less, so that every rung has about the same work before it. Where the
    epochs are too few, rungs fall together and one cut does the work of both; with a single epoch there is
    no rung, and the layouts are compared at the end.

    Raises:
        ValueError: fewer than one layout or epoch, or ``reduction`` below 2.
    """
    if n_layouts < 1 or n_epochs < 1 or reduction < 2:
        raise ValueError(
            f"{n_layouts} layouts, {n_epochs} epochs, reduction {reduction}: give at least 1, 1 and 2"
        )
    kept: list[int] = []
    n_left = n_layouts
    while n_left > 1:
        n_left = math.ceil(n_left / reduction)
        kept.append(n_left)
    cuts: dict[int, int] = {}
    for place, n_kept in enumerate(kept):
        epoch = max(1, round(n_epochs / reduction ** (len(kept) - place)))
        if epoch < n_epochs:
            cuts[epoch] = n_kept
    return tuple(Rung(epoch, n_kept) for epoch, n_kept in sorted(cuts.items()))


def race_cost(n_layouts: int, n_epochs: int, reduction: int) -> float:
    """Epochs that a race trains, as a multiple of those of one layout."""
    n_left, done, paid = n_layouts, 0, 0
    for rung in race_rungs(n_layouts, n_epochs, reduction):
        paid += n_left * (rung.epoch - done)
        n_left, done = rung.n_kept, rung.epoch
    return (paid + n_left * (n_epochs - done)) / n_epochs
