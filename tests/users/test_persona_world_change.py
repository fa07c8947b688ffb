"""PersonaWorld at two times: what changes, and that nothing held out is trained on."""

from __future__ import annotations

from collections import Counter

from milp_ray.users.persona_world.change import CHANGED, N_FACTS, NEW, OLD, changing_users
from milp_ray.users.splits import check_no_leak

USERS = changing_users(40, seed=3)


def test_later_data_begins_with_the_earlier_and_leaks_nothing() -> None:
    for user in USERS:
        before, after = user.before, user.after
        assert after.history[: len(before.history)] == before.history
        assert after.train[: len(before.train)] == before.train
        assert set(map(id, before.validation)) <= set(map(id, after.train))
        check_no_leak(before)
        check_no_leak(after)


def test_the_same_seed_gives_the_same_users_and_more_users_do_not_change_the_first() -> None:
    assert changing_users(2, seed=3) == USERS[:2]
    assert changing_users(2, seed=4) != USERS[:2]


def test_every_old_changed_and_new_fact_is_asked_for_three_times() -> None:
    for user in USERS:
        states = Counter(example.tags["state"] for example in user.after.test)
        assert states == {state: 3 * N_FACTS[state] for state in (OLD, CHANGED, NEW)}


def test_a_changed_fact_was_something_else_before() -> None:
    for user in USERS:
        told = " ".join(turn.text for turn in user.after.history[len(user.before.history) :])
        for example in user.after.test:
            assert ("earlier" in example.tags) == (example.tags["state"] == CHANGED)
            if example.kind == "direct" and example.tags["state"] == CHANGED:
                assert example.tags["earlier"] != example.answer
                assert str(example.answer) in told
