"""The LoRA weights of several jobs of one layout, in slots.

A slot's numbers lie in one row: weights, gradients and Adam's moments are (n_slots, n_parameters) each. So a
job's gradient norm is that of a row, its optimizer step is one kernel over a row, and jobs of one layout can
be multiplied together as stacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import target_modules

if TYPE_CHECKING:
    from milp_ray.memory.architecture import FfnShapes, FfnSpec

_HEAD = "base_model.model."  # of the names in PEFT's files


@dataclass(frozen=True, slots=True)
class Pair:
    """Where the two factors of a map's update lie in a slot's row: A is (rank, n_in), B is (n_out, rank)."""

    module: str
    rank: int
    n_in: int
    n_out: int
    start: int

    @property
    def seam(self) -> int:
        """Where A ends and B begins."""
        return self.start + self.rank * self.n_in

    @property
    def end(self) -> int:
        """Where B ends."""
        return self.seam + self.rank * self.n_out

    @property
    def names(self) -> tuple[str, str]:
        """The names of A and B in PEFT's files."""
        return f"{_HEAD}{self.module}.lora_A.weight", f"{_HEAD}{self.module}.lora_B.weight"

    def a(self, rows: Tensor) -> Tensor:
        """A of every row of (…, n_parameters): (…, rank, n_in)."""
        return rows[..., self.start : self.seam].unflatten(-1, (self.rank, self.n_in))

    def b(self, rows: Tensor) -> Tensor:
        """B of every row of (…, n_parameters): (…, n_out, rank)."""
        return rows[..., self.seam : self.end].unflatten(-1, (self.n_out, self.rank))


def pairs_of(layout: CanonicalLayout, spec: FfnSpec, shapes: FfnShapes) -> tuple[Pair, ...]:
    """The LoRA pairs of a layout in the order of PEFT's files."""
    sizes = [(n_in, n_out) for _ in layout.layers for _, n_in, n_out in shapes.modules]
    pairs: list[Pair] = []
    start = 0
    for module, (n_in, n_out) in zip(target_modules(layout, spec), sizes, strict=True):
        pairs.append(Pair(module, layout.rank, n_in, n_out, start))
        start = pairs[-1].end
    return tuple(pairs)


def tensor_shapes(pairs: tuple[Pair, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights by the names of PEFT's files."""
    found: dict[str, tuple[int, ...]] = {}
    for pair in pairs:
        a, b = pair.names
        found |= {a: (pair.rank, pair.n_in), b: (pair.n_out, pair.rank)}
    return found


def initial_weights(pairs: tuple[Pair, ...], seed: int) -> dict[str, Tensor]:
    """LoRA weights before the first step, by the names of PEFT's files: float32, drawn from ``seed`` alone.

    As PEFT draws them: A uniform within ±1/√n_in (Kaiming's bound with a = √5), B zero.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for pair in pairs:
        bound = 1 / math.sqrt(pair.n_in)
        a, b = pair.names
        weights[a] = torch.empty(pair.rank, pair.n_in).uniform_(-bound, bound, generator=generator)
        weights[b] = torch.zeros(pair.n_out, pair.rank)
    return weights


@dataclass(frozen=True, slots=True)
class Views:
    """One map's factors in one slot, and where their gradients are summed up."""

    a: Tensor
    b: Tensor
    a_gradient: Tensor
    b_gradient: Tensor


class Rack:
    """Slots for jobs of one layout.

    ``weights`` is a parameter whose gradient is summed up in ``gradients`` by the maps themselves
    (:mod:`milp_ray.training.packed_lora`); a rack that is only answered with has neither gradients nor
    moments. ``scale`` is lora_alpha / rank.
    """

    def __init__(
        self,
        layout: CanonicalLayout,
        pairs: tuple[Pair, ...],
        scale: float,
        n_slots: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        trains: bool = True,
    ) -> None:
        self.layout, self.scale, self.n_slots = layout, scale, n_slots
        self.pairs = {pair.module: pair for pair in pairs}
        n_parameters = pairs[-1].end
        self.weights = nn.Parameter(torch.zeros(n_slots, n_parameters, device=device), requires_grad=trains)
        # What the maps multiply with: the weights themselves, or a copy in the base's precision.
        self.operands = self.weights.detach() if dtype == torch.float32 else self.weights.detach().to(dtype)
        n_states = n_slots if trains else 0
        self.gradients, self.first_moments, self.second_moments = (
            torch.zeros(n_states, n_parameters, device=device) for _ in range(3)
        )
        self.free = list(range(n_slots))[::-1]
        self._views: dict[str, list[Views]] = {}

    def views(self, module: str) -> list[Views]:
        """One entry a slot for the map ``module``."""
        found = self._views.get(module)
        if found is None:
            pair = self.pairs[module]
            # Without gradients the places for them are empty, and nothing reaches for them.
            gradients = self.gradients if len(self.gradients) else self.operands
            found = [
                Views(pair.a(row), pair.b(row), pair.a(gradient), pair.b(gradient))
                for row, gradient in zip(self.operands, gradients, strict=True)
            ]
            self._views[module] = found
        return found

    def factors(self, module: str, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """A (n_slots, rank, n_in) and B (n_slots, n_out, rank) of some slots, or of all of them."""
        pair = self.pairs[module]
        a, b = pair.a(self.operands), pair.b(self.operands)
        return (a, b) if slots is None else (a.index_select(0, slots), b.index_select(0, slots))

    def add_gradients(self, module: str, slots: Tensor | None, of_a: Tensor, of_b: Tensor) -> None:
        """Add scale × what belongs to A and B of some slots, or of all of them, to their gradients."""
        pair = self.pairs[module]
        for total, part in ((pair.a(self.gradients), of_a), (pair.b(self.gradients), of_b)):
            if slots is None:
                total.add_(part, alpha=self.scale)
            else:
                total.index_add_(0, slots, part.to(total.dtype), alpha=self.scale)

    def load(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """Set a slot's weights; ``tensors`` by the names of PEFT's files.

        Raises:
            KeyError: a tensor is missing.
        """
        row = self.weights.detach()[slot]
        for pair in self.pairs.values():
            a, b = pair.names
            pair.a(row).copy_(tensors[a])
            pair.b(row).copy_(tensors[b])
        self.refresh([slot])

    def read(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's weights on the CPU in float32, by the names of PEFT's files."""
        row = self.weights.detach()[slot].cpu()
        tensors: dict[str, Tensor] = {}
        for pair in self.pairs.values():
            a, b = pair.names
            tensors[a], tensors[b] = pair.a(row).clone(), pair.b(row).clone()
        return tensors

    def refresh(self, slots: list[int]) -> None:
        """Bring the copies in the base's precision up to date with the weights."""
        if self.operands.dtype != torch.float32:
            self.operands[slots] = self.weights.detach()[slots].to(self.operands.dtype)

    def forget(self, slot: int) -> None:
        """A stage begins: no gradient, no moments."""
        for state in (self.gradients, self.first_moments, self.second_moments):
            state[slot].zero_()

    def moments(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's moments on the CPU."""
        return {
            "first": self.first_moments[slot].cpu().clone(),
            "second": self.second_moments[slot].cpu().clone(),
        }

    def restore(self, slot: int, moments: dict[str, Tensor]) -> None:
        """Put back what :meth:`moments` gave."""
        self.gradients[slot].zero_()
        self.first_moments[slot].copy_(moments["first"])
        self.second_moments[slot].copy_(moments["second"])
