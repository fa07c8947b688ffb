"""How much device memory training and generation take, by part: a formula, to be checked by measuring.

Pure: numbers in, bytes out. A *pack* is several jobs trained in one forward and backward pass over one base.

**What stays.** The base's weights are there once. Every job has its LoRA weights, their gradients and Adam's
two moments in float32: 16 bytes a trainable number; where LoRA is computed in a smaller precision a copy in
it comes on top.

**Activations.** A frozen linear map keeps nothing for the backward pass; what is kept, a token, with d the
hidden width, a and k the widths of the queries and of the keys, f the feed-forward block's inner width, h
heads and b bytes a number:

* two normalisations: 2 · d · (4 under RMSNorm, which works in float32, else b), and 8 bytes each;
* fused attention: (2a + 2k) · b for queries, keys, values and output, and 4h for the row sums;
* the feed-forward block: c · f · b, where c (``ModelShape.inner_copies``) is 3 for SwiGLU, 4 for GPT-2's
  gelu, 1 for a plain gelu;
* on a layer with a LoRA also the inputs of its maps (d and f once each if LoRA is computed in the base's
  precision, else one copy a map) and r numbers a map.

Layers below the lowest LoRA keep nothing, and of the lowest only the feed-forward block does. With activation
checkpointing a layer keeps its input alone, and one layer at a time is whole again.

**For a moment.** Logits exist at target positions only: 12 bytes a target and vocabulary entry at the peak
(the log-softmax kept, its gradient, and the gradient of the logits, in float32). The other peak is inside a
layer's backward pass. They do not fall together, so the larger one counts.

Measured on a CPU with random Llamas, GPT-2s and RoBERTas under PEFT, in this module's tests: activations
within 3 %, the peak of a step within 10 %. What is missing is a CUDA context (about half a GiB) and what the
allocator loses to fragments: the headroom of :func:`largest_pack`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from milp_ray.training.model_shape import ModelShape

_MASTER_BYTES = 4  # LoRA weights, gradients and each of Adam's moments are float32
_LOGIT_BYTES = 12


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes by part. ``states`` are kept hidden states that stand in for the layers below the lowest LoRA."""

    base: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    states: int = 0
    kv_cache: int = 0
    logits: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        """The expected peak: everything that stays, and the larger one of ``logits`` and ``working``."""
        momentary = (self.logits, self.working)
        return sum(getattr(self, field.name) for field in fields(self)) - min(momentary)


@dataclass(frozen=True, slots=True)
class JobLoad:
    """What one job of a pack puts on the device; where jobs differ, the largest of each.

    Args:
        rank: the largest rank of the pack.
        n_lora_layers: layers of one job that carry a LoRA.
        lowest_layer: index of the lowest layer of the pack that carries one.
        tokens_per_step: tokens of the job's rows in one pass, padding included.
        targets_per_step: tokens of those that keep logits.
        longest_row: tokens of the longest row; it matters for attention that is not fused.
        kept_tokens: tokens of the job whose states below the lowest LoRA are kept between epochs.
        lora_bytes: bytes a number that LoRA is computed in; ``None``: as the base.
        activation_checkpointing: layers are computed again in the backward pass.
        fused_attention: without it every head keeps its (tokens × longest row) weights.
    """

    rank: int
    n_lora_layers: int
    lowest_layer: int
    tokens_per_step: int
    targets_per_step: int
    longest_row: int
    kept_tokens: int = 0
    lora_bytes: int | None = None
    activation_checkpointing: bool = False
    fused_attention: bool = True


def memory_of_pack(shape: ModelShape, job: JobLoad, *, n_jobs: int) -> MemoryParts:
    """Peak memory of training ``n_jobs`` adapters at once; 0 of them gives what is there before any job."""
    b = shape.dtype_bytes
    lora_b = b if job.lora_bytes is None else job.lora_bytes
    trainable = n_jobs * shape.adapter_parameters(job.rank, job.n_lora_layers)
    working_copy = trainable * lora_b if lora_b < _MASTER_BYTES else 0
    attention_row = 0 if job.fused_attention else job.longest_row
    tokens = n_jobs * job.tokens_per_step
    return MemoryParts(
        base=shape.n_parameters * b,
        adapters=trainable * _MASTER_BYTES + working_copy,
        gradients=trainable * _MASTER_BYTES,
        optimizer=2 * trainable * _MASTER_BYTES,
        activations=tokens * _kept_a_token(shape, job, lora_b, attention_row) if trainable else 0,
        states=n_jobs * job.kept_tokens * shape.hidden * b,
        logits=n_jobs * job.targets_per_step * shape.vocabulary * _LOGIT_BYTES,
        working=tokens * _backward_of_a_layer(shape, max(b, lora_b), attention_row),
    )


def largest_pack(shape: ModelShape, job: JobLoad, budget_bytes: int, *, headroom: float = 0.1) -> int:
    """How many jobs fit ``budget_bytes`` of device memory; 0 where not even one does.

    ``headroom`` is the share of the budget that is left alone, for the CUDA context and fragments.
    """
    # Every part but the base grows with the number of jobs, in proportion.
    fixed, with_one = (memory_of_pack(shape, job, n_jobs=n).total for n in (0, 1))
    return max(0, int((1.0 - headroom) * budget_bytes) - fixed) // max(1, with_one - fixed)


def memory_of_generation(
    shape: ModelShape,
    *,
    n_rows: int,
    prompt_tokens: int,
    new_tokens: int,
    adapter_parameters: int = 0,
) -> MemoryParts:
    """Peak memory of answering ``n_rows`` prompts of ``prompt_tokens`` tokens at once.

    Keys and values of every token of every layer are kept: 2 · layers · k · b bytes a token. Reading the
    prompts is the peak: then a layer works on all their tokens. ``adapter_parameters`` are the numbers of all
    adapters that are loaded, held in float32.
    """
    b = shape.dtype_bytes
    return MemoryParts(
        base=shape.n_parameters * b,
        adapters=adapter_parameters * _MASTER_BYTES,
        kv_cache=n_rows * (prompt_tokens + new_tokens) * kv_bytes_a_token(shape),
        logits=n_rows * shape.vocabulary * b,
        # Both factors of the block's product and the product, beside the layer's input and output.
        working=n_rows * prompt_tokens * b * (3 * shape.inner + 2 * shape.hidden),
    )


def kv_bytes_a_token(shape: ModelShape) -> int:
    """Bytes of keys and values of one token in all layers."""
    return 2 * shape.n_layers * shape.kv_width * shape.dtype_bytes


def _kept_a_token(shape: ModelShape, job: JobLoad, lora_b: int, attention_row: int) -> int:
    """Bytes that one token leaves in all layers for the backward pass."""
    b, d = shape.dtype_bytes, shape.hidden
    block = shape.inner_copies * shape.inner * b
    norm = d * shape.norm_bytes + 8
    attention = 2 * b * (shape.attention_width + shape.kv_width) + 4 * shape.n_heads
    attention += attention_row * shape.n_heads * b
    whole = 2 * norm + attention + block
    inputs = [n_in for _, n_in, _ in shape.ffn.modules]
    if lora_b == b:
        inputs = list(set(inputs))  # maps that read the same tensor share it
    lora = lora_b * (sum(inputs) + job.rank * len(shape.ffn.modules))
    n_above = shape.n_layers - job.lowest_layer - 1
    # The model's last normalisation is behind every layer.
    if job.activation_checkpointing:
        return (n_above + 1) * d * b + whole + lora + norm
    return n_above * whole + block + job.n_lora_layers * lora + norm


def _backward_of_a_layer(shape: ModelShape, widest_bytes: int, attention_row: int) -> int:
    """Bytes of one token's momentary tensors inside a layer's backward pass.

    At the widest point two gradients of the block's inner width and one of the hidden width are there.
    """
    eager = attention_row * shape.n_heads * (4 + shape.dtype_bytes)
    return max(widest_bytes * (2 * shape.inner + shape.hidden), eager)
