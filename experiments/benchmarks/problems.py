"""Search problems that answer at once: measured learning curves, and synthetic ones, all with known fronts.

    .venv/bin/python experiments/benchmarks/problems.py    # what the problems are like; seconds

Every problem is a search for a layout with the space, the objectives and the kind of values that a study has:
learning curves, seconds, and values by probe user. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from milp_ray.memory.layout import EMPTY_KEY, CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.objectives import ADAPTER_PARAMETERS, KNOWN_OBJECTIVES, ROUGE_L, VALIDATION_LOSS
from milp_ray.search.front import hypervolume, pareto_front, reference_point

Floats = NDArray[np.float64]

TABLE = Path(__file__).parent / "lora_table" / "table.parquet"


@dataclass(frozen=True)
class Curve:
    """One trial as it would go.

    ``values`` of shape (n_epochs, m) are what would be measured after each epoch, the last row being the
    trial's own values; ``train_seconds`` (n_epochs,) counts from the trial's start to the end of each epoch,
    ``score_seconds`` is what generating and scoring at the end takes. ``per_user`` has the final values by
    probe user of every objective that is measured on users.
    """

    values: Floats
    train_seconds: Floats
    score_seconds: float
    per_user: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of a trial that is not stopped."""
        return float(self.train_seconds[-1]) + self.score_seconds


class Problem(Protocol):
    """A search whose answer is known.

    ``objectives`` are names of :mod:`milp_ray.objectives` and ``signs`` (m,) their directions. ``front``
    (k, m) are the values of the best possible Pareto front, ``reference`` (m,) the corner from which
    hypervolumes are measured; both are free of noise. ``worst`` are the objectives' worst values as far as
    they are known beforehand (the size of the largest adapter of the space).
    """

    name: str
    space: SearchSpace
    objectives: tuple[str, ...]

    @property
    def signs(self) -> tuple[float, ...]:
        """Directions of the objectives."""

    @property
    def front(self) -> Floats:
        """Values of the best possible Pareto front."""

    @property
    def reference(self) -> Floats:
        """The corner of the hypervolume."""

    @property
    def worst(self) -> tuple[float | None, ...]:
        """Worst values known beforehand."""

    def measured(self, layout: CanonicalLayout) -> CanonicalLayout:
        """The layout that is measured in place of ``layout``: itself wherever the problem knows it."""

    def evaluate(self, layout: CanonicalLayout) -> Curve:
        """The trial of a layout; the same at every call."""

    def truth(self, layout: CanonicalLayout) -> Floats:
        """The values (m,) of a layout without noise."""


def best_hypervolume(problem: Problem) -> float:
    """Hypervolume of the problem's own front."""
    return hypervolume(problem.front, problem.signs, problem.reference)


def front_of(values: Floats, signs: Sequence[float]) -> Floats:
    """The non-dominated rows of ``values`` (n, m), without repeats; in blocks, since n may be large."""
    block = 500
    best = np.unique(values, axis=0)
    while True:
        parts = [best[i : i + block] for i in range(0, len(best), block)]
        kept = np.concatenate([part[pareto_front(part, signs)] for part in parts])
        if len(parts) == 1:
            return np.asarray(kept)
        if len(kept) > 0.9 * len(best):  # blocks alone no longer help
            return np.asarray(kept[pareto_front(kept, signs)])
        # Neighbours in a sorted list hardly dominate each other: deal the rows out anew.
        best = kept[np.random.default_rng(0).permutation(len(kept))]


# --------------------------------------------------------------------------------------- measured layouts


class LoraTable:
    """Layouts of the embedded base as they were measured on PersonaWorld (``lora_table/README.md``).

    What was measured is the truth here, so that there is no standard error to tell a search of: no values by
    user are given. A layout that the table lacks is answered with the nearest one that it has, the same for
    whoever asks: fewest layers switched on or off, then fewest steps of rank, then the key that sorts first.

    Args:
        objectives: of validation_loss, rouge_l and adapter_parameters.
        path: the table.
        users: which of the three measured users' means are the values, by their place; all of them otherwise.
        time_scale: what the measured seconds are multiplied with. The embedded base's trials take seconds;
            those of the bases that a search is run for take minutes, against which the seconds of a
            suggestion count for less.
    """

    def __init__(
        self,
        objectives: tuple[str, ...] = (VALIDATION_LOSS.name, ROUGE_L.name, ADAPTER_PARAMETERS.name),
        path: Path = TABLE,
        time_scale: float = 1.0,
        users: Sequence[int] | None = None,
    ) -> None:
        import pyarrow.parquet as pq

        self.name = "lora_table"
        self.objectives = objectives
        self._users = users
        rows = pq.read_table(path).to_pylist()
        self._curves: dict[str, Curve] = {}
        for key, group in itertools.groupby(rows, key=lambda row: row["key"]):
            epochs = sorted(group, key=lambda row: row["epoch"])
            self._curves[key] = self._curve(epochs, time_scale)
        n_layers = max(len(key.split("-")[0]) for key in self._curves if key != EMPTY_KEY)
        self._layouts = {key: _layout(key, n_layers) for key in self._curves}
        ranks = tuple(sorted({layout.rank for layout in self._layouts.values() if not layout.is_empty}))
        self.space = SearchSpace(n_layers, ranks)

    def _curve(self, epochs: Sequence[Mapping[str, Any]], time_scale: float) -> Curve:
        return Curve(
            values=np.array([[self._value(row, name) for name in self.objectives] for row in epochs]),
            train_seconds=np.array([row["train_seconds"] for row in epochs], dtype=float) * time_scale,
            score_seconds=float(epochs[-1]["score_seconds"]) * time_scale,
        )

    def _value(self, row: Mapping[str, Any], name: str) -> float:
        if self._users is None or name == ADAPTER_PARAMETERS.name:
            return float(row[name])
        return float(np.mean([row[f"{name}_by_user"][user] for user in self._users]))

    @property
    def signs(self) -> tuple[float, ...]:
        """Directions of the objectives."""
        return _signs(self.objectives)

    @cached_property
    def front(self) -> Floats:
        """Values of the non-dominated ones of all measured layouts."""
        return front_of(self._all_values, self.signs)

    @cached_property
    def reference(self) -> Floats:
        """By the rule of a study, over all measured layouts."""
        return reference_point(self._all_values, self.signs, self.worst)

    @property
    def worst(self) -> tuple[float | None, ...]:
        """The size of the largest adapter, of the full mask at the highest rank."""
        column = self._all_values.max(axis=0)
        sizes = zip(self.objectives, column.tolist(), strict=True)
        return tuple(value if name == ADAPTER_PARAMETERS.name else None for name, value in sizes)

    @property
    def layouts(self) -> tuple[CanonicalLayout, ...]:
        """Those that were measured."""
        return tuple(self._layouts.values())

    def measured(self, layout: CanonicalLayout) -> CanonicalLayout:
        """``layout``, or the nearest one that was measured."""
        if layout.key in self._layouts:
            return layout
        return min(self._layouts.values(), key=lambda other: (*self._distance(layout, other), other.key))

    def evaluate(self, layout: CanonicalLayout) -> Curve:
        """The measured curve of ``layout``, or of the nearest layout."""
        return self._curves[self.measured(layout).key]

    def truth(self, layout: CanonicalLayout) -> Floats:
        """What was measured: the table is the world here."""
        return np.asarray(self.evaluate(layout).values[-1])

    @property
    def _all_values(self) -> Floats:
        return np.array([curve.values[-1] for curve in self._curves.values()])

    def _distance(self, layout: CanonicalLayout, other: CanonicalLayout) -> tuple[int, int]:
        """Layers that differ, and steps of rank; the empty layout has the smallest rank."""
        steps = [self.space.ranks.index(one.rank or self.space.ranks[0]) for one in (layout, other)]
        return sum(a != b for a, b in zip(layout.mask, other.mask, strict=True)), abs(steps[0] - steps[1])


def _layout(key: str, n_layers: int) -> CanonicalLayout:
    """The layout that a key names."""
    if key == EMPTY_KEY:
        return CanonicalLayout((False,) * n_layers, 0)
    bits, _, rank = key.partition("-r")
    return CanonicalLayout(tuple(bit == "1" for bit in bits), int(rank))


# ------------------------------------------------------------------------------------------ synthetic ones


@dataclass(frozen=True)
class Effect:
    """How one objective depends on the layout: all but the adapter's size.

    value = start − direction · g(r) · (Σ w_i b_i + Σ v_ij b_i b_j) + direction · crowding · (k/L − ideal)²,
    where b are the layers' bits, k is their number, direction is 1 where smaller is better and −1 elsewhere,
    and g(r) = ½ + ½ (1 − exp(−3 q)), q in [0, 1] the place of the rank among the ranks.

    Args:
        weights: w by layer; layers without one have none.
        pairs: v by pair of layers: negative where two layers do the same work, positive where one needs the
            other.
        start: the value without any effect.
        crowding: how much too many or too few LoRAs cost.
        ideal: the best share of layers.
        noise: standard deviation of one probe user's value.
    """

    weights: Mapping[int, float]
    pairs: Mapping[tuple[int, int], float]
    start: float
    crowding: float = 0.0
    ideal: float = 0.0
    noise: float = 0.0

    @property
    def layers(self) -> set[int]:
        """Layers that matter by themselves."""
        return set(self.weights) | {layer for pair in self.pairs for layer in pair}


@dataclass(frozen=True)
class Synthetic:
    """Objectives that few of many layers decide, with a front known by enumeration.

    Raw points have 34 dimensions (32 layers, n, r). A layer without an effect of its own matters through the
    number of LoRAs only, so that all values there are come from the bits of the layers that matter, the
    number of other layers that carry a LoRA, and the rank: those are gone through for the front. A trial's
    noise is drawn from its layout: repeats give the same values. Values come down (or up) to the final ones
    as exp(−rate · epoch), the faster the larger the rank, so that curves cross. A trial trains from its
    lowest LoRA upwards, which its seconds show.

    Args:
        name: of the problem.
        effects: by objective; adapter_parameters has none, its value is its definition.
        objectives: names, in order.
    """

    name: str
    effects: Mapping[str, Effect]
    objectives: tuple[str, ...]
    space: SearchSpace = field(default_factory=lambda: SearchSpace(32, (8, 16, 32, 64, 96)))
    n_users: int = 4
    n_epochs: int = 9
    # r × so many numbers a layer: the feed-forward maps of Llama-2 7B.
    parameters_per_rank: int = 3 * (4096 + 11008)

    @property
    def signs(self) -> tuple[float, ...]:
        """Directions of the objectives."""
        return _signs(self.objectives)

    @cached_property
    def front(self) -> Floats:
        """By enumeration; see the class."""
        return front_of(self._all_values, self.signs)

    @cached_property
    def reference(self) -> Floats:
        """By the rule of a study, over all values there are."""
        return reference_point(self._all_values, self.signs, self.worst)

    @property
    def worst(self) -> tuple[float | None, ...]:
        """The size of the largest adapter."""
        largest = float(self.space.n_layers * self.space.ranks[-1] * self.parameters_per_rank)
        return tuple(largest if name == ADAPTER_PARAMETERS.name else None for name in self.objectives)

    def measured(self, layout: CanonicalLayout) -> CanonicalLayout:
        """``layout`` itself."""
        return layout

    def truth(self, layout: CanonicalLayout) -> Floats:
        """The values (m,) of a layout without noise."""
        bits = np.array([layout.mask], dtype=float)
        rank_index = self.space.ranks.index(layout.rank or self.space.ranks[0])
        return np.asarray(self._values(bits, bits.sum(axis=1), np.array([rank_index]))[0])

    def evaluate(self, layout: CanonicalLayout) -> Curve:
        """The trial of a layout; the same at every call."""
        truth = self.truth(layout)
        rng = np.random.default_rng(_digest(f"{self.name}/{layout.key}"))
        per_user: dict[str, tuple[float, ...]] = {}
        final = truth.copy()
        for column, name in enumerate(self.objectives):
            if name != ADAPTER_PARAMETERS.name:
                values = (
                    truth[column]
                    + self._by_user(name)
                    + rng.normal(0, self.effects[name].noise, self.n_users)
                )
                per_user[name] = tuple(values.tolist())
                final[column] = values.mean()
        return Curve(self._approach(final, layout), self._train_seconds(layout), 15.0, per_user)

    def _values(self, bits: Floats, n_loras: Floats, rank_index: NDArray[np.int_]) -> Floats:
        """Values (n, m) of n layouts; ``bits`` (n, L) need be right for the layers that matter only."""
        place = rank_index / (len(self.space.ranks) - 1)
        strength = 0.5 + 0.5 * (1.0 - np.exp(-3.0 * place))
        columns = []
        for name in self.objectives:
            if name == ADAPTER_PARAMETERS.name:
                ranks = np.array(self.space.ranks, dtype=float)[rank_index]
                columns.append(n_loras * ranks * self.parameters_per_rank)
                continue
            effect = self.effects[name]
            total = np.zeros(len(bits))
            for layer, weight in effect.weights.items():
                total += weight * bits[:, layer]
            for (one, other), weight in effect.pairs.items():
                total += weight * bits[:, one] * bits[:, other]
            crowding = effect.crowding * (n_loras / self.space.n_layers - effect.ideal) ** 2
            columns.append(effect.start - KNOWN_OBJECTIVES[name].sign * (strength * total - crowding))
        return np.stack(columns, axis=1)

    @cached_property
    def _all_values(self) -> Floats:
        """Values of all layouts, those that are equal by construction once."""
        matters = sorted(set().union(*(effect.layers for effect in self.effects.values())))
        masks = np.array(list(itertools.product((0.0, 1.0), repeat=len(matters))))
        n_others, ranks = self.space.n_layers - len(matters) + 1, len(self.space.ranks)
        mask, other, rank = (index.ravel() for index in np.indices((len(masks), n_others, ranks)))
        bits = np.zeros((len(mask), self.space.n_layers))
        bits[:, matters] = masks[mask]
        return self._values(bits, bits.sum(axis=1) + other, rank)

    def _by_user(self, name: str) -> Floats:
        """How much harder than the mean each user is: the same in every trial, and nothing together."""
        offsets = np.random.default_rng(_digest(f"{self.name}/{name}/users")).normal(0, 0.1, self.n_users)
        return np.asarray(offsets - offsets.mean())

    def _approach(self, final: Floats, layout: CanonicalLayout) -> Floats:
        """Values (n_epochs, m) on their way to ``final``, which the last row is."""
        place = self.space.ranks.index(layout.rank or self.space.ranks[0]) / (len(self.space.ranks) - 1)
        rate = 0.25 + 0.5 * place
        epochs = np.arange(1, self.n_epochs + 1)
        left = np.exp(-rate * epochs) - math.exp(-rate * self.n_epochs)
        far = [0.0 if n == ADAPTER_PARAMETERS.name else KNOWN_OBJECTIVES[n].sign for n in self.objectives]
        return np.asarray(final + left[:, None] * np.array(far))

    def _train_seconds(self, layout: CanonicalLayout) -> Floats:
        """Forward through all layers, backward down to the lowest LoRA; a little for each LoRA's own rank."""
        lowest = layout.layers[0] if layout.layers else self.space.n_layers
        backward = 1.0 - lowest / self.space.n_layers
        own = sum(layout.mask) * layout.rank / (self.space.n_layers * self.space.ranks[-1])
        return np.arange(1, self.n_epochs + 1) * (6.0 + 12.0 * backward + 4.0 * own)


def few_layers() -> Synthetic:
    """Loss against size: six layers matter, some of them do the same work; every other layer only costs."""
    effect = Effect(
        weights={3: 0.25, 9: 0.10, 14: 0.30, 20: 0.15, 21: 0.20, 30: 0.12},
        pairs={(3, 9): 0.20, (14, 21): -0.15, (20, 30): 0.15, (3, 14): -0.05},
        start=2.0,
        noise=0.04,
    )
    return Synthetic(
        "few_layers", {VALIDATION_LOSS.name: effect}, (VALIDATION_LOSS.name, ADAPTER_PARAMETERS.name)
    )


def two_depths() -> Synthetic:
    """Loss against ROUGE-L: they want different layers, two of them for one and against the other."""
    loss = Effect(
        weights={2: 0.30, 7: 0.20, 12: 0.25, 18: -0.15, 25: -0.10},
        pairs={(2, 7): 0.15, (7, 12): -0.20, (12, 18): 0.10},
        start=2.0,
        crowding=1.5,
        ideal=0.2,
        noise=0.04,
    )
    rouge = Effect(
        weights={12: -0.20, 18: 0.25, 25: 0.30, 28: 0.20, 2: -0.10},
        pairs={(18, 25): 0.15, (25, 28): -0.15, (2, 28): 0.10},
        start=1.0,
        crowding=1.0,
        ideal=0.35,
        noise=0.04,
    )
    effects = {VALIDATION_LOSS.name: loss, ROUGE_L.name: rouge}
    return Synthetic("two_depths", effects, (VALIDATION_LOSS.name, ROUGE_L.name))


def _signs(objectives: Sequence[str]) -> tuple[float, ...]:
    return tuple(KNOWN_OBJECTIVES[name].sign for name in objectives)


def _digest(text: str) -> int:
    """A seed from a text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    cards: dict[str, Any] = {}
    for problem in (LoraTable(), few_layers(), two_depths()):
        rng = np.random.default_rng(0)
        drawn = [problem.space.layout(problem.space.sample(rng)).canonical() for _ in range(200)]
        curves = [problem.evaluate(layout) for layout in drawn]
        of_random = hypervolume([problem.truth(layout) for layout in drawn], problem.signs, problem.reference)
        cards[problem.name] = {
            "n_parameters": len(problem.space.parameters()),
            "n_layouts": problem.space.n_canonical,
            "n_measured": len(problem.layouts) if isinstance(problem, LoraTable) else None,
            "objectives": list(problem.objectives),
            "n_front": len(problem.front),
            "hypervolume_share_of_200_random": of_random / best_hypervolume(problem),
            "median_trial_seconds": float(np.median([curve.seconds for curve in curves])),
        }
        print(f"{problem.name}: " + ", ".join(f"{k} {v}" for k, v in cards[problem.name].items()))
    print(json.dumps(cards))


if __name__ == "__main__":
    main()
