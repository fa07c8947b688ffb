"""Memory by part: against what autograd really keeps, and how it grows."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from milp_ray.memory.architecture import ffn_spec
from milp_ray.training.memory_model import (
    JobLoad,
    MemoryParts,
    kv_bytes_a_token,
    largest_pack,
    memory_of_generation,
    memory_of_pack,
)
from milp_ray.training.model_shape import ModelShape, shape_of_config, shape_of_model
from milp_ray.training.published import published_config

N_ROWS, LENGTH, RANK = 2, 64, 4
LLAMA_7B = shape_of_config(published_config("meta-llama/Llama-2-7b-hf"), dtype_bytes=2)
JOB = JobLoad(
    rank=32, n_lora_layers=16, lowest_layer=4, tokens_per_step=1024, targets_per_step=512, longest_row=256
)


def small(kind: str, vocabulary: int) -> Any:
    import transformers

    if kind == "llama":
        return transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocabulary,
        )
    if kind == "roberta":
        return transformers.RobertaConfig(
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=vocabulary,
            is_decoder=True,
        )
    return transformers.GPT2Config(
        n_embd=32, n_layer=4, n_head=4, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
    )


def adapted(kind: str, layers: list[int], dtype: torch.dtype, vocabulary: int) -> tuple[ModelShape, Any]:
    """A small random model with PEFT's LoRA on some layers, and its shape without."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = small(kind, vocabulary)
    model: Any = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    spec = ffn_spec(config)
    shape = shape_of_model(model, spec, dtype_bytes=dtype.itemsize)
    names = [name for layer in layers for name in spec.module_names(layer)]
    lora = LoraConfig(r=RANK, target_modules=names, fan_in_fan_out=spec.fan_in_fan_out)
    return shape, get_peft_model(model, lora)


def bytes_kept_by_autograd(model: Any) -> int:
    """What a forward pass leaves for the backward pass, beside the model's own weights."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    ids = torch.zeros((N_ROWS, LENGTH), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, use_cache=False, logits_to_keep=1)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak_of_a_step(model: Any, n_targets: int) -> int:
    """Most bytes that forward and backward hold at once beside the weights, as torch's profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    ids = torch.zeros((N_ROWS, LENGTH), dtype=torch.long)
    keep = (torch.arange(N_ROWS * LENGTH) < n_targets).view(N_ROWS, LENGTH)
    gc.collect()  # what earlier tests left must not be freed under the profiler
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        logits = model(ids, use_cache=False, logits_to_keep=keep).logits
        nll = torch.nn.functional.cross_entropy(
            logits.float().view(n_targets, -1), ids[keep], reduction="none"
        )
        del logits
        nll.sum().backward()
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held)


def parts_of(shape: ModelShape, layers: list[int], n_targets: int) -> MemoryParts:
    return memory_of_pack(
        shape,
        JobLoad(
            rank=RANK,
            n_lora_layers=len(layers),
            lowest_layer=layers[0],
            tokens_per_step=N_ROWS * LENGTH,
            targets_per_step=n_targets,
            longest_row=LENGTH,
            lora_bytes=4,  # PEFT's
        ),
        n_jobs=1,
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta"])
@pytest.mark.parametrize("layers", [[3], [2, 3], [0, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(kind: str, layers: list[int], dtype: torch.dtype) -> None:
    shape, model = adapted(kind, layers, dtype, 100)
    parts = parts_of(shape, layers, n_targets=1)
    assert parts.activations == pytest.approx(bytes_kept_by_autograd(model), rel=0.03)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layers", "vocabulary", "n_targets"), [([0, 1, 2, 3], 50, 8), ([0, 2], 4000, 100)])
def test_the_peak_of_a_step_is_as_expected(
    kind: str, dtype: torch.dtype, layers: list[int], vocabulary: int, n_targets: int
) -> None:
    shape, model = adapted(kind, layers, dtype, vocabulary)
    parts = parts_of(shape, layers, n_targets)
    expected = parts.total - parts.base - parts.adapters - parts.optimizer
    assert expected == pytest.approx(peak_of_a_step(model, n_targets), rel=0.1)


def test_what_stays_is_the_base_once_and_sixteen_bytes_a_trainable_number() -> None:
    trainable = LLAMA_7B.adapter_parameters(32, 16)
    three = memory_of_pack(LLAMA_7B, replace(JOB, lora_bytes=4), n_jobs=3)
    assert three.base == 2 * 6_738_415_616
    assert three.adapters == three.gradients == 3 * 4 * trainable
    assert three.optimizer == 2 * three.gradients
    with_copy = memory_of_pack(LLAMA_7B, JOB, n_jobs=3)
    assert with_copy.adapters == 3 * (4 + 2) * trainable, "a copy in the base's precision to compute with"
    assert memory_of_pack(LLAMA_7B, JOB, n_jobs=0).total == three.base


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 64},
        {"n_lora_layers": 20},
        {"tokens_per_step": 2048},
        {"targets_per_step": 5000},
        {"kept_tokens": 9000},
    ],
    ids=str,
)
def test_more_of_anything_takes_more(changes: dict[str, Any]) -> None:
    less = memory_of_pack(LLAMA_7B, JOB, n_jobs=2).total
    assert memory_of_pack(LLAMA_7B, replace(JOB, **changes), n_jobs=2).total > less


def test_layers_below_the_lowest_lora_keep_nothing() -> None:
    kept = [
        memory_of_pack(LLAMA_7B, replace(JOB, lowest_layer=lowest), n_jobs=1).activations
        for lowest in (0, 8, 16)
    ]
    assert kept[0] > kept[1] > kept[2]
    assert kept[0] - kept[1] == kept[1] - kept[2], "every layer the same"


def test_checkpointing_keeps_the_inputs_of_layers_alone() -> None:
    whole = memory_of_pack(LLAMA_7B, JOB, n_jobs=1)
    less = memory_of_pack(LLAMA_7B, replace(JOB, activation_checkpointing=True), n_jobs=1)
    assert less.activations < 0.3 * whole.activations


def test_attention_that_is_not_fused_grows_with_the_longest_row() -> None:
    short, long = (
        memory_of_pack(LLAMA_7B, replace(JOB, fused_attention=False, longest_row=length), n_jobs=1)
        for length in (256, 512)
    )
    assert long.activations > short.activations
    fused = memory_of_pack(LLAMA_7B, replace(JOB, longest_row=512), n_jobs=1)
    assert fused.activations == memory_of_pack(LLAMA_7B, JOB, n_jobs=1).activations


def test_the_larger_of_two_moments_counts() -> None:
    parts = MemoryParts(base=100, activations=10, logits=7, working=5)
    assert parts.total == 117


@pytest.mark.parametrize("budget", [20, 40, 80])
def test_the_largest_pack_fits_and_one_job_more_does_not(budget: int) -> None:
    n_bytes = budget * 2**30
    n_jobs = largest_pack(LLAMA_7B, JOB, n_bytes, headroom=0.1)
    assert n_jobs >= 1
    assert memory_of_pack(LLAMA_7B, JOB, n_jobs=n_jobs).total <= 0.9 * n_bytes
    assert memory_of_pack(LLAMA_7B, JOB, n_jobs=n_jobs + 1).total > 0.9 * n_bytes


def test_a_device_that_the_base_alone_fills_takes_no_job() -> None:
    assert largest_pack(LLAMA_7B, JOB, 10 * 2**30) == 0


def test_the_cache_of_a_prompt_is_keys_and_values_of_every_layer() -> None:
    assert kv_bytes_a_token(LLAMA_7B) == 2 * 32 * 4096 * 2
    parts = memory_of_generation(LLAMA_7B, n_rows=2, prompt_tokens=100, new_tokens=28)
    assert parts.kv_cache == 2 * 128 * kv_bytes_a_token(LLAMA_7B)
    more = memory_of_generation(LLAMA_7B, n_rows=2, prompt_tokens=100, new_tokens=28, adapter_parameters=10)
    assert more.total - parts.total == 40
