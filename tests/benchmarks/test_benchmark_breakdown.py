"""The training benchmark's breakdown of a pack's steps."""

from __future__ import annotations

import pytest
import torch
from adapters.bases import base_of
from adapters.breakdown import (
    ATTENTION,
    ELEMENTWISE,
    GROUPS,
    IN_ATTENTION,
    PRODUCTS,
    breakdown,
    grouped,
)
from adapters.users import PROMPT, splits
from torch.profiler import ProfilerActivity, profile, record_function

from milp_ray.config.training import TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.job import Job, plan_job


def test_all_of_a_steps_time_is_in_some_group() -> None:
    base = base_of("embedded", "cpu")
    # Two layers: of a single one the attention is kept with what lies below.
    layout = CanonicalLayout((False,) * (base.n_layers - 2) + (True, True), 8)
    section = TrainingSection()
    jobs = [
        Job(str(i), split, layout, frozenset({"instruction"}), seed=i) for i, split in enumerate(splits(2))
    ]
    plans = [plan_job(job, base, section, PROMPT) for job in jobs]

    found = breakdown(base, plans, section, 2)

    assert set(found.seconds) == set(found.figures()["share"]) == set(GROUPS)
    assert sum(found.figures()["share"].values()) == pytest.approx(1.0, abs=1e-3)
    assert all(spent > 0 for spent in found.seconds.values())
    assert found.n_steps == plans[0].stages[0].steps_per_epoch(section)


def test_what_goes_back_through_attention_is_attention() -> None:
    weight = torch.randn(4, 4, requires_grad=True)

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        states = (torch.randn(4, 4) @ weight).exp()
        with record_function(IN_ATTENTION):
            states = torch.mm(states, states)
        states.backward(torch.ones(4, 4))

    _, numbers = grouped(profiler.events() or (), on_gpu=False)
    assert numbers[PRODUCTS] == 2  # forward, and the weight's gradient
    assert numbers[ELEMENTWISE] >= 1
    assert numbers[ATTENTION] >= 3  # forward, and a product for either factor's gradient
