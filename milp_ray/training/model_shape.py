"""Sizes of a base that its costs follow from: layers, widths, heads, vocabulary, parameters.

They are read off the model itself, whose linear maps are what is multiplied: a loaded one, or one that is
built from its configuration on the meta device, with no weights behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milp_ray.memory.architecture import (
    FfnShapes,
    FfnSpec,
    ffn_shapes,
    ffn_spec,
    linear_maps,
    without_weights,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# Tensors of the feed-forward block's inner width that an activation keeps for its gradient. One that
# transformers writes out in Python keeps every factor; the others are one operation and keep their input.
_KEPT_BY_ACTIVATION = {"gelu_new": 4}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model.

    Widths and lengths are numbers, ``dtype_bytes`` the bytes of one weight and one activation.
    ``attention_size`` is Σ in × out over a layer's linear maps outside its feed-forward block, ``head_size``
    the same over the maps behind the last layer. ``inner_copies`` is how many tensors of the feed-forward
    block's inner width one layer keeps for the backward pass; ``norm_bytes`` are the bytes a number that a
    normalisation keeps (RMSNorm works in float32 whatever the model's precision).
    """

    model_type: str
    ffn: FfnShapes
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int
    context_length: int
    n_parameters: int
    attention_size: int
    head_size: int
    inner_copies: int
    norm_bytes: int
    dtype_bytes: int

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.ffn.n_layers

    @property
    def attention_width(self) -> int:
        """Width of all heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values, of one token in one layer."""
        return self.n_kv_heads * self.head_dim

    @property
    def inner(self) -> int:
        """Width inside the feed-forward block."""
        return max(n_in for _, n_in, _ in self.ffn.modules)

    @property
    def ffn_size(self) -> int:
        """Σ in × out over the feed-forward maps of one layer: their weights."""
        return sum(n_in * n_out for _, n_in, n_out in self.ffn.modules)

    def adapter_parameters(self, rank: int, n_lora_layers: int) -> int:
        """Trainable numbers of an adapter: r × Σ (in + out), for each layer that carries a LoRA."""
        return rank * n_lora_layers * sum(n_in + n_out for _, n_in, n_out in self.ffn.modules)


def shape_of_config(
    config: PretrainedConfig, *, dtype_bytes: int, ffn_modules: tuple[str, ...] | None = None
) -> ModelShape:
    """Sizes of the model that a configuration describes.

    Raises:
        MilpError: it describes no causal language model whose feed-forward maps are known or named.
    """
    return shape_of_model(without_weights(config), ffn_spec(config, ffn_modules), dtype_bytes=dtype_bytes)


def shape_of_model(model: nn.Module, spec: FfnSpec, *, dtype_bytes: int) -> ModelShape:
    """Sizes of a causal LM as it is loaded, before any adapter.

    Raises:
        MilpError: a map that ``spec`` names is missing, or of another size in another layer.
    """
    from milp_ray.training.base import first_position_of

    config: Any = model.config
    ffn = ffn_shapes(model, spec)
    layer = linear_maps(model.get_submodule(f"{spec.layers_path}.0"))
    attention_size = sum(n_in * n_out for name, (n_in, n_out) in layer.items() if name not in spec.modules)
    behind = {k: v for k, v in linear_maps(model).items() if not k.startswith(f"{spec.layers_path}.")}
    n_heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    stated = getattr(config, "max_position_embeddings", None) or 0
    is_rms = any("RMSNorm" in type(module).__name__ for module in model.modules())
    return ModelShape(
        model_type=spec.model_type,
        ffn=ffn,
        hidden=hidden,
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // n_heads),
        vocabulary=int(config.vocab_size),
        context_length=max(0, int(stated) - first_position_of(model)),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        attention_size=attention_size,
        head_size=sum(n_in * n_out for n_in, n_out in behind.values()),
        inner_copies=_inner_copies(config, ffn),
        norm_bytes=4 if is_rms else dtype_bytes,
        dtype_bytes=dtype_bytes,
    )


def _inner_copies(config: Any, ffn: FfnShapes) -> int:
    """What the activation keeps; a gated block keeps both factors of its product, too."""
    name = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
    inner = max(n_in for _, n_in, _ in ffn.modules)
    towards_inner = sum(n_out for _, n_in, n_out in ffn.modules if n_in != inner)
    return _KEPT_BY_ACTIVATION.get(str(name), 1) + (2 if towards_inner >= 2 * inner else 0)
