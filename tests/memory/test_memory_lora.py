"""Precisely the intended feed-forward maps of real model classes carry LoRA, and no attention map does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.training import LoraAlphaSection
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import (
    adapter_parameters,
    ffn_shapes,
    ffn_shapes_of_config,
    ffn_spec,
)
from milp_ray.memory.layout import CanonicalLayout, Layout
from milp_ray.memory.lora import lora_alpha, lora_config

# What must carry LoRA, written out by hand for each architecture: {layer} is filled in.
EXPECTED = {
    "llama": [f"model.layers.{{layer}}.mlp.{m}_proj" for m in ("gate", "up", "down")],
    "gpt2": ["transformer.h.{layer}.mlp.c_fc", "transformer.h.{layer}.mlp.c_proj"],
    "roberta": [
        "roberta.encoder.layer.{layer}.intermediate.dense",
        "roberta.encoder.layer.{layer}.output.dense",
    ],
}
# Attention maps whose names resemble the targets; they must exist, or the test would prove nothing.
LOOKALIKES = {
    "llama": "model.layers.0.self_attn.o_proj",
    "gpt2": "transformer.h.0.attn.c_proj",
    "roberta": "roberta.encoder.layer.0.attention.output.dense",
}
ALPHA = LoraAlphaSection()


@pytest.fixture(params=["llama", "gpt2", "roberta"])
def model(request: pytest.FixtureRequest) -> Any:
    from transformers import AutoModelForCausalLM

    folder: Path = request.getfixturevalue(f"tiny_{request.param}_dir")
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)


def with_lora(model: Any, layout: CanonicalLayout, alpha: LoraAlphaSection = ALPHA) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, lora_config(layout, ffn_spec(model.config), alpha, 0.0, "some/base"))


def lora_modules(peft_model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    inner = peft_model.get_base_model()
    return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("bits", ["100", "010", "011", "101", "111"])
def test_precisely_the_feed_forward_maps_of_the_mask_carry_lora(model: Any, bits: str) -> None:
    model_type = model.config.model_type
    bits += "0" * (model.config.num_hidden_layers - len(bits))
    layout = CanonicalLayout(tuple(bit == "1" for bit in bits), 4)
    model.get_submodule(LOOKALIKES[model_type])
    expected = {name.format(layer=i) for i, b in enumerate(bits) if b == "1" for name in EXPECTED[model_type]}
    peft_model = with_lora(model, layout)
    found = lora_modules(peft_model)
    assert set(found) == expected
    assert not any("attn" in name or "attention" in name for name in found)
    trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(expected)
    assert all("lora_" in name for name in trainable)


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_adapter_parameters_is_what_peft_trains(model: Any, rank: int) -> None:
    shapes = ffn_shapes(model, ffn_spec(model.config))
    layout = Layout((True,) * shapes.n_layers, 2, rank).canonical()
    n_trainable = sum(p.numel() for p in with_lora(model, layout).parameters() if p.requires_grad)
    assert adapter_parameters(layout, shapes) == n_trainable


def test_the_empty_layout_has_no_parameters_and_no_peft_configuration(model: Any) -> None:
    spec = ffn_spec(model.config)
    shapes = ffn_shapes(model, spec)
    empty = CanonicalLayout((False,) * shapes.n_layers, 8)
    assert adapter_parameters(empty, shapes) == 0
    with pytest.raises(MilpError, match="empty layout"):
        lora_config(empty, spec, ALPHA, 0.0, None)


def test_a_fresh_adapter_leaves_the_model_as_it_is_and_a_trained_one_does_not(model: Any) -> None:
    """The second half fails where GPT-2's Conv1D weights are taken for (out, in)."""
    import torch

    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        plain = model(ids).logits
        layout = CanonicalLayout((True,) + (False,) * (model.config.num_hidden_layers - 1), 4)
        peft_model = with_lora(model, layout).eval()
        assert torch.equal(peft_model(ids).logits, plain)
        for module in lora_modules(peft_model).values():
            torch.nn.init.ones_(module.lora_B["default"].weight)
        changed = peft_model(ids).logits
        assert not torch.allclose(changed, plain, atol=1e-4)
        merged = peft_model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, changed, rtol=1e-4, atol=1e-4)


def test_gpt2_weights_are_stored_in_by_out(tiny_gpt2_dir: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_gpt2_dir)
    spec = ffn_spec(config)
    assert lora_config(CanonicalLayout((True, True, False), 4), spec, ALPHA, 0.0, None).fan_in_fan_out is True
    assert ffn_shapes_of_config(config, spec).modules == (("mlp.c_fc", 32, 64), ("mlp.c_proj", 64, 32))


@pytest.mark.parametrize(
    ("rule", "value", "rank", "expected"),
    [
        ("constant", 16.0, 8, 16),
        ("constant", 16.0, 96, 16),
        ("proportional", 2.0, 8, 16),
        ("proportional", 0.25, 96, 24),
        ("sqrt", 2.0, 16, 8),
        ("sqrt", 1.0, 8, 8**0.5),
    ],
)
def test_alpha_follows_its_rule(rule: Any, value: float, rank: int, expected: float) -> None:
    alpha = lora_alpha(rank, LoraAlphaSection(rule=rule, value=value))
    assert alpha == pytest.approx(expected)
    assert isinstance(alpha, int) == float(expected).is_integer()


@pytest.mark.parametrize("rule", ["constant", "proportional", "sqrt"])
def test_alpha_over_rank_is_the_same_everywhere(model: Any, rule: Any) -> None:
    section = LoraAlphaSection(rule=rule, value=3.0)
    layout = CanonicalLayout((True,) * model.config.num_hidden_layers, 8)
    found = lora_modules(with_lora(model, layout, section))
    scales = {module.scaling["default"] for module in found.values()}
    assert len(scales) == 1
    assert scales.pop() == pytest.approx(lora_alpha(8, section) / 8)


def test_the_configuration_names_the_base_and_the_task(model: Any) -> None:
    layout = CanonicalLayout((True,) * model.config.num_hidden_layers, 8)
    config = lora_config(layout, ffn_spec(model.config), ALPHA, 0.1, "some/base")
    assert config.base_model_name_or_path == "some/base"
    assert config.task_type == "CAUSAL_LM"
    assert (config.r, config.lora_dropout, config.bias) == (8, 0.1, "none")
    assert not config.rank_pattern
    assert not config.alpha_pattern


def test_layer_1_is_not_taken_for_layers_11_and_21() -> None:
    """PEFT shortens long lists of targets; with eleven layers and more a suffix could match several."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=22,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    mask = tuple(index in (1, 2, 3, 4, 5, 6, 10) for index in range(22))
    found = lora_modules(with_lora(model, CanonicalLayout(mask, 2)))
    assert {int(name.split(".")[2]) for name in found} == {1, 2, 3, 4, 5, 6, 10}
    assert len(found) == 7 * 3
