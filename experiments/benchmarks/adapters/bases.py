"""The bases of the benchmarks: the embedded one, and published shapes with random weights."""

from __future__ import annotations

import torch

from milp_ray.config.base import BaseSection
from milp_ray.training.base import Base, base_around, load_base

# hidden, ffn, layers, heads, key-value heads: Llama-160M and TinyLlama's and LLaMA2's published shapes.
SHAPES = {
    "llama-160m": (768, 3072, 12, 12, 12),
    "llama-1b": (2048, 5632, 22, 32, 4),
    "llama-7b": (4096, 11008, 32, 32, 32),
}


def base_of(name: str, device: str) -> Base:
    """The embedded base, or one of random weights with a shape of :data:`SHAPES`; bfloat16 on a GPU."""
    if name == "embedded":
        return load_base(BaseSection(device=device))
    from transformers import LlamaConfig, LlamaForCausalLM

    embedded = load_base(BaseSection(device="cpu"))
    hidden, ffn, layers, heads, kv_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        bos_token_id=embedded.model.config.bos_token_id,
        eos_token_id=embedded.model.config.eos_token_id,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    return base_around(model, embedded.tokenizer, BaseSection(model=name, device=device), model_id=name)
