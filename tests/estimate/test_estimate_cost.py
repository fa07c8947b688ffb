"""Costs: how they follow from counts, sizes and machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from milp_ray.config.search import SpaceSection
from milp_ray.config.training import DeepSpeedSection, TrainingSection
from milp_ray.errors import MilpError
from milp_ray.estimate.cost import (
    Cost,
    Machine,
    Work,
    pack_size,
    placements,
    training_memory,
    trial_cost,
    user_cost,
)
from milp_ray.estimate.paper import (
    PAPER_RANKS,
    PAPER_TABLE_7,
    memory_curve,
    nearest_layout,
    rank_rows,
)
from milp_ray.memory.space import SearchSpace
from milp_ray.training.device_speed import DEVICES, device, measured_peak
from milp_ray.training.flops import Placement
from milp_ray.training.model_shape import shape_of_config
from milp_ray.training.published import published_config
from milp_ray.training.workload import UserWork, invented_work

LLAMA_7B = shape_of_config(published_config("meta-llama/Llama-2-7b-hf"), dtype_bytes=2)
PLAIN = DeepSpeedSection()
HALF = Placement(32, 16, 1)


def work(**changes: Any) -> UserWork:
    given = {"history_tokens": 2000, "n_train": 35, "n_validation": 5, "example_tokens": 64} | changes
    return invented_work(
        TrainingSection(),
        parts=frozenset({"memory", "instruction"}),
        context_length=4096,
        max_new_tokens=48,
        **given,
    )


def machine(n_devices: int = 1, asked: float = 1.0, most: int | None = None) -> Machine:
    return Machine.of(DEVICES["a100"], n_devices, asked, most, threads=1)


def test_workers_are_as_many_as_the_devices_hold() -> None:
    assert machine(4, 1.0).n_workers == 4
    assert machine(1, 0.25).n_workers == 4
    assert machine(4, 1.0, most=3).n_workers == 3
    assert machine(3, 0.3).n_workers == 10
    with pytest.raises(MilpError, match="--devices 2 or more"):
        machine(1, 2.0)


def test_a_worker_on_a_cpu_has_no_more_threads_than_cores() -> None:
    on_cpu = Machine.of(DEVICES["cpu"], 2, 1.0, None, threads=8)
    assert (on_cpu.n_workers, on_cpu.portion) == (2, 1.0)


def test_a_stage_takes_as_long_as_its_rounds() -> None:
    one = Cost(flops=10.0, seconds=2.0, tokens=3.0)
    stage = Work.of(5, one, n_workers=2)
    assert stage.whole == Cost(50.0, 10.0, 15.0)
    assert stage.wall_seconds == 6.0
    assert Work.of(1, one, n_workers=8).n_workers == 1


def test_more_work_and_a_slower_device_take_longer() -> None:
    base = user_cost(LLAMA_7B, machine(), work(), HALF, PLAIN)
    assert user_cost(LLAMA_7B, machine(), work(history_tokens=4000), HALF, PLAIN).seconds > base.seconds
    slower = machine()
    slower = replace(slower, device=device("a100", share=0.1))
    assert user_cost(LLAMA_7B, slower, work(), HALF, PLAIN).seconds > base.seconds
    assert user_cost(LLAMA_7B, machine(1, 0.25), work(), HALF, PLAIN).seconds > base.seconds
    checkpointing = DeepSpeedSection(activation_checkpointing=True)
    assert user_cost(LLAMA_7B, machine(), work(), HALF, checkpointing).flops > base.flops


def test_layers_below_the_lowest_lora_are_paid_once_a_job() -> None:
    high = user_cost(LLAMA_7B, machine(), work(), Placement(32, 1, 31), PLAIN)
    low = user_cost(LLAMA_7B, machine(), work(), Placement(32, 1, 0), PLAIN)
    assert high.flops < 0.2 * low.flops
    zero_3 = user_cost(LLAMA_7B, machine(), work(), Placement(32, 1, 31), DeepSpeedSection(zero_stage=3))
    assert zero_3.flops > 3 * high.flops, "ZeRO-3 runs them each time"


def test_a_trial_is_the_mean_over_layouts_and_counts_every_probe_user() -> None:
    def trial(drawn: list[Placement | None], n: int = 1) -> Cost:
        return trial_cost(LLAMA_7B, machine(), work(), drawn, n_probe_users=n, batch_size=16, options=PLAIN)

    both = trial([HALF, None])
    assert both.flops == pytest.approx((trial([HALF]).flops + trial([None]).flops) / 2)
    assert trial([None]).tokens == 0, "the empty layout is not trained"
    assert trial([HALF], 3).seconds == pytest.approx(3 * trial([HALF]).seconds)


def test_layouts_are_drawn_as_the_space_draws_them() -> None:
    space = SearchSpace.for_base(SpaceSection(factors=("rank",)), LLAMA_7B.ffn)
    drawn = placements(space, seed=0)
    assert {p.rank for p in drawn if p} == set(space.ranks)
    assert {(p.n_lora_layers, p.lowest_layer) for p in drawn if p} == {(32, 0)}
    assert drawn == placements(space, seed=0)


def test_a_pack_of_the_estimate_fits_the_device() -> None:
    budget = DEVICES["a100"].memory
    assert training_memory(LLAMA_7B, work(), HALF, PLAIN).total < budget
    assert 1 <= pack_size(LLAMA_7B, work(), HALF, PLAIN, budget) < 100


def test_generation_is_bound_by_reading_the_weights() -> None:
    a100 = DEVICES["a100"]
    steps, weights = 100, LLAMA_7B.n_parameters * 2
    seconds = a100.decoding_seconds(1e9, 0, steps * weights, 2, 1.0)
    assert seconds > steps * weights / a100.bandwidth


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "tpu"}, "a100, h100, h200, cpu"),
        ({"name": "a100", "peak": 0.0}, "above 0"),
        ({"name": "a100", "share": 1.5}, "up to 1"),
    ],
)
def test_a_device_that_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(MilpError, match=said):
        device(**settings)


def test_a_processor_s_peak_can_be_measured() -> None:
    assert 1e8 < measured_peak(on_gpu=False, dtype_bytes=4, seconds=0.05) < 1e14


# ------------------------------------------------------------------------------------------- the paper's


def test_trainable_parameters_are_rank_times_in_and_out_of_every_map() -> None:
    rows = {row.rank: row for row in rank_rows(LLAMA_7B, PAPER_RANKS)}
    assert rows[8].one_layer == 8 * 3 * (4096 + 11008)
    assert rows[96].all_layers == 32 * 96 * 3 * (4096 + 11008)
    assert list(rows) == list(PAPER_RANKS)


def test_no_rank_on_all_layers_gives_the_paper_s_figure() -> None:
    nearest = nearest_layout(LLAMA_7B, PAPER_RANKS, PAPER_TABLE_7)
    assert (nearest.n_lora_layers, nearest.rank) == (17, 64)
    assert nearest.parameters != PAPER_TABLE_7
    assert nearest.rank_on_all_layers == pytest.approx(34.7, abs=0.1)


def test_a_prompt_grows_with_the_history_and_an_adapter_does_not() -> None:
    curve = memory_curve(LLAMA_7B, (8, 96), longest_history=8192, query_tokens=100, context_length=4096)
    a_token = 2 * 32 * 4096 * 2
    assert curve.history[0] == 0
    assert curve.history[-1] == 8192
    assert curve.prompted[-1] - curve.prompted[0] == 8192 * a_token
    assert curve.parameterised[8] == 4 * LLAMA_7B.adapter_parameters(8, 32) + 100 * a_token
    assert curve.equal_at[96] * a_token == 4 * LLAMA_7B.adapter_parameters(96, 32)
