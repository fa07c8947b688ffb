"""How many trials a cluster holds, at the beginning and later. No Ray is started."""

from __future__ import annotations

import pytest
import ray

from milp_ray.config.search import SearchSection
from milp_ray.errors import MilpError
from milp_ray.search.tuner import check_room, count_slots


@pytest.mark.parametrize(
    "section",
    [
        SearchSection(processes_per_trial=4, cpus_per_trial=8),
        SearchSection(trials_per_process=4, cpus_per_trial=8),
    ],
)
def test_where_no_trial_fits_a_search_does_not_begin_but_one_that_has_begun_waits(
    section: SearchSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = {"CPU": 16.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: cluster)
    check_room(section)
    assert count_slots(section) == 2 * section.n_sharing
    cluster["CPU"] = 4.0  # nodes have left
    with pytest.raises(MilpError, match=r"take 8 CPUs .* the cluster has 4 CPUs"):
        check_room(section)
    assert count_slots(section) == section.n_sharing
    on_demand = section.model_copy(update={"max_concurrent_trials": 3})
    check_room(on_demand)
    assert count_slots(on_demand) <= 3
