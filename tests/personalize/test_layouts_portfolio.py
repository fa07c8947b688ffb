"""A layout by similar users: taken where that is sure, and the chosen one elsewhere. Pure."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from milp_ray.personalize.layouts.portfolio import MIN_USERS, Portfolio
from milp_ray.users.records import Example, Turn, UserSplit
from milp_ray.users.traits import TRAITS, user_traits

Floats = NDArray[np.float64]


def two_kinds(n_each: int = 6, gain: float = 0.1, noise: float = 0.01) -> tuple[Floats, Floats, Floats]:
    """Users of short and of long histories: each kind has a layout that is better by ``gain``."""
    rng = np.random.default_rng(0)
    kinds = np.repeat([0, 1], n_each)
    lengths = np.where(kinds == 0, 4.0, 8.0) + 0.1 * rng.standard_normal(2 * n_each)
    traits = np.column_stack([lengths, lengths / 2, 0.8 + 0.01 * rng.standard_normal(2 * n_each)])
    chosen = 2.0 + 0.5 * rng.random(2 * n_each)
    relative = np.column_stack([np.where(kinds == kind, -gain, gain) for kind in (0, 1)])
    return traits, chosen[:, None] * (1 + relative + noise * rng.standard_normal(relative.shape)), chosen


def test_each_kind_of_user_gets_the_layout_that_is_better_for_it() -> None:
    portfolio = Portfolio.of(*two_kinds())
    short, long = portfolio.pick((4.0, 2.0, 0.8)), portfolio.pick((8.0, 4.0, 0.8))
    assert (short.layout, long.layout) == (0, 1)
    assert 0.05 < short.gain < 0.1, "shrunk, as a few users are not all"
    assert short.gain > short.error


@pytest.mark.parametrize("seed", range(20))
def test_where_layouts_differ_by_chance_alone_everybody_gets_the_chosen_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    traits = rng.standard_normal((8, 3))
    chosen = 1.0 + rng.random(8)
    losses = chosen[:, None] * (1.0 + 0.05 * rng.standard_normal((8, 5)))
    portfolio = Portfolio.of(traits, losses, chosen)
    assert all(portfolio.pick(user).layout is None for user in traits)


def test_a_user_like_no_probe_user_gets_the_chosen_layout() -> None:
    portfolio = Portfolio.of(*two_kinds())
    pick = portfolio.pick((60.0, 30.0, 0.1))
    assert pick.layout is None
    assert portfolio.predict((60.0, 30.0, 0.1)) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_a_layout_that_is_better_for_all_is_taken_for_all_however_the_traits_lie() -> None:
    traits = np.ones((5, 3))  # nothing tells the users apart
    chosen = np.array([1.0, 2.0, 1.5, 1.2, 1.9])
    losses = np.column_stack([chosen * 0.8, chosen * 0.9])
    assert Portfolio.of(traits, losses, chosen).pick((1.0, 1.0, 1.0)).layout == 0


def test_more_shrinkage_asks_for_more_evidence() -> None:
    traits, losses, chosen = two_kinds(n_each=3, gain=0.05, noise=0.02)
    user = (4.0, 2.0, 0.8)
    gains = [Portfolio.of(traits, losses, chosen, shrinkage=s).pick(user).gain for s in (0.0, 1.0, 10.0)]
    assert gains[0] > gains[1] > gains[2] > 0
    assert Portfolio.of(traits, losses, chosen, shrinkage=10.0).pick(user).layout is None


def test_what_cannot_be_predicted_from_is_refused() -> None:
    traits, losses, chosen = two_kinds()
    with pytest.raises(ValueError, match="at least 3"):
        Portfolio.of(*(part[: MIN_USERS - 1] for part in (traits, losses, chosen)))
    with pytest.raises(ValueError, match="finite"):
        Portfolio.of(traits, losses * np.nan, chosen)
    with pytest.raises(ValueError, match="do not fit"):
        Portfolio.of(traits[:-1], losses, chosen)


def test_traits_are_of_what_training_sees_and_say_nothing_of_the_order() -> None:
    example = Example("Which colour?", "Green, of course.")
    split = UserSplit(
        "u", "a profile", (Turn("Tea, tea and tea."), Turn("More.")), (example,), (), (example,)
    )
    traits = dict(zip(TRAITS, user_traits(split), strict=True))
    assert traits["log_words"] == pytest.approx(np.log1p(4 + 1 + 2 + 3))
    assert traits["log_turns"] == pytest.approx(np.log1p(3))
    assert traits["diversity"] == pytest.approx(np.log(8) / np.log(10))
    turned = UserSplit("v", None, split.history[::-1], split.train, (example,), ())
    assert user_traits(turned) == user_traits(split)


def test_diversity_falls_with_repetition_and_not_with_length_alone() -> None:
    def of(*texts: str) -> float:
        return user_traits(UserSplit("u", None, tuple(map(Turn, texts)), (), (), ()))[2]

    assert of("a b c d e f") == of("a b c d e f g h i j k l") == 1.0
    assert of("a b a b a b") < of("a b c a b c") < 1.0
    assert of("word") == of() == 1.0
