"""Floating-point operations of training and generation, from a base's sizes and a layout. Pure.

A multiplication with its addition counts as two. Linear maps and attention's two products are counted;
element-wise work is not. With T tokens, P = Σ length² over the rows (attention's pairs, padding included: the
kernel's saving on causal rows is not taken off, as torch's ``FlopCounterMode`` does not), and t targets:

* a layer forward: 2 · T · Σ(in · out) + 4 · a · P, with a the width of all heads;
* the layer backward: the same maps once more, for the gradient of what enters them (a frozen map has no
  gradient of its own), and twice attention's products;
* LoRA forward: 2 · T · r · Σ(in + out); backward twice that;
* the head: 2 · t · (in · out), forward and backward each.

Backward stops at the lowest LoRA: of that layer only the feed-forward maps behind its first LoRAs are passed
through. What lies below it runs forward only; where its states are kept, once a job instead of once an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

from milp_ray.training.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class Tokens:
    """What goes through a model in some passes: numbers of tokens, of attention's pairs, of logits wanted."""

    tokens: float
    pairs: float
    targets: float


@dataclass(frozen=True, slots=True)
class Placement:
    """What of a layout decides about its cost."""

    rank: int
    n_lora_layers: int
    lowest_layer: int


def layers_forward(shape: ModelShape, work: Tokens, n_layers: int) -> float:
    """FLOPs of ``n_layers`` layers without LoRA, forward."""
    return n_layers * (_attention_forward(shape, work) + 2.0 * work.tokens * shape.ffn_size)


def forward(shape: ModelShape, work: Tokens, placement: Placement | None = None) -> float:
    """FLOPs of the whole model forward, with an adapter or without."""
    total = layers_forward(shape, work, shape.n_layers) + 2.0 * work.targets * shape.head_size
    return total + (0.0 if placement is None else _lora(shape, work, placement))


def below(shape: ModelShape, work: Tokens, placement: Placement, *, attention_too: bool) -> float:
    """FLOPs of the layers below the lowest LoRA, forward: what kept states save.

    ``attention_too`` counts the attention of the lowest layer with them, as packs do.
    """
    own = _attention_forward(shape, work) if attention_too else 0.0
    return layers_forward(shape, work, placement.lowest_layer) + own


def backward(shape: ModelShape, work: Tokens, placement: Placement) -> float:
    """FLOPs of the backward pass."""
    n_above = shape.n_layers - placement.lowest_layer - 1
    maps = 2.0 * work.tokens * (shape.attention_size + shape.ffn_size)
    above = n_above * (maps + 8.0 * shape.attention_width * work.pairs)
    # Nothing below the lowest layer wants a gradient: its maps that read the block's input send none on.
    first = [(n_in, n_out) for _, n_in, n_out in shape.ffn.modules if n_in != shape.inner]
    passed = shape.ffn_size - sum(n_in * n_out for n_in, n_out in first)
    lowest = 2.0 * work.tokens * (passed - placement.rank * sum(n_in for n_in, _ in first))
    head = 2.0 * work.targets * shape.head_size
    return above + lowest + head + 2.0 * _lora(shape, work, placement)


def training_step(
    shape: ModelShape, work: Tokens, placement: Placement, *, checkpointing: bool = False
) -> float:
    """FLOPs of forward and backward over ``work``; ``checkpointing`` adds the layers above once more."""
    total = forward(shape, work, placement) + backward(shape, work, placement)
    if checkpointing:
        total += layers_forward(shape, work, shape.n_layers - placement.lowest_layer)
    return total


def generation(
    shape: ModelShape,
    *,
    n_prompts: float,
    prompt_tokens: float,
    new_tokens: float,
    placement: Placement | None,
) -> float:
    """FLOPs of answering prompts with a key-value cache; lengths are means."""
    length = prompt_tokens + new_tokens
    read = Tokens(n_prompts * prompt_tokens, n_prompts * prompt_tokens**2, n_prompts)
    # The i-th new token looks at all that stand before it.
    pairs = n_prompts * new_tokens * (length + prompt_tokens) / 2
    written = Tokens(n_prompts * new_tokens, pairs, n_prompts * new_tokens)
    return forward(shape, read, placement) + forward(shape, written, placement)


def _attention_forward(shape: ModelShape, work: Tokens) -> float:
    return 2.0 * work.tokens * shape.attention_size + 4.0 * shape.attention_width * work.pairs


def _lora(shape: ModelShape, work: Tokens, placement: Placement) -> float:
    return 2.0 * work.tokens * shape.adapter_parameters(placement.rank, placement.n_lora_layers)
