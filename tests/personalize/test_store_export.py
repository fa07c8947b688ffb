"""Exports: what PEFT and vLLM read of them, and that they compute what the stored adapter does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from milp_ray.config.base import BaseSection
from milp_ray.config.training import LoraAlphaSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.store import AdapterStore, hash_id
from milp_ray.personalize.store.export import VLLM_RANKS, export_users, exported, largest_difference
from milp_ray.training.adapters import Adapter, attached
from milp_ray.training.base import Base, load_base

MakeAdapter = Callable[..., Adapter]
SQRT = LoraAlphaSection(rule="sqrt", value=3.0)


def logits_in_peft(folder: Path, model_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        return PeftModel.from_pretrained(fresh, folder).eval()(ids).logits


@pytest.mark.parametrize("format", ["peft", "vllm"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (8, SQRT), (12, LoraAlphaSection(rule="constant"))])
def test_peft_computes_the_same_from_an_export(
    tmp_path: Path,
    tiny_llama_dir: Path,
    base: Base,
    make_adapter: MakeAdapter,
    format: Any,
    rank: int,
    alpha: LoraAlphaSection | None,
) -> None:
    adapter = make_adapter(base, CanonicalLayout((True, False, False, True), rank=rank), alpha)
    store = AdapterStore(tmp_path / "adapters")
    store.publish("u-1", adapter, {})
    [one] = export_users(store, tmp_path / "out", ["u-1"], format)
    ids = torch.tensor([base.tokenize(["My dog is red."])[0]])
    with torch.no_grad(), attached(base, adapter) as model:
        ours = model(ids).logits
    theirs = logits_in_peft(one.folder, tiny_llama_dir, ids)
    assert float((ours - theirs).abs().max()) < 1e-4 * float(ours.abs().max())
    config = json.loads((one.folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == one.rank
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["layers_to_transform"] is None
    assert config["use_rslora"] is False
    assert one.rank == (rank if format == "peft" else next(r for r in VLLM_RANKS if r >= rank))


def test_gpt2_is_exported_for_peft_and_refused_for_vllm(
    tmp_path: Path, tiny_gpt2_dir: Path, make_adapter: MakeAdapter
) -> None:
    base = load_base(BaseSection(model=str(tiny_gpt2_dir), device="cpu"))
    adapter = make_adapter(base, CanonicalLayout((True,) * base.n_layers, rank=4))
    store = AdapterStore(tmp_path / "adapters")
    store.publish("u-1", adapter, {})
    [one] = export_users(store, tmp_path / "out", ["u-1"], "peft")
    ids = torch.tensor([base.tokenize(["My dog is red."])[0]])
    with torch.no_grad(), attached(base, adapter) as model:
        ours = model(ids).logits
    assert float((ours - logits_in_peft(one.folder, tiny_gpt2_dir, ids)).abs().max()) < 1e-4 * float(
        ours.abs().max()
    )
    with pytest.raises(MilpError, match=r"vLLM puts no LoRA on transformer\.h\.0\.mlp\.c_fc .*--format peft"):
        list(export_users(store, tmp_path / "vllm", ["u-1"], "vllm"))


def test_rank_96_is_padded_with_zeros_to_128(base: Base, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(base, CanonicalLayout((False, True, False, False), rank=96))
    padded = exported(adapter, "vllm")
    assert padded.config["r"] == 128
    scale = adapter.config["lora_alpha"] / 96
    for name, tensor in padded.tensors.items():
        before = adapter.tensors[name]
        if ".lora_A." in name:
            assert torch.equal(tensor[:96], before)
            assert not tensor[96:].any()
            assert tensor.shape == (128, before.shape[1])
        else:
            assert torch.equal(tensor[:, :96], before * scale)
            assert not tensor[:, 96:].any()
            assert tensor.shape == (before.shape[0], 128)
    with pytest.raises(MilpError, match="rank 600 is above vLLM's largest"):
        exported(Adapter({**adapter.config, "r": 600}, adapter.tensors, adapter.layout), "vllm")


def test_vllm_finds_what_it_checks_for(tmp_path: Path, base: Base, make_adapter: MakeAdapter) -> None:
    """Its rules, as its loader states them: names of weights, ranks, scale, and what it does not support."""
    store = AdapterStore(tmp_path / "adapters", precision="int8")
    store.publish("u-1", make_adapter(base, CanonicalLayout((True, False, True, False), rank=4)), {})
    [one] = export_users(store, tmp_path / "out", ["u-1"], "vllm")
    config = json.loads((one.folder / "adapter_config.json").read_text())
    tensors = load_file(one.folder / "adapter_model.safetensors")
    maps = set()
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert match
        assert match[1].rpartition(".")[2] in {"gate_proj", "up_proj", "down_proj"}
        assert tensor.shape[0 if match[2] == "A" else 1] == config["r"]
        assert tensor.dtype == torch.float32
        maps.add(match[1])
    assert set(config["target_modules"]) == maps
    assert config["r"] in VLLM_RANKS
    assert config["lora_alpha"] / config["r"] == 1.0
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    assert not config["use_dora"]


def test_an_export_names_its_users_and_never_writes_over_anything(
    tmp_path: Path, base: Base, adapter: Adapter
) -> None:
    store = AdapterStore(tmp_path / "adapters")
    users = ["u-1", "../../etc", "u/3"]
    for user_id in users:
        store.publish(user_id, adapter, {})
    written = list(export_users(store, tmp_path / "out", users, "peft"))
    assert [one.folder for one in written] == [tmp_path / "out" / hash_id(user_id) for user_id in users]
    lines = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert {line["user_id"]: line["folder"] for line in lines} == {user: hash_id(user) for user in users}
    with pytest.raises(MilpError, match="is not empty; export into a new folder"):
        list(export_users(store, tmp_path / "out", users, "peft"))


def test_the_check_measures_the_difference_in_peft(
    tmp_path: Path, tiny_llama_dir: Path, base: Base, make_adapter: MakeAdapter
) -> None:
    store = AdapterStore(tmp_path / "adapters")
    store.publish("u-1", make_adapter(base, CanonicalLayout((True,) * 4, rank=4), SQRT), {})
    exports = list(export_users(store, tmp_path / "out", ["u-1"], "vllm"))
    section = BaseSection(model=str(tiny_llama_dir), device="cpu")
    assert largest_difference(store, exports, section) < 1e-3
    config_file = exports[0].folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "lora_alpha": 2 * config["r"]}))
    assert largest_difference(store, exports, section) > 1e-2
