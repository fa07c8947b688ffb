"""Adapters: what PEFT reads back is what was trained, and the base is only lent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.adapters import Adapter, attached, load_adapter, save_adapter
from milp_ray.training.base import Base, load_base
from milp_ray.training.job import Job
from milp_ray.training.train import train
from milp_ray.users.records import UserSplit

QUICK = TrainingSection(memory_epochs=1, instruction_epochs=3, learning_rate=3e-2)


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_gpt2_dir", "tiny_roberta_dir"])
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(BaseSection(model=str(request.getfixturevalue(request.param)), device="cpu"))


@pytest.fixture(scope="module")
def adapter(base: Base, make_split: Callable[..., UserSplit]) -> Adapter:
    layout = CanonicalLayout(tuple(i != 0 for i in range(base.n_layers)), 4)
    job = Job("job", make_split(), layout, frozenset({"memory", "instruction"}), seed=0)
    (result,) = train(base, [job], QUICK, PromptSection())
    assert result.adapter is not None
    return result.adapter


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25).reshape(2, 10)).logits


def test_peft_loads_a_saved_adapter_with_equal_logits(base: Base, adapter: Adapter, tmp_path: Path) -> None:
    save_adapter(adapter, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    fresh = AutoModelForCausalLM.from_pretrained(base.model_id, config=base.model.config)
    theirs = logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval())
    with attached(base, adapter) as model:
        ours = logits(model)
    assert torch.equal(ours, theirs)
    assert (ours - logits(base.model)).abs().max() > 1e-3, "the adapter must change something"


def test_a_saved_adapter_loads_as_it_was(adapter: Adapter, tmp_path: Path) -> None:
    save_adapter(adapter, tmp_path)
    loaded = load_adapter(tmp_path)
    assert loaded.layout == adapter.layout
    assert loaded.config == adapter.config
    assert loaded.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in adapter.tensors.items())


def test_the_configuration_names_base_rank_and_every_map(
    base: Base, adapter: Adapter, tmp_path: Path
) -> None:
    save_adapter(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.model_id
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    expected = [n for layer in adapter.layout.layers for n in base.spec.module_names(layer)]
    assert config["target_modules"] == expected
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True


def test_equal_adapters_are_equal_files(adapter: Adapter, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save_adapter(adapter, tmp_path / folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_no_adapter_is_the_base_itself(base: Base) -> None:
    with attached(base, None) as model:
        assert model is base.model


def test_the_base_is_given_back_as_it_was_also_after_an_error(base: Base, adapter: Adapter) -> None:
    before = logits(base.model)
    modules = [type(m).__name__ for m in base.model.modules()]
    changed = torch.empty(0)

    def use_and_fail() -> None:
        nonlocal changed
        with attached(base, adapter) as model:
            changed = logits(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_and_fail()
    assert not torch.equal(changed, before)
    assert [type(m).__name__ for m in base.model.modules()] == modules
    assert torch.equal(logits(base.model), before)
    assert not any(p.requires_grad for p in base.model.parameters())


def test_an_attached_adapter_asks_for_no_gradients(base: Base, adapter: Adapter) -> None:
    with attached(base, adapter) as model:
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training


def test_an_adapter_of_another_base_is_refused(base: Base, adapter: Adapter) -> None:
    tensors = dict(list(adapter.tensors.items())[1:])
    with (
        pytest.raises(MilpError, match="does not fit this base: 1 of its weights"),
        attached(base, Adapter(adapter.config, tensors, adapter.layout)),
    ):
        pass


def test_a_folder_without_an_adapter_is_told(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(MilpError, match=r"no adapter_config\.json and no adapter_model\.safetensors"):
        load_adapter(tmp_path)
    save_adapter(adapter, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(MilpError, match="damaged"):
        load_adapter(tmp_path)
    shutil.rmtree(tmp_path)
