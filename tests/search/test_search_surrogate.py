"""What the suggester proposes, the noise that it is told of, and the Ax experiment that it keeps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ax.core.trial_status import TrialStatus

from milp_ray.config.search import SearchSection, SurrogateSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search import surrogate
from milp_ray.search.ax_study import AxStudy
from milp_ray.search.candidates import initial_points
from milp_ray.search.front import hypervolume, reference_point
from milp_ray.search.observations import Observation, standard_errors
from milp_ray.search.suggest import (
    RANDOM,
    SAAS_NEHVI,
    ActorProposer,
    Question,
    Suggester,
    SuggesterActor,
)

OBJECTIVES = ("validation_loss", "rouge_l", "adapter_parameters")
SIGNS = (1.0, -1.0, 1.0)


# --------------------------------------------------------------------------------------------------- noise


def observation(index: int, point: dict, space: SearchSpace, per_user: dict, **values: float) -> Observation:
    means = {name: float(np.mean(users)) for name, users in per_user.items()}
    return Observation(index, point, space.layout(point).canonical(), {**means, **values}, per_user)


def test_a_hard_user_is_no_noise_between_layouts() -> None:
    space = SearchSpace(4, (2, 4))
    points = initial_points(space, 3, 0)
    loss = [[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]  # the second user is 4 nats harder, under every layout
    trials = [observation(i, p, space, {"validation_loss": loss[i]}) for i, p in enumerate(points)]
    assert standard_errors(trials, ["validation_loss"]) == {"validation_loss": pytest.approx(0.0)}


def test_the_interaction_of_user_and_layout_is_noise() -> None:
    space = SearchSpace(8, (2, 4))
    rng = np.random.default_rng(0)
    trials = [
        observation(i, p, space, {"validation_loss": list(rng.normal(0.0, 0.3, 8) + 5 * np.arange(8))})
        for i, p in enumerate(initial_points(space, 60, 0))
    ]
    errors = standard_errors(trials, ["validation_loss", "adapter_parameters"])
    assert errors is not None
    assert errors["validation_loss"] == pytest.approx(0.3 / 8**0.5, rel=0.1)
    assert errors["adapter_parameters"] == 0.0


def test_one_probe_user_tells_no_noise_of_any_objective() -> None:
    space = SearchSpace(4, (2, 4))
    points = initial_points(space, 3, 0)
    trials = [observation(i, p, space, {"validation_loss": [1.0 + i]}) for i, p in enumerate(points)]
    assert standard_errors(trials, ["validation_loss", "adapter_parameters"]) is None


# ----------------------------------------------------------------------------------------------- proposals


def world(space: SearchSpace, layout: CanonicalLayout) -> dict[str, list[float]]:
    """A deterministic stand-in for training: upper layers and rank help, with small differences by user."""
    gain = sum((i + 1) * bit for i, bit in enumerate(layout.mask)) / sum(range(1, space.n_layers + 1))
    users = np.array([0.0, 0.3, -0.2])
    loss = 3.0 - 2.0 * gain**0.5 - 0.01 * layout.rank * gain + users
    return {"validation_loss": list(loss), "rouge_l": list(20 + 30 * gain + users * gain)}


def question(space: SearchSpace, n: int, batch: int = 1, ask: int = 3) -> Question:
    observations = []
    for index, point in enumerate(initial_points(space, n, 0)):
        layout = space.layout(point).canonical()
        size = float(sum(layout.mask) * layout.rank)
        observations.append(observation(index, point, space, world(space, layout), adapter_parameters=size))
    return Question(tuple(observations), batch, ask)


def suggester(
    space: SearchSpace, inference: str = "map", seed: int = 0, objectives: tuple[str, ...] = OBJECTIVES
) -> Suggester:
    surrogate = SurrogateSection(inference=inference, n_ensemble=2, warmup_steps=8, num_samples=8, thinning=4)
    return Suggester(space, SearchSection(objectives=objectives, surrogate=surrogate), seed)


def test_proposals_are_new_different_and_the_same_every_time() -> None:
    space = SearchSpace(6, (2, 4, 8))
    asked = question(space, 10)
    proposals = suggester(space).propose(asked)
    keys = [space.layout(p.raw).canonical().key for p in proposals]
    assert [p.generator for p in proposals] == [SAAS_NEHVI] * 3
    assert len(set(keys)) == 3
    assert not set(keys) & {o.key for o in asked.observations}
    assert suggester(space).propose(asked) == proposals


def test_the_fully_bayesian_surrogate_proposes_new_layouts() -> None:
    space = SearchSpace(4, (2, 4))
    asked = question(space, 6, ask=2)
    proposals = suggester(space, "nuts", objectives=OBJECTIVES[:2]).propose(asked)
    keys = {space.layout(p.raw).canonical().key for p in proposals}
    assert [p.generator for p in proposals] == [SAAS_NEHVI] * 2
    assert len(keys - {o.key for o in asked.observations}) == 2


def test_a_subset_is_fitted_where_there_are_too_many_and_none_of_all_is_proposed_again() -> None:
    space = SearchSpace(6, (2, 4))
    asked = question(space, 60, ask=20)
    section = SurrogateSection(inference="map", n_ensemble=2, max_observations=16)
    fitted = surrogate.fit(space, OBJECTIVES, section, asked.observations, 0)
    assert len(fitted.final.observations) == len(fitted.posterior.features) == 16
    assert asked.observations[-1] in fitted.final.observations
    one = Suggester(space, SearchSection(objectives=OBJECTIVES, surrogate=section), 0)
    keys = {space.layout(p.raw).canonical().key for p in one.propose(asked)}
    assert len(keys - {o.key for o in asked.observations}) == 20


@pytest.mark.parametrize(("n", "limit"), [(12, 400), (48, 16)])
def test_proposals_improve_the_front_more_than_chance(n: int, limit: int) -> None:
    space = SearchSpace(8, (2, 4, 8, 16))
    asked = question(space, n, ask=4)

    def volume_with(points: list[dict]) -> float:
        layouts = [space.layout(point).canonical() for point in points]
        new = [
            [*(float(np.mean(v)) for v in world(space, x).values()), sum(x.mask) * x.rank] for x in layouts
        ]
        old = [[(o.values or {})[name] for name in OBJECTIVES] for o in asked.observations]
        return hypervolume([*old, *new], SIGNS, reference_point(old, SIGNS))

    section = SurrogateSection(inference="map", n_ensemble=2, max_observations=limit)
    one = Suggester(space, SearchSection(objectives=OBJECTIVES, surrogate=section), 0)
    proposed = volume_with([p.raw for p in one.propose(asked)])
    rng = np.random.default_rng(0)
    by_chance = [volume_with([space.sample(rng) for _ in range(4)]) for _ in range(100)]
    assert proposed > np.quantile(by_chance, 0.9)


def test_observations_reach_the_suggester_s_actor_as_they_are_and_are_packed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    received: list[Question] = []
    actor = SuggesterActor.__new__(SuggesterActor)
    actor._suggester = SimpleNamespace(propose=received.append)
    proposer = ActorProposer(suggester(SearchSpace(4, (2, 4))))
    proposer._actor = SimpleNamespace(propose=SimpleNamespace(remote=actor.propose))
    asked = question(SearchSpace(4, (2, 4)), 6)
    again = replace(asked, batch=2, pending=(asked.observations[0].layout,))
    proposer.submit(asked)
    monkeypatch.setattr("milp_ray.search.suggest.pickle.dumps", None)  # is not called
    proposer.submit(again)
    assert received == [asked, again]


def test_failed_trials_are_not_proposed_again() -> None:
    space = SearchSpace(3, (2, 4))
    asked = question(space, 9, ask=99)
    failed = tuple(
        Observation(o.index, o.raw, o.layout, None if o.index % 3 == 0 else o.values, o.per_user)
        for o in asked.observations
    )
    proposals = suggester(space).propose(Question(failed, 1, 99))
    keys = {space.layout(p.raw).canonical().key for p in proposals}
    assert len(keys) == len(proposals) == space.n_canonical - 9
    assert not keys & {o.key for o in failed}


def test_chance_proposes_where_there_is_nothing_to_fit() -> None:
    space = SearchSpace(4, (2, 4))
    proposals = suggester(space).propose(Question((), 1, 3))
    assert [p.generator for p in proposals] == [RANDOM] * 3
    assert proposals == suggester(space).propose(Question((), 1, 3))
    assert proposals != suggester(space, seed=1).propose(Question((), 1, 3))


def test_pending_layouts_are_not_proposed_and_move_the_others() -> None:
    space = SearchSpace(6, (2, 4, 8))
    asked = question(space, 10)
    keys = [space.layout(p.raw).canonical() for p in suggester(space).propose(asked)]
    waiting = replace(asked, pending=(keys[0],))
    after = [space.layout(p.raw).canonical() for p in suggester(space).propose(waiting)]
    assert keys[0] not in after
    assert len(set(after)) == 3
    # The first of a batch is chosen without the others, so what follows it is chosen as if it were pending.
    assert len(set(keys[1:]) & set(after)) >= 1


def test_a_numerical_failure_is_answered_by_chance_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise torch.linalg.LinAlgError("no covariance could be factored")

    space = SearchSpace(4, (2, 4))
    monkeypatch.setattr(surrogate, "fit", fail)
    proposals = suggester(space).propose(question(space, 6))
    assert [p.generator for p in proposals] == [RANDOM] * 3
    assert "LinAlgError" in caplog.text


def test_any_other_error_is_none_of_the_suggesters(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise KeyError("rouge_l")

    space = SearchSpace(4, (2, 4))
    monkeypatch.setattr(surrogate, "fit", fail)
    with pytest.raises(KeyError):
        suggester(space).propose(question(space, 6))


def test_the_copula_proposes_too() -> None:
    space = SearchSpace(6, (2, 4, 8))
    section = SearchSection(
        objectives=OBJECTIVES, surrogate=SurrogateSection(inference="map", n_ensemble=2, outputs="copula")
    )
    proposals = Suggester(space, section, 0).propose(question(space, 10))
    assert [p.generator for p in proposals] == [SAAS_NEHVI] * 3


# ------------------------------------------------------------------------------------------ the Ax experiment


def grown(asked: Question, space: SearchSpace, layouts: list[CanonicalLayout]) -> Question:
    """The question after ``layouts`` were measured; the last of them failed."""
    more = list(asked.observations)
    for layout in layouts:
        size = float(sum(layout.mask) * layout.rank)
        raw = space.raw(layout)
        more.append(observation(len(more), dict(raw), space, world(space, layout), adapter_parameters=size))
    more[-1] = replace(more[-1], values=None)
    return replace(asked, observations=tuple(more), batch=asked.batch + 1)


def test_a_client_that_is_kept_proposes_what_one_built_anew_does() -> None:
    space = SearchSpace(6, (2, 4, 8))
    first = question(space, 10)
    kept = suggester(space)
    batch = [space.layout(p.raw).canonical() for p in kept.propose(first)]
    second = grown(first, space, batch)
    assert kept.propose(second) == suggester(space).propose(second)


def test_ax_holds_the_trials_as_they_stand() -> None:
    space = SearchSpace(6, (2, 4, 8))
    asked = question(space, 10)
    study = AxStudy(space, OBJECTIVES)
    chosen = [
        CanonicalLayout((True,) * 6, 2),
        CanonicalLayout((True,) * 6, 8),
        CanonicalLayout((True,) * 6, 4),
    ]
    taken = {o.key for o in asked.observations}
    chosen = [layout for layout in chosen if layout.key not in taken][:2]
    assert len(chosen) == 2
    raws = study.propose(asked.observations, (), 2, lambda: chosen)
    assert [space.layout(raw).canonical() for raw in raws] == chosen
    trials = study.experiment.trials
    assert [trials[i].status for i in range(12)] == [TrialStatus.COMPLETED] * 10 + [TrialStatus.RUNNING] * 2
    values = study.experiment.lookup_data().df
    assert len(values) == 30
    # The first was measured and failed, the second is run by nobody any more.
    failed = Observation(10, raws[0], chosen[0], None)
    third = next(o.layout for o in question(space, 11).observations if o.key not in taken)
    study.propose((*asked.observations, failed), (), 1, lambda: [third])
    assert trials[10].status == TrialStatus.FAILED
    assert trials[11].status == TrialStatus.ABANDONED
    assert study.propose(asked.observations, (), 1, list) == []
