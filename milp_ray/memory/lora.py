"""A layout as PEFT's ``LoraConfig``: exactly the feed-forward maps of its layers, and nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.memory.architecture import FfnSpec
from milp_ray.memory.layout import CanonicalLayout

if TYPE_CHECKING:
    from peft import LoraConfig

    from milp_ray.config.training import LoraAlphaSection


def lora_alpha(rank: int, section: LoraAlphaSection) -> int | float:
    """``lora_alpha`` of a rank; the update BAx is scaled by lora_alpha / rank.

    ``constant``: value; ``proportional``: value × r; ``sqrt``: value × √r (rank-stabilised LoRA,
    Kalajdzievski 2023, arXiv 2312.03732). A whole number comes as an ``int``, as in PEFT's own files.
    """
    factor = {"constant": 1.0, "proportional": float(rank), "sqrt": math.sqrt(rank)}[section.rule]
    alpha = float(section.value) * factor
    return int(alpha) if alpha.is_integer() else alpha


def target_modules(layout: CanonicalLayout, spec: FfnSpec) -> list[str]:
    """Full names of the maps that carry LoRA, in the order of the layers."""
    return [name for layer in layout.layers for name in spec.module_names(layer)]


def lora_config(
    layout: CanonicalLayout,
    spec: FfnSpec,
    alpha: LoraAlphaSection,
    dropout: float,
    base_model_id: str | None,
) -> LoraConfig:
    """PEFT's configuration of a layout.

    Maps are named in full, layer by layer: a pattern could reach attention maps of the same name, and PEFT
    reads an empty ``layers_to_transform`` as *all* layers. One rank and one alpha hold everywhere
    (``rank_pattern`` and ``alpha_pattern`` stay empty: servers ignore them).

    Raises:
        MilpError: the layout is empty, which means the base alone.
    """
    if layout.is_empty:
        raise MilpError(
            "an empty layout has no LoRA: it stands for the base alone; use the base without an adapter"
        )
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model_id,
        r=layout.rank,
        lora_alpha=lora_alpha(layout.rank, alpha),  # type: ignore[arg-type]  # PEFT divides; a float serves
        lora_dropout=dropout,
        target_modules=target_modules(layout, spec),
        fan_in_fan_out=spec.fan_in_fan_out,
        bias="none",
    )
