"""Ids that are words of the run: they take nothing of others away, and are found where ids stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from governed_run import (
    IDS,
    Governed,
    audit,
    files_of,
    forget,
    score_row,
)

from milp_ray.errors import MilpError
from milp_ray.evaluation.scores import read_scores, write_scores
from milp_ray.personalize.governance.audit import audit_forgotten
from milp_ray.training.adapters import Adapter

# What a run's own files hold for other reasons: tags, methods, keys, names of files and of folders.
NOT_PLAIN = ("user_id", "part-000000", "embedded")  # found where they stand, and left there
WORDS = ("1", "milp", "reason", "E", "none", "x", "study", "report", "v1", "index", *NOT_PLAIN)


@pytest.mark.parametrize("word", WORDS)
def test_an_id_that_is_a_word_of_the_run_takes_nothing_of_the_others_away(
    governed: Governed, word: str
) -> None:
    run = governed.run
    rows = [{**score_row(user_id, n), "mentions": "1"} for user_id in IDS for n in range(3)]
    write_scores(run.scores_file, rows, dict.fromkeys(IDS, "made from"))
    (run.path / "summary.json").unlink()
    (run.report / "index.html").rename(run.study / "index.html")
    run.record_facts(base={"model": "embedded"})
    changing = ("versions.json", "governance", ".scores")
    before = files_of(run.path, *changing)
    if word in NOT_PLAIN:
        with pytest.raises(MilpError, match="not all could be removed"):
            forget(governed, word)
    else:
        assert forget(governed, word).line == 2
        assert audit_forgotten(run, governed.store).is_clean
    assert files_of(run.path, *changing) == before
    assert run.facts()["probe_users"] == list(IDS[:3])
    assert run.facts()["base"] == {"model": "embedded"}


@pytest.mark.parametrize("word", ["1", "milp", "reason"])
def test_a_user_whose_id_is_a_word_of_the_run_is_forgotten_and_found_where_ids_stand(
    governed: Governed, adapter: Adapter, word: str
) -> None:
    run, line = governed.run, json.dumps({"user_id": word, "error": "E", "reason": "no"}) + "\n"
    others = run.failed_file.read_text()

    def add() -> None:
        governed.store.publish(word, adapter, {})
        run.failed_file.write_text(line + others)
        rows = [{**score_row(user_id, 0), "mentions": "1"} for user_id in (word, *IDS)]
        write_scores(run.scores_file, rows, dict.fromkeys((word, *IDS), "f"))
        run.record_facts(probe_users=[word, *IDS[:2]])

    add()
    result = forget(governed, word)
    assert {removed.what: removed.count for removed in result.removed if removed.count} == {
        "versions of the adapter": 1,
        "half-written files": 1,
        "pages and figures": 2,
        "rows": 2,
        "lines": 1,
        "values in the search": 10 + 1,
        "mentions": 1,
        "hashes of all data": 1,
    }
    assert run.failed_file.read_text() == others
    assert read_scores(run.scores_file)["user_id"].to_pylist() == list(IDS)
    add()
    for found in (audit(governed, word), audit_forgotten(run, governed.store)):
        names = {Path(where).name for where, _ in found.found}
        assert {"manifest.json", "failed.jsonl", "scores.parquet", "versions.json"} <= names


def test_a_mention_in_what_is_another_users_gives_way_to_a_pseudonym(governed: Governed) -> None:
    run = governed.run
    rows = [{**score_row(user_id, 0), "mentions": IDS[0]} for user_id in IDS]
    write_scores(run.scores_file, rows, dict.fromkeys(IDS, "f"))
    reason = {"user_id": IDS[1], "error": "E", "reason": f"as {IDS[0]}"}
    run.failed_file.write_text(json.dumps(reason) + "\n")
    forget(governed, IDS[0])
    kept = read_scores(run.scores_file)
    assert kept["user_id"].to_pylist() == list(IDS[1:])
    [mention] = set(kept["mentions"].to_pylist())
    line = json.loads(run.failed_file.read_text())
    assert mention.startswith("forgotten-")
    assert line == {"user_id": IDS[1], "error": "E", "reason": mention}
