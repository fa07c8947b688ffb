"""Soft prompts of several sources added up, with weights that a query decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from milp_ray.methods.user_encoder import UserEncoder, new_encoder, padded

if TYPE_CHECKING:
    from milp_ray.config.methods import SoftFusedSection, UserEncoderSection
    from milp_ray.training.base import Base

# A query's vector (n_in,), and each source's vectors (n_texts, n_in) in time order.
Asked = tuple[Tensor, tuple[Tensor, ...]]


class Fusion(nn.Module):
    """One encoder for all sources, and the weights between what it makes of them.

    Args:
        encoder: vectors of a source → a soft prompt.
        n_sources: how many sources there are.
        bottleneck: numbers that a query's vector is pressed through.
    """

    def __init__(self, encoder: UserEncoder, n_sources: int, bottleneck: int) -> None:
        super().__init__()
        n_in, n_out = encoder.mean.shape[0], encoder.leave.out_features
        self.encoder = encoder
        self.narrow, self.widen = nn.Linear(n_in, bottleneck), nn.Linear(bottleneck, n_out)
        self.preference = nn.Parameter(torch.zeros(n_sources))
        self.for_all = nn.Parameter(torch.zeros(encoder.latents.shape[0], n_out))

    def fused(self, asked: Sequence[Asked], device: torch.device) -> tuple[Tensor, Tensor]:
        """(n, n_soft, n_out) soft prompts of n queries, and the weights (n, n_sources) of their sources.

        A source without texts has weight 0, unless none of a query's has any.
        """
        queries = torch.stack([query for query, _ in asked]).to(device)
        prompts = torch.stack(
            [self._prompts(own, device) for own in zip(*(own for _, own in asked), strict=True)], 1
        )
        empty = torch.tensor([[not len(source) for source in own] for _, own in asked], device=device)
        weights = self.weights(queries, prompts, empty & ~empty.all(1, keepdim=True))
        return self.for_all + torch.einsum("ns,nske->nke", weights, prompts), weights

    def weights(self, queries: Tensor, prompts: Tensor, left_out: Tensor) -> Tensor:
        """(n, n_sources) that sum to 1, of queries (n, n_in) and prompts (n, n_sources, n_soft, n_out)."""
        looked_for = self.widen(functional.silu(self.narrow(self.encoder.standardised(queries))))
        keys = functional.layer_norm(prompts.mean(2), prompts.shape[-1:])
        looked_for = functional.layer_norm(looked_for, looked_for.shape[-1:])
        scores = torch.einsum("ne,nse->ns", looked_for, keys) / prompts.shape[-1] ** 0.5
        return (scores + self.preference).masked_fill(left_out, float("-inf")).softmax(-1)

    def _prompts(self, sources: Sequence[Tensor], device: torch.device) -> Tensor:
        """(n, n_soft, n_out) of one source of n queries; what several have in common is encoded once."""
        distinct = list({id(one): one for one in sources}.values())
        place = {id(one): i for i, one in enumerate(distinct)}
        prompts: Tensor = self.encoder(*padded(distinct, device))
        return prompts[[place[id(one)] for one in sources]]


def new_fusion(
    base: Base,
    vectors: Sequence[Tensor],
    n_sources: int,
    encoder: UserEncoderSection,
    section: SoftFusedSection,
    seed: int,
) -> Fusion:
    """Fresh weights, drawn from ``seed`` alone, for texts like ``vectors`` (n_texts, n_in) each."""
    made = new_encoder(base, vectors, encoder, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Fusion(made, n_sources, section.bottleneck).to(base.device)
