"""The posterior of the objectives' Gaussian processes, and joint draws from it that grow point by point.

The objectives are free of noise, but not smooth: a layout's roughness, which no other layout tells of
(:mod:`milp_ray.search.saas`), is a part of them.

Notation: m objectives, s samples of the hyperparameters, b = m·s processes (objective by objective), n
observations, d features. A process is known by its *whitener* A = L⁻¹ of the covariance K = L Lᵀ, so that
what is asked of a new point x is one product, v = A k(x): the mean is μ + vᵀ A (y − μ) and the variance
k(x, x) − vᵀv.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from milp_ray.search.saas import JITTER, Hyperparameters, LinAlgError, matern52, squared_distances

MeanFunction = Callable[[Tensor], Tensor]  # features q x d -> m x q


class Posterior:
    """Of the noise-free objectives, given n observations.

    Args:
        features: n x d.
        values: m x n, in the model's units.
        hyperparameters: of the m objectives by s samples.
        mean_function: added to the processes' constant means; ``values`` are whole, with it.
        extra: what single observations' variances are above the noise, m x n; ``None``: nothing.

    Raises:
        torch.linalg.LinAlgError: a covariance is not positive definite.
    """

    def __init__(
        self,
        features: Tensor,
        values: Tensor,
        hyperparameters: Hyperparameters,
        mean_function: MeanFunction | None = None,
        extra: Tensor | None = None,
    ) -> None:
        m, s, d = hyperparameters.weights.shape
        self.features = features
        self.n_objectives, self.n_samples = m, s
        self.weights = hyperparameters.weights.reshape(m * s, d)
        self.outputscale = hyperparameters.outputscale.reshape(-1)
        self.roughness = hyperparameters.roughness.reshape(-1, 1)  # b x 1
        # Of every observation: b x n, or b x 1 where all have the same.
        self.noise = hyperparameters.noise.reshape(-1, 1)
        if extra is not None:
            self.noise = self.noise + extra.repeat_interleave(s, dim=0)
        self.constant = hyperparameters.mean.reshape(-1)
        self._mean_function = mean_function
        covariance = self.covariance(features, features)
        covariance.diagonal(dim1=1, dim2=2).add_(self._jittered_noise())
        self.whitener = _inverse_root(torch.linalg.cholesky(covariance))
        self._values = values.repeat_interleave(s, dim=0)
        residual = self._values - self.prior_mean(features)
        self.whitened = torch.bmm(self.whitener, residual[:, :, None])[:, :, 0]  # b x n
        self.residual_weights = torch.bmm(self.whitener.mT, self.whitened[:, :, None])[:, :, 0]

    def prior_mean(self, points: Tensor) -> Tensor:
        """B x q."""
        mean = self.constant[:, None].expand(-1, len(points))
        if self._mean_function is None:
            return mean
        return mean + self._mean_function(points).repeat_interleave(self.n_samples, dim=0)

    def covariance(self, left: Tensor, right: Tensor) -> Tensor:
        """Prior covariances of the objectives: q x d and r x d, b x q x r. Equal points share roughness."""
        is_same = (left[:, None] == right[None]).all(dim=2)
        return self.smooth_covariance(left, right).add_(is_same * self.roughness[:, :, None])

    def smooth_covariance(self, left: Tensor, right: Tensor) -> Tensor:
        """The same without roughness: also what points have in common of which none is in both."""
        return matern52(squared_distances(left, right, self.weights)).mul_(self.outputscale[:, None, None])

    @property
    def variance(self) -> Tensor:
        """Prior variances of the objectives at any point, b x 1."""
        return self.outputscale[:, None] + self.roughness

    def mean(self, points: Tensor) -> Tensor:
        """Means by sample of the objectives' smooth part, m x s x q; ``points`` q x d."""
        cross = self.smooth_covariance(self.features, points)
        mean = torch.bmm(self.residual_weights[:, None, :], cross)[:, 0] + self.prior_mean(points)
        return mean.reshape(self.n_objectives, self.n_samples, -1)

    def mean_and_variance(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances by sample, m x s x q each."""
        explained = torch.bmm(self.whitener, self.covariance(self.features, points))
        variance = (self.variance - (explained**2).sum(dim=1)).clamp_min(0.0)
        mean = torch.bmm(self.whitened[:, None, :], explained)[:, 0] + self.prior_mean(points)
        shape = (self.n_objectives, self.n_samples, -1)
        return mean.reshape(shape), variance.reshape(shape)

    def draws_at_observed(self, base: Tensor) -> Tensor:
        """Joint draws at the observed points, s x k x m x n; ``base`` s x k x m x n is standard normal.

        Without the noise, of variances D, the covariance there is D − D K⁻¹ D, of which the root is taken.
        """
        identity = torch.eye(len(self.features)).to(self.whitener)
        inverse = torch.bmm(self.whitener.mT, self.whitener)
        noise = self._jittered_noise().expand(-1, len(self.features))
        deviation = noise.sqrt()
        scaled = inverse * deviation[:, :, None] * deviation[:, None, :]
        root = root_with_jitter(identity - scaled) * deviation[:, :, None]
        mean = self._values - noise * self.residual_weights
        normal = self.by_process(base)  # b x k x n
        draws = mean[:, None, :] + torch.bmm(normal, root.mT)
        return self.by_sample(draws)

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every noisy observation given all others, m x s x n (Rasmussen and Williams
        2006, 5.12).
        """
        precision = (self.whitener**2).sum(dim=1)
        mean = self._values - self.residual_weights / precision
        shape = (self.n_objectives, self.n_samples, -1)
        return mean.reshape(shape), (1.0 / precision).reshape(shape)

    def _jittered_noise(self) -> Tensor:
        return self.noise + JITTER * self.outputscale[:, None]

    def by_process(self, values: Tensor) -> Tensor:
        """S x k x m x n to b x k x n."""
        s, k, m, n = values.shape
        return values.permute(2, 0, 1, 3).reshape(m * s, k, n)

    def by_sample(self, values: Tensor) -> Tensor:
        """B x k x n to s x k x m x n."""
        _, k, n = values.shape
        return values.reshape(self.n_objectives, self.n_samples, k, n).permute(1, 2, 0, 3)


class JointDraws:
    """k joint draws a sample at points that are added one after another, and conditional draws at any others.

    A drawn point enters the covariance as an observation without noise, of another value in every draw, by
    one more row of the whitener. So a candidate's draw, given those, is again one product (Daulton et al.
    2021 keep the root of the baseline for the same reason).

    Args:
        base: s x k x m x c, standard normal: the c-th point takes the c-th number; a candidate the next one.
    """

    def __init__(self, posterior: Posterior, points: Tensor, base: Tensor) -> None:
        self._posterior = posterior
        self._base = posterior.by_process(base)  # b x k x c
        self._points = posterior.features
        self._whitener = posterior.whitener
        # The whitened values: one column an observation (the same in all draws), then one a drawn point.
        self._whitened = posterior.whitened[:, None, :].expand(-1, base.shape[1], -1)
        self._n_drawn = 0
        self.values = posterior.by_sample(self._base[:, :, :0])  # s x k x m x p, at the added points
        if len(points):
            self.add(points)

    def add(self, points: Tensor) -> None:
        """Draw at q more points, jointly with all that is drawn; ``points`` q x d."""
        posterior, n, q = self._posterior, len(self._points), len(points)
        explained = torch.bmm(self._whitener, posterior.covariance(self._points, points))  # b x n x q
        rest = posterior.covariance(points, points) - torch.bmm(explained.mT, explained)
        root = root_with_jitter(rest, scale=posterior.outputscale)
        below = _inverse_root(root)
        whitener = self._whitener.new_zeros(len(root), n + q, n + q)
        whitener[:, :n, :n] = self._whitener
        whitener[:, n:, :n] = -torch.bmm(torch.bmm(below, explained.mT), self._whitener)
        whitener[:, n:, n:] = below
        normal = self._base[:, :, self._n_drawn : self._n_drawn + q]
        mean = torch.bmm(self._whitened, explained) + posterior.prior_mean(points)[:, None, :]
        drawn = mean + torch.bmm(normal, root.mT)
        self.values = torch.cat([self.values, posterior.by_sample(drawn)], dim=-1)
        self._whitener = whitener
        self._whitened = torch.cat([self._whitened, normal], dim=2)
        self._points = torch.cat([self._points, points])
        self._n_drawn += q

    def candidates(self, points: Tensor) -> Tensor:
        """Draws at every point by itself given those at the added ones, s x k x m x q.

        ``points`` q x d are new: none is observed or drawn.
        """
        posterior = self._posterior
        explained = torch.bmm(self._whitener, posterior.smooth_covariance(self._points, points))
        mean = torch.bmm(self._whitened, explained) + posterior.prior_mean(points)[:, None, :]
        variance = (posterior.variance - explained.square_().sum(dim=1)).clamp_min_(0.0)
        normal = self._base[:, :, self._n_drawn, None]
        return posterior.by_sample(mean + normal * variance.sqrt()[:, None, :])


def root_with_jitter(covariance: Tensor, scale: Tensor | None = None) -> Tensor:
    """Cholesky roots of covariances b x n x n that rounding may have made singular.

    Jitter is relative to ``scale``, b (1 where not given), and grows as long as a factorisation fails.

    Raises:
        torch.linalg.LinAlgError: not even the largest jitter helps.
    """
    unit = torch.ones_like(covariance[:, 0, 0]) if scale is None else scale
    for jitter in (JITTER, 1e-6, 1e-4):
        jittered = covariance.clone()
        jittered.diagonal(dim1=1, dim2=2).add_((jitter * unit)[:, None])
        root, info = torch.linalg.cholesky_ex(jittered)
        if not bool(info.any()):
            return root
    raise LinAlgError("a posterior covariance could not be factored")


def _inverse_root(root: Tensor) -> Tensor:
    identity = torch.eye(root.shape[-1]).to(root).expand_as(root)
    return torch.linalg.solve_triangular(root, identity, upper=False)
