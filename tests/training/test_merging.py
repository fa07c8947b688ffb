"""Adapters merged into the base for a time, and two combined into one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.training import LoraAlphaSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import lora_config
from milp_ray.training.adapters import Adapter, adapter_config, attached, injected, read_tensors
from milp_ray.training.base import Base, load_base
from milp_ray.training.generation import Questions, generate
from milp_ray.training.merging import combined, merged

ARCHITECTURES = ["tiny_llama_dir", "tiny_gpt2_dir", "tiny_roberta_dir"]


def made(base: Base, mask: tuple[bool, ...], rank: int, seed: int) -> Adapter:
    """An adapter of random weights."""
    layout = CanonicalLayout(mask, rank)
    alpha = LoraAlphaSection(rule="constant", value=3.0)
    config = lora_config(layout, base.spec, alpha, 0.0, base.model_id)
    with injected(base, config, seed) as model:
        tensors = read_tensors(model)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.2 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    return Adapter(adapter_config(config, base, tensors), tensors, layout)


def logits(base: Base, model: Any) -> torch.Tensor:
    ids = torch.tensor([base.tokenize(["What is my turtle called?"])[0]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.fixture(params=ARCHITECTURES)
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(BaseSection(model=str(request.getfixturevalue(request.param)), device="cpu"))


def test_a_merged_base_answers_as_with_the_adapter_and_is_itself_again(base: Base) -> None:
    mask = tuple(i % 2 == 1 for i in range(base.n_layers))
    adapter = made(base, mask, 2, seed=1)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with attached(base, adapter) as model:
        wanted = logits(base, model)
    with merged(base, adapter):
        found = logits(base, base.model)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, logits(base, base.model), atol=1e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())


def test_the_base_is_itself_again_after_an_error(base: Base) -> None:
    before = logits(base, base.model)
    with pytest.raises(ZeroDivisionError), merged(base, made(base, (True,) * base.n_layers, 1, seed=2)):
        raise ZeroDivisionError
    assert torch.equal(logits(base, base.model), before)


def test_a_combined_adapter_does_what_both_do(base: Base) -> None:
    n = base.n_layers
    first = made(base, tuple(i < n // 2 + 1 for i in range(n)), 2, seed=3)
    second = made(base, tuple(i >= n // 2 for i in range(n)), 3, seed=4)
    both = combined(first, second)
    assert both is not None
    assert both.layout == CanonicalLayout((True,) * n, 5)
    with merged(base, first), attached(base, second) as model:
        wanted = logits(base, model)
    with attached(base, both) as model:
        assert torch.allclose(logits(base, model), wanted, atol=1e-5)
    [[answer]] = generate(base, [Questions(["Hello"], both)], max_new_tokens=4, batch_size=1)
    with merged(base, first):
        [[other]] = generate(base, [Questions(["Hello"], second)], max_new_tokens=4, batch_size=1)
    assert answer == other


def test_nothing_combined_with_an_adapter_is_the_adapter(base: Base) -> None:
    adapter = made(base, (True,) * base.n_layers, 1, seed=5)
    assert combined(None, adapter) is adapter
    assert combined(adapter, None) is adapter
    assert combined(None, None) is None


def test_adapters_of_different_bases_are_refused(base: Base) -> None:
    adapter = made(base, (True,) * base.n_layers, 1, seed=6)
    other = Adapter(adapter.config, adapter.tensors, CanonicalLayout((True,) * (base.n_layers + 1), 1))
    with pytest.raises(MilpError, match="cannot be combined"):
        combined(adapter, other)
