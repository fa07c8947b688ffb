"""Which users a search measures layouts on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from milp_ray.config import Config
from milp_ray.config_loader import override_config
from milp_ray.errors import MilpError
from milp_ray.memory.space import SearchSpace
from milp_ray.pipeline.probes import probe_users, probes_of
from milp_ray.rundir import RunFolder
from milp_ray.search.journal import Journal
from milp_ray.search.study import StudySettings, _begin, _header, run_study, trial_task
from milp_ray.training.shapes import base_shapes
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


class Searched:
    """A run whose search has begun with some users, and what a later command on it sees."""

    def __init__(self, folder: Path, splits: list[UserSplit]) -> None:
        self.config = Config(name="r", output_dir=folder)
        self.run = RunFolder.create(self.config)
        self.splits, self.said = splits, list[str]()
        self.gate = SimpleNamespace(is_trimmed=lambda name: False)
        self.run.record_facts(probe_users=[split.user_id for split in splits])
        self.shapes = base_shapes(self.config.base)
        settings = StudySettings.of(self.config)
        space = SearchSpace.for_base(settings.space, self.shapes)
        self.run.study.mkdir()
        with Journal(self.run.journal) as journal:
            _begin(journal, _header(settings, space, self.shapes, trial_task(settings, splits), []), [])

    def finish(self) -> None:
        with Journal(self.run.journal) as journal:
            journal.append("study_finished", reason="all trials have ended")

    def probes(self) -> list[UserSplit] | None:
        work: Any = self
        return probes_of(work)

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture
def searched(tmp_path: Path, make_split: Callable[..., UserSplit]) -> Searched:
    return Searched(tmp_path, [make_split("a"), make_split("b")])


def grown(searched: Searched) -> list[UserSplit]:
    """The users, of whom one has said one thing more."""
    first, *others = searched.splits
    return [replace(first, history=(*first.history, first.history[0])), *others]


def test_a_finished_search_stays_when_its_users_data_have_grown(searched: Searched) -> None:
    before = searched.run.journal.read_bytes()
    searched.finish()
    assert searched.probes() == searched.splits
    assert searched.said == []
    searched.splits = grown(searched)
    assert searched.probes() is None
    assert "the search stays as it is, with 0 trials" in searched.said[0]
    assert searched.run.journal.read_bytes().startswith(before)


def test_an_unfinished_search_does_not_go_on_with_other_data_of_its_users(searched: Searched) -> None:
    searched.splits = grown(searched)
    probes = searched.probes()
    assert probes == searched.splits
    with pytest.raises(MilpError, match="its configuration or its users differ"):
        run_study(searched.run.study, StudySettings.of(searched.config), probes, searched.shapes)


def test_another_configuration_is_not_taken_for_other_users(searched: Searched) -> None:
    searched.finish()
    searched.config = override_config(searched.config, ["space.ranks=[2]"])
    assert searched.probes() == searched.splits  # the study itself refuses it, and says what differs
