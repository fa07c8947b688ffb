"""Problems of 34 dimensions that few of many layers decide, with fronts known by enumeration."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from comparison.problem import Curve, Enumerated, Floats
from numpy.typing import NDArray

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.objectives import ADAPTER_PARAMETERS, KNOWN_OBJECTIVES, ROUGE_L, VALIDATION_LOSS


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
class Synthetic(Enumerated):
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
    def all_values(self) -> Floats:
        """By enumeration, see the class: values of all layouts, those that are equal by construction once."""
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


def _digest(text: str) -> int:
    """A seed from a text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
