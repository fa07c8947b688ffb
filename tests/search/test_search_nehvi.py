"""Noisy expected hypervolume improvement: against brute force, against BoTorch, and what pruning keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.models import ModelListGP, SingleTaskGP
from botorch.sampling.normal import SobolQMCNormalSampler
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.means import ConstantMean
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.search.front import hypervolume
from milp_ray.search.nehvi import NoisyHypervolumeImprovement, _on_front, chances_on_front
from milp_ray.search.posterior import Posterior
from milp_ray.search.saas import Hyperparameters

D = 4


def posterior(m: int, s: int = 2, n: int = 6, seed: int = 0) -> Posterior:
    rng = np.random.default_rng(seed)

    def some(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, shape))

    found = Hyperparameters(
        weights=some(0.5, 2.0, m, s, D),
        outputscale=some(0.8, 1.2, m, s),
        noise=some(0.01, 0.05, m, s),
        roughness=torch.zeros(m, s).double(),  # BoTorch knows none
        mean=some(-0.1, 0.1, m, s),
    )
    return Posterior(some(0.0, 1.0, n, D), torch.from_numpy(rng.normal(size=(m, n))), found)


def points(n: int, seed: int = 9) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, D)))


@pytest.mark.parametrize("m", [2, 3])
def test_it_is_the_mean_improvement_of_the_draws_hypervolume(m: int) -> None:
    """The same draws, their hypervolumes with and without the candidate one by one."""
    model = posterior(m)
    corner = torch.full((m,), -1.5, dtype=torch.double)
    waiting = points(2, seed=1)
    found = NoisyHypervolumeImprovement(
        model, model.features[:5], waiting, corner, n_more=1, seed=0, n_draws=16
    )
    candidates = points(6)
    drawn = found._draws.candidates(candidates).flatten(0, 1)  # draws x m x q
    fronts = found._draws.values.flatten(0, 1)  # draws x m x 7
    signs = [-1.0] * m
    gains = np.array(
        [
            [
                hypervolume(torch.cat([front, draw[:, q : q + 1]], dim=1).T, signs, corner)
                - hypervolume(front.T, signs, corner)
                for q in range(6)
            ]
            for front, draw in zip(fronts, drawn, strict=True)
        ]
    ).mean(axis=0)
    assert gains.max() > 1e-3
    np.testing.assert_allclose(found(candidates).exp().numpy(), gains, atol=1e-5)


def test_a_pending_point_counts_as_one_that_was_given() -> None:
    model, corner = posterior(2), torch.full((2,), -1.5, dtype=torch.double)
    waiting, candidates = points(3, seed=1), points(6)
    given_all = NoisyHypervolumeImprovement(model, model.features, waiting, corner, n_more=1, seed=0)
    given_two = NoisyHypervolumeImprovement(model, model.features, waiting[:2], corner, n_more=2, seed=0)
    before = given_two(candidates)
    given_two.add_pending(waiting[2])
    torch.testing.assert_close(given_two(candidates), given_all(candidates), atol=1e-6, rtol=1e-6)
    assert (given_two(candidates) <= before + 1e-6).any()
    assert given_two(waiting[2:])[0] < before.max() - 3  # measuring it twice shows nothing


def test_where_no_draw_improves_candidates_still_have_an_order() -> None:
    """Further below the front is worse, however far below: the smoothing's tail."""
    model = posterior(2, s=1)
    beyond = torch.full((2,), 50.0, dtype=torch.double)  # nothing gets above this corner
    found = NoisyHypervolumeImprovement(model, model.features, points(0), beyond, n_more=1, seed=0)
    values = found(points(20))
    assert torch.isfinite(values).all()
    mean = model.mean(points(20)).sum(dim=(0, 1))
    assert np.corrcoef(values.numpy(), mean.numpy())[0, 1] > 0.9


@pytest.mark.parametrize("m", [2, 3])
def test_values_are_botorchs(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample of the hyperparameters, many draws: both estimate the same expectation."""
    # BoTorch would compile a kernel for this processor, which takes half a minute.
    monkeypatch.setattr(logei, "_load_attempted", True)
    model = posterior(m, s=1)
    models = []
    for j in range(m):
        covariance = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=D)).double()
        covariance.outputscale = model.outputscale[j]
        covariance.base_kernel.lengthscale = model.weights[j].rsqrt()
        mean = ConstantMean().double()
        mean.constant.data.fill_(float(model.constant[j]))
        models.append(
            SingleTaskGP(
                model.features,
                model._values[j][:, None],
                train_Yvar=torch.full((6, 1), float(model.noise[j])).double(),
                covar_module=covariance,
                mean_module=mean,
                outcome_transform=None,
            )
        )
    corner = torch.full((m,), -1.5, dtype=torch.double)
    waiting, candidates = points(1, seed=1), points(40)
    n_draws = 1024 if m == 2 else 256  # BoTorch's boxes for three objectives take their time
    theirs = qLogNoisyExpectedHypervolumeImprovement(
        ModelListGP(*models).eval(),
        corner,
        model.features,
        sampler=SobolQMCNormalSampler(torch.Size([n_draws]), seed=0),
        X_pending=waiting,
    )
    with torch.no_grad():
        expected = theirs(candidates[:, None, :])
    improvement = NoisyHypervolumeImprovement(
        model, model.features, waiting, corner, n_more=1, seed=1, n_draws=n_draws
    )
    ours = improvement(candidates)
    likely = expected > expected.max() - 1.5
    assert likely.sum() >= 3
    torch.testing.assert_close(ours[likely], expected[likely], atol=0.2, rtol=0)
    assert np.corrcoef(ours.argsort().argsort(), expected.argsort().argsort())[0, 1] > 0.97


@settings(deadline=None)
@given(
    st.integers(2, 3).flatmap(
        lambda m: st.lists(
            st.lists(st.integers(-1, 4).map(float), min_size=m, max_size=m), min_size=1, max_size=8
        )
    )
)
def test_peeling_finds_the_front(rows: list[list[float]]) -> None:
    """One of several equal points stands for all of them."""
    values = torch.tensor(rows, dtype=torch.double)
    found = _on_front(values[None], torch.zeros(values.shape[1]).double())[0]
    better = (values[:, None] >= values[None]).all(dim=2) & (values[:, None] > values[None]).any(dim=2)
    expected = ~better.any(dim=0) & (values > 0).all(dim=1)
    assert {tuple(row) for row in values[found].tolist()} == {tuple(row) for row in values[expected].tolist()}
    assert int(found.sum()) == len({tuple(row) for row in values[expected].tolist()})


def test_what_cannot_be_on_the_front_has_no_chance_to() -> None:
    model = posterior(2, n=12)
    corner = torch.full((2,), -1.5, dtype=torch.double)
    everything = torch.ones(12, dtype=torch.bool)
    chances = chances_on_front(model, corner, everything, seed=0)
    assert ((chances >= 0) & (chances <= 1)).all()
    best = model._values.reshape(2, 2, 12)[:, 0].sum(dim=0).argmax()
    assert chances[best] > 0.5
    values = model._values.reshape(2, 2, 12)[:, 0]
    for i in range(12):  # a point that is worse by ten standard deviations of the noise in both objectives
        if (values > values[:, i : i + 1] + 2.5).all(dim=0).any():
            assert chances[i] == 0
    everything[best] = False
    assert chances_on_front(model, corner, everything, seed=0)[best] == 0
