"""Users files that batches were given: noted without credentials, and looked into where that can be done."""

from __future__ import annotations

from pathlib import Path

import pytest
from governed_run import IDS, Governed, user_line, write_users

from milp_ray.errors import MilpError
from milp_ray.personalize.governance.audit import audit_user
from milp_ray.personalize.governance.forget import forget_user
from milp_ray.personalize.governance.given import find_given, note_given

AWAY = "quatsch://somebody:password@host/users.jsonl?option=1"


def noted(it: Governed) -> list[str]:
    return it.run.facts()["batch_users"]["sources"]


def test_what_batches_are_given_is_noted_once_in_full_and_without_credentials(
    governed: Governed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    governed.run.record_facts(batch_users={"n_users": 3})
    note_given(governed.run, ["more.jsonl", AWAY])
    note_given(governed.run, [f"file://{tmp_path}/others", str(tmp_path / "more.jsonl")])
    away = "quatsch://host/users.jsonl?option=1"
    assert noted(governed) == [str(tmp_path / "others"), str(tmp_path / "more.jsonl"), away]
    assert governed.run.facts()["batch_users"]["n_users"] == 3


def test_a_user_of_given_files_is_sought_by_texts_and_the_files_are_named(
    governed: Governed, tmp_path: Path
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    write_users(folder / "1.jsonl", user_line("other"))
    write_users(folder / "2.jsonl", user_line("new"), user_line("other"))
    note_given(governed.run, [str(folder)])
    (governed.run.path / "debug.log").write_text("ValueError: I like blue, says new.")
    audit = audit_user(governed.run, governed.store, governed.config.users, "new")
    assert audit.sources == [str(folder / "2.jsonl")]
    assert "a text of the user" in dict(audit.found)[str(governed.run.path.resolve() / "debug.log")]
    found = find_given(governed.run, "new")
    assert found is not None
    assert len(found.history) == 3
    assert find_given(governed.run, "nobody") is None


def test_the_configurations_own_files_are_read_once_though_a_batch_was_given_them(
    governed: Governed,
) -> None:
    before = audit_user(governed.run, governed.store, governed.config.users, IDS[0])
    note_given(governed.run, [str(governed.users)])
    after = audit_user(governed.run, governed.store, governed.config.users, IDS[0])
    assert (after.sources, after.n_needles) == (before.sources, before.n_needles)
    assert after.sources == [governed.users]


def test_given_files_that_are_gone_or_cannot_be_reached_hold_no_forgetting_up(
    governed: Governed, tmp_path: Path
) -> None:
    note_given(governed.run, [AWAY, str(tmp_path / "gone.jsonl")])
    audit = forget_user(governed.run, governed.config, governed.store, IDS[0], by="x").audit
    assert audit is not None
    assert audit.is_clean
    [why] = audit.unread_sources
    assert "quatsch://…: it cannot be opened" in why
    assert "password" not in why
    with pytest.raises(MilpError, match="cannot be opened"):
        find_given(governed.run, IDS[0])
