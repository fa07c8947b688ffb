"""Where a base keeps its feed-forward blocks, and how large their linear maps are.

The block is every linear map between a layer's attention and its residual: Llama's gate, up and down; GPT-2's
``mlp.c_fc`` and ``mlp.c_proj``; RoBERTa's ``intermediate.dense`` and ``output.dense``. Attention has maps of
the same names (GPT-2's ``attn.c_proj``, RoBERTa's ``attention.output.dense``), so a map is always named by
its path from the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# (path of the list of layers, maps of one layer's feed-forward block), by transformers' model_type.
_LLAMA = ("model.layers", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_ENCODER_MODULES = ("intermediate.dense", "output.dense")
_KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "ministral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "olmo",
            "olmo2",
            "olmo3",
            "smollm3",
            "granite",
            "cohere",
            "stablelm",
        ),
        _LLAMA,
    ),
    "phi3": ("model.layers", ("mlp.gate_up_proj", "mlp.down_proj")),
    "phi": ("model.layers", ("mlp.fc1", "mlp.fc2")),
    "starcoder2": ("model.layers", ("mlp.c_fc", "mlp.c_proj")),
    "gpt2": ("transformer.h", ("mlp.c_fc", "mlp.c_proj")),
    "gpt_neo": ("transformer.h", ("mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": ("gpt_neox.layers", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    "opt": ("model.decoder.layers", ("fc1", "fc2")),
    "bert": ("bert.encoder.layer", _ENCODER_MODULES),
    "roberta": ("roberta.encoder.layer", _ENCODER_MODULES),
    "xlm-roberta": ("roberta.encoder.layer", _ENCODER_MODULES),
    "camembert": ("roberta.encoder.layer", _ENCODER_MODULES),
}
KNOWN_MODEL_TYPES = tuple(sorted(_KNOWN))
# Bases whose linear maps are Conv1D: weights of shape (in, out) rather than (out, in).
_CONV1D_TYPES = frozenset({"gpt2"})


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """Names of the feed-forward maps: module ``m`` of layer ``i`` is at ``{layers_path}.{i}.{m}``.

    ``fan_in_fan_out`` says that their weights are stored (in, out), as GPT-2's Conv1D does.
    """

    model_type: str
    layers_path: str
    modules: tuple[str, ...]
    fan_in_fan_out: bool = False

    def module_names(self, layer: int) -> tuple[str, ...]:
        """Full names, from the causal LM, of the maps of one layer."""
        return tuple(f"{self.layers_path}.{layer}.{module}" for module in self.modules)


@dataclass(frozen=True, slots=True)
class FfnShapes:
    """Sizes of the feed-forward maps, the same in each of ``n_layers`` layers: (name, in, out) each."""

    n_layers: int
    modules: tuple[tuple[str, int, int], ...]

    @property
    def max_rank(self) -> int:
        """The largest rank that is below full rank nowhere: the smallest side of any map."""
        return min(min(n_in, n_out) for _, n_in, n_out in self.modules)

    def check_rank(self, rank: int) -> None:
        """Refuse a rank that some map cannot have.

        Raises:
            MilpError: the rank is below 1 or above the smaller side of a map.
        """
        name, side = min(((name, min(n_in, n_out)) for name, n_in, n_out in self.modules), key=lambda m: m[1])
        if rank > side:
            raise MilpError(
                f"rank {rank} is above the smaller side of the layers' {name} ({side}); use at most {side}"
            )
        if rank < 1:
            raise MilpError(f"rank {rank}: use 1 to {side}")


def ffn_spec(model_config: PretrainedConfig, override: tuple[str, ...] | None = None) -> FfnSpec:
    """The feed-forward maps of a base, by its architecture or as named in ``override`` (base.ffn_modules).

    For an architecture that is not known, the list of layers is looked up in the model built without
    weights: the one ``ModuleList`` of ``num_hidden_layers`` modules that all hold the named maps.

    Raises:
        MilpError: the architecture is not known and ``override`` is None, or the named maps are not there.
    """
    model_type = str(model_config.model_type)
    known = known_ffn_spec(model_type, override)
    if known is not None:
        return known
    if not override:
        raise MilpError(
            f"the feed-forward maps of a {model_type!r} model are not known; "
            f"known are {', '.join(KNOWN_MODEL_TYPES)}. "
            "Name them in base.ffn_modules by their paths from a layer, for example "
            '["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]'
        )
    model = without_weights(model_config)
    layers_path = _find_layers(model, int(model_config.num_hidden_layers), override)
    first = model.get_submodule(f"{layers_path}.0.{override[0]}")
    return FfnSpec(model_type, layers_path, tuple(override), type(first).__name__ == "Conv1D")


def known_ffn_spec(model_type: str, override: tuple[str, ...] | None = None) -> FfnSpec | None:
    """As :func:`ffn_spec`, from the architecture's name alone; ``None`` where it is not known."""
    if model_type not in _KNOWN:
        return None
    layers_path, modules = _KNOWN[model_type]
    return FfnSpec(model_type, layers_path, override or modules, model_type in _CONV1D_TYPES)


def ffn_shapes(model: nn.Module, spec: FfnSpec) -> FfnShapes:
    """Sizes of the maps that ``spec`` names in a causal LM (as loaded, before any adapter).

    Raises:
        MilpError: a named map is missing, is no linear map, or has another size in another layer.
    """
    try:
        layers = model.get_submodule(spec.layers_path)
    except AttributeError as error:
        raise MilpError(
            f"the {spec.model_type} model has no {spec.layers_path!r}: it is not the causal language model "
            "that base.model should name"
        ) from error
    found = [_layer_shapes(layer, index, spec) for index, layer in enumerate(layers.children())]
    for index, shapes in enumerate(found):
        if shapes != found[0]:
            raise MilpError(
                f"the feed-forward maps of layer {index} have other sizes than layer 0's: a layout needs "
                "layers of one size; name maps that are alike in base.ffn_modules"
            )
    return FfnShapes(n_layers=len(found), modules=found[0])


def ffn_shapes_of_config(model_config: PretrainedConfig, spec: FfnSpec) -> FfnShapes:
    """As :func:`ffn_shapes`, from the configuration alone: the model is built without its weights."""
    return ffn_shapes(without_weights(model_config), spec)


def adapter_parameters(layout: CanonicalLayout, shapes: FfnShapes) -> int:
    """Trainable numbers of one adapter: r × (in + out) for each map of each layer that carries a LoRA."""
    per_layer = sum(layout.rank * (n_in + n_out) for _, n_in, n_out in shapes.modules)
    return len(layout.layers) * per_layer


def _layer_shapes(layer: nn.Module, index: int, spec: FfnSpec) -> tuple[tuple[str, int, int], ...]:
    linear = linear_maps(layer)
    missing = [name for name in spec.modules if name not in linear]
    if missing:
        raise MilpError(
            f"layer {index} of the {spec.model_type} model has no linear maps {missing}; "
            f"it has {sorted(linear)}. Name the feed-forward ones in base.ffn_modules"
        )
    return tuple((name, *linear[name]) for name in spec.modules)


def linear_maps(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of every ``Linear`` and GPT-2 ``Conv1D`` within a module, by its path from the module."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found: dict[str, tuple[int, int]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            n_in, n_out = module.weight.shape
            found[name] = (int(n_in), int(n_out))
    return found


def _find_layers(model: nn.Module, n_layers: int, modules: tuple[str, ...]) -> str:
    from torch import nn

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    named = set(modules)
    fitting = [name for name, layers in lists if all(named <= set(linear_maps(layer)) for layer in layers)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise MilpError(
            f"base.ffn_modules {list(modules)} are found under several lists of layers: {fitting}"
        )
    there = sorted(set().union(*(linear_maps(layers[0]) for _, layers in lists)))
    raise MilpError(
        f"base.ffn_modules {list(modules)} are not linear maps of each of the model's {n_layers} layers; "
        f"layer 0 has {there}"
    )


def without_weights(model_config: PretrainedConfig) -> Any:
    """The causal LM of a configuration on the meta device: its structure, with no memory behind it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config)
    except ValueError as error:
        raise MilpError(
            f"a {model_config.model_type!r} model is no causal language model that transformers knows; "
            "give another base.model"
        ) from error
