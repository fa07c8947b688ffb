"""What the store's and the governance's tests share: a base, adapters on it, and a run with users."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.training import LoraAlphaSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import lora_config
from milp_ray.training.adapters import Adapter, adapter_config, injected, read_tensors
from milp_ray.training.base import Base, load_base

if TYPE_CHECKING:
    from governed_run import Governed

sys.path.insert(0, str(Path(__file__).parent))  # governed_run, which several files use


@pytest.fixture(scope="session")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Adapter]:
    """``make_adapter(base, layout, alpha)``: an adapter that changes the logits (a fresh one has B = 0)."""

    def make(base: Base, layout: CanonicalLayout, alpha: LoraAlphaSection | None = None) -> Adapter:
        config = lora_config(layout, base.spec, alpha or LoraAlphaSection(), 0.0, base.model_id)
        with injected(base, config, seed=3) as model:
            tensors = read_tensors(model)
        made = Adapter(adapter_config(config, base, list(tensors)), tensors, layout)
        generator = torch.Generator().manual_seed(3)
        random = {name: torch.randn(t.shape, generator=generator) for name, t in made.tensors.items()}
        return replace(made, tensors=random)

    return make


@pytest.fixture(scope="session")
def adapter(base: Base, make_adapter: Callable[..., Adapter]) -> Adapter:
    return make_adapter(base, CanonicalLayout((False, True, False, True), rank=4))


@pytest.fixture
def governed(tmp_path: Path, adapter: Adapter, study_events: Callable[..., Any]) -> Governed:
    """A run with a finished search, adapters, scores and a report of some users."""
    from governed_run import make_governed

    return make_governed(tmp_path, adapter, study_events(10, is_finished=True))
