"""Training through DeepSpeed: only LoRA weights learn, the base stays as it was, same seed same bits."""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.adapters import Adapter
from milp_ray.training.base import Base, load_base
from milp_ray.training.engine import linear_schedule
from milp_ray.training.job import Job, JobResult
from milp_ray.training.loss import mean_token_loss
from milp_ray.training.pack_optimizer import SlotAdamW
from milp_ray.training.response_loss import Wanted, response_losses
from milp_ray.training.train import train
from milp_ray.users.records import UserSplit

PROMPT = PromptSection()
QUICK = TrainingSection(
    memory_epochs=2, instruction_epochs=2, batch_size=2, learning_rate=1e-2, memory_block_turns=2
)
BOTH = frozenset({"memory", "instruction"})
Split = Callable[..., UserSplit]


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


def layout(bits: str = "0011", rank: int = 4) -> CanonicalLayout:
    return CanonicalLayout(tuple(bit == "1" for bit in bits), rank)


def job(split: UserSplit, bits: str = "0011", **changes: Any) -> Job:
    return replace(Job("job", split, layout(bits), BOTH, seed=0), **changes)


def section(**changes: Any) -> TrainingSection:
    return TrainingSection(**{**QUICK.model_dump(), **changes})


def run(base: Base, a_job: Job, training: TrainingSection = QUICK, **options: Any) -> JobResult:
    (result,) = train(base, [a_job], training, PROMPT, **options)
    return result


def same(a: Adapter | None, b: Adapter | None) -> bool:
    assert a is not None
    assert b is not None
    return a.tensors.keys() == b.tensors.keys() and furthest(a, b) == 0.0


def furthest(a: Adapter | None, b: Adapter | None) -> float:
    assert a is not None
    assert b is not None
    return max(float((a.tensors[n] - b.tensors[n]).abs().max()) for n in a.tensors)


def losses_of(base: Base, examples: Any, adapter: Any = None) -> list[tuple[float, int]]:
    [losses] = response_losses(base, [Wanted(examples, adapter=adapter)], PROMPT)
    return losses


def digest(base: Base) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def traces(base: Base) -> dict[str, Any]:
    """What a job could leave behind on the model."""
    modules = list(base.model.named_modules())
    return {
        "modules": [(name, type(module).__name__) for name, module in modules],
        "hooks": sum(
            len(getattr(m, kind))
            for _, m in modules
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ),
        "training": [name for name, module in modules if module.training],
        "gradients": [n for n, p in base.model.named_parameters() if p.requires_grad or p.grad is not None],
        "attributes": sorted(set(vars(base.model)) - {"_hf_peft_config_loaded"}),
        "attention": base.model.config._attn_implementation,
        "checkpointing": [n for n, m in modules if getattr(m, "gradient_checkpointing", False)],
    }


# ---------------------------------------------------------------------------------------- what is learnt


def test_training_lowers_the_loss_and_says_what_it_did(base: Base, make_split: Split) -> None:
    split = make_split(n_turns=6, n_train=4, n_val=2)
    before = mean_token_loss(losses_of(base, split.validation))
    training = section(memory_epochs=3, instruction_epochs=8, learning_rate=5e-2)
    result = run(base, job(split, layout=layout("1111", 16)), training)
    assert before is not None
    assert result.validation_loss is not None
    assert result.validation_loss < before - 0.2
    # Memory: 6 turns in blocks of two are 3 sequences, 2 batches; instruction: 4 examples, 2 batches.
    assert result.steps == 3 * 2 + 8 * 2
    assert [(row["stage"], row["epoch"]) for row in result.curve] == [
        *(("memory", epoch) for epoch in (1, 2, 3)),
        *(("instruction", epoch) for epoch in range(1, 9)),
    ]
    assert result.curve[-1]["training_loss"] < result.curve[3]["training_loss"]
    assert result.tokens > 0
    assert result.seconds > 0
    assert result.peak_rss_mib > 10


def test_the_validation_loss_is_the_mean_over_all_response_tokens(base: Base, make_split: Split) -> None:
    split = make_split(n_val=3)
    result = run(base, job(split))
    losses = losses_of(base, split.validation, result.adapter)
    n_tokens = sum(len(base.tokenize([" " + e.response])[0]) + 1 for e in split.validation)  # and the end
    assert sum(n for _, n in losses) == n_tokens
    assert result.validation_loss == pytest.approx(sum(s for s, _ in losses) / n_tokens, abs=1e-6)


def test_only_lora_weights_get_gradients_and_the_base_is_left_bit_for_bit(
    base: Base, make_split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, clean = digest(base), traces(base)
    seen: set[str] = set()
    step = SlotAdamW.step

    def watch(self: SlotAdamW, closure: Any = None) -> None:
        assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
        for one in self.steps:
            row = one.rack.gradients[one.slot]
            seen.update(name for name, pair in one.rack.pairs.items() if pair.b(row).any())
        step(self)

    monkeypatch.setattr(SlotAdamW, "step", watch)
    run(base, job(make_split(), "0101"))
    assert {name.split(".layers.")[1].split(".")[0] for name in seen} == {"1", "3"}
    assert digest(base) == before
    assert traces(base) == clean


def test_the_base_is_clean_after_a_job_that_failed(base: Base, make_split: Split) -> None:
    before, clean = digest(base), traces(base)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for settings in ({}, {"deepspeed": {"activation_checkpointing": True}}):
        with pytest.raises(KeyboardInterrupt):
            run(base, job(make_split()), section(**settings), on_progress=stop)
        assert digest(base) == before
        assert traces(base) == clean


def test_the_empty_layout_is_the_base_alone(base: Base, make_split: Split) -> None:
    split = make_split()
    result = run(base, job(split, "0000"))
    assert result.adapter is None
    assert (result.steps, result.tokens, result.curve) == (0, 0, [])
    losses = losses_of(base, split.validation)
    assert result.validation_loss == pytest.approx(mean_token_loss(losses), abs=1e-6)


def test_a_user_without_validation_examples_has_no_validation_loss(base: Base, make_split: Split) -> None:
    assert run(base, job(make_split(n_val=0))).validation_loss is None


def test_a_user_without_anything_to_train_on_gets_an_adapter_that_changes_nothing(
    base: Base, make_split: Split
) -> None:
    result = run(base, job(make_split(n_turns=0, n_train=0)))
    assert result.steps == 0
    assert result.adapter is not None
    assert all(not t.any() for name, t in result.adapter.tensors.items() if ".lora_B." in name)


@pytest.mark.parametrize(("parts", "names"), [(["memory"], ["memory"]), (["instruction"], ["instruction"])])
def test_a_job_trains_the_parts_it_names(
    base: Base, make_split: Split, parts: list[str], names: list[str]
) -> None:
    result = run(base, job(make_split(), parts=frozenset(parts)))
    assert list(dict.fromkeys(row["stage"] for row in result.curve)) == names


def test_joint_mixes_both_parts_for_the_larger_number_of_epochs(base: Base, make_split: Split) -> None:
    split = make_split(n_turns=6, n_train=4)
    result = run(base, job(split), section(stages="joint", memory_epochs=1, instruction_epochs=3))
    assert [(row["stage"], row["epoch"]) for row in result.curve] == [("joint", i) for i in (1, 2, 3)]
    assert result.steps == 3 * 4  # 3 + 4 sequences in batches of two


def test_unknown_parts_and_layouts_of_another_base_are_refused(base: Base, make_split: Split) -> None:
    with pytest.raises(MilpError, match="give one or both of"):
        run(base, job(make_split(), parts=frozenset({"history"})))
    with pytest.raises(MilpError, match=r"is for 3 layers, but the base .* has 4"):
        run(base, job(make_split(), "011"))
    with pytest.raises(MilpError, match="use at most 32"):
        run(base, job(make_split(), layout=layout("0011", 64)))
    with pytest.raises(MilpError, match=r"training\.max_length 999 .* use at most 256"):
        run(base, job(make_split()), section(max_length=999))


def test_a_diverging_job_says_what_to_lower(base: Base, make_split: Split) -> None:
    with pytest.raises(MilpError, match=r"diverged .* lower training\.learning_rate"):
        run(base, job(make_split()), section(learning_rate=1e30, memory_epochs=6))


def test_progress_counts_the_steps_of_the_whole_job(base: Base, make_split: Split) -> None:
    calls: list[tuple[str, int, int]] = []
    result = run(base, job(make_split()), on_progress=lambda *call: calls.append(call))
    assert calls == [("job", i, result.steps) for i in range(1, result.steps + 1)]


# ------------------------------------------------------------------------------------------ determinism


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2}, {"order": "chronological"}, {"stages": "joint"}])
def test_the_same_seed_gives_the_same_bits_whatever_happened_before(
    base: Base, make_split: Split, changes: dict[str, Any]
) -> None:
    split, training = make_split(), section(**changes)
    torch.manual_seed(1)
    first = run(base, job(split), training)
    torch.manual_seed(2)
    torch.rand(5)
    state = torch.get_rng_state()
    second = run(base, job(split), training)
    assert same(first.adapter, second.adapter)
    assert first.validation_loss == second.validation_loss
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not the job's to use"
    assert not same(first.adapter, run(base, job(split, seed=1), training).adapter)


def test_jobs_of_one_call_do_not_touch_each_other(base: Base, make_split: Split) -> None:
    jobs = [job(make_split(f"u-{i}"), bits, job_id=str(i)) for i, bits in enumerate(("0011", "1100", "0101"))]
    together = train(base, jobs, QUICK, PROMPT)
    assert [r.job_id for r in together] == ["0", "1", "2"]
    assert all(same(r.adapter, run(base, j).adapter) for r, j in zip(together, jobs, strict=True))


# -------------------------------------------------------------------------- schedule, accumulation, stopping


def test_the_schedule_warms_up_and_falls_linearly_to_zero() -> None:
    factors = [linear_schedule(step, n_steps=10, warmup_ratio=0.2) for step in range(11)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[2:] == pytest.approx([1 - i / 8 for i in range(9)])
    assert linear_schedule(0, n_steps=1, warmup_ratio=0.0) == 1.0


def test_accumulation_equals_one_larger_batch(base: Base, make_split: Split) -> None:
    """Also where batches hold different numbers of targets, and where the last window is short."""
    split = make_split(n_turns=5, n_train=7)
    large = run(base, job(split), section(batch_size=4, order="chronological"))
    small = run(base, job(split), section(batch_size=2, gradient_accumulation=2, order="chronological"))
    assert large.steps == small.steps
    assert furthest(large.adapter, small.adapter) < 1e-4
    assert large.validation_loss == pytest.approx(small.validation_loss, abs=1e-5)


def test_losses_do_not_depend_on_the_company(base: Base, make_split: Split) -> None:
    examples = make_split(n_train=9).train
    one = [losses_of(base, [example])[0] for example in examples]
    many = losses_of(base, examples)
    assert [n for _, n in one] == [n for _, n in many]
    assert [s / n for s, n in one] == pytest.approx([s / n for s, n in many], abs=1e-5)


def test_early_stopping_keeps_the_best_weights(base: Base, make_split: Split) -> None:
    patient = section(
        memory_epochs=0, instruction_epochs=40, learning_rate=0.1, early_stopping_patience=2, batch_size=1
    )
    result = run(base, job(make_split(n_train=2, n_val=6)), patient)
    losses = [row["validation_loss"] for row in result.curve]
    best = min(losses)
    assert len(losses) < 40, "the case needs a job that overfits"
    assert losses.index(best) == len(losses) - 3, "it ends two epochs after the best"
    assert result.validation_loss == pytest.approx(best, abs=1e-6)


def test_the_curve_has_validation_losses_when_asked_for(base: Base, make_split: Split) -> None:
    plain = run(base, job(make_split()))
    asked = run(base, job(make_split()), validate_every_epoch=True)
    assert [row["validation_loss"] for row in plain.curve] == [None] * 4
    assert all(math.isfinite(row["validation_loss"]) for row in asked.curve)
    assert asked.curve[-1]["validation_loss"] == asked.validation_loss
    assert same(plain.adapter, asked.adapter), "measuring changes nothing"


# ---------------------------------------------------------------------------- DeepSpeed's ways, other bases


@pytest.mark.parametrize(
    "deepspeed",
    [
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_every_engine_gives_the_same_adapter(
    base: Base, make_split: Split, deepspeed: dict[str, Any]
) -> None:
    before, clean = digest(base), traces(base)
    plain = run(base, job(make_split()))
    other = run(base, job(make_split()), section(deepspeed=deepspeed, gradient_accumulation=1))
    assert other.adapter is not None
    assert any(t.any() for n, t in other.adapter.tensors.items() if ".lora_B." in n), "zeros were saved"
    assert furthest(plain.adapter, other.adapter) < 1e-4
    assert digest(base) == before
    assert traces(base) == clean


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_bfloat16_trains_through_deepspeeds_own_master_weights(
    base: Base, tiny_llama_dir: Path, make_split: Split, tmp_path: Path, zero_stage: int
) -> None:
    half = load_base(BaseSection(model=str(tiny_llama_dir), device="cpu", dtype="bfloat16"))
    before, clean = digest(half), traces(half)
    training = section(deepspeed={"zero_stage": zero_stage}, memory_epochs=1)
    result, whole = run(half, job(make_split()), training), run(base, job(make_split()), training)
    in_half, in_whole = ([row["training_loss"] for row in r.curve] for r in (result, whole))
    assert in_half == pytest.approx(in_whole, abs=3e-3)
    assert in_half != in_whole

    def kill(_: str, done: int, __: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        run(half, job(make_split()), training, checkpoint_dir=tmp_path, on_progress=kill)
    assert same(result.adapter, run(half, job(make_split()), training, checkpoint_dir=tmp_path).adapter)
    assert digest(half) == before
    assert traces(half) == clean


@pytest.mark.parametrize("fixture", ["tiny_gpt2_dir", "tiny_roberta_dir"])
def test_other_architectures_learn_as_well(
    request: pytest.FixtureRequest, make_split: Split, fixture: str
) -> None:
    other = load_base(BaseSection(model=str(request.getfixturevalue(fixture)), device="cpu"))
    before, clean, split = digest(other), traces(other), make_split()
    start = mean_token_loss(losses_of(other, split.validation))
    training = section(instruction_epochs=12, learning_rate=5e-2)
    result = run(other, job(split, layout=layout("111", 16)), training)
    assert start is not None
    assert result.validation_loss is not None
    assert result.validation_loss < start - 0.05
    assert digest(other) == before
    assert traces(other) == clean


def test_many_jobs_in_one_process_leave_nothing_behind(base: Base, make_split: Split) -> None:
    process, clean = psutil.Process(), traces(base)
    jobs = [job(make_split(f"u-{i}"), job_id=str(i)) for i in range(20)]
    quick = section(memory_epochs=1, instruction_epochs=1)
    train(base, jobs[:5], quick, PROMPT)  # caches fill
    gc.collect()
    before, n_before = process.memory_info().rss, count_tensors()
    train(base, jobs, quick, PROMPT)
    gc.collect()
    assert process.memory_info().rss - before < 30 * 2**20
    assert count_tensors() - n_before <= 10
    assert traces(base) == clean


def count_tensors() -> int:
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
