"""What is new since a version was made, and what of it is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from updated_user import more

from milp_ray.config.update import UpdateSection
from milp_ray.personalize.provenance import Provenance
from milp_ray.personalize.update.plan import training_data
from milp_ray.users.records import UserSplit

Make = Callable[..., UserSplit]


def test_what_is_new_is_told_by_hashes_and_nothing_can_be_read_from_them(make_split: Make) -> None:
    split = make_split("u-1")
    record = Provenance.of("recipe", split).to_dict()
    assert split.history[0].text not in json.dumps(record)
    assert record["salt"] != Provenance.of("recipe", split).to_dict()["salt"]
    made_from = Provenance.from_meta({"made_from": record})
    assert made_from is not None
    now = more(split, "Now my dog is green.", split.history[0].text)
    news = made_from.news(now)
    assert [turn.text for turn in news.new_turns] == ["Now my dog is green.", split.history[0].text]
    assert news.earlier_turns == split.history
    assert news.earlier_examples == split.train
    assert (news.n_gone, news.n_new) == (0, 3)
    assert Provenance.from_meta({}) is None
    assert Provenance.from_meta({"made_from": {**record, "history": "%"}}) is None


def test_what_the_guard_measures_on_is_not_trained_on(make_split: Make) -> None:
    split = make_split("u-1")
    echo = split.validation[0].response
    news = Provenance.of("recipe", split).news(more(split, "My oven is new.", echo))
    assert {e.query for e in news.guard} == {e.query for e in split.validation}
    assert split.validation[0] not in news.new_examples
    assert [turn.text for turn in news.new_turns] == ["My oven is new."]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_replay_adds_as_much_as_its_share_says_and_keeps_the_order(make_split: Make, share: float) -> None:
    split = make_split("u-1", n_turns=40, n_train=20)
    now = more(split)
    news = Provenance.of("recipe", split).news(now)
    alone = training_data(now, news, UpdateSection(data="new"), seed=1)
    assert (alone.history, alone.train) == (news.new_turns, news.new_examples)
    data = training_data(now, news, UpdateSection(replay_share=share), seed=1)
    n_all = len(data.history) + len(data.train)
    assert n_all - news.n_new == round(n_all * share)
    assert data.history[-2:] == news.new_turns
    places = [now.history.index(turn) for turn in data.history[:-2]]
    assert sorted(now.history[i].text for i in places) == sorted(t.text for t in data.history[:-2])
    assert data == training_data(now, news, UpdateSection(replay_share=share), seed=1)
