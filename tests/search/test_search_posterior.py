"""The posterior and its joint draws, against the formulas that they abbreviate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from milp_ray.search import saas
from milp_ray.search.posterior import JointDraws, Posterior, root_with_jitter
from milp_ray.search.saas import Hyperparameters, matern52, squared_distances


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits and two objectives."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(2, size=(n, 6)).astype(float)), torch.from_numpy(
        rng.normal(size=(2, n))
    )


def hyperparameters(m: int, s: int, d: int, seed: int = 0) -> Hyperparameters:
    rng = np.random.default_rng(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(0.1, 0.6, shape))

    return Hyperparameters(some(m, s, d), 1 + some(m, s), 0.1 * some(m, s), 0.3 * some(m, s), some(m, s))


def test_the_posterior_is_the_textbooks() -> None:
    x, values = data(15)
    found = hyperparameters(2, 3, 6)
    points = torch.rand(4, 6, dtype=torch.double)
    posterior = Posterior(x, values, found)
    mean, variance = posterior.mean_and_variance(points)
    torch.testing.assert_close(posterior.mean(points), mean)
    for j in range(2):
        for s in range(3):
            weights, scale = found.weights[j, s][None], found.outputscale[j, s]
            k = scale * matern52(squared_distances(x, x, weights))[0]
            beside = found.noise[j, s] + saas.JITTER * scale
            same = (x[:, None] == x[None]).all(dim=2).double()
            k = k + found.roughness[j, s] * same + beside * torch.eye(15).double()
            cross = scale * matern52(squared_distances(x, points, weights))[0]
            constant = found.mean[j, s]
            torch.testing.assert_close(
                mean[j, s], constant + cross.T @ torch.linalg.solve(k, values[j] - constant)
            )
            explained = (cross * torch.linalg.solve(k, cross)).sum(dim=0)
            torch.testing.assert_close(variance[j, s], scale + found.roughness[j, s] - explained)


def test_what_was_measured_exactly_is_known_however_rough_its_neighbourhood() -> None:
    x = torch.eye(6, dtype=torch.double)
    values = data(6)[1]
    found = replace(hyperparameters(2, 2, 6), noise=torch.zeros(2, 2).double())
    posterior = Posterior(x, values, found)
    mean, variance = posterior.mean_and_variance(x)
    torch.testing.assert_close(mean, values[:, None].expand(-1, 2, -1), atol=1e-5, rtol=0)
    assert (variance < 1e-5).all()
    # What is next to it is not: it has a roughness of its own, which no neighbour tells of.
    beside = posterior.mean_and_variance(x + 1e-6)[1]
    assert (beside > found.roughness[:, :, None]).all()
    assert ((posterior.mean(x) - values[:, None]).abs() > 1e-3).any()


def test_an_observation_with_more_noise_counts_for_less_and_with_endless_noise_for_nothing() -> None:
    x, values = data(12)
    found = hyperparameters(2, 2, 6)
    points = torch.rand(5, 6, dtype=torch.double)
    extra = torch.zeros(2, 12).double()
    extra[0, 7], extra[1, 7] = 1e4, 0.5
    mean, variance = Posterior(x, values, found, extra=extra).mean_and_variance(points)
    rest = torch.arange(12) != 7
    without = Posterior(x[rest], values[:, rest], found).mean_and_variance(points)
    torch.testing.assert_close(mean[0], without[0][0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(variance[0], without[1][0], atol=1e-3, rtol=1e-3)
    known = Posterior(x, values, found).mean_and_variance(points)
    assert (variance[1] > known[1][1]).all()
    assert (variance[1] < without[1][1]).all()


def test_draws_at_the_observed_points_have_the_posteriors_moments_with_unequal_noise() -> None:
    x, values = data(8)
    extra = torch.zeros(2, 8).double()
    extra[:, 3], extra[0, 5] = 1e4, 0.3
    posterior = Posterior(x, values, hyperparameters(2, 2, 6), extra=extra)
    base = torch.randn(2, 20000, 2, 8, generator=torch.Generator().manual_seed(0)).double()
    draws = posterior.draws_at_observed(base)
    mean, variance = posterior.mean_and_variance(x)
    torch.testing.assert_close(draws.mean(dim=1), mean.transpose(0, 1), atol=0.05, rtol=0.05)
    torch.testing.assert_close(draws.var(dim=1), variance.transpose(0, 1), atol=0.02, rtol=0.1)


def test_leaving_one_out_is_leaving_it_out() -> None:
    _, values = data(9)
    x = torch.rand(9, 6, dtype=torch.double)
    found = hyperparameters(2, 2, 6)
    mean, variance = Posterior(x, values, found).leave_one_out()
    rest = torch.arange(9) != 4
    at, spread = Posterior(x[rest], values[:, rest], found).mean_and_variance(x[4:5])
    torch.testing.assert_close(mean[:, :, 4], at[:, :, 0])
    torch.testing.assert_close(variance[:, :, 4], spread[:, :, 0] + found.noise, rtol=1e-6, atol=1e-6)


def test_a_mean_function_is_what_the_processes_deviate_from() -> None:
    x, values = data(9)
    found = hyperparameters(2, 2, 6)

    def trend(points: torch.Tensor) -> torch.Tensor:
        return torch.stack([3 * points[:, 0], points[:, 1] - 7])

    points = torch.rand(4, 6, dtype=torch.double)
    plain = Posterior(x, values - trend(x), found)
    with_trend = Posterior(x, values, found, trend)
    torch.testing.assert_close(with_trend.mean(points), plain.mean(points) + trend(points)[:, None])
    torch.testing.assert_close(
        with_trend.leave_one_out()[0] - plain.leave_one_out()[0], trend(x)[:, None].expand(-1, 2, -1)
    )


def many_normals(s: int, k: int, m: int, n: int) -> torch.Tensor:
    return torch.randn(s, k, m, n, generator=torch.Generator().manual_seed(3), dtype=torch.double)


def test_draws_at_observed_points_have_the_posteriors_moments() -> None:
    x, values = data(6)
    posterior = Posterior(x, values, hyperparameters(2, 2, 6))
    draws = posterior.draws_at_observed(many_normals(2, 20000, 2, 6))
    mean, variance = posterior.mean_and_variance(x)
    torch.testing.assert_close(draws.mean(dim=1).transpose(0, 1), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(draws.var(dim=1).transpose(0, 1), variance, atol=1e-3, rtol=0.05)


def test_points_drawn_one_by_one_are_drawn_jointly() -> None:
    """The covariance of draws at three points: two added at once, one later, and a candidate given all
    three."""
    x, values = data(6)
    found = hyperparameters(2, 2, 6)
    posterior = Posterior(x, values, found)
    points = torch.rand(4, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    draws = JointDraws(posterior, points[:2], many_normals(2, 40000, 2, 4))
    draws.add(points[2:3])
    joint = torch.cat([draws.values, draws.candidates(points[3:])], dim=-1)  # s x k x m x 4
    whitened = torch.bmm(posterior.whitener, posterior.covariance(x, points))
    covariance = posterior.covariance(points, points) - torch.bmm(whitened.mT, whitened)
    for s in range(2):
        for j in range(2):
            torch.testing.assert_close(joint[s, :, j].T.cov(), covariance[2 * j + s], atol=0.02, rtol=0.05)
    torch.testing.assert_close(joint.mean(dim=1).transpose(0, 1), posterior.mean(points), atol=0.02, rtol=0)


def test_a_point_drawn_twice_is_the_same_twice_where_nothing_is_rough() -> None:
    x, values = data(6)
    found = replace(hyperparameters(2, 2, 6), roughness=torch.zeros(2, 2).double())
    posterior = Posterior(x, values, found)
    point = torch.rand(1, 6, dtype=torch.double)
    draws = JointDraws(posterior, point, many_normals(2, 8, 2, 2))
    torch.testing.assert_close(draws.candidates(point), draws.values, atol=1e-3, rtol=0)


def test_a_singular_covariance_gets_the_jitter_that_it_needs() -> None:
    covariance = torch.ones(1, 3, 3).double() - 1e-7 * torch.eye(3).double()
    root = root_with_jitter(covariance)
    torch.testing.assert_close(root @ root.mT, covariance, atol=2e-6, rtol=0)
    with pytest.raises(torch.linalg.LinAlgError):
        root_with_jitter(-torch.eye(2).double()[None])
