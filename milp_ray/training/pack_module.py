"""What DeepSpeed sees of a pack: the racks' weights, and a forward pass to the loss of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from milp_ray.training.flat_loss import FlatLoss

if TYPE_CHECKING:
    from milp_ray.training.base import Base
    from milp_ray.training.flat import FlatView
    from milp_ray.training.flat_batch import FlatBatch
    from milp_ray.training.flat_prefix import FlatPrefix
    from milp_ray.training.packed_lora import PackContext


class PackModule(nn.Module):
    """The base stays beside the registry of modules: only ``racks`` concern DeepSpeed."""

    def __init__(self, base: Base, view: FlatView, context: PackContext, prefix: FlatPrefix) -> None:
        super().__init__()
        self.racks = nn.ParameterDict()
        self.__dict__.update(view=view, context=context, prefix=prefix, loss=FlatLoss(base))
        self.last_nll: Tensor

    def nll(self, batch: FlatBatch, dropout: float) -> Tensor:
        """Loss of each target in nats, (n_targets,) float32: see :class:`FlatLoss`."""
        context, prefix = self.__dict__["context"], self.__dict__["prefix"]
        context.segments, context.dropout = batch.segments, dropout
        prefix.shown = batch.states
        try:
            states = self.__dict__["view"].hidden_states(batch.ids, batch.rows)
        finally:
            context.segments = []
            prefix.shown = None
        found: Tensor = self.__dict__["loss"](states[batch.targets], batch.labels, batch.reference)
        return found

    def forward(self, batch: FlatBatch, shares: Tensor, dropout: float) -> Tensor:
        """Σ over targets of ``shares`` (n_targets,) × their loss; keeps the losses as :attr:`last_nll`."""
        nll = self.nll(batch, dropout)
        self.last_nll = nll.detach()
        return (nll * shares).sum()
