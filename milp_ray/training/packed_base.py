"""The base while a pack has hold of it: racks of LoRA on its maps, and passes over it.

A pass takes what it is given, a part a slot, as one line of tokens; whose turn it is, and what becomes of the
losses, is the pack's matter (:mod:`milp_ray.training.pack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from milp_ray.memory.lora import lora_alpha
from milp_ray.training.engine import engine_around
from milp_ray.training.flat import FlatView, flat_attention
from milp_ray.training.flat_batch import FlatBatch, Part, flat_batch, pieces_of, together
from milp_ray.training.flat_prefix import FlatPrefix
from milp_ray.training.fused import fused_operations
from milp_ray.training.pack_module import PackModule
from milp_ray.training.pack_optimizer import SlotAdamW, SlotStep
from milp_ray.training.packed_lora import packed
from milp_ray.training.rack import Rack, pairs_of
from milp_ray.training.reference import reference_of

if TYPE_CHECKING:
    from milp_ray.config.training import TrainingSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.training.base import Base

_TOKENS_A_PASS = {"cpu": 4096, "cuda": 32768}  # of a pass that only measures


class PackedBase:
    """Racks by layout, and passes that train or measure the jobs in their slots.

    ``prefix`` is there from :meth:`held` on.
    """

    prefix: FlatPrefix

    def __init__(self, base: Base, section: TrainingSection) -> None:
        self._base, self._section = base, section
        self.racks: dict[CanonicalLayout, Rack] = {}
        self._unneeded: CanonicalLayout | None = None  # the last rack's layout, where no job has it any more
        self._view: FlatView | None = None  # while the base is held
        self._tokens_a_pass = _TOKENS_A_PASS.get(base.device.type, 4096)

    @contextmanager
    def held(self, modules: Iterable[str], first: CanonicalLayout, n_slots: int) -> Iterator[None]:
        """Take hold of the base, whose maps ``modules`` may carry LoRA, with a rack of one layout."""
        base = self._base
        with ExitStack() as stack:
            stack.enter_context(fused_operations(base))
            view = stack.enter_context(flat_attention(base))
            context = stack.enter_context(packed(base, modules))
            self.prefix = FlatPrefix(base, view, self._tokens_a_pass)
            stack.enter_context(self.prefix.aside())
            self._module = PackModule(base, view, context, self.prefix)
            # DeepSpeed wants something to step from the beginning; racks come and go.
            self.rack_for(first, n_slots)
            self._optimizer = SlotAdamW(self.racks.values(), self._section)
            self._engine: Any = stack.enter_context(engine_around(self._module, self._optimizer, base))
            self._view = view
            yield

    def lent(self) -> AbstractContextManager[None]:
        """Between two passes, the base for other uses."""
        return self._view.aside() if self._view is not None else nullcontext()

    def rack_for(self, layout: CanonicalLayout, n_slots: int) -> Rack:
        """The rack of a layout; where there is none yet, one of ``n_slots``."""
        rack = self.racks.get(layout)
        if rack is None:
            rack = Rack(
                layout,
                pairs_of(layout, self._base.spec, self._base.shapes),
                float(lora_alpha(layout.rank, self._section.lora_alpha)) / layout.rank,
                n_slots,
                device=self._base.device,
                dtype=self._base.dtype,
            )
            self.racks[layout] = rack
            self._module.racks[layout.key] = rack.weights
            if len(self.racks) > 1:
                self._optimizer.add(rack)
            if self._unneeded is not None:
                self._remove(self._unneeded)
        self._unneeded = None
        return rack

    def drop_rack(self, layout: CanonicalLayout) -> None:
        """No job needs a layout's rack, if there is one; DeepSpeed needs one to step, and keeps the last."""
        if len(self.racks) > 1:
            self._remove(layout)
        else:
            self._unneeded = layout

    def _remove(self, layout: CanonicalLayout) -> None:
        rack = self.racks.pop(layout, None)
        if rack is not None:
            del self._module.racks[layout.key]
            self._optimizer.remove(rack)

    def train(self, parts: SequenceOf[Part], steps: list[SlotStep]) -> list[float]:
        """Forward, backward and the optimizer step of some slots: each by the mean of its own targets.

        Gives the sum of each part's losses in nats, by the targets' weights.

        Raises:
            torch.OutOfMemoryError: it does not fit the device; all is as if the pass had not been begun.
        """
        self._optimizer.steps = steps
        try:
            return self._train(parts)
        except torch.OutOfMemoryError:
            for step in steps:
                step.rack.gradients[step.slot].zero_()
            if self._base.device.type == "cuda":
                torch.cuda.empty_cache()
            raise

    def _train(self, parts: SequenceOf[Part]) -> list[float]:
        device = self._base.device
        reference = reference_of([wanted for part in parts for wanted in part.wanted], device)
        batch = replace(self._batch(parts), reference=reference)
        n_targets = [part.n_targets for part in parts]
        totals = torch.tensor([part.total_weight for part in parts], device=device)
        shares = torch.repeat_interleave(1.0 / totals, torch.tensor(n_targets, device=device))
        weights = None
        if any(part.texts.weights is not None for part in parts):
            weights = torch.tensor([w for part in parts for w in part.target_weights], device=device)
            shares = shares * weights
        loss = self._engine(batch, shares, self._section.dropout)
        self._engine.backward(loss)
        self._engine.step()
        nll = self._module.last_nll if weights is None else self._module.last_nll * weights
        # Fetched in one go: each fetch waits for the device.
        sums: list[float] = torch.stack([own.double().sum() for own in nll.split(n_targets)]).tolist()
        return sums

    def mean_losses(self, parts: SequenceOf[Part]) -> list[float | None]:
        """Mean loss of each part's targets in nats; ``None`` where there are none.

        Raises:
            torch.OutOfMemoryError: not even one sequence fits the device.
        """
        longest = max((part.texts.lengths[i] for part in parts for i in part.chosen), default=0)
        while self._tokens_a_pass > longest:
            try:
                return self._mean_losses(parts, self._tokens_a_pass)
            except torch.OutOfMemoryError:
                self._tokens_a_pass //= 2
        return self._mean_losses(parts, longest)

    def _mean_losses(self, parts: SequenceOf[Part], most: int) -> list[float | None]:
        """In passes of at most ``most`` tokens, or of one sequence."""
        pieces = [
            (i, Part(part.texts, piece, part.segment))
            for i, part in enumerate(parts)
            for piece in pieces_of(part.texts, part.chosen, most)
        ]
        sums, counts = [0.0] * len(parts), [0] * len(parts)
        with torch.no_grad():
            for some in together(pieces, most):
                chosen = [part for _, part in some]
                nll = self._module.nll(self._batch(chosen), 0.0).double()
                sizes = [part.n_targets for part in chosen]
                own = torch.stack([nll_of.sum() for nll_of in nll.split(sizes)]).tolist()
                for (i, _), total, n in zip(some, own, sizes, strict=True):
                    sums[i] += total
                    counts[i] += n
        return [total / n if n else None for total, n in zip(sums, counts, strict=True)]

    def _batch(self, parts: SequenceOf[Part]) -> FlatBatch:
        return flat_batch(parts, self._base.device, self.prefix.states_of(parts))
