"""Loading a base: frozen, its context and tokens known, and errors that name the option."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from milp_ray.config.base import BaseSection
from milp_ray.data import EMBEDDED_BASE
from milp_ray.errors import MilpError
from milp_ray.training.base import load_base


@pytest.mark.parametrize(
    ("fixture", "n_layers", "first_position"),
    [("tiny_llama_dir", 4, 0), ("tiny_gpt2_dir", 3, 0), ("tiny_roberta_dir", 3, 2)],
)
def test_a_base_is_frozen_and_in_eval_mode(
    request: pytest.FixtureRequest, fixture: str, n_layers: int, first_position: int
) -> None:
    base = load_base(BaseSection(model=str(request.getfixturevalue(fixture)), device="cpu"))
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert (base.n_layers, base.context_length) == (n_layers, 256)
    assert (base.eos_id, base.first_position) == (2, first_position)


def test_an_encoder_is_loaded_as_a_causal_decoder(tiny_roberta_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "roberta"
    shutil.copytree(tiny_roberta_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["is_decoder"] = False
    (folder / "config.json").write_text(json.dumps(config))
    base = load_base(BaseSection(model=str(folder), device="cpu"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base.model(input_ids=ids).logits[0, :2]
        ids[0, 3] = 9
        after = base.model(input_ids=ids).logits[0, :2]
    assert torch.equal(before, after), "a later token must not be seen by earlier ones"


def test_the_start_tokens_are_those_that_the_tokenizer_puts_first(shared_dir: Path) -> None:
    base = load_base(BaseSection(model=str(shared_dir / "models" / "stories260K"), device="cpu"))
    assert base.start_ids == (1,)
    assert (base.n_layers, base.context_length) == (5, 512)


def test_a_missing_folder_is_told_with_the_options_name() -> None:
    with pytest.raises(MilpError, match=r"base\.model '\./not/there' is no folder"):
        load_base(BaseSection(model="./not/there"))


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(MilpError, match=r"holds no config\.json"):
        load_base(BaseSection(model=str(tmp_path)))


def test_weights_that_are_not_safetensors_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MilpError, match=r"base\.model .* cannot be loaded"):
        load_base(BaseSection(model=str(folder), device="cpu"))


def _folder_with(folder: Path, source: Path, **stated: object) -> BaseSection:
    """A copy of a model's folder whose configuration states something else."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | stated))
    return BaseSection(model=str(folder), device="cpu")


def test_a_base_saved_without_its_head_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    section = _folder_with(tmp_path / "headless", tiny_llama_dir, tie_word_embeddings=False)
    with pytest.raises(MilpError, match=r"lacks 1 of the weights .* 'lm_head\.weight'"):
        load_base(section)


def test_more_layers_than_are_stored_are_refused(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    section = _folder_with(tmp_path / "deeper", tiny_gpt2_dir, n_layer=4)
    with pytest.raises(MilpError, match=r"lacks 12 of the weights .* 'transformer\.h\.3\.attn\.c_attn"):
        load_base(section)


def test_weights_of_other_sizes_than_stated_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    section = _folder_with(tmp_path / "wider", tiny_llama_dir, intermediate_size=96)
    with pytest.raises(MilpError, match=r"12 weights of other sizes .* \(32, 64\) is stored, \(32, 96\) is"):
        load_base(section)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_found_where_it_is_stored_and_where_it_is_tied(tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=2560,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_BASE / name, tmp_path)
    base = load_base(BaseSection(model=str(tmp_path), device="cpu"))
    assert torch.equal(base.model.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_the_embedded_base_is_complete() -> None:
    assert load_base(BaseSection(device="cpu")).n_layers > 0


def test_a_context_beyond_the_models_is_refused(tiny_gpt2_dir: Path) -> None:
    with pytest.raises(MilpError, match=r"base\.context_length 300 .* use at most 256"):
        load_base(BaseSection(model=str(tiny_gpt2_dir), context_length=300, device="cpu"))


def test_a_shorter_context_may_be_asked_for(tiny_gpt2_dir: Path) -> None:
    assert load_base(BaseSection(model=str(tiny_gpt2_dir), context_length=64)).context_length == 64


def test_an_unknown_device_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(MilpError, match=r"base\.device 'gpu' is no device"):
        load_base(BaseSection(model=str(tiny_llama_dir), device="gpu"))


@pytest.mark.parametrize("device", ["mps", "meta", "xpu", "cpu:3"])
def test_a_device_that_nothing_is_trained_on_is_refused(device: str, tiny_llama_dir: Path) -> None:
    with pytest.raises(MilpError, match=rf"base\.device '{device}' .* use 'auto', 'cpu', 'cuda' or"):
        load_base(BaseSection(model=str(tiny_llama_dir), device=device))


def test_a_gpu_that_is_not_there_is_refused(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MilpError, match=r"base\.device is 'cuda:7', but the last .* is 'cuda:1'"):
        load_base(BaseSection(model=str(tiny_llama_dir), device="cuda:7"))


def test_a_base_that_is_kept_nowhere_else_trains_where_its_weights_lie(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the very device, number included: jobs are packed only where the two are the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    base = load_base(BaseSection(model=str(tiny_llama_dir), device="cuda"))
    assert base.engine_device == base.device
    aside = load_base(BaseSection(model=str(tiny_llama_dir), device="cuda", keep_on="cpu"))
    assert aside.engine_device == torch.device("cuda")


def test_weights_that_do_not_fit_the_device_are_told(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("as a GPU would say")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(MilpError, match=r"does not fit the 100% of 'cpu' .* larger part of a GPU"):
        load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


def test_the_first_cpu_is_the_cpu(tiny_llama_dir: Path) -> None:
    base = load_base(BaseSection(model=str(tiny_llama_dir), device="cpu:0"))
    assert (base.device, base.dtype) == (torch.device("cpu"), torch.float32)
