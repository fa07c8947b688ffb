"""The SAAS model: its posterior density and gradient, its fits, and what it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable

import gpytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.search import saas
from milp_ray.search.posterior import Posterior
from milp_ray.search.quasi_newton import minimise
from milp_ray.search.saas import fit_map, matern52, squared_distances

Data = Callable[..., tuple[torch.Tensor, torch.Tensor]]


# --------------------------------------------------------------------------------------------- the density


def test_the_kernel_is_gpytorchs(data: Data) -> None:
    x, other = data(8)[0], torch.rand(5, 6, dtype=torch.double)
    weights = torch.rand(3, 6, dtype=torch.double)
    ours = matern52(squared_distances(x, other, weights))
    for row, matrix in zip(weights, ours, strict=True):
        kernel = gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=6).double()
        kernel.lengthscale = row.rsqrt()
        torch.testing.assert_close(matrix, kernel(x, other).to_dense().detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("is_noise_known", [False, True])
@pytest.mark.parametrize("is_some_noisier", [False, True])
def test_the_log_posterior_is_the_definitions_and_its_gradient_autograds(
    data: Data, is_noise_known: bool, is_some_noisier: bool
) -> None:
    """Against the multivariate normal and the priors as torch has them, with the mean at its best value."""
    x, values = data(12)
    taus = torch.tensor([0.05, 0.4], dtype=torch.double)
    noise = torch.tensor([0.02, 0.3], dtype=torch.double) * is_noise_known
    more = torch.rand(2, 12, generator=torch.Generator().manual_seed(2)).double()
    extra = more if is_some_noisier else torch.zeros(2, 12).double()
    posterior = saas._LogPosterior(x, values, taus, noise, extra if is_some_noisier else None)
    point = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).double() - 1
    point.requires_grad_()
    weights, scale = point[:, :6].exp(), point[:, 6].exp()
    inferred = point[:, 7].exp()
    variances = noise + inferred
    expected = torch.zeros(2, dtype=torch.double)
    means = posterior.mean(point.detach())
    for b in range(2):
        scaled = x * weights[b].sqrt()
        squared = ((scaled[:, None] - scaled[None]) ** 2).sum(dim=2)
        distance = (5.0 * (squared + 1e-30)).sqrt()
        k = scale[b] * (1 + distance + distance**2 / 3) * torch.exp(-distance)
        k = k + (variances[b] + saas.JITTER * scale[b]) * torch.eye(12).double() + torch.diag(extra[b])
        normal = torch.distributions.MultivariateNormal(means[b].expand(12), k)
        half_cauchy = torch.distributions.HalfCauchy(taus[b])
        log = normal.log_prob(values[b]) - 0.5 * means[b] ** 2 + half_cauchy.log_prob(weights[b]).sum()
        log = log + torch.distributions.Gamma(2.0, 0.15).log_prob(scale[b])
        log = log + torch.distributions.Gamma(0.9, 10.0).log_prob(inferred[b])
        expected[b] = -log
    (gradient,) = torch.autograd.grad(expected.sum(), point)
    value, ours = posterior(point.detach(), torch.arange(2))
    torch.testing.assert_close(ours, gradient, atol=1e-6, rtol=1e-6)
    # The density is known up to the constants of its normalisation: they cancel between two points.
    other = point.detach() + 0.1
    moved = posterior(other, torch.arange(2))[0] - value
    assert not torch.allclose(moved, torch.zeros(2).double())
    slope = (
        posterior(point.detach() + 1e-6, torch.arange(2))[0]
        - posterior(point.detach() - 1e-6, torch.arange(2))[0]
    )
    torch.testing.assert_close(slope / 2e-6, gradient.sum(dim=1), atol=1e-4, rtol=1e-4)


def test_the_means_mode_makes_the_density_flat(data: Data) -> None:
    x, values = data(10)
    posterior = saas._LogPosterior(x, values + 3.0, torch.full((2,), 0.1).double(), torch.zeros(2).double())
    point = torch.full((2, 8), -1.0).double()
    k = torch.exp(torch.tensor(-1.0)) * matern52(squared_distances(x, x, point[:, :6].exp()))
    k = k + (math.exp(-1.0) * (1 + saas.JITTER)) * torch.eye(10).double()
    for mean, row, matrix in zip(posterior.mean(point), values + 3.0, k.double(), strict=True):
        slope = torch.linalg.solve(matrix, row - mean).sum() - mean
        assert float(slope) == pytest.approx(0.0, abs=1e-6)


# -------------------------------------------------------------------------------------------- the optimiser


def test_problems_of_a_batch_reach_their_own_minima_inside_their_boxes() -> None:
    centre = torch.tensor([[0.5, -3.0, 2.0], [40.0, 0.0, -0.5], [0.0, 0.0, 0.0]], dtype=torch.double)
    scale = torch.tensor([1.0, 30.0, 0.1], dtype=torch.double)
    n_calls = torch.zeros(3)

    def function(points: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n_calls[which] += 1
        away = points - centre[which]
        return (scale * away**2).sum(dim=1), 2.0 * scale * away

    found = minimise(
        function,
        torch.zeros_like(centre),
        torch.tensor([-5.0, -5.0, -1.0]).double(),
        torch.tensor([5.0, 5.0, 1.0]).double(),
        max_evaluations=200,
        tolerance=1e-8,
    )
    torch.testing.assert_close(
        found.points, centre.clamp(-5.0, 5.0).clamp(max=torch.tensor([5.0, 5.0, 1.0])), atol=1e-6, rtol=0
    )
    assert n_calls[2] == 1  # it began at its minimum and was left alone
    assert n_calls.max() < 60


def test_a_step_to_where_the_function_is_infinite_is_shortened() -> None:
    def function(points: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = points[:, 0]
        value = torch.where(x < 0.9, -torch.log((0.9 - x).clamp_min(1e-9)) - 5 * x, torch.inf)
        return value, (1 / (0.9 - x) - 5.0)[:, None]

    low, high = torch.tensor([-2.0]).double(), torch.tensor([2.0]).double()
    start = torch.zeros(1, 1, dtype=torch.double)
    found = minimise(function, start, low, high, max_evaluations=100, tolerance=1e-6)
    assert float(found.points) == pytest.approx(0.7, abs=1e-5)


# ------------------------------------------------------------------------------------------------- the fits


@pytest.mark.parametrize("n", [40, 200])
def test_a_fit_finds_the_features_that_matter(data: Data, n: int) -> None:
    x, values = data(n, d=20)
    found = fit_map(x, values, None, 3)
    assert found.weights.shape == (2, 3, 20)
    for objective, active in ((0, {1, 2}), (1, {0})):
        for weights in found.weights[objective]:
            assert set(weights.argsort(descending=True)[: len(active)].tolist()) == active
    new_x, truth = data(200, d=20, seed=5)
    predicted = Posterior(x, values, found).mean(new_x).mean(dim=1)
    explained = 1 - ((predicted - truth) ** 2).mean(dim=1) / truth.var(dim=1)
    assert (explained > 0.9).all()


def test_the_same_data_give_the_same_bits(data: Data) -> None:
    x, values = data(30)
    first, second = fit_map(x, values, None, 2), fit_map(x, values, None, 2)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.noise, second.noise)


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 8), st.integers(0, 99), st.booleans())
def test_few_constant_or_exact_observations_are_fitted(data: Data, n: int, seed: int, is_exact: bool) -> None:
    x, _ = data(n, seed=seed)
    values = torch.stack([torch.zeros(n).double(), x[:, 0] - x[:, 0].mean()])
    noise = torch.full((2,), saas.EXACT_NOISE).double() if is_exact else None
    found = fit_map(x, values, noise, 2)
    mean, variance = Posterior(x, values, found).mean_and_variance(torch.rand(5, 6).double())
    assert torch.isfinite(mean).all()
    assert (variance >= 0).all()
    if noise is not None:
        assert torch.equal(found.noise, noise[:, None].expand(2, 2))
    assert (found.roughness > 0).all() == is_exact


def test_noise_that_is_known_is_told_from_roughness(data: Data) -> None:
    """Values that scatter with variance 0.09 around a smooth function, 0.04 of which measuring explains."""
    x, values = data(150, d=8)
    rng = torch.Generator().manual_seed(3)
    values = values + 0.3 * torch.randn(values.shape, generator=rng).double()
    found = fit_map(x, values, torch.full((2,), 0.04).double(), 2)
    torch.testing.assert_close(
        found.roughness.mean(dim=1), torch.full((2,), 0.05).double(), atol=0.03, rtol=0
    )
    unknown = fit_map(x, values, None, 2)
    torch.testing.assert_close(unknown.noise, found.roughness + found.noise, atol=0.01, rtol=0)
    assert (unknown.roughness == 0).all()
