"""Packs: every job ends as it would alone with plain PEFT and AdamW, whoever its neighbours are."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from support.jobs import BOTH, MakeSplit
from support.packs import PROMPT, RECIPE, Tensors, furthest, mixed_jobs, tensors_of
from torch import Tensor

from milp_ray.config.base import BaseSection
from milp_ray.config.training import TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import lora_config
from milp_ray.training import packed_lora
from milp_ray.training.adapters import load_tensors, read_tensors
from milp_ray.training.base import Base, load_base
from milp_ray.training.data import Sequence, epoch_plan
from milp_ray.training.encode import with_reference
from milp_ray.training.engine import linear_schedule
from milp_ray.training.generation import Questions, generate
from milp_ray.training.hooks import Hooks
from milp_ray.training.job import Job, plan_job
from milp_ray.training.rack import initial_weights, pairs_of
from milp_ray.training.response_loss import losses_under
from milp_ray.training.train import train, train_alone

TINY = ("tiny_llama_dir", "tiny_gpt2_dir", "tiny_roberta_dir")
ON_GPU = [pytest.param((folder, "cuda"), marks=pytest.mark.gpu) for folder in TINY]


@pytest.fixture(scope="module", params=[*((folder, "cpu") for folder in TINY), *ON_GPU], ids=str)
def any_base(request: pytest.FixtureRequest) -> Base:
    folder, device = request.param
    return load_base(BaseSection(model=str(request.getfixturevalue(folder)), device=device, dtype="float32"))


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


def with_plain_peft(base: Base, job: Job, section: TrainingSection) -> tuple[Tensors, list[float]]:
    """The job as one would write it by hand: PEFT's model, padded batches, all logits, torch's AdamW.

    Gives the weights and the mean training loss of every epoch.
    """
    plan = plan_job(job, base, section, PROMPT)
    config = lora_config(job.layout, base.spec, section.lora_alpha, 0.0, base.model_id)
    model = get_peft_model(base.model, config)
    load_tensors(model, initial_weights(pairs_of(job.layout, base.spec, base.shapes), job.seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses: list[float] = []
    try:
        for stage in plan.stages:
            rate, n_steps = plan.section.learning_rate, stage.n_steps(section)
            optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=section.weight_decay)
            done = 0
            for epoch in range(stage.epochs):
                rng = random.Random(f"{job.seed}/{stage.name}/{epoch}")
                total, count = 0.0, 0.0
                for chosen in epoch_plan(stage.sequences, section.batch_size, section.order, rng):
                    rows = [stage.sequences[i] for i in chosen]
                    nll = padded_nll(base, model, rows)
                    counted = torch.tensor([w for row in rows for w in row.target_weights]).to(nll)
                    ((nll * counted).sum() / counted.sum()).backward()
                    total += float((nll.detach() * counted).sum())
                    count += float(counted.sum())
                    torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
                    factor = linear_schedule(done, n_steps, section.warmup_ratio)
                    optimizer.param_groups[0]["lr"] = rate * factor
                    optimizer.step()
                    optimizer.zero_grad()
                    done += 1
                losses.append(total / count)
        return read_tensors(model), losses
    finally:
        model.unload()
        base.model.eval().requires_grad_(False)


def padded_nll(base: Base, model: Any, rows: list[Sequence]) -> Tensor:
    """The targets' losses with padding on the right, a mask, and every logit."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), base.pad_id)
    labels = torch.full((len(rows), length), -100)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        mask[i, :n] = 1
        labels[i, row.target_from : n] = ids[i, row.target_from : n]
    positions = (torch.arange(length) + base.first_position).expand(len(rows), -1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs = {name: tensor.to(base.device) for name, tensor in inputs.items()}
    labels = labels.to(base.device)[:, 1:]
    is_target = labels != -100
    log_q = model(**inputs).logits[:, :-1].log_softmax(-1)[is_target]
    nll = -log_q.gather(1, labels[is_target][:, None])[:, 0]
    has_own = [row.reference is not None for row in rows for _ in range(row.n_targets)]
    if not any(has_own):
        return nll
    with torch.no_grad(), model.disable_adapter():
        log_p = model(**inputs).logits[:, :-1].log_softmax(-1)[is_target]
    divergences = (log_p.exp() * (log_p - log_q)).sum(1)
    return torch.where(torch.tensor(has_own, device=nll.device), divergences, nll)


def share_apart(a: Tensors, b: Tensors, distance: float) -> float:
    """Share of the weights that differ by more than ``distance``.

    Adam divides a gradient by its own size: where terms that cancel leave nothing but rounding, the sign of a
    whole step is chance, in whatever way the sum is worked out.
    """
    apart = torch.cat([((a[name] - b[name]).abs() > distance).flatten() for name in a])
    return float(apart.float().mean())


# ---------------------------------------------------------------------------------------- equal to alone


def test_a_packed_job_equals_the_same_job_alone_with_plain_peft(
    any_base: Base, make_split: MakeSplit
) -> None:
    """Mixed ranks, layers, lengths, rates, seeds and ends, in fewer slots than jobs; up to 71 steps."""
    before = {name: tensor.clone() for name, tensor in any_base.model.state_dict().items()}
    jobs = mixed_jobs(any_base, make_split)
    results = train(any_base, jobs, RECIPE, PROMPT)
    assert max(result.steps for result in results) >= 50
    assert len({result.steps for result in results}) > 3, "the case needs jobs that end at different times"
    for job, result in zip(jobs, results, strict=True):
        weights, losses = with_plain_peft(any_base, job, RECIPE)
        assert [row["training_loss"] for row in result.curve] == pytest.approx(losses, abs=1e-5)
        assert furthest(tensors_of(result), weights) < 1e-5
    after = any_base.model.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def weighted_job(base: Base, make_split: MakeSplit, name: str = "weighted") -> Job:
    """Two stages whose targets count unevenly: some for nothing, some for three times as much."""
    split = make_split(name, n_turns=6, n_train=4)
    job = Job(name, split, CanonicalLayout((True,) * base.n_layers, 4), BOTH, 3)
    stages = []
    for stage in plan_job(job, base, RECIPE, PROMPT).stages:
        sequences = tuple(
            replace(s, weights=tuple((0.0, 0.5, 3.0)[i % 3] for i in range(s.n_targets)))
            for s in stage.sequences
        )
        stages.append(replace(stage, sequences=sequences))
    return replace(job, stages=tuple(stages))


def test_targets_count_by_their_weights_in_packs_and_alone(any_base: Base, make_split: MakeSplit) -> None:
    """Beside a job whose targets count alike, which ends with the bits that it has by itself."""
    plain = mixed_jobs(any_base, make_split)[1]
    weighted = weighted_job(any_base, make_split)
    neighbour, packed = train(any_base, [plain, weighted], RECIPE, PROMPT)
    by_hand, losses = with_plain_peft(any_base, weighted, RECIPE)
    [unweighted] = train(any_base, [replace(weighted, stages=None)], RECIPE, PROMPT)
    ended = train_alone(any_base, weighted, RECIPE, PROMPT, Hooks())
    for curve in (packed.curve, ended.progress.curve):
        assert [row["training_loss"] for row in curve] == pytest.approx(losses, abs=1e-5)
    assert furthest(tensors_of(packed), by_hand) < 1e-5
    assert furthest(ended.tensors, by_hand) < 1e-5
    assert furthest(tensors_of(unweighted), by_hand) > 1e-4
    [alone] = train(any_base, [plain], RECIPE, PROMPT)
    assert furthest(tensors_of(neighbour), tensors_of(alone)) < 1e-5


def test_an_adapter_is_held_to_what_the_base_says_in_packs_and_alone(
    any_base: Base, make_split: MakeSplit
) -> None:
    """Every other sequence has the base's own distributions for targets."""
    weighted = weighted_job(any_base, make_split)
    stages = []
    for stage in weighted.stages or ():
        both = zip(stage.sequences, with_reference(any_base, stage.sequences), strict=True)
        chosen = tuple(pair[i % 2] for i, pair in enumerate(both))
        assert len({len(one.ids) for one in chosen}) > 1, "the case needs rows that are padded"
        stages.append(replace(stage, sequences=chosen))
    held = replace(weighted, stages=tuple(stages))
    [packed] = train(any_base, [held], RECIPE, PROMPT)
    by_hand, losses = with_plain_peft(any_base, held, RECIPE)
    ended = train_alone(any_base, held, RECIPE, PROMPT, Hooks())
    for curve in (packed.curve, ended.progress.curve):
        assert [row["training_loss"] for row in curve] == pytest.approx(losses, abs=1e-5)
    assert furthest(tensors_of(packed), by_hand) < 1e-5
    assert furthest(ended.tensors, by_hand) < 1e-5
    plans = [plan_job(job, any_base, RECIPE, PROMPT) for job in (weighted, held)]
    assert plans[0].fingerprint != plans[1].fingerprint
    sequences = [one for stage in stages for one in stage.sequences]
    bare = [replace(one, reference=None) for one in sequences]
    losses_of = losses_under(any_base, [None, None], [sequences, bare])
    assert losses_of[0] == losses_of[1], "what measures does not look at references"


def test_weights_of_one_are_no_weights_and_change_the_fingerprint_alone(
    base: Base, make_split: MakeSplit
) -> None:
    plain = weighted_job(base, make_split)
    assert plain.stages is not None

    def with_weights(make: Callable[[int], tuple[float, ...] | None]) -> Job:
        stages = [
            replace(stage, sequences=tuple(replace(s, weights=make(s.n_targets)) for s in stage.sequences))
            for stage in plain.stages or ()
        ]
        return replace(plain, stages=tuple(stages))

    none, ones = with_weights(lambda n: None), with_weights(lambda n: (1.0,) * n)
    twos = with_weights(lambda n: (2.0,) * n)
    results = [train(base, [job], RECIPE, PROMPT)[0] for job in (none, ones, twos)]
    assert furthest(tensors_of(results[0]), tensors_of(results[1])) == 0.0
    assert furthest(tensors_of(results[0]), tensors_of(results[2])) < 1e-6
    prints = {plan_job(job, base, RECIPE, PROMPT).fingerprint for job in (none, ones, twos)}
    assert len(prints) == 3
    planned = plan_job(replace(plain, stages=None), base, RECIPE, PROMPT)
    assert plan_job(none, base, RECIPE, PROMPT).fingerprint == planned.fingerprint


@settings(
    max_examples=10,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_job_depends_on_its_neighbours(base: Base, make_split: MakeSplit, data: st.DataObject) -> None:
    """Random packs: any layouts, lengths, parts, early stopping, dropout, accumulation and pack sizes."""
    section = RECIPE.model_copy(
        update={
            "memory_epochs": data.draw(st.integers(1, 2)),
            "instruction_epochs": data.draw(st.integers(1, 3)),
            "stages": data.draw(st.sampled_from(["sequential", "joint"])),
            "order": data.draw(st.sampled_from(["shuffled", "chronological"])),
            "gradient_accumulation": data.draw(st.integers(1, 2)),
            "dropout": data.draw(st.sampled_from([0.0, 0.2])),
            "early_stopping_patience": data.draw(st.sampled_from([None, 1])),
            "learning_rate": data.draw(st.sampled_from([5e-4, 5e-3])),
        }
    )
    jobs = []
    for i in range(data.draw(st.integers(2, 5))):
        mask = data.draw(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
        layout = CanonicalLayout(tuple(mask), data.draw(st.sampled_from([2, 8])))
        n_turns, n_train = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
        split = make_split(f"u-{i}", n_turns=n_turns, n_train=n_train)
        parts = data.draw(st.sampled_from([BOTH, frozenset({"memory"}), frozenset({"instruction"})]))
        jobs.append(Job(f"job-{i}", split, layout, parts, seed=i))
    size = data.draw(st.integers(1, 5))
    together = train(base, jobs, section.model_copy(update={"pack_size": size}), PROMPT)
    for job, result in zip(jobs, together, strict=True):
        [alone] = train(base, [job], section, PROMPT)
        assert (alone.steps, alone.tokens) == (result.steps, result.tokens)
        assert result.validation_loss == pytest.approx(alone.validation_loss, abs=1e-4)
        assert share_apart(tensors_of(result), tensors_of(alone), 1e-4) < 1e-2


def test_products_in_one_go_give_the_gradients_of_products_one_by_one(
    base: Base, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does; the six jobs are of four layouts, two of which two jobs of other lengths share."""
    jobs = mixed_jobs(base, make_split)
    jobs += [replace(jobs[1], job_id="again", seed=5), replace(jobs[2], job_id="twin")]
    section = RECIPE.model_copy(update={"pack_size": 8})
    expected = train(base, jobs, section, PROMPT)
    made: list[int] = []

    def pays(n_segments: int, n_tokens: int, length: int, device: torch.device) -> bool:
        made.append(n_segments * length - n_tokens)
        return True

    monkeypatch.setattr(packed_lora, "_pays", pays)
    monkeypatch.setattr(packed_lora, "_stacks_in_training", lambda device: True)
    for result, wanted in zip(train(base, jobs, section, PROMPT), expected, strict=True):
        assert furthest(tensors_of(result), tensors_of(wanted)) < 2e-5
    assert 0 in made
    assert max(made) > 0, "the case needs segments of one length, and of several"


def test_zero_decides_the_engine_and_not_the_weights(base: Base, make_split: MakeSplit) -> None:
    """The one-job engine, which ZeRO uses, and packs start from the same weights and go the same way."""
    job = mixed_jobs(base, make_split)[1]
    other = RECIPE.model_copy(update={"deepspeed": RECIPE.deepspeed.model_copy(update={"zero_stage": 2})})
    [packed], [alone] = (train(base, [job], section, PROMPT) for section in (RECIPE, other))
    assert furthest(tensors_of(packed), tensors_of(alone)) < 1e-5
    assert packed.steps == alone.steps
    assert packed.adapter is not None
    assert alone.adapter is not None
    assert packed.adapter.config == alone.adapter.config


def test_answers_in_packs_equal_answers_alone(any_base: Base, make_split: MakeSplit) -> None:
    """Token for token: greedy decoding of rows of many adapters, with rows of the base alone among them."""
    jobs = mixed_jobs(any_base, make_split)
    strong = RECIPE.model_copy(update={"learning_rate": 2e-2})
    adapters = [None, *(result.adapter for result in train(any_base, jobs, strong, PROMPT))]
    asked = [
        Questions([f"Question: what is {'so ' * j}{i}?\nAnswer:" for j in range(1 + i % 3)], adapter)
        for i, adapter in enumerate(adapters)
    ]
    together = generate(any_base, asked, max_new_tokens=12, batch_size=5)
    alone = [generate(any_base, [one], max_new_tokens=12, batch_size=1)[0] for one in asked]
    assert together == alone
    assert len({answer for answers in together for answer in answers}) > 3
