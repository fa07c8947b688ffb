"""Raw search points as the surrogate sees them: the canonical layout as features in [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from botorch.models.transforms.input import InputTransform
from torch import Tensor, nn

from milp_ray.memory.layout import spread

if TYPE_CHECKING:
    from milp_ray.memory.space import SearchSpace


class CanonicalFeatures(InputTransform, nn.Module):
    """Input transform from Ax's encoding of a raw point to the features of its canonical layout.

    In: ``batch_shape x q x d``, one column a searched parameter that has more than one value: layer bits as
    0/1, ``n_loras`` as a count, ``rank`` as an index into the ranks. Out: ``batch_shape x q x (L + 2)``: the
    effective mask's bits, their number over L, and the rank's index over the largest one; the empty layout
    is all zeros, as its rank means nothing. So raw points that train the same adapter are one point to the
    surrogate, while the raw factors remain what is searched.
    """

    transform_on_train = True
    transform_on_eval = True
    transform_on_fantasize = True
    is_one_to_many = False

    held_active: Tensor
    carried: Tensor

    def __init__(
        self,
        layer_columns: list[int] | None,
        number_column: int | None,
        rank_column: int | None,
        held_active: list[bool],
        held_number: int | None,
        n_ranks: int,
    ) -> None:
        """Columns are positions in the input; ``None`` where the factor is held.

        ``held_number`` ``None``: as many LoRAs as active layers.
        """
        super().__init__()
        self.layer_columns = layer_columns
        self.number_column = number_column
        self.rank_column = rank_column
        self.held_number = held_number
        self.n_ranks = n_ranks
        n_layers = len(held_active)
        self.register_buffer("held_active", torch.tensor(held_active, dtype=torch.long))
        # carried[k, n, p]: whether the p-th of k active layers carries one of n LoRAs.
        carried = torch.zeros(n_layers + 1, n_layers + 1, n_layers, dtype=torch.long)
        for k in range(n_layers + 1):
            for n in range(n_layers + 1):
                carried[k, n, list(spread(k, n))] = 1
        self.register_buffer("carried", carried)

    def transform(self, X: Tensor) -> Tensor:
        """Features of the raw points ``X``."""
        if self.layer_columns is None:
            active = self.held_active.expand(*X.shape[:-1], -1)
        else:
            active = X[..., self.layer_columns].round().long()
        n_layers = active.shape[-1]
        n_active = active.sum(dim=-1)
        if self.number_column is not None:
            number = X[..., self.number_column].round().long()
        elif self.held_number is not None:
            number = torch.full_like(n_active, self.held_number)
        else:
            number = n_active
        position = (active.cumsum(dim=-1) - 1).clamp_min(0)
        mask = active * self.carried[n_active[..., None], number[..., None], position]
        count = mask.sum(dim=-1, keepdim=True).to(X)
        rank = torch.zeros_like(count)
        if self.rank_column is not None:
            rank = X[..., self.rank_column, None] / (self.n_ranks - 1)
        return torch.cat([mask.to(X), count / n_layers, rank * (count > 0)], dim=-1)

    def equals(self, other: InputTransform) -> bool:
        """Whether ``other`` does the same (BoTorch asks before sharing one between models)."""
        return isinstance(other, CanonicalFeatures) and self.settings() == other.settings()

    def settings(self) -> dict[str, Any]:
        """The arguments that make this transform."""
        return {
            "layer_columns": self.layer_columns,
            "number_column": self.number_column,
            "rank_column": self.rank_column,
            "held_active": [bool(bit) for bit in self.held_active.tolist()],
            "held_number": self.held_number,
            "n_ranks": self.n_ranks,
        }


def feature_options(space: SearchSpace, columns: list[str]) -> dict[str, Any]:
    """Arguments of :class:`CanonicalFeatures`; ``columns`` are the searched parameters in order."""
    position = {name: index for index, name in enumerate(columns)}
    layer_columns = [position[name] for name in columns if name.startswith("layer_")] or None
    held = set(range(space.n_layers) if space.fixed_layers is None else space.fixed_layers)
    return {
        "layer_columns": layer_columns,
        "number_column": position.get("n_loras"),
        "rank_column": position.get("rank"),
        "held_active": [index in held for index in range(space.n_layers)],
        "held_number": space.fixed_number,
        "n_ranks": len(space.ranks),
    }
