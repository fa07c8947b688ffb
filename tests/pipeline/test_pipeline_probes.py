"""Which users a search measures layouts on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from milp_ray.errors import MilpError
from milp_ray.pipeline.probes import probe_users
from milp_ray.users.records import UserSplit


def test_probe_users_are_a_seeded_sample_of_those_that_can_be_measured(
    make_split: Callable[..., UserSplit],
) -> None:
    splits = [make_split(f"u-{i}", n_val=i % 2) for i in range(20)]
    chosen = probe_users(splits, 4, seed=1)
    assert [split.user_id for split in chosen] == [split.user_id for split in probe_users(splits, 4, seed=1)]
    assert all(split.validation for split in chosen)
    assert len({split.user_id for split in chosen}) == 4
    assert any(probe_users(splits, 4, seed) != chosen for seed in range(2, 6))


def test_too_few_probe_users_are_told_with_the_numbers(make_split: Callable[..., UserSplit]) -> None:
    with pytest.raises(MilpError, match="n_probe_users is 3, but 1 of 2 users"):
        probe_users([make_split("a"), make_split("b", n_val=0)], 3, seed=0)
