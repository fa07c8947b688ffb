"""The file of judgements: what replaces what, and what forgetting a user leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.judgements import DRAWS, judgement

from milp_ray.errors import MilpError
from milp_ray.evaluation.judgements import read_judgements, write_judgements
from milp_ray.evaluation.win_rate import win_rates
from milp_ray.personalize.governance import traces
from milp_ray.personalize.governance.needles import IdFinder
from milp_ray.rundir import RunFolder


def test_a_users_new_judgements_replace_that_users_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "a=b" / "judgements.parquet"
    path.parent.mkdir()
    write_judgements(path, [judgement("a", 0, 1), judgement("a", 1, 1), judgement("b", 0, 1)])
    write_judgements(path, [judgement("a", 0, -1), judgement("a", 0, 0, judge="other")])
    found = {(r["user_id"], r["example"], r["judge"]): r["choice"] for r in read_judgements(path).to_pylist()}
    assert found == {("a", 0, "embedded"): -1, ("a", 0, "other"): 0, ("b", 0, "embedded"): 1}


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "judgements.parquet"
    path.write_bytes(b"PAR1 or not")
    with pytest.raises(MilpError, match="damaged"):
        read_judgements(path)


def test_forgetting_a_user_takes_the_judgements_away(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write_judgements(run.judgements_file, [judgement("u-1", 0, 1), judgement("u-12", 0, -1)])
    removed = traces.tables(run, IdFinder("u-1"), dry_run=False)
    assert removed.count == 1
    assert read_judgements(run.judgements_file)["user_id"].to_pylist() == ["u-12"]
    traces.tables(run, IdFinder("u-12"), dry_run=False)
    assert win_rates(read_judgements(run.judgements_file), DRAWS) == []
