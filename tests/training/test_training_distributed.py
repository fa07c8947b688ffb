"""Several processes that train one job give what one process gives, and leave nothing but that."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.jobs import MakeSplit, make_job

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.memory.lora import lora_config
from milp_ray.training.adapters import Adapter, injected, load_adapter
from milp_ray.training.base import Base, load_base
from milp_ray.training.engine import copy_to_scatter
from milp_ray.training.job import Job
from milp_ray.training.loss import mean_token_loss
from milp_ray.training.response_loss import Wanted, response_losses
from milp_ray.training.train import train

PROMPT = PromptSection()


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture
def together(pair: Any, tiny_llama_dir: Path) -> Callable[..., list[dict[str, Any]]]:
    """Train a job in two processes: what each of them tells."""

    def run(job: Job, section: TrainingSection, **options: Any) -> list[dict[str, Any]]:
        return pair.run(folder=str(tiny_llama_dir), job=job, section=section, **options)

    return run


def section(**changes: Any) -> TrainingSection:
    """Batches of three: a process has two rows or one; the last batch of an epoch may leave it none."""
    settings: dict[str, Any] = {
        "memory_epochs": 2,
        "instruction_epochs": 2,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "memory_block_turns": 2,
    }
    return TrainingSection(**{**settings, **changes})


def furthest(adapter: Adapter | None, tensors: dict[str, np.ndarray]) -> float:
    assert adapter is not None
    assert adapter.tensors.keys() == tensors.keys()
    return max(float(np.abs(t.numpy() - tensors[name]).max()) for name, t in adapter.tensors.items())


def identical(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


ENGINES: list[Any] = [
    {"zero_stage": 0},
    {"zero_stage": 2},
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    pytest.param({"zero_stage": 1}, marks=pytest.mark.slow),
    pytest.param({"zero_stage": 2, "offload_optimizer": "cpu"}, marks=pytest.mark.slow),
    pytest.param({"zero_stage": 3}, marks=pytest.mark.slow),
]
# ZeRO-3 takes several times as long as the others: one case of it is in every run, the rest are slow tests.
SLOW_3 = pytest.param(3, marks=pytest.mark.slow)


@pytest.mark.parametrize("deepspeed", ENGINES, ids=str)
def test_two_processes_give_the_adapter_of_one(
    base: Base,
    make_split: MakeSplit,
    together: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    deepspeed: dict[str, Any],
) -> None:
    # Four examples in batches of three: the second batch holds one row for two processes.
    a_job, training = make_job(make_split(n_train=4, n_val=3)), section(gradient_accumulation=2)
    [alone] = train(base, [a_job], training, PROMPT, validate_every_epoch=True)
    first, second = together(
        a_job,
        TrainingSection(**{**training.model_dump(), "deepspeed": deepspeed}),
        validate_every_epoch=True,
        save_to=tmp_path,
    )
    assert furthest(alone.adapter, first["tensors"]) < 1e-4
    assert identical(first["tensors"], second["tensors"])
    assert first["untouched"]
    assert second["untouched"]
    assert (first["steps"], first["tokens"]) == (alone.steps, alone.tokens)
    assert first["told"] == list(range(1, alone.steps + 1))
    assert second["told"] == [], "callbacks are the first process's"
    assert first["loss"] == second["loss"] == pytest.approx(alone.validation_loss, abs=1e-5)
    for ours, theirs in zip(alone.curve, first["curve"], strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5)
    # What was saved is whole: weights that are still scattered would be saved as zeros.
    saved = load_adapter(tmp_path)
    assert furthest(saved, first["tensors"]) == 0.0
    assert any(t.any() for name, t in saved.tensors.items() if ".lora_B." in name)
    [losses] = response_losses(base, [Wanted(a_job.split.validation, adapter=saved)], PROMPT)
    assert mean_token_loss(losses) == pytest.approx(first["loss"], abs=1e-5)


def test_every_process_counts_in_a_step(
    base: Base, make_split: MakeSplit, together: Callable[..., list[dict[str, Any]]]
) -> None:
    """AdamW forgives a wrong factor on all gradients; with clipping at their usual size it does not."""
    a_job, training = make_job(make_split(n_train=4)), section(max_grad_norm=0.05, batch_size=4)
    [alone] = train(base, [a_job], training, PROMPT)
    [unclipped] = train(base, [a_job], section(max_grad_norm=0.1, batch_size=4), PROMPT)
    tensors = together(a_job, training)[0]["tensors"]
    assert furthest(alone.adapter, tensors) < 1e-4
    assert furthest(unclipped.adapter, tensors) > 5e-4, "the case needs a norm that clips"


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_batch_with_fewer_rows_than_processes(
    base: Base, make_split: MakeSplit, together: Callable[..., list[dict[str, Any]]], zero_stage: int
) -> None:
    """One row a step: the second process never has one of its own."""
    a_job = make_job(make_split(n_turns=1, n_train=2, n_val=1))
    training = section(batch_size=1, deepspeed={"zero_stage": zero_stage})
    [alone] = train(base, [a_job], section(batch_size=1), PROMPT)
    first, _ = together(a_job, training)
    assert furthest(alone.adapter, first["tensors"]) < 1e-4
    assert first["loss"] == pytest.approx(alone.validation_loss, abs=1e-5)
    assert first["tokens"] == alone.tokens


def test_the_empty_layout_is_the_base_alone(
    base: Base, make_split: MakeSplit, together: Callable[..., list[dict[str, Any]]]
) -> None:
    a_job = make_job(make_split(), "0000")
    [alone] = train(base, [a_job], section(), PROMPT)
    for told in together(a_job, section()):
        assert "tensors" not in told
        assert told["loss"] == alone.validation_loss


@pytest.mark.parametrize("zero_stage", [2, SLOW_3])
def test_early_stopping_ends_every_process_at_once_with_the_best_weights(
    base: Base, make_split: MakeSplit, together: Callable[..., list[dict[str, Any]]], zero_stage: int
) -> None:
    a_job = make_job(make_split(n_train=2, n_val=6), parts=frozenset({"instruction"}))
    patient = {"instruction_epochs": 40, "learning_rate": 0.1, "early_stopping_patience": 2, "batch_size": 2}
    [alone] = train(base, [a_job], section(**patient), PROMPT)
    first, second = together(a_job, section(**patient, deepspeed={"zero_stage": zero_stage}))
    losses = [row["validation_loss"] for row in first["curve"]]
    assert 2 < len(losses) < 40
    assert losses.index(min(losses)) == len(losses) - 3, "it ends two epochs after the best"
    assert first["loss"] == pytest.approx(min(losses), abs=1e-6)
    assert len(losses) == len(alone.curve)
    assert furthest(alone.adapter, first["tensors"]) < 1e-4
    assert identical(first["tensors"], second["tensors"])


@pytest.mark.parametrize("zero_stage", [2, pytest.param(0, marks=pytest.mark.slow), SLOW_3])
def test_killed_processes_go_on_with_the_same_bits(
    make_split: MakeSplit, together: Callable[..., list[dict[str, Any]]], tmp_path: Path, zero_stage: int
) -> None:
    """Killed in the second epoch of the second stage; dropout draws go on as well."""
    a_job, training = make_job(make_split()), section(dropout=0.1, deepspeed={"zero_stage": zero_stage})
    never_killed, _ = together(a_job, training)
    killed = together(a_job, training, checkpoint_dir=tmp_path, kill_at_step=6)
    assert [told["killed"] for told in killed] == [True, True]
    assert all(told["untouched"] for told in killed)
    assert len(list(tmp_path.iterdir())) == 1, "one file for all processes"
    resumed, other = together(a_job, training, checkpoint_dir=tmp_path)
    n_steps = never_killed["steps"]
    assert resumed["told"] == list(range(1, n_steps + 1))[-len(resumed["told"]) :]
    assert 0 < len(resumed["told"]) < n_steps - 3, "finished epochs are not done again"
    for told in (resumed, other):
        assert identical(told["tensors"], never_killed["tensors"])
        assert told["curve"] == never_killed["curve"]
    assert list(tmp_path.iterdir()) == [], "a finished job leaves no checkpoint"


def test_another_number_of_processes_begins_the_job_anew(
    base: Base, make_split: MakeSplit, together: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    a_job, training = make_job(make_split()), section()
    together(a_job, training, checkpoint_dir=tmp_path, kill_at_step=5)
    steps: list[int] = []
    [alone] = train(
        base, [a_job], training, PROMPT, checkpoint_dir=tmp_path, on_progress=lambda _, i, n: steps.append(i)
    )
    assert steps[0] == 1
    [plain] = train(base, [a_job], training, PROMPT)
    assert plain.adapter is not None
    assert furthest(alone.adapter, {n: t.numpy() for n, t in plain.adapter.tensors.items()}) == 0.0


@pytest.mark.parametrize(
    ("zero_stage", "rungs"), [(2, (1, 3)), pytest.param(3, (3,), marks=pytest.mark.slow)]
)
def test_a_job_that_pauses_at_rungs_ends_with_the_same_bits(
    make_split: MakeSplit,
    together: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    zero_stage: int,
    rungs: tuple[int, ...],
) -> None:
    a_job, training = make_job(make_split()), section(deepspeed={"zero_stage": zero_stage})
    whole, _ = together(a_job, training, validate_every_epoch=True)
    for epoch in rungs:
        parts = [told["paused"] for told in together(a_job, training, until=epoch, checkpoint_dir=tmp_path)]
        assert [part.epoch for part in parts] == [epoch, epoch]
        assert parts[0].validation_loss == parts[1].validation_loss
        assert parts[0].validation_loss == pytest.approx(
            whole["curve"][epoch - 1]["validation_loss"], abs=1e-6
        )
    resumed, _ = together(a_job, training, checkpoint_dir=tmp_path, checkpoint_every_epoch=False)
    assert identical(resumed["tensors"], whole["tensors"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("zero_stage", [2, SLOW_3])
def test_bfloat16_trains_on_scattered_master_weights(
    make_split: MakeSplit, together: Callable[..., list[dict[str, Any]]], tmp_path: Path, zero_stage: int
) -> None:
    a_job = make_job(make_split())
    training = section(memory_epochs=1, instruction_epochs=1, deepspeed={"zero_stage": zero_stage})
    whole, _ = together(a_job, training)
    half, _ = together(a_job, training, dtype="bfloat16")
    assert half["loss"] == pytest.approx(whole["loss"], abs=1e-2)
    together(a_job, training, dtype="bfloat16", checkpoint_dir=tmp_path, kill_at_step=2)
    resumed, _ = together(a_job, training, dtype="bfloat16", checkpoint_dir=tmp_path)
    assert identical(half["tensors"], resumed["tensors"])


def test_no_engine_compiles_anything(
    pair: Any, make_split: MakeSplit, together: Callable[..., list[dict[str, Any]]]
) -> None:
    """The processes find neither a compiler nor ninja: what wants one would fail."""
    offload = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
    assert together(make_job(make_split()), section(deepspeed=offload))[0]["steps"]
    assert pair.compiled is not None
    assert not pair.compiled.exists()


def test_a_base_in_main_memory_is_trained_all_the_same(
    base: Base, tiny_llama_dir: Path, make_split: MakeSplit
) -> None:
    """With ZeRO-3, in one process; here main memory and the device are the same."""
    kept = load_base(BaseSection(model=str(tiny_llama_dir), device="cpu", keep_on="cpu"))
    a_job = make_job(make_split())
    [plain] = train(base, [a_job], section(), PROMPT)
    [other] = train(kept, [a_job], section(deepspeed={"zero_stage": 3}), PROMPT)
    assert other.adapter is not None
    assert furthest(plain.adapter, {n: t.numpy() for n, t in other.adapter.tensors.items()}) < 1e-4


def test_the_copy_for_zero_3_shares_the_frozen_weights(base: Base, make_split: MakeSplit) -> None:
    config = lora_config(
        make_job(make_split()).layout, base.spec, TrainingSection().lora_alpha, 0.0, base.model_id
    )
    with injected(base, config, seed=0) as model:
        own = dict(copy_to_scatter(model).named_parameters())
        for name, parameter in model.named_parameters():
            shares = own[name].data_ptr() == parameter.data_ptr()
            assert shares != parameter.requires_grad
            assert own[name] is not parameter


def test_zero_3_leaves_no_copy_of_the_base_behind(base: Base, make_split: MakeSplit) -> None:
    a_job = make_job(make_split(n_turns=2, n_train=1))
    training = section(memory_epochs=1, instruction_epochs=1, deepspeed={"zero_stage": 3})
    counts = []
    for _ in range(3):
        train(base, [a_job], training, PROMPT)
        gc.collect()
        counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert counts[2] <= counts[0] + 5


@pytest.mark.slow
@pytest.mark.parametrize("killed_rank", [0, 1])
def test_processes_one_of_which_was_killed_go_on_in_others(
    base: Base,
    tiny_llama_dir: Path,
    make_split: MakeSplit,
    process_group: Callable[..., Any],
    tmp_path: Path,
    killed_rank: int,
) -> None:
    """SIGKILL in the middle of a stage; the other process ends with an error and does not wait for ever."""
    kept = tmp_path / "kept"
    a_job, training = make_job(make_split()), section(deepspeed={"zero_stage": 2})
    [alone] = train(base, [a_job], training, PROMPT)
    what: dict[str, Any] = {"folder": str(tiny_llama_dir), "job": a_job, "section": training}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with (
        process_group(tmp_path / "first") as group,
        pytest.raises((EOFError, ConnectionResetError, RuntimeError)),
    ):
        group.run(**what, checkpoint_dir=kept, kill_at_step=6, sigkill_rank=killed_rank)
    assert len(list(kept.iterdir())) == 1
    with process_group(tmp_path / "second") as group:
        told = group.run(**what, checkpoint_dir=kept)[0]
    assert 0 < len(told["told"]) < alone.steps
    assert furthest(alone.adapter, told["tensors"]) < 1e-4
