"""h = Wx + s·BAx for many jobs at once: every token is multiplied with its own job's A and B.

Tokens of a job lie next to each other. A feed-forward map that carries LoRA for any job is replaced by a
:class:`PackedLinear`, which adds each job's update to its tokens and, going back, sums the gradients straight
into the job's row of its rack: autograd sees one node a map, however many jobs there are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from milp_ray.training.base import Base
    from milp_ray.training.rack import Rack


_FEW, _SHORT = 4, 32  # segments of a rack that are multiplied one by one; mean tokens of those that are not


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start`` to ``end`` of the flat line belong to a slot of a rack.

    ``dropout_seed`` decides the slot's dropout in this pass.
    """

    rack: Rack
    slot: int
    start: int
    end: int
    dropout_seed: int = 0


@dataclass(frozen=True, slots=True)
class Stack:
    """A rack's segments, to be multiplied in one go, because a product each would cost more.

    ``slots`` (n_slots,) are the rack's, ``None`` where it is all of them in order. Where segments differ in
    length, ``gather`` (n_slots × length,) are the tokens padded to the longest, ``places`` (n_tokens,) where
    each token of the stretch ``start`` to ``end`` lies among them, and ``real`` (n_slots, length, 1) is 0
    where nothing does.
    """

    rack: Rack
    slots: Tensor | None
    n_slots: int
    start: int
    end: int
    padding: tuple[Tensor, Tensor, Tensor] | None  # gather, places, real

    def rows(self, line: Tensor) -> Tensor:
        """(n_tokens of the line, size) → (n_slots, length, size), zero where no token lies."""
        if self.padding is None:
            return line[self.start : self.end].unflatten(0, (self.n_slots, -1))
        gather, _, real = self.padding
        return line.index_select(0, gather).unflatten(0, (self.n_slots, -1)).mul_(real.to(line.dtype))

    def add(self, rows: Tensor, line: Tensor, scale: float) -> None:
        """Add scale × (n_slots, length, size) to the stretch of the line."""
        flat = rows.flatten(0, 1)
        if self.padding is not None:
            flat = flat.index_select(0, self.padding[1])
        line[self.start : self.end].add_(flat, alpha=scale)


@dataclass
class PackContext:
    """What the maps of a pack look up in a pass; ``dropout`` is that of LoRA's input, 0 when measuring."""

    segments: list[Segment] = field(default_factory=list)
    dropout: float = 0.0
    _stacked: tuple[list[Segment], list[Stack], list[Segment]] | None = None

    def stacked(self, device: torch.device) -> tuple[list[Stack], list[Segment]]:
        """The segments as stacks where that pays, and the others; worked out once a pass."""
        if self._stacked is None or self._stacked[0] is not self.segments:
            self._stacked = (self.segments, *_stacks_of(self.segments, device))
        return self._stacked[1], self._stacked[2]

    def in_training(self, device: torch.device) -> tuple[list[Stack], list[Segment]]:
        """As :meth:`stacked`, where gradients are wanted: on a CPU a product a segment wins nothing by it."""
        if self.dropout or not _stacks_in_training(device):
            return [], self.segments
        return self.stacked(device)


class PackedLinear(nn.Module):
    """Stands in for a feed-forward map of the base and adds the updates of ``context.segments``."""

    weight: Tensor  # (n_out, n_in)
    bias: Tensor | None
    anchor: Tensor

    def __init__(self, linear: nn.Module, name: str, context: PackContext) -> None:
        super().__init__()
        self.name, self.context = name, context
        self.number = zlib.crc32(name.encode())  # the same whatever other maps are replaced
        weight, bias = linear.get_parameter("weight"), linear._parameters.get("bias")
        # Beside the registry of modules: the base's weights must not be seen through here.
        self.__dict__["linear"] = linear  # for a pack within this one
        self.__dict__["weight"] = weight.mT if type(linear).__name__ == "Conv1D" else weight
        self.__dict__["bias"] = bias
        # Something that asks for a gradient, so that the lowest map of the pack is gone back to.
        self.__dict__["anchor"] = torch.zeros((), device=weight.device, requires_grad=True)

    def forward(self, states: Tensor) -> Tensor:
        """(…, n_in) → (…, n_out); the leading dimensions, flattened, are the line of tokens."""
        flat = states.reshape(-1, states.shape[-1])
        if not torch.is_grad_enabled() or not self.context.segments:
            return self._without_gradient(flat).view(*states.shape[:-1], -1)
        stacks, segments = self.context.in_training(states.device)
        stacks = [stack for stack in stacks if self.name in stack.rack.pairs]
        segments = [segment for segment in segments if self.name in segment.rack.pairs]
        if not segments and not stacks:
            return nn.functional.linear(states, self.weight, self.bias)
        out: Tensor = _PackedLora.apply(flat, self.anchor, self, segments, stacks)
        return out.view(*states.shape[:-1], -1)

    def _without_gradient(self, states: Tensor) -> Tensor:
        out = nn.functional.linear(states, self.weight, self.bias)
        stacks, segments = self.context.stacked(states.device)
        for stack in stacks:
            rack = stack.rack
            if self.name not in rack.pairs:
                continue
            a, b = rack.factors(self.name, stack.slots)
            stack.add(torch.bmm(torch.bmm(stack.rows(states), a.mT), b.mT), out, rack.scale)
        for segment in segments:
            if self.name in segment.rack.pairs:
                views = segment.rack.views(self.name)[segment.slot]
                hidden = torch.mm(states[segment.start : segment.end], views.a.t())
                out[segment.start : segment.end].addmm_(hidden, views.b.t(), alpha=segment.rack.scale)
        return out


class _PackedLora(torch.autograd.Function):
    """Base map and updates in one node. (n_tokens, n_in) → (n_tokens, n_out)."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        anchor: Tensor,
        module: PackedLinear,
        segments: list[Segment],
        stacks: list[Stack],
    ) -> Tensor:
        out = nn.functional.linear(states, module.weight, module.bias)
        dropout = module.context.dropout
        narrowed, masks = [], []
        for segment in segments:
            views = segment.rack.views(module.name)[segment.slot]
            own = states[segment.start : segment.end]
            mask = _dropout_mask(own, dropout, segment.dropout_seed + module.number) if dropout else None
            hidden = torch.mm(own if mask is None else own * mask, views.a.t())
            out[segment.start : segment.end].addmm_(hidden, views.b.t(), alpha=segment.rack.scale)
            narrowed.append(hidden)
            masks.append(mask)
        stacked = []
        for stack in stacks:
            a, b = stack.rack.factors(module.name, stack.slots)
            stacked.append(torch.bmm(stack.rows(states), a.mT))
            stack.add(torch.bmm(stacked[-1], b.mT), out, stack.rack.scale)
        ctx.save_for_backward(states)
        ctx.module, ctx.segments, ctx.narrowed, ctx.masks = module, segments, narrowed, masks
        ctx.stacks, ctx.stacked = stacks, stacked
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (states,) = ctx.saved_tensors
        module: PackedLinear = ctx.module
        wants_states = ctx.needs_input_grad[0]
        back = gradient.mm(module.weight) if wants_states else None
        for segment, hidden, mask in zip(ctx.segments, ctx.narrowed, ctx.masks, strict=True):
            views, scale = segment.rack.views(module.name)[segment.slot], segment.rack.scale
            own = states[segment.start : segment.end]
            if mask is not None:
                own = own * mask
            coming = gradient[segment.start : segment.end]
            through = coming.mm(views.b)
            _add_product(views.b_gradient, coming.t(), hidden, scale)
            _add_product(views.a_gradient, through.t(), own, scale)
            if back is None:
                continue
            if mask is None:
                back[segment.start : segment.end].addmm_(through, views.a, alpha=scale)
            else:
                back[segment.start : segment.end].addcmul_(through.mm(views.a), mask, value=scale)
        for stack, hidden in zip(ctx.stacks, ctx.stacked, strict=True):
            rack, coming = stack.rack, stack.rows(gradient)
            a, b = rack.factors(module.name, stack.slots)
            through = torch.bmm(coming, b)
            of_a, of_b = torch.bmm(through.mT, stack.rows(states)), torch.bmm(coming.mT, hidden)
            rack.add_gradients(module.name, stack.slots, of_a, of_b)
            if back is not None:
                stack.add(torch.bmm(through, a), back, rack.scale)
        return back, None, None, None, None


def _stacks_of(segments: list[Segment], device: torch.device) -> tuple[list[Stack], list[Segment]]:
    by_rack: dict[int, list[Segment]] = {}
    for segment in segments:
        by_rack.setdefault(id(segment.rack), []).append(segment)
    stacks: list[Stack] = []
    rest: list[Segment] = []
    for own in by_rack.values():
        n_tokens = own[-1].end - own[0].start
        touches = n_tokens == sum(one.end - one.start for one in own)
        length = max(one.end - one.start for one in own)
        if not touches or not _pays(len(own), n_tokens, length, device):
            rest += own
            continue
        slots = [one.slot for one in own]
        everyone = slots == list(range(own[0].rack.n_slots))
        stacks.append(
            Stack(
                own[0].rack,
                None if everyone else torch.tensor(slots, device=device),
                len(own),
                own[0].start,
                own[-1].end,
                None if n_tokens == length * len(own) else _padding(own, length, device),
            )
        )
    return stacks, rest


def _padding(segments: list[Segment], length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # Padding reads the segment's own first token: a neighbour's times zero may still be no number.
    gather = torch.tensor([one.start for one in segments]).repeat_interleave(length).view(-1, length)
    real = torch.zeros(len(segments), length, 1)
    for i, one in enumerate(segments):
        n = one.end - one.start
        gather[i, :n] = torch.arange(one.start, one.end)
        real[i, :n] = 1
    places = torch.nonzero(real.flatten()).squeeze(1)
    return gather.flatten().to(device), places.to(device), real.to(device)


def _pays(n_segments: int, n_tokens: int, length: int, device: torch.device) -> bool:
    """Whether segments are better multiplied in one go, padded to ``length`` tokens."""
    if device.type == "cpu":
        return n_segments >= _FEW and n_tokens <= _SHORT * n_segments
    return n_segments > 1 and n_segments * length <= 2 * n_tokens


def _stacks_in_training(device: torch.device) -> bool:
    return device.type != "cpu"


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Total += scale · left @ right; in the precision of ``total`` where the factors are of a lower one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left.mm(right), alpha=scale)


def _dropout_mask(states: Tensor, dropout: float, seed: int) -> Tensor:
    """0 with probability ``dropout``, 1 / (1 − dropout) otherwise; ``seed`` alone decides."""
    generator = torch.Generator(device=states.device).manual_seed(seed)
    kept = torch.rand(states.shape, generator=generator, device=states.device) >= dropout
    return kept.to(states.dtype).div_(1 - dropout)


@contextmanager
def packed(base: Base, modules: Iterable[str]) -> Iterator[PackContext]:
    """Replace the named maps of the base for the time; what it yields says whose tokens are where.

    Inside a pack these maps take the place of the pack's.
    """
    context = PackContext()
    replaced: list[tuple[Any, str, nn.Module]] = []
    try:
        for name in modules:
            path, _, last = name.rpartition(".")
            parent = base.model.get_submodule(path)
            linear = getattr(parent, last)
            replaced.append((parent, last, linear))
            # Inside another pack, which stands aside meanwhile, the map itself is under that one's.
            plain = linear.__dict__["linear"] if isinstance(linear, PackedLinear) else linear
            setattr(parent, last, PackedLinear(plain, name, context))
        yield context
    finally:
        for parent, last, linear in replaced:
            setattr(parent, last, linear)
