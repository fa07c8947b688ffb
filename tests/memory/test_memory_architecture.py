"""Where feed-forward maps are: in known architectures, in named ones, and where they do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from milp_ray.errors import MilpError
from milp_ray.memory.architecture import (
    KNOWN_MODEL_TYPES,
    FfnShapes,
    FfnSpec,
    ffn_shapes,
    ffn_shapes_of_config,
    ffn_spec,
    linear_maps,
)

SMALL: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "ffn_dim": 12,
    "word_embed_proj_dim": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "attention_types": [[["global", "local"], 1]],
    "num_layers": 2,
    "num_heads": 2,
}


@pytest.mark.parametrize("model_type", KNOWN_MODEL_TYPES)
def test_the_maps_of_every_known_architecture_are_all_linear_maps_outside_attention(model_type: str) -> None:
    """Checked against transformers' own classes: what is left when attention is taken out of a layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SMALL)
    spec = ffn_spec(config)
    shapes = ffn_shapes_of_config(config, spec)
    assert shapes.n_layers == 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for layer in model.get_submodule(spec.layers_path):
        outside = {name for name in linear_maps(layer) if not ("attn" in name or "attention" in name)}
        assert set(spec.modules) == outside


def test_an_unknown_architecture_names_the_option_to_set() -> None:
    from transformers import AutoConfig

    with pytest.raises(MilpError, match=r"'gptj' model are not known.*base\.ffn_modules"):
        ffn_spec(AutoConfig.for_model("gptj"))


def test_named_maps_of_an_unknown_architecture_are_found_in_its_layers() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gptj", vocab_size=8, n_embd=16, n_inner=24, n_layer=2, n_head=2, rotary_dim=4
    )
    spec = ffn_spec(config, ("mlp.fc_in", "mlp.fc_out"))
    assert spec == FfnSpec("gptj", "transformer.h", ("mlp.fc_in", "mlp.fc_out"), fan_in_fan_out=False)
    assert ffn_shapes_of_config(config, spec).modules == (("mlp.fc_in", 16, 24), ("mlp.fc_out", 24, 16))
    with pytest.raises(MilpError, match=r"\['mlp.nothing'\] are not linear maps .*mlp\.fc_in"):
        ffn_spec(config, ("mlp.nothing",))


def test_named_maps_replace_the_known_ones(tiny_llama_dir: Any) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_llama_dir)
    spec = ffn_spec(config, ("mlp.down_proj",))
    assert ffn_shapes_of_config(config, spec).modules == (("mlp.down_proj", 64, 32),)
    with pytest.raises(MilpError, match=r"no linear maps \['mlp.c_fc'\].*mlp\.down_proj"):
        ffn_shapes_of_config(config, ffn_spec(config, ("mlp.c_fc",)))


def test_layers_of_different_sizes_are_refused(tiny_llama_dir: Any) -> None:
    from torch import nn
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, use_safetensors=True)
    model.model.layers[2].mlp.up_proj = nn.Linear(32, 48, bias=False)
    with pytest.raises(MilpError, match="layer 2 have other sizes"):
        ffn_shapes(model, ffn_spec(model.config))


def test_a_rank_is_checked_against_the_smallest_side_of_any_map() -> None:
    shapes = FfnShapes(3, (("mlp.up_proj", 512, 344), ("mlp.down_proj", 344, 172)))
    assert shapes.max_rank == 172
    shapes.check_rank(172)
    with pytest.raises(MilpError, match=r"rank 512 is above the smaller side of .*mlp\.down_proj \(172\)"):
        shapes.check_rank(512)
    with pytest.raises(MilpError, match="rank 0: use 1 to 172"):
        shapes.check_rank(0)


def test_a_published_base_drops_the_ranks_that_its_maps_cannot_have(shared_dir: Any) -> None:
    from transformers import AutoConfig

    from milp_ray.config.search import SpaceSection
    from milp_ray.memory.space import SearchSpace

    config = AutoConfig.from_pretrained(shared_dir / "models" / "stories260K")
    shapes = ffn_shapes_of_config(config, ffn_spec(config))
    assert shapes.n_layers == 5
    assert shapes.modules[0] == ("mlp.gate_proj", 64, 172)
    assert SearchSpace.for_base(SpaceSection(), shapes).dropped_ranks == (96,)
