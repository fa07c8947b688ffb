"""The SAAS Gaussian process (Eriksson and Jankowiak 2021): its prior, its MAP fits and its NUTS samples.

One process an objective, Matérn-5/2 with one weight (an inverse squared lengthscale) a feature::

    tau ~ HalfCauchy(0.1)        weight_i ~ HalfCauchy(tau)          (most features matter little)
    outputscale ~ Gamma(2, 0.15) noise ~ Gamma(0.9, 10) + 1e-4       (as BoTorch's SAAS models have them)
    mean ~ Normal(0, 1)

Where the noise of measuring is known, what the process leaves of the values is not noise: it is what a layout
has of its own, its *roughness*, a variance with the prior that the noise has elsewhere. A layout measured
again would show it again, so a front that it led to stands, and a layout that is yet to be measured may have
as much of it.

``map`` takes tau at the quantiles of its prior, as an ensemble, and the rest at the mode of the posterior
for each tau. All objectives and taus are one batch, with the gradient written out: the sum over pairs of
points in it is a matrix product for all features at once. The fit begins at the same place every time, not
at the last batch's hyperparameters: a resumed study has no last batch and must propose the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from milp_ray.search.quasi_newton import Minima, minimise

# What torch raises where a matrix cannot be factored, and what is raised here; torch exports it, but does not
# tell type checkers that it does.
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

TAU_SCALE = 0.1
# Numerical noise, relative to the outputscale: what keeps a covariance of float64 positive definite.
JITTER = 1e-8
# Noise of an objective that is measured exactly, in variances of its values.
EXACT_NOISE = 1e-6

_WEIGHT_BOUNDS = (1e-8, 1e3)
_OUTPUTSCALE_BOUNDS = (1e-2, 1e3)
_NOISE_BOUNDS = (1e-4, 1.0)
_OUTPUTSCALE_PRIOR = (2.0, 0.15)  # Gamma: concentration, rate
_NOISE_PRIOR = (0.9, 10.0)
# Gradients of the log posterior, and gains a step, below which a mode is found: far below what data can tell.
_TOLERANCE = 0.2
# Observations from which on a part of them is fitted first.
_LARGE = 160
_SQRT5 = math.sqrt(5.0)


@dataclass(frozen=True)
class Hyperparameters:
    """Of m objectives by s samples (members of the ensemble).

    ``weights`` m x s x d are inverse squared lengthscales; ``outputscale``, ``noise``, ``roughness``
    (variances) and ``mean`` are m x s. Either the noise is known or the roughness is 0: values alone do not
    tell the two apart.
    """

    weights: Tensor
    outputscale: Tensor
    noise: Tensor
    roughness: Tensor
    mean: Tensor

    @property
    def n_samples(self) -> int:
        """Samples of the hyperparameters of an objective."""
        return self.weights.shape[1]


def squared_distances(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared distances: ``left`` q x d, ``right`` n x d, ``weights`` b x d; b x q x n."""
    weighted = left * weights[:, None, :]
    own = (weighted * left).sum(dim=-1)
    other = weights @ (right * right).mT
    sums = own[:, :, None] + other[:, None, :]
    return sums.baddbmm_(weighted, right.mT.expand(len(weights), -1, -1), alpha=-2.0).clamp_min_(0.0)


def matern52(squared: Tensor) -> Tensor:
    """Matérn-5/2 correlation of squared distances, of any shape."""
    distance = squared.sqrt().mul_(_SQRT5)
    decay = torch.exp(-distance)
    return distance.add_(1.0).add_(squared, alpha=5.0 / 3.0).mul_(decay)


def fit_map(
    features: Tensor,
    values: Tensor,
    noise: Tensor | None,
    n_ensemble: int,
    extra: Tensor | None = None,
) -> Hyperparameters:
    """The modes of the posterior for ``n_ensemble`` taus, of every objective.

    Args:
        features: n x d.
        values: m x n, of mean 0 and variance about 1 in every row.
        noise: known variances, m, beside which the roughness is inferred; ``None``: all of it is noise.
        extra: what single observations' variances are above the noise, m x n; ``None``: nothing.

    Raises:
        torch.linalg.LinAlgError: no covariance at the start could be factored.
    """
    m, d = len(values), features.shape[1]
    levels = (torch.arange(n_ensemble, dtype=values.dtype) + 0.5) / n_ensemble
    taus = (TAU_SCALE * torch.tan(0.5 * math.pi * levels)).to(values).repeat(m)
    values = values.repeat_interleave(n_ensemble, dim=0)
    known = torch.zeros_like(taus) if noise is None else noise.repeat_interleave(n_ensemble)
    extra = None if extra is None else extra.repeat_interleave(n_ensemble, dim=0)
    point = _modes(features, values, taus, known, extra).points
    mean = _LogPosterior(features, values, taus, known, extra).mean(point)
    shape = (m, n_ensemble)
    found = point.exp()
    measuring, own = told_apart(found[:, d + 1].reshape(shape), noise)
    return Hyperparameters(
        weights=found[:, :d].reshape(*shape, d),
        outputscale=found[:, d].reshape(shape),
        noise=measuring,
        roughness=own,
        mean=mean.reshape(shape),
    )


def told_apart(inferred: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
    """The noise and the roughness that an inferred variance, m x s, stands for; ``known`` noise, m."""
    if known is None:
        return inferred, torch.zeros_like(inferred)
    return known[:, None].expand_as(inferred), inferred


def _modes(features: Tensor, values: Tensor, taus: Tensor, noise: Tensor, extra: Tensor | None) -> Minima:
    """Modes of b processes: the logarithms of weights, outputscale and the inferred variance, b x (d + 2)."""
    n, d = features.shape
    bounds = [_WEIGHT_BOUNDS] * d + [_OUTPUTSCALE_BOUNDS, _NOISE_BOUNDS]
    lower, upper = torch.tensor(bounds).to(values).log().unbind(dim=1)
    if n >= _LARGE:
        # Every fourth observation tells most of the way for little time, and the curvature, which grows with
        # their number.
        fewer = None if extra is None else extra[:, ::4]
        part = _modes(features[::4], values[:, ::4], taus, noise, fewer)
        start, inverse = part.points, 0.25 * part.inverse
    else:
        # All features alike and points at distances of about one: everywhere else the gradient tells less.
        begin = [2.0 / d] * d + [1.0, 0.05]
        start, inverse = torch.tensor(begin).to(values).log().expand(len(values), -1), None
    posterior = _LogPosterior(features, values, taus, noise, extra)
    found = minimise(
        posterior, start, lower, upper, max_evaluations=200, tolerance=_TOLERANCE, inverse=inverse
    )
    if not bool(torch.isfinite(found.values).all()):
        raise LinAlgError("no covariance could be factored")
    return found


class _LogPosterior:
    """Minus the log posterior density of the logarithms of b processes' hyperparameters, and its gradient.

    The density is that of the hyperparameters themselves, as in BoTorch: no Jacobian, which would push every
    weight away from zero. The mean is at its mode given the rest, which is known in closed form, so that the
    gradient does not see it. ``noise``, b, is the known part of the variance beside the inferred one.
    """

    def __init__(
        self,
        features: Tensor,
        values: Tensor,
        taus: Tensor,
        noise: Tensor,
        extra: Tensor | None = None,
    ) -> None:
        self._features = features
        self._values = values
        self._taus = taus
        self._noise = noise
        self._extra = extra

    def __call__(self, point: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        x, y, tau = self._features, self._values[which], self._taus[which]
        d = x.shape[1]
        weights, scale = point[:, :d].exp(), point[:, d].exp()
        inferred = point[:, d + 1].exp()
        # In place where it can be: at a few hundred points fresh memory costs as much as the sums.
        squared = squared_distances(x, x, weights)
        distance = squared.sqrt().mul_(_SQRT5)
        slope = distance.neg().exp_()
        covariance = squared.mul_(5.0 / 3.0).mul_(slope)
        slope.mul_(distance.add_(1.0))  # times -5/6: the correlation's derivative by the squared distance
        covariance.add_(slope).mul_(scale[:, None, None])
        variance = self._variance(inferred, which)
        covariance.diagonal(dim1=1, dim2=2).add_(variance + JITTER * scale[:, None])
        root, info = torch.linalg.cholesky_ex(covariance)
        inverse = torch.cholesky_inverse(root)
        mean, alpha = _mode_of_mean(inverse, y)
        log_determinant = root.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        ratio = weights / tau[:, None]
        value = (
            0.5 * ((y - mean[:, None]) * alpha).sum(dim=1)
            + log_determinant
            + 0.5 * mean**2
            + torch.log1p(ratio**2).sum(dim=1)
            - (_OUTPUTSCALE_PRIOR[0] - 1.0) * point[:, d]
            + _OUTPUTSCALE_PRIOR[1] * scale
            - (_NOISE_PRIOR[0] - 1.0) * point[:, d + 1]
            + _NOISE_PRIOR[1] * inferred
        )
        # Twice the derivative by the covariance, symmetric.
        by_covariance = inverse.baddbmm_(alpha[:, :, None], alpha[:, None, :], alpha=-1.0)
        diagonal = by_covariance.diagonal(dim1=1, dim2=2).clone()
        with_signal = covariance.mul_(by_covariance).sum(dim=(1, 2)) - (variance * diagonal).sum(dim=1)
        by_squared = slope.mul_(by_covariance)
        products = torch.matmul(by_squared, x)
        by_weights = by_squared.sum(dim=2) @ (x * x) - (products * x).sum(dim=1)
        gradient = torch.empty_like(point)
        gradient[:, :d] = (-5.0 / 6.0) * scale[:, None] * by_weights * weights
        gradient[:, :d] += 2.0 * ratio**2 / (1.0 + ratio**2)
        gradient[:, d] = 0.5 * with_signal - (_OUTPUTSCALE_PRIOR[0] - 1.0) + _OUTPUTSCALE_PRIOR[1] * scale
        gradient[:, d + 1] = inferred * (0.5 * diagonal.sum(dim=1) + _NOISE_PRIOR[1]) - (
            _NOISE_PRIOR[0] - 1.0
        )
        failed = (info > 0) | ~torch.isfinite(value)
        return torch.where(failed, torch.inf, value), torch.where(failed[:, None], 0.0, gradient)

    def mean(self, point: Tensor) -> Tensor:
        """The modes of the means at the points of all problems, b."""
        x, d = self._features, self._features.shape[1]
        scale = point[:, d].exp()
        covariance = scale[:, None, None] * matern52(squared_distances(x, x, point[:, :d].exp()))
        variance = self._variance(point[:, d + 1].exp(), slice(None))
        covariance.diagonal(dim1=1, dim2=2).add_(variance + JITTER * scale[:, None])
        return _mode_of_mean(torch.cholesky_inverse(torch.linalg.cholesky(covariance)), self._values)[0]

    def _variance(self, inferred: Tensor, which: Tensor | slice) -> Tensor:
        """What stands on the diagonals beside the process: b x n, or b x 1 where all are alike."""
        variance = (inferred + self._noise[which])[:, None]
        return variance if self._extra is None else variance + self._extra[which]


def _mode_of_mean(inverse: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The mode of the constant mean under its standard normal prior, b, and inverse times residual, b x n."""
    by_one = inverse.sum(dim=2)
    by_value = torch.bmm(inverse, values[:, :, None])[:, :, 0]
    mean = by_value.sum(dim=1) / (by_one.sum(dim=1) + 1.0)
    return mean, by_value - mean[:, None] * by_one
