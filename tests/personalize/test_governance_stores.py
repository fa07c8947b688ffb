"""Forgetting in every store that a run's adapters went to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from governed_run import (
    IDS,
    Governed,
    audit,
    forget,
    make_governed,
)

from milp_ray.config_loader import override_config
from milp_ray.errors import MilpError
from milp_ray.personalize.governance.audit import audit_forgotten
from milp_ray.personalize.governance.forget import forget_items
from milp_ray.personalize.governance.items import find_user, resolve
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.governance.stores import remember_store
from milp_ray.personalize.store import AdapterStore, run_store
from milp_ray.rundir import RunFolder
from milp_ray.training.adapters import Adapter


def test_adapters_in_the_runs_own_folder_go_too_where_the_store_is_elsewhere(
    tmp_path: Path, adapter: Adapter, study_events: Callable[..., Any]
) -> None:
    it = make_governed(tmp_path, adapter, study_events(4), store=str(tmp_path / "elsewhere"))
    own = AdapterStore(it.run.adapters)
    own.publish(IDS[0], adapter, {})
    assert forget(it, IDS[0]).removed[0].count == 3
    assert own.versions(IDS[0]) == it.store.versions(IDS[0]) == []
    assert audit(it, IDS[0]).is_clean


@pytest.fixture
def moved(tmp_path: Path, adapter: Adapter, study_events: Callable[..., Any]) -> Governed:
    """A run whose adapters went to a store that its configuration no longer names."""
    it = make_governed(tmp_path, adapter, study_events(4), store=str(tmp_path / "earlier"))
    remember_store(it.run, it.store)
    config = override_config(it.config, [f"personalize.store={tmp_path / 'now'}"])
    run = RunFolder.create(config)
    return Governed(run, config, run_store(run.store, config.personalize), it.users)


@pytest.mark.parametrize("fresh", [False, True])
def test_adapters_in_a_store_of_an_earlier_configuration_are_found_and_go_too(
    moved: Governed, tmp_path: Path, fresh: bool
) -> None:
    if fresh:
        RunFolder.create(moved.config, fresh=True)
    earlier = AdapterStore(tmp_path / "earlier")
    found = audit(moved, IDS[0]).found
    assert any(Path(where).is_relative_to(tmp_path / "earlier") for where, _ in found)
    assert forget(moved, IDS[0]).removed[0].count == 2
    assert earlier.versions(IDS[0]) == []
    assert earlier.versions(IDS[1]) == [1, 2]
    assert audit(moved, IDS[0]).is_clean
    earlier.publish(IDS[0], earlier.load(IDS[1]), {})
    assert not audit_forgotten(moved.run, moved.store).is_clean


def test_versions_with_a_forgotten_item_go_from_a_store_of_an_earlier_configuration(
    moved: Governed, tmp_path: Path
) -> None:
    hashes = resolve(["history:0"], find_user(moved.config.users, 0, IDS[0]))
    with moved.run.lock():
        found = forget_items(moved.run, moved.config, moved.store, IDS[0], hashes, by="x")
    assert found.removed[0].count == 2
    assert AdapterStore(tmp_path / "earlier").versions(IDS[0]) == []


def test_a_store_of_an_earlier_configuration_that_is_away_is_told_and_nothing_is_signed_off(
    moved: Governed, tmp_path: Path
) -> None:
    away = (tmp_path / "earlier").rename(tmp_path / "unmounted")
    for call in (forget, audit):
        with pytest.raises(MilpError, match=r"earlier under an earlier configuration.*versions\.json"):
            call(moved, IDS[0])
    assert not Record(moved.run.path).state.forgotten
    away.rename(tmp_path / "earlier")
    assert forget(moved, IDS[0]).audit is not None


def test_of_a_run_that_recorded_no_stores_the_configured_one_is_kept_in_mind(
    tmp_path: Path, adapter: Adapter, study_events: Callable[..., Any]
) -> None:
    it = make_governed(tmp_path, adapter, study_events(4), store=str(tmp_path / "earlier"))
    facts = it.run.facts()
    del facts["stores"]
    it.run.versions_file.write_text(json.dumps(facts))
    run = RunFolder.create(override_config(it.config, ["personalize.store=null"]))
    assert run.other_stores() == [str(tmp_path / "earlier")]
    assert RunFolder.create(it.config).other_stores() == [str(tmp_path / "earlier")]
