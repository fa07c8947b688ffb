"""Stored precisions: what comes back, how large it is, and that its cost is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.config.personalize import AdapterPrecision
from milp_ray.config.prompt import PromptSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.governance.retention import Retention
from milp_ray.personalize.store import AdapterStore
from milp_ray.personalize.store.precision import from_stored, stored_bytes, to_stored
from milp_ray.personalize.store.precision_loss import PRECISIONS, measure_precisions
from milp_ray.training.adapters import Adapter, load_adapter
from milp_ray.training.base import Base
from milp_ray.users.records import UserSplit


def one_pair(a: torch.Tensor, b: torch.Tensor) -> Adapter:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    layout = CanonicalLayout((True,), rank=a.shape[0])
    return Adapter({}, {name.format("A"): a, name.format("B"): b}, layout)


@given(
    rank=st.integers(1, 5),
    width=st.integers(1, 9),
    exponent=st.floats(-20, 10),
    seed=st.integers(0, 10_000),
)
def test_int8_is_within_half_a_step_of_each_components_largest_weight(
    rank: int, width: int, exponent: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, width, generator=generator) * 10**exponent
    b = torch.randn(width, rank, generator=generator)
    b[:, 0] = 0.0  # a component that was never trained
    stored, facts = to_stored(one_pair(a, b), "int8")
    back_a, back_b = from_stored(stored, "int8").tensors.values()
    for exact, back, dim in ((a, back_a, 1), (b, back_b, 0)):
        step = exact.abs().amax(dim=dim, keepdim=True) / 127
        assert bool(((exact - back).abs() <= step * 0.5001).all())
    assert bool((back_b[:, 0] == 0).all())
    largest = max(float((a - back_a).abs().max()), float((b - back_b).abs().max()))
    assert facts["max_error"] == pytest.approx(largest)


def test_bfloat16_is_rounded_once_and_its_errors_are_told() -> None:
    a, b = torch.tensor([[1.0, 1.003]]), torch.tensor([[0.5], [0.25]])
    stored, facts = to_stored(one_pair(a, b), "bfloat16")
    back = list(from_stored(stored, "bfloat16").tensors.values())
    assert [t.dtype for t in back] == [torch.float32, torch.float32]
    error = 1.003 - 1.0
    assert back[0].tolist() == [[1.0, 1.0]]
    assert facts["max_error"] == pytest.approx(error, rel=1e-3)
    assert facts["mean_error"] == pytest.approx(error / 4, rel=1e-3)
    assert facts["relative_error"] == pytest.approx(error / (1 + 1.003**2 + 0.25 + 0.0625) ** 0.5, rel=1e-3)


def test_float32_is_exact_and_says_nothing_of_errors() -> None:
    a, b = torch.randn(2, 3), torch.randn(4, 2)
    stored, facts = to_stored(one_pair(a, b), "float32")
    assert facts == {"name": "float32"}
    for exact, back in zip((a, b), from_stored(stored, "float32").tensors.values(), strict=True):
        assert torch.equal(exact, back)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_an_adapter_will_take_is_known_from_its_sizes(adapter: Adapter, precision: str) -> None:
    stored, _ = to_stored(adapter, precision)
    n_weights = sum(tensor.numel() for tensor in adapter.tensors.values())
    n_scales = adapter.layout.rank * len(adapter.tensors)  # each tensor is the A or the B of a map
    taken = sum(tensor.numel() * tensor.element_size() for tensor in stored.tensors.values())
    assert stored_bytes(precision, n_weights, n_scales) == taken


@pytest.mark.parametrize(("precision", "share"), [("float32", 1.0), ("bfloat16", 0.5), ("int8", 0.3)])
def test_the_store_reads_every_precision_whatever_it_writes(
    tmp_path: Path, adapter: Adapter, precision: AdapterPrecision, share: float
) -> None:
    large = {name: t.repeat(1, 40) if ".lora_A." in name else t for name, t in adapter.tensors.items()}
    wide = Adapter(adapter.config, large, adapter.layout)
    AdapterStore(tmp_path, precision=precision).publish("u-1", wide, {})
    reader = AdapterStore(tmp_path)
    loaded, manifest = reader.load("u-1"), reader.manifest("u-1")
    assert manifest.precision["name"] == precision
    assert set(loaded.tensors) == set(large)
    for name, tensor in loaded.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, large[name], atol=manifest.precision.get("max_error", 0.0) + 1e-7)
    n_bytes = manifest.files["adapter_model.safetensors"]["bytes"]
    exact = sum(tensor.numel() * 4 for tensor in large.values())
    assert n_bytes < share * exact + 6000  # the header's names
    copy = load_adapter(reader.folder("u-1"))
    assert {name: t.shape for name, t in copy.tensors.items()} == {n: t.shape for n, t in large.items()}


def test_the_loss_of_each_precision_is_measured_against_what_is_stored(
    tmp_path: Path, adapter: Adapter, base: Base, make_split: Callable[..., UserSplit]
) -> None:
    store = AdapterStore(tmp_path)
    splits = [make_split(f"u-{i}", n_val=2) for i in range(4)]
    for split in splits[1:]:
        store.publish(split.user_id, adapter, {})
    rows = measure_precisions(store, base, splits, PromptSection(), n_users=2)
    assert [row.precision for row in rows] == list(PRECISIONS)
    assert {row.n_users for row in rows} == {2}
    exact, half, eighth = rows
    assert (exact.loss_difference, exact.largest_loss_difference, exact.relative_error) == (0.0, 0.0, 0.0)
    assert 0 < half.relative_error < eighth.relative_error < 0.05
    assert 0 < abs(eighth.largest_loss_difference) < 0.1
    assert eighth.validation_loss == pytest.approx(exact.validation_loss + eighth.loss_difference)
    assert store.versions("u-1") == [1]
    with pytest.raises(MilpError, match="no user of the run has both"):
        measure_precisions(store, base, splits[:1], PromptSection(), n_users=2)


def test_an_expired_adapter_is_not_measured_and_the_others_are(
    tmp_path: Path, adapter: Adapter, base: Base, make_split: Callable[..., UserSplit]
) -> None:
    splits = [make_split(f"u-{i}", n_val=2) for i in range(2)]
    AdapterStore(tmp_path, retention=Retention(None, 0)).publish("u-0", adapter, {})
    store = AdapterStore(tmp_path)
    store.publish("u-1", adapter, {})
    assert {row.n_users for row in measure_precisions(store, base, splits, PromptSection(), 2)} == {1}
    with pytest.raises(MilpError, match="that may be served"):
        measure_precisions(store, base, splits[:1], PromptSection(), n_users=2)
