"""FLOPs: what torch itself counts on a tiny model with an adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from milp_ray.memory.architecture import ffn_spec
from milp_ray.training import flops
from milp_ray.training.flops import Placement, Tokens
from milp_ray.training.model_shape import ModelShape, shape_of_model

N_ROWS, LENGTH, RANK = 3, 40, 8


def adapted(kind: str, layers: list[int]) -> tuple[ModelShape, Any]:
    """A random model of four layers with LoRA on the feed-forward maps of some."""
    import transformers
    from peft import LoraConfig, get_peft_model

    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
        )
    elif kind == "roberta":
        config = transformers.RobertaConfig(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=100,
            is_decoder=True,
        )
    else:
        config = transformers.GPT2Config(
            n_embd=64, n_layer=4, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0
        )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    spec = ffn_spec(config)
    names = [name for layer in layers for name in spec.module_names(layer)]
    shape = shape_of_model(model, spec, dtype_bytes=4)
    lora = LoraConfig(r=RANK, target_modules=names, fan_in_fan_out=spec.fan_in_fan_out)
    return shape, get_peft_model(model, lora)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta"])
@pytest.mark.parametrize("layers", [[3], [1, 2], [0, 1, 2, 3]])
def test_forward_and_backward_are_what_torch_counts(kind: str, layers: list[int]) -> None:
    shape, model = adapted(kind, layers)
    ids = torch.zeros((N_ROWS, LENGTH), dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH):  # whose products the counter sees one by one
        with FlopCounterMode(display=False) as forward:
            logits = model(ids, use_cache=False).logits
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    work = Tokens(N_ROWS * LENGTH, N_ROWS * LENGTH**2, N_ROWS * LENGTH)
    placement = Placement(RANK, len(layers), layers[0])
    assert flops.forward(shape, work, placement) == pytest.approx(forward.get_total_flops(), rel=0.02)
    assert flops.backward(shape, work, placement) == pytest.approx(backward.get_total_flops(), rel=0.02)
    assert shape.adapter_parameters(RANK, len(layers)) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    ), "PEFT's own count"


def test_a_higher_lowest_layer_costs_less_and_kept_states_save_what_lies_below() -> None:
    shape, _ = adapted("llama", [0])
    work = Tokens(100, 4000, 50)
    high, low = Placement(RANK, 1, 3), Placement(RANK, 1, 0)
    assert flops.backward(shape, work, high) < flops.backward(shape, work, low)
    below = flops.below(shape, work, high, attention_too=False)
    assert below == flops.layers_forward(shape, work, 3)
    assert below < flops.below(shape, work, high, attention_too=True) < flops.layers_forward(shape, work, 4)
    assert flops.below(shape, work, low, attention_too=False) == 0
    whole = flops.training_step(shape, work, high)
    again = flops.training_step(shape, work, high, checkpointing=True)
    assert again - whole == pytest.approx(flops.layers_forward(shape, work, 1))


def test_generation_reads_the_prompt_once_and_writes_every_new_token() -> None:
    shape, _ = adapted("llama", [0])
    read = flops.generation(shape, n_prompts=2, prompt_tokens=10, new_tokens=0, placement=None)
    assert read == flops.forward(shape, Tokens(20, 200, 2))
    both = flops.generation(shape, n_prompts=2, prompt_tokens=10, new_tokens=3, placement=None)
    assert both - read == flops.forward(shape, Tokens(6, 2 * 3 * 11.5, 6))
