"""How an adapter's weights are stored: as they are, in bfloat16, or as 8-bit integers with scales.

``int8`` is symmetric and has one scale a *rank component*: a row of A (rank x inputs) and a column of B
(outputs x rank), q = round(w / s) with s = max |w| / 127, so that component i of the update is
s_A[i] · s_B[i] times an integer matrix. Scales stand beside their weights as ``<name>.scale`` in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from milp_ray.training.adapters import Adapter

_SCALE = ".scale"
_SCALE_BYTES = 4
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_LARGEST = 127  # -128 is left out, so that the range is symmetric


def to_stored(adapter: Adapter, precision: str) -> tuple[Adapter, dict[str, Any]]:
    """An adapter as it is stored, and what that changed.

    Args:
        adapter: weights of any floating type.
        precision: ``"float32"``, ``"bfloat16"`` or ``"int8"``.

    Returns:
        The adapter with the stored tensors, and for the manifest the precision's ``name``; unless nothing was
        rounded, also ``max_error`` and ``mean_error`` (absolute, over all weights) and ``relative_error``
        (the norm of the difference over the norm of the weights).
    """
    import torch

    exact = {name: tensor.float() for name, tensor in adapter.tensors.items()}
    if precision == "float32":
        return replace(adapter, tensors=exact), {"name": precision}
    if precision == "bfloat16":
        stored = {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()}
    else:
        stored = {}
        for name, tensor in exact.items():
            stored[name], stored[name + _SCALE] = _quantised(tensor, _channel_dim(name))
    errors = _errors(exact, _decoded(stored, precision))
    return replace(adapter, tensors=stored), {"name": precision, **errors}


def stored_bytes(precision: str, n_weights: int, n_scales: int) -> int:
    """Bytes of an adapter's tensors as :func:`to_stored` makes them; file headers are a few KiB more.

    Args:
        precision: as of :func:`to_stored`.
        n_weights: numbers in the adapter.
        n_scales: rank components, of A and of B, over all of its maps; int8 alone keeps a scale of each.
    """
    return _WEIGHT_BYTES[precision] * n_weights + (_SCALE_BYTES * n_scales if precision == "int8" else 0)


def from_stored(adapter: Adapter, precision: str) -> Adapter:
    """The adapter with float32 weights that :func:`to_stored` made ``adapter`` of."""
    return replace(adapter, tensors=_decoded(adapter.tensors, precision))


def _decoded(tensors: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    if precision != "int8":
        return {name: tensor.float() for name, tensor in tensors.items()}
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALE)}
    return {
        name: tensor.float() * tensors[name + _SCALE].unsqueeze(1 - _channel_dim(name))
        for name, tensor in weights.items()
    }


def _channel_dim(name: str) -> int:
    """The dimension of the rank: A is rank x inputs, B is outputs x rank."""
    return 0 if ".lora_A." in name else 1


def _quantised(tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A matrix as integers, and its scales along ``dim``; a channel of zeros gets the scale 1."""
    import torch

    largest = tensor.abs().amax(dim=1 - dim)
    scale = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    integers = (tensor / scale.unsqueeze(1 - dim)).round().clamp(-_LARGEST, _LARGEST)
    return integers.to(torch.int8), scale


def _errors(exact: dict[str, Tensor], rounded: dict[str, Tensor]) -> dict[str, float]:
    n_weights = sum(tensor.numel() for tensor in exact.values())
    difference = {name: (tensor - rounded[name]).double() for name, tensor in exact.items()}
    squares = sum(float(d.square().sum()) for d in difference.values())
    norm = sum(float(tensor.double().square().sum()) for tensor in exact.values())
    return {
        "max_error": max((float(d.abs().max()) for d in difference.values()), default=0.0),
        "mean_error": sum(float(d.abs().sum()) for d in difference.values()) / max(n_weights, 1),
        "relative_error": (squares / norm) ** 0.5 if norm else 0.0,
    }
