"""Sizes of a base: those of the real model, with and without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.memory.architecture import ffn_spec
from milp_ray.training.base import load_base, model_config
from milp_ray.training.model_shape import shape_of_config, shape_of_model
from milp_ray.training.published import PUBLISHED_MODELS, published_config, published_id


@pytest.mark.parametrize(
    ("model", "n_parameters", "n_layers"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616, 32),
        ("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320, 40),
        ("microsoft/DialoGPT-small", 124_439_808, 12),
        ("microsoft/DialoGPT-medium", 354_823_168, 24),
        ("microsoft/DialoGPT-large", 774_030_080, 36),
        ("FacebookAI/roberta-base", 124_697_433, 12),
        ("FacebookAI/roberta-large", 355_412_057, 24),
    ],
)
def test_published_bases_have_the_parameters_of_the_real_ones(
    model: str, n_parameters: int, n_layers: int
) -> None:
    shape = shape_of_config(published_config(model), dtype_bytes=2)
    assert (shape.n_parameters, shape.n_layers) == (n_parameters, n_layers)


def test_llama2_7b_is_as_published() -> None:
    shape = shape_of_config(published_config("meta-llama/Llama-2-7b-hf"), dtype_bytes=2)
    assert (shape.hidden, shape.inner, shape.n_heads, shape.kv_width) == (4096, 11008, 32, 4096)
    assert (shape.vocabulary, shape.context_length) == (32000, 4096)
    assert shape.inner_copies == 3, "SwiGLU keeps the gate, what is made of it, and the other factor"
    assert shape.norm_bytes == 4, "RMSNorm works in float32 whatever the precision"
    assert shape.head_size == 4096 * 32000


def test_a_published_base_is_known_by_the_last_part_of_its_name() -> None:
    assert published_id("models/DialoGPT-medium") == "microsoft/DialoGPT-medium"
    assert published_id("NousResearch/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert published_id("gpt2") is None
    assert len({name.rpartition("/")[2] for name in PUBLISHED_MODELS}) == len(PUBLISHED_MODELS)


@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir", "tiny_roberta_dir"])
def test_a_configuration_tells_what_the_loaded_model_does(
    folder: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(folder)
    section = BaseSection(model=str(path), device="cpu")
    base = load_base(section)
    of_model = shape_of_model(base.model, base.spec, dtype_bytes=4)
    config = model_config(section)
    assert shape_of_config(config, dtype_bytes=4) == of_model
    assert of_model.context_length == base.context_length
    assert of_model.ffn == base.shapes
    assert ffn_spec(config) == base.spec


def test_a_grouped_query_base_has_narrower_keys() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=50,
    )
    shape = shape_of_config(config, dtype_bytes=4)
    assert (shape.attention_width, shape.kv_width) == (64, 16)
    assert shape.attention_size == 64 * (64 + 16 + 16 + 64)
    assert shape.ffn_size == 3 * 64 * 96
