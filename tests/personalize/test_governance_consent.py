"""Consent and retention: who is trained, who is served, and what is kept for how long."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from governed_run import IDS, Governed, user_line, write_users
from typer.testing import CliRunner

from milp_ray import store_changes, store_view
from milp_ray.cli import app
from milp_ray.config import Config
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.config.users import UsersSection
from milp_ray.errors import MilpError
from milp_ray.personalize.governance import retention
from milp_ray.personalize.governance.consent import (
    Gate,
    NoConsentError,
    NoSuchUserError,
    record_consent,
)
from milp_ray.personalize.governance.forget import forget_items, forget_user
from milp_ray.personalize.governance.items import example_hash
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.governance.retention import Retention, collect_expired
from milp_ray.personalize.store import AdapterExpiredError, AdapterStore, hash_id, precision_loss, survey
from milp_ray.personalize.store.encryption import KeySource
from milp_ray.pipeline.answering import generate
from milp_ray.training.adapters import Adapter
from milp_ray.users.readers import LoadedUsers, read_users
from milp_ray.users.records import User, UserSplit
from milp_ray.users.splits import split_user


def say(it: Governed, user_id: str, state: Any) -> bool:
    return record_consent(Record(it.run.path), user_id, state, "the officer")


def gate(it: Governed, policy: Any = "assumed") -> Gate:
    return Gate(Record(it.run.path), policy)


def person(user_id: str, consent: bool | None) -> User:
    return User(user_id, consent=consent)


# -------------------------------------------------------------------------------------------------- consent


@pytest.mark.parametrize(
    ("in_file", "policy", "refused"),
    [
        (True, "assumed", None),
        (True, "required", None),
        (None, "assumed", None),
        (None, "required", "no consent"),
        (False, "assumed", "consent withdrawn"),
        (False, "required", "consent withdrawn"),
    ],
)
def test_the_users_file_and_the_policy_decide_who_is_trained(
    tmp_path: Path, in_file: bool | None, policy: Any, refused: str | None
) -> None:
    assert Gate(Record(tmp_path), policy).refusal(person("u", in_file)) == refused


def test_what_a_person_said_by_the_command_counts_more_than_the_file(governed: Governed) -> None:
    say(governed, IDS[0], "withdrawn")
    say(governed, IDS[1], "given")
    for policy in ("assumed", "required"):
        assert gate(governed, policy).refusal(person(IDS[0], True)) == "consent withdrawn"
        assert gate(governed, policy).refusal(person(IDS[1], None)) is None
    say(governed, IDS[0], "given")
    assert gate(governed, "required").refusal(person(IDS[0], None)) is None


def test_a_user_who_withdrew_is_not_served_until_consent_is_given_again(governed: Governed) -> None:
    assert say(governed, IDS[0], "withdrawn")
    assert not say(governed, IDS[0], "withdrawn")
    with pytest.raises(NoConsentError, match="has withdrawn consent") as told:
        generate(governed.run, governed.config, IDS[0], "Who am I?")
    assert "--give" in str(told.value)
    gate(governed).check_serving(IDS[1], "run")
    say(governed, IDS[0], "given")
    gate(governed).check_serving(IDS[0], "run")


def loaded(it: Governed, **consent: bool | None) -> LoadedUsers:
    lines = [user_line(user_id, consent=consent.get(user_id.replace("-", "_"), True)) for user_id in IDS]
    write_users(it.users, *lines)
    return read_users(it.config.users, 0)


def test_consent_that_the_file_withdraws_ends_serving_and_the_file_can_give_it_again(
    governed: Governed,
) -> None:
    now = loaded(governed, ann_0001=False)
    assert gate(governed).note_file(now.users, now.problems, governed.store) == 1
    with pytest.raises(NoConsentError, match="said by the users' file"):
        gate(governed).check_serving(IDS[0], "run")
    assert gate(governed).note_file(now.users, now.problems, governed.store) == 1
    assert Record(governed.run.path).n_lines == 1  # said once
    later = loaded(governed)
    assert gate(governed).note_file(later.users, later.problems, governed.store) == 0
    gate(governed).check_serving(IDS[0], "run")


def test_a_file_that_may_be_stale_does_not_take_back_a_withdrawal_by_the_command(governed: Governed) -> None:
    say(governed, IDS[0], "withdrawn")
    now = loaded(governed)
    assert gate(governed).note_file(now.users, now.problems, governed.store) == 1
    with pytest.raises(NoConsentError):
        gate(governed).check_serving(IDS[0], "run")


def test_where_consent_is_required_silence_ends_serving_too(governed: Governed) -> None:
    now = loaded(governed, u_1=None)
    assert gate(governed, "required").note_file(now.users, now.problems, governed.store) == 1
    with pytest.raises(NoConsentError, match=r"users\.consent: required"):
        gate(governed, "required").check_serving("u-1", "run")
    gate(governed, "assumed").check_serving("u-1", "run")


def test_nothing_is_recorded_of_people_who_have_no_adapter(governed: Governed) -> None:
    governed.store.delete(IDS[0])
    now = loaded(governed, ann_0001=False)
    assert gate(governed).note_file(now.users, now.problems, governed.store) == 0
    assert Record(governed.run.path).n_lines == 0


def test_who_may_not_be_served_is_not_exported(
    governed: Governed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(governed, IDS[0], "withdrawn")
    opened = store_view.opened(str(governed.run.path))
    store_changes.export(opened, tmp_path / "all", None, "peft")
    lines = (tmp_path / "all" / "index.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["user_id"] for line in lines) == sorted(IDS[1:])
    assert "1 users are left out" in capsys.readouterr().out
    with pytest.raises(NoConsentError):
        store_changes.export(opened, tmp_path / "one", [IDS[0]], "peft")
    assert not (tmp_path / "one").exists()


def test_precisions_are_measured_on_users_who_may_be_served_and_on_what_they_let_stand(
    governed: Governed, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(governed, IDS[0], "withdrawn")
    forget_user(governed.run, governed.config, governed.store, IDS[1], by="x")
    [user] = [user for user in read_users(governed.config.users, 0).users if user.user_id == IDS[2]]
    gone = split_user(user, governed.config.users.split).validation[0]
    hashes = [example_hash(gone)]
    forget_items(governed.run, governed.config, governed.store, IDS[2], hashes, by="x")
    measured: dict[str, UserSplit] = {}

    def measure(store: object, base: object, splits: Iterable[UserSplit], *_: object) -> list[object]:
        measured.update({split.user_id: split for split in splits})
        return []

    monkeypatch.setattr(precision_loss, "measure_precisions", measure)
    monkeypatch.setattr("milp_ray.training.base.load_base", lambda section: None)
    store_view.print_precisions(store_view.opened(str(governed.run.path)), 5, as_json=True)
    assert sorted(measured) == sorted(IDS[2:])
    assert gone not in measured[IDS[2]].validation


def test_a_forgotten_user_cannot_be_given_consent_again(governed: Governed) -> None:
    forget_user(governed.run, governed.config, governed.store, IDS[0], by="x")
    with pytest.raises(NoSuchUserError, match="there is no user"):
        say(governed, IDS[0], "given")


def test_consent_may_be_asked_for_by_a_run_that_assumed_it(governed: Governed) -> None:
    from milp_ray.rundir import RunFolder

    users = governed.config.users.model_copy(update={"consent": "required"})
    RunFolder.create(governed.config.model_copy(update={"users": users}))
    assert RunFolder.open(governed.run.path).config().users.consent == "required"
    assert UsersSection().consent == "assumed"


# ------------------------------------------------------------------------------------------------ retention


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``later(days)``: so many days from now it is for the store."""
    real = retention.now

    def move(days: float) -> None:
        def moved() -> datetime:
            return real() + timedelta(days=days)

        monkeypatch.setattr(retention, "now", moved)
        monkeypatch.setattr("milp_ray.personalize.store.adapter_store.now", moved)

    return move


KEPT = Retention("answers in the shop", 30)


def test_purpose_and_period_stand_in_the_manifest_in_the_clear_of_an_encrypted_store_too(
    tmp_path: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "ab" * 32)
    for name, key in (("clear", None), ("sealed", KeySource("variable", "KEY"))):
        store = AdapterStore(tmp_path / name, retention=KEPT, key=key)
        store.publish("u", adapter, {})
        [entry] = survey.entries(AdapterStore(tmp_path / name))
        assert entry.manifest is not None
        stamped = entry.manifest.retention
        assert stamped is not None
        assert (stamped["purpose"], stamped["days"]) == ("answers in the shop", 30)
        made = datetime.fromisoformat(entry.manifest.created)
        period = datetime.fromisoformat(stamped["expires"]) - made
        assert abs(period - timedelta(days=30)) < timedelta(seconds=2)


def test_an_expired_adapter_is_served_by_no_read_and_made_anew_by_the_next_batch(
    tmp_path: Path, adapter: Adapter, later: Callable[[float], None]
) -> None:
    store = AdapterStore(tmp_path, retention=KEPT)
    store.publish("u", adapter, {}, fingerprint="f")
    later(29.9)
    assert store.has("u", "f")
    store.load("u")
    later(30.1)
    assert not store.has("u", "f")
    for read in (store.load, store.folder):
        with pytest.raises(AdapterExpiredError, match="for: answers in the shop") as told:
            read("u")
        assert "store gc --expired" in str(told.value)
    assert store.verify("u").version == 1


@pytest.mark.parametrize(("days", "is_expired"), [(10, True), (60, True), (None, True), (31, True)])
def test_what_the_manifest_promised_is_kept_whatever_the_configuration_says_later(
    tmp_path: Path, adapter: Adapter, later: Callable[[float], None], days: int | None, is_expired: bool
) -> None:
    AdapterStore(tmp_path, retention=KEPT).publish("u", adapter, {})
    later(30.5)
    store = AdapterStore(tmp_path, retention=Retention(None, days))
    assert store.is_expired(store.manifest("u")) == is_expired


def test_a_period_that_was_configured_later_counts_for_earlier_adapters(
    tmp_path: Path, adapter: Adapter, later: Callable[[float], None]
) -> None:
    AdapterStore(tmp_path).publish("u", adapter, {})
    later(31)
    AdapterStore(tmp_path).load("u")
    with pytest.raises(AdapterExpiredError):
        AdapterStore(tmp_path, retention=KEPT).load("u")


def test_collecting_removes_what_has_expired_and_never_lets_an_older_version_come_up(
    tmp_path: Path, adapter: Adapter, later: Callable[[float], None]
) -> None:
    for user_id, days in (("short on top", (None, 5)), ("long on top", (5, None)), ("fresh", (60,))):
        for n in days:
            AdapterStore(tmp_path, retention=Retention(None, n)).publish(user_id, adapter, {})
    later(10)
    store = AdapterStore(tmp_path)
    would = collect_expired(store, dry_run=True)
    assert (would.users, would.versions) == (1, 3)
    assert store.versions("short on top") == [1, 2]
    assert collect_expired(store) == would
    assert store.versions("short on top") == []
    assert store.versions("long on top") == [2]
    assert store.versions("fresh") == [1]
    assert collect_expired(store).versions == 0


def damage_manifest(store: AdapterStore, user_id: str, version: int) -> None:
    path = store.backend.folder(hash_id(user_id)) / f"v{version}" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-9])


def test_a_damaged_manifest_keeps_nobody_elses_adapter_from_expiring(
    tmp_path: Path, adapter: Adapter, later: Callable[[float], None]
) -> None:
    store = AdapterStore(tmp_path, retention=KEPT)
    for user_id in ("current", "earlier", "sound"):
        for _ in range(2):
            store.publish(user_id, adapter, {})
    damage_manifest(store, "current", 2)
    damage_manifest(store, "earlier", 1)
    later(31)
    would = collect_expired(store, dry_run=True)
    assert (would.users, would.versions) == (2, 5)
    assert collect_expired(store) == would
    assert [store.versions(user_id) for user_id in ("current", "earlier", "sound")] == [[2], [], []]
    [problem] = would.problems
    assert f"the adapter of user #{hash_id('current')[:12]}, version 2: manifest.json is damaged" in problem


def test_a_run_told_to_collect_what_has_expired_says_whose_manifest_is_damaged(
    governed: Governed, later: Callable[[float], None]
) -> None:
    damage_manifest(governed.store, "u-1", 2)
    arguments = ["store", "gc", str(governed.run.path), "--expired"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3, result.output
    assert f"user #{hash_id('u-1')[:12]}, version 2" in result.output
    governed.store.publish("u-1", governed.store.load("u-17"), {})
    assert CliRunner().invoke(app, [*arguments, "--keep", "1"]).exit_code == 3
    assert CliRunner().invoke(app, arguments).exit_code == 0


@pytest.mark.parametrize("stamped", [KEPT, Retention()])
def test_storing_anew_does_not_begin_a_new_period(
    tmp_path: Path, adapter: Adapter, later: Callable[[float], None], stamped: Retention
) -> None:
    AdapterStore(tmp_path, retention=stamped).publish("u", adapter, {})
    before = AdapterStore(tmp_path).manifest("u")
    later(20)
    store = AdapterStore(tmp_path, precision="bfloat16", retention=KEPT)
    assert list(survey.rewrite(store)) == [("u", 2)]
    after = store.manifest("u")
    assert (after.created, after.retention) == (before.created, before.retention)
    later(31)
    assert store.is_expired(after)
    assert list(survey.rewrite(AdapterStore(tmp_path, retention=KEPT))) == []


def test_a_period_is_a_whole_number_of_days() -> None:
    assert Retention.of(PersonalizeSection(purpose="p", retention_days=1)) == Retention("p", 1)
    with pytest.raises(ValueError, match="retention_days"):
        Config.model_validate({"name": "x", "personalize": {"retention_days": 0}})


def test_no_error_of_these_tests_is_anything_but_a_mistake_that_can_be_mended() -> None:
    assert issubclass(NoConsentError, MilpError)
    assert issubclass(NoSuchUserError, MilpError)
    assert issubclass(AdapterExpiredError, MilpError)
