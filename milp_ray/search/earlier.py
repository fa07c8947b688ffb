"""What earlier studies of the same space and objectives tell a new one, where they tell anything.

The posterior mean of a process fitted to an earlier study is a trend that the new study's process deviates
from: a multiple of it is subtracted from the new values and added to the new predictions (the stacked
processes of Golovin et al. 2017, with one scale). Whether an objective takes a trend, and which, is decided
by what predicts its own observations best when each is left out (Rasmussen and Williams 2006, section
5.4.2): an earlier study that is beside the point changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from milp_ray.search.posterior import Posterior
from milp_ray.search.saas import fit_map

# What a trend has to gain over none, in nats of all observations together: some gain a little by chance.
_LEAST_GAIN = 8.0


@dataclass(frozen=True)
class EarlierStudies:
    """Posteriors of the earlier studies, each in its own model's units, all objectives maximised."""

    posteriors: tuple[Posterior, ...]

    def trends(self, points: Tensor) -> Tensor:
        """Their means at ``points`` q x d, and the mean of them all where there are several: k x m x q."""
        each = torch.stack([posterior.mean(points).mean(dim=1) for posterior in self.posteriors])
        return torch.cat([each, each.mean(dim=0, keepdim=True)]) if len(each) > 1 else each


@dataclass(frozen=True)
class Trend:
    """The mean function of m objectives: ``scales[k, j]`` times the k-th trend for objective j, summed."""

    earlier: EarlierStudies
    scales: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """M x q."""
        return (self.scales[:, :, None] * self.earlier.trends(points)).sum(dim=0)


def choose_trend(
    earlier: EarlierStudies,
    features: Tensor,
    values: Tensor,
    noise: Tensor | None,
    n_ensemble: int,
    extra: Tensor | None = None,
) -> Trend | None:
    """The trend that each objective's own observations ask for; ``None``: no objective asks for one.

    Args:
        earlier: at least one study.
        features: n x d.
        values: m x n, standardised.
        noise: known variances, m; ``None``: inferred.
        n_ensemble: of the MAP fits that are compared, also where the surrogate samples with NUTS.
        extra: what single observations' variances are above the noise, m x n; ``None``: nothing.

    Raises:
        torch.linalg.LinAlgError: no covariance could be factored.
    """
    m, n = values.shape
    trends = earlier.trends(features)  # k x m x n
    # Least squares, observations weighing less the more noise they have above the others; the added row of
    # prior, as heavy as one observation, keeps a flat trend from being blown up.
    weights = torch.ones_like(values) if extra is None else 1.0 / (1.0 + extra)
    scales = (weights * trends * values).sum(dim=2) / ((weights * trends * trends).sum(dim=2) + 1.0)  # k x m
    residuals = values - scales[:, :, None] * trends
    stacked = torch.cat([values[None], residuals]).reshape(-1, n)  # (1 + k)·m x n
    repeated = None if noise is None else noise.repeat(1 + len(trends))
    above = None if extra is None else extra.repeat(1 + len(trends), 1)
    found = fit_map(features, stacked, repeated, n_ensemble, above)
    fitted = Posterior(features, stacked, found, extra=above)
    gain = _left_out_density(fitted, stacked).reshape(-1, m)
    best = gain[1:].argmax(dim=0)
    is_better = gain[1:].amax(dim=0) > gain[0] + _LEAST_GAIN
    chosen = torch.zeros_like(scales)
    for objective in torch.nonzero(is_better)[:, 0].tolist():
        chosen[best[objective], objective] = scales[best[objective], objective]
    return Trend(earlier, chosen) if bool(is_better.any()) else None


def fit_earlier(studies: Sequence[tuple[Tensor, Tensor, Tensor | None]], n_ensemble: int) -> EarlierStudies:
    """Fit every earlier study by itself.

    Args:
        studies: of each the features n x d, standardised values m x n, and what their variances are above
            the noise (m x n or ``None``).
    """
    return EarlierStudies(
        tuple(
            Posterior(features, values, fit_map(features, values, None, n_ensemble, extra), extra=extra)
            for features, values, extra in studies
        )
    )


def _left_out_density(posterior: Posterior, values: Tensor) -> Tensor:
    """Log density of every objective's observations, each given all others, summed: m.

    The samples of the hyperparameters are a mixture.
    """
    mean, variance = posterior.leave_one_out()  # m x s x n
    log = -0.5 * ((values[:, None] - mean) ** 2 / variance + torch.log(2.0 * math.pi * variance))
    return (torch.logsumexp(log, dim=1) - math.log(posterior.n_samples)).sum(dim=1)
