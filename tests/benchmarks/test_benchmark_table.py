from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import LoraAlphaSection, TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.training.adapters import attached
from milp_ray.training.base import load_base
from milp_ray.training.job import Job
from milp_ray.training.train import train


@pytest.fixture(scope="module")
def make(repository: Path) -> ModuleType:
    path = repository / "experiments" / "benchmarks" / "lora_table" / "make.py"
    spec = importlib.util.spec_from_file_location("lora_table_make", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def curve(make: ModuleType, layout: CanonicalLayout, loss: float) -> dict[str, Any]:
    values = [[loss - epoch, loss - epoch + 0.5, loss - epoch + 1.0] for epoch in range(make.N_EPOCHS)]
    return {
        "key": layout.key,
        "layout": layout.to_dict(),
        "adapter_parameters": 7,
        "validation_loss": values,
        "rouge_l": values,
        "train_seconds": [1.0 + epoch for epoch in range(make.N_EPOCHS)],
        "score_seconds": [0.5] * make.N_EPOCHS,
    }


def test_every_layout_is_measured_once_and_the_plain_ones_first(make: ModuleType) -> None:
    space = SearchSpace(4, (8, 16))
    layouts = make.layouts_in_order(space)
    assert len(layouts) == len({layout.key for layout in layouts}) == space.n_canonical
    assert layouts[0].is_empty
    assert [sum(layout.mask) for layout in layouts[1:11]] == [1] * 8 + [4] * 2


def test_a_layout_is_measured_after_every_epoch_for_every_user(
    make: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, smaller in (("N_EPOCHS", 2), ("N_USERS", 1), ("N_DRAWN_USERS", 2), ("N_EXAMPLES", 20)):
        monkeypatch.setattr(make, name, smaller)
    monkeypatch.setattr(make, "TRAINING", make.TRAINING.model_copy(update={"memory_epochs": 2}))
    measured = make.measure_curve(CanonicalLayout((True,) + (False,) * 7, 8))
    losses, scores = np.array(measured["validation_loss"]), np.array(measured["rouge_l"])
    assert losses.shape == scores.shape == (2, 1)
    assert losses[1] < losses[0]
    assert ((scores > 0) & (scores <= 100)).all()
    assert len(measured["score_seconds"]) == 2
    assert 0 < measured["train_seconds"][0] < measured["train_seconds"][1]


def test_the_order_of_the_work_file_does_not_matter(make: ModuleType, tmp_path: Path) -> None:
    curves = [curve(make, CanonicalLayout((True, False), rank), float(rank)) for rank in (8, 16, 32)]
    make.write_table(curves, tmp_path / "one.parquet")
    make.write_table(curves[::-1], tmp_path / "other.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "other.parquet").read_bytes()


def test_a_table_has_means_and_standard_errors(make: ModuleType, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    make.write_table([curve(make, CanonicalLayout((True, True), 8), 9.0)], tmp_path / "table.parquet")
    rows = pq.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["validation_loss"] for row in rows] == [9.5, 8.5, 7.5, 6.5]
    # Standard deviation of (0, ½, 1) is ½; of three users' mean it is ½ / √3.
    assert rows[0]["rouge_l_sem"] == pytest.approx(0.5 / 3**0.5)
    assert (rows[0]["n_loras"], rows[0]["rank"]) == (2, 8)


def test_measuring_goes_on_after_a_kill(
    make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "curves.jsonl"
    layouts = [CanonicalLayout((True, False), rank) for rank in (8, 16, 32)]
    whole = json.dumps(curve(make, layouts[0], 1.0))
    path.write_text(whole + "\n" + whole[:40])  # the second line was cut short
    measured: list[str] = []

    def instead(layout: CanonicalLayout) -> dict[str, Any]:
        measured.append(layout.key)
        return curve(make, layout, 2.0)

    monkeypatch.setattr(make, "measure_curve", instead)
    make.measure_all(layouts, path, 1)

    assert measured == ["10-r16", "10-r32"]
    assert sorted(make.read_curves(path)) == sorted(layout.key for layout in layouts)
    make.measure_all(layouts, path, 1)
    assert len(measured) == 2


def test_a_merged_adapter_answers_as_an_attached_one_and_leaves_no_trace(
    make: ModuleType, tiny_llama_dir: Path, make_split: Any
) -> None:
    base = load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))
    layout = CanonicalLayout((True, False, True, False), 8)
    section = TrainingSection(
        memory_epochs=2, learning_rate=1e-2, lora_alpha=LoraAlphaSection(rule="sqrt", value=8.0)
    )
    epochs: list[tuple[str, int]] = []
    weights: list[dict[str, torch.Tensor]] = []

    def on_epoch(job_id: str, epoch: int, tensors: dict[str, torch.Tensor]) -> None:
        epochs.append((job_id, epoch))
        weights.append(tensors)

    job = Job("one", make_split(), layout, frozenset({"memory"}), seed=0)
    [result] = train(base, [job], section, PromptSection(), on_epoch=on_epoch)
    assert epochs == [("one", 1), ("one", 2)]
    assert result.adapter is not None
    assert weights[1].keys() == result.adapter.tensors.keys()
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in result.adapter.tensors.items())
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    ids = torch.tensor([[5, 6, 7, 8]])
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    with torch.inference_mode():
        plain = base.model(ids).logits
        with attached(base, result.adapter) as model:
            expected = model(ids).logits
        with make._merged(base, result.adapter):
            merged = base.model(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged, plain, rtol=1e-4, atol=1e-5)
    after = dict(base.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
