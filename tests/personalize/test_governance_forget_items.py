"""Forgetting one item: what was made with it goes, and it is left out from then on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from governed_run import (
    IDS,
    SECRET,
    Governed,
    user_line,
    write_users,
)

from milp_ray.errors import MilpError
from milp_ray.evaluation.scores import read_users_scored
from milp_ray.personalize.governance import forget as forgetting
from milp_ray.personalize.governance.consent import Gate
from milp_ray.personalize.governance.forget import forget_items
from milp_ray.personalize.governance.items import find_user, items_of, resolve
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.store import AdapterStore, survey
from milp_ray.training.adapters import Adapter


def test_forgetting_an_item_takes_away_what_was_made_with_it_and_leaves_it_out_from_then_on(
    governed: Governed, adapter: Adapter
) -> None:
    user = find_user(governed.config.users, 0, IDS[0])
    hashes = resolve(["history:0", "examples:1"], user)

    def forget_them() -> forgetting.Forgotten:
        with governed.run.lock():
            return forget_items(governed.run, governed.config, governed.store, IDS[0], hashes, by="x")

    assert forget_them().removed[0].count == 2
    assert governed.store.versions(IDS[0]) == []
    assert IDS[0] not in read_users_scored(governed.run.scores_file)
    assert IDS[1] in read_users_scored(governed.run.scores_file)

    from milp_ray.users.splits import split_user

    assert user is not None
    whole = split_user(user, governed.config.users.split)
    left = Gate(Record(governed.run.path), "assumed").trimmed(whole)
    assert [turn.text for turn in left.history] == [turn.text for turn in whole.history[1:]]
    assert SECRET not in str(left)
    assert len(left.train) == len(whole.train) - 1
    assert (left.validation, left.test) == (whole.validation, whole.test)

    governed.store.publish(IDS[0], adapter, {}, fingerprint="from the rest")
    assert forget_them().was_forgotten
    assert governed.store.has(IDS[0], "from the rest")


def test_what_was_made_with_an_item_goes_also_where_it_was_stored_anew_in_between(governed: Governed) -> None:
    hashes = resolve(["history:0"], find_user(governed.config.users, 0, IDS[0]))

    def forget_it(tell: Callable[[str], None]) -> forgetting.Forgotten:
        return forget_items(governed.run, governed.config, governed.store, IDS[0], hashes, by="x", tell=tell)

    def stop_at_adapters(step: str) -> None:
        if step == "adapters":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forget_it(stop_at_adapters)
    halved = AdapterStore(governed.store.uri, precision="bfloat16")
    assert (IDS[0], 3) in list(survey.rewrite(halved))
    forget_it(lambda step: None)
    assert governed.store.versions(IDS[0]) == []


def test_an_item_is_named_by_place_hash_or_file_and_a_wrong_name_is_refused(
    governed: Governed, tmp_path: Path
) -> None:
    user = find_user(governed.config.users, 0, IDS[0])
    assert user is not None
    first, *_ = items_of(user)
    listed = tmp_path / "items.txt"
    listed.write_text(f"history:0\n\n{first.sha256[:10]}\nexamples:0\n")
    assert resolve([f"@{listed}"], user) == [first.sha256, resolve(["examples:0"], user)[0]]
    assert resolve([first.sha256], None) == [first.sha256]
    for wrong in ("history:99", "turn:1", "", "abc", "0" * 10, "@/no/such/file"):
        with pytest.raises(MilpError, match="item"):
            resolve([wrong], user)


def test_the_same_text_said_again_is_the_same_item(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    twice = [{"text": "I am ill.", "time": f"2024-05-0{day}T00:00:00Z"} for day in (1, 2)]
    write_users(path, {**user_line("a"), "history": [*twice, {"text": "I am ill.", "role": "assistant"}]})
    from milp_ray.config.users import UsersSection

    user = find_user(UsersSection(format="jsonl", paths=(path,)), 0, "a")
    assert user is not None
    first, second, other, *_ = items_of(user)
    assert first.sha256 == second.sha256 != other.sha256
