"""Adapters folded together: one into the base's weights for a time, two into one that does what both do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.adapters import Adapter, attached

if TYPE_CHECKING:
    from milp_ray.training.base import Base

_PREFIX = "base_model.model."


@contextmanager
def merged(base: Base, adapter: Adapter | None) -> Iterator[None]:
    """The base with W + s·BA in place of W, bit for bit as it was afterwards; ``None``: as it is.

    Raises:
        MilpError: the adapter does not fit this base.
    """
    if adapter is None:
        yield
        return
    with attached(base, adapter) as model:
        deltas = {
            name.removeprefix(_PREFIX): module.get_delta_weight("default").detach().clone()
            for name, module in model.named_modules()
            if "default" in getattr(module, "lora_A", {})
        }
    weights = {name: base.model.get_parameter(f"{name}.weight") for name in deltas}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(deltas[name])
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])


def combined(first: Adapter | None, second: Adapter | None) -> Adapter | None:
    """One adapter that adds to each map what both add: their ranks summed, their scales folded into B.

    Layers are those of either; ``None`` adds nothing.

    Raises:
        MilpError: they are for bases of different depth.
    """
    if first is None or second is None:
        return first or second
    if first.layout.n_layers != second.layout.n_layers:
        raise MilpError(
            f"adapters for bases of {first.layout.n_layers} and {second.layout.n_layers} layers cannot be "
            "combined; make both on one base"
        )
    either = zip(first.layout.mask, second.layout.mask, strict=True)
    layout = CanonicalLayout(tuple(a or b for a, b in either), first.layout.rank + second.layout.rank)
    stems = dict.fromkeys(_stem(name) for adapter in (first, second) for name in adapter.tensors)
    tensors: dict[str, torch.Tensor] = {}
    for stem in sorted(stems, key=lambda stem: _order(stem)):
        pairs = [_pair(adapter, stem) for adapter in (first, second)]
        [(n_in, n_out), *_] = [(a.shape[1], b.shape[0]) for pair in pairs if pair for a, b in [pair]]
        ranks = [adapter.layout.rank for adapter in (first, second)]
        downs = [pair[0] if pair else torch.zeros(r, n_in) for pair, r in zip(pairs, ranks, strict=True)]
        ups = [pair[1] if pair else torch.zeros(n_out, r) for pair, r in zip(pairs, ranks, strict=True)]
        tensors[f"{stem}.lora_A.weight"] = torch.cat(downs, 0)
        tensors[f"{stem}.lora_B.weight"] = torch.cat(ups, 1)
    config: dict[str, Any] = {
        **first.config,
        "r": layout.rank,
        "lora_alpha": layout.rank,
        "use_rslora": False,
        "target_modules": [
            stem.removeprefix(_PREFIX) for stem in sorted(stems, key=lambda stem: _order(stem))
        ],
    }
    return Adapter(config, tensors, layout)


def _pair(adapter: Adapter, stem: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and s·B of a map."""
    down = adapter.tensors.get(f"{stem}.lora_A.weight")
    if down is None:
        return None
    scale = float(adapter.config["lora_alpha"]) / adapter.layout.rank
    return down, scale * adapter.tensors[f"{stem}.lora_B.weight"]


def _stem(name: str) -> str:
    return name.rpartition(".lora_")[0]


def _order(stem: str) -> tuple[tuple[int, str], ...]:
    """Layers by their number, and not as words."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in stem.split("."))
