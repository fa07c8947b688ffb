"""Adapters of many users on one base at the same time, to answer or to measure with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from milp_ray.training.adapters import check_shapes
from milp_ray.training.packed_lora import PackContext, Segment, packed
from milp_ray.training.rack import Rack, pairs_of, tensor_shapes

if TYPE_CHECKING:
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base


class Seating:
    """Which slot each adapter has; adapters of one layout share a rack."""

    def __init__(self, base: Base, adapters: SequenceOf[Adapter | None], context: PackContext) -> None:
        self.context = context
        # One that answers for many users has one seat.
        own = {id(adapter): adapter for adapter in adapters if adapter is not None}
        wanted = Counter(_kind(adapter) for adapter in own.values())
        taken: dict[int, tuple[Rack, int]] = {}
        racks: dict[tuple[str, float], Rack] = {}
        self._seats: list[tuple[Rack, int] | None] = []
        for adapter in adapters:
            if adapter is None:
                self._seats.append(None)
                continue
            if id(adapter) in taken:
                self._seats.append(taken[id(adapter)])
                continue
            kind = _kind(adapter)
            rack = racks.get(kind)
            if rack is None:
                pairs = pairs_of(adapter.layout, base.spec, base.shapes)
                device, dtype = base.device, base.dtype
                rack = racks[kind] = Rack(
                    adapter.layout, pairs, kind[1], wanted[kind], device=device, dtype=dtype, trains=False
                )
            slot = rack.free.pop()
            rack.load(slot, adapter.tensors)
            taken[id(adapter)] = rack, slot
            self._seats.append(taken[id(adapter)])
        order = {id(rack): i for i, rack in enumerate(racks.values())}
        self._order = [(-1, 0) if seat is None else (order[id(seat[0])], seat[1]) for seat in self._seats]

    def place(self, index: int) -> tuple[int, int]:
        """Sorts adapters so that those of one rack stand next to each other."""
        return self._order[index]

    def segment(self, index: int, start: int = 0, end: int = 0) -> Segment | None:
        """Tokens ``start`` to ``end`` belong to adapter ``index``; ``None`` for the base alone."""
        seat = self._seats[index]
        return None if seat is None else Segment(seat[0], seat[1], start, end)

    def show(self, owners: SequenceOf[int], n_tokens: int) -> None:
        """The next pass has rows of ``n_tokens`` tokens each, row i of adapter ``owners[i]``."""
        segments: list[Segment] = []
        start = 0
        for row in range(len(owners)):
            if row + 1 == len(owners) or owners[row + 1] != owners[row]:
                own = self.segment(owners[row], start * n_tokens, (row + 1) * n_tokens)
                start = row + 1
                if own is not None:
                    segments.append(own)
        self.context.segments = segments


@contextmanager
def seated(base: Base, adapters: SequenceOf[Adapter | None]) -> Iterator[Seating]:
    """Put all adapters on the base for the time (``None``: the base alone); it is afterwards as it was.

    Raises:
        MilpError: an adapter does not fit this base.
    """
    found = [adapter for adapter in adapters if adapter is not None]
    for adapter in found:
        _check_fits(adapter, base)
    modules = {name for adapter in found for name in adapter.config["target_modules"]}
    with torch.inference_mode(False), packed(base, modules) as context:
        yield Seating(base, adapters, context)


def _kind(adapter: Adapter) -> tuple[str, float]:
    """Adapters of one kind can share a rack: their layout and scale."""
    return adapter.layout.key, float(adapter.config["lora_alpha"]) / float(adapter.config["r"])


def _check_fits(adapter: Adapter, base: Base) -> None:
    ours: dict[str, tuple[int, ...]] = {}
    if adapter.layout.n_layers == base.n_layers:
        ours = tensor_shapes(pairs_of(adapter.layout, base.spec, base.shapes))
    check_shapes(adapter.tensors, ours)
