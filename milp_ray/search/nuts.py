"""Samples of the SAAS model's hyperparameters by NUTS (Hoffman and Gelman 2014), with NumPyro.

The model is that of :mod:`milp_ray.search.saas`, tau included, in float64. Squared distances are a matrix
product, as there: BoTorch's sampler makes all n·n·d differences at every step. A compiled sampler serves all
objectives, and all batches for which the number of observations is filled up to the same one.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import torch
from jax.scipy.linalg import solve_triangular
from numpyro import distributions
from numpyro.infer import MCMC, NUTS
from torch import Tensor

from milp_ray.search.saas import JITTER, TAU_SCALE, Hyperparameters, LinAlgError, told_apart

_MAX_TREE_DEPTH = 6
_MIN_NOISE = 1e-4
# Observations are filled up to a multiple of so many, so that a study compiles its sampler every few batches.
_ROWS = 32


def fit_nuts(
    features: Tensor,
    values: Tensor,
    noise: Tensor | None,
    *,
    warmup_steps: int,
    n_steps: int,
    thinning: int,
    seed: int,
    extra: Tensor | None = None,
) -> Hyperparameters:
    """Every ``thinning``-th of ``n_steps`` samples of each objective's hyperparameters, after the warm-up.

    Args:
        features: n x d.
        values: m x n, of mean 0 and variance about 1 in every row.
        noise: known variances, m, beside which the roughness is inferred; ``None``: all of it is noise.
        seed: of the sampler.
        extra: what single observations' variances are above the noise, m x n; ``None``: nothing.

    Raises:
        torch.linalg.LinAlgError: the sampler found no place to begin, or no finite sample.
    """
    n, d = features.shape
    n_rows = _ROWS * -(-n // _ROWS)
    x = np.zeros((n_rows, d))
    x[:n] = features.cpu().numpy()
    y = np.zeros((len(values), n_rows))
    y[:, :n] = values.cpu().numpy()
    variances = np.zeros(len(values)) if noise is None else noise.cpu().numpy()
    above = np.zeros((len(values), n_rows))
    if extra is not None:
        above[:, :n] = extra.cpu().numpy()
    with jax.enable_x64(True):
        sampler = _sampler(warmup_steps, n_steps)
        keys = jax.random.split(jax.random.PRNGKey(seed), len(values))
        samples = [
            _sample(sampler, key, (x, row, np.arange(n_rows) < n, variance, more), thinning)
            for key, row, variance, more in zip(keys, y, variances, above, strict=True)
        ]
    stacked = {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples])).to(values)
        for name in samples[0]
    }
    if not all(bool(torch.isfinite(part).all()) for part in stacked.values()):
        raise LinAlgError("NUTS gave samples that are not finite")
    measuring, own = told_apart(stacked["noise_above"] + _MIN_NOISE, noise)
    return Hyperparameters(
        weights=stacked["tau"][:, :, None] * stacked["relative_weights"],
        outputscale=stacked["outputscale"],
        noise=measuring,
        roughness=own,
        mean=stacked["mean"],
    )


@lru_cache(maxsize=4)
def _sampler(warmup_steps: int, n_steps: int) -> MCMC:
    """A sampler; it is compiled at its first run, which takes long, and again for data of another shape
    only.
    """
    return MCMC(
        NUTS(_model, dense_mass=True, max_tree_depth=_MAX_TREE_DEPTH),
        num_warmup=warmup_steps,
        num_samples=n_steps,
        progress_bar=False,
        jit_model_args=True,
    )


def _sample(sampler: MCMC, key: jax.Array, data: tuple[Any, ...], thinning: int) -> dict[str, np.ndarray]:
    try:
        sampler.run(key, *data)
    except RuntimeError as error:
        if "valid initial parameters" not in str(error):
            raise
        raise LinAlgError("NUTS found no place to begin") from error
    return {name: np.asarray(values)[::thinning] for name, values in sampler.get_samples().items()}


def _model(x: jax.Array, y: jax.Array, is_row: jax.Array, known_noise: jax.Array, extra: jax.Array) -> None:
    """``is_row`` says which rows are data; the others only fill up and leave the density as it is.

    ``extra`` is what rows' variances are above the noise.
    """
    d = x.shape[1]
    tau = numpyro.sample("tau", distributions.HalfCauchy(TAU_SCALE))
    relative = numpyro.sample("relative_weights", distributions.HalfCauchy(jnp.ones(d)))
    scale = numpyro.sample("outputscale", distributions.Gamma(2.0, 0.15))
    mean = numpyro.sample("mean", distributions.Normal(0.0, 1.0))
    noise = known_noise + numpyro.sample("noise_above", distributions.Gamma(0.9, 10.0)) + _MIN_NOISE
    weighted = x * (tau * relative)
    own = (weighted * x).sum(axis=1)
    squared = own[:, None] + own[None, :] - 2.0 * weighted @ x.T
    # The root's derivative is infinite at 0: equal points are held a hair apart.
    distance = math.sqrt(5.0) * jnp.sqrt(jnp.maximum(squared, 1e-20))
    correlation = (1.0 + distance + distance**2 / 3.0) * jnp.exp(-distance)
    covariance = scale * jnp.where(is_row[:, None] & is_row[None, :], correlation, 0.0)
    covariance = covariance + jnp.diag(jnp.where(is_row, noise + extra + JITTER * scale, 1.0))
    root = jnp.linalg.cholesky(covariance)
    whitened = solve_triangular(root, jnp.where(is_row, y - mean, 0.0), lower=True)
    log_density = -0.5 * (whitened**2).sum() - jnp.log(jnp.diagonal(root)).sum()
    numpyro.factor("observed", log_density)
