"""How much work jobs are, and how fast the device could do it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from milp_ray.training.base import Base
from milp_ray.training.flat import padded_length
from milp_ray.training.job import JobPlan


def ceiling(base: Base) -> float:
    """FLOP a second of a large matrix product in the base's precision."""
    n = 1024 if base.device.type == "cpu" else 8192
    left, right = (torch.randn(n, n, device=base.device, dtype=base.dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def n_tokens(plan: JobPlan) -> int:
    """Tokens of a job, once for every epoch."""
    return sum(stage.epochs * sum(len(s.ids) for s in stage.sequences) for stage in plan.stages)


def padding_share(plans: Sequence[JobPlan]) -> float:
    """Share of the places in attention that are padding; the rest of the model has none."""
    lengths = [len(s.ids) for plan in plans for stage in plan.stages for s in stage.sequences * stage.epochs]
    return 1 - sum(lengths) / sum(padded_length(length) for length in lengths)


def needed_flops(base: Base, plan: JobPlan) -> float:
    """Multiply-adds × 2 that a job's steps need: every layer forward, back only to the lowest LoRA, no weight
    gradients of the base, logits at targets.
    """
    model: Any = base.model
    layers = model.get_submodule(base.spec.layers_path)
    per_layer = sum(p.numel() for p in layers[0].parameters() if p.dim() == 2)
    head = model.get_output_embeddings().weight.numel()
    hidden = model.config.hidden_size
    layout = plan.job.layout
    lora = sum(layout.rank * (n_in + n_out) for _, n_in, n_out in base.shapes.modules)
    n_back = base.n_layers - layout.layers[0]
    total = 0.0
    for stage in plan.stages:
        for sequence in stage.sequences:
            n = len(sequence.ids)
            attention = 2 * hidden * n / 2  # scores and values of a causal row, a token and layer
            token = base.n_layers * (per_layer + attention) + n_back * (per_layer + 2 * attention)
            token += 3 * lora * len(layout.layers)
            total += 2 * stage.epochs * (n * token + 2 * head * sequence.n_targets)
    return total
