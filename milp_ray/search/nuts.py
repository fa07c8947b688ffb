"""Samples of the SAAS model's hyperparameters by NUTS (Hoffman and Gelman 2014), with NumPyro.

The model is that of :mod:`milp_ray.search.saas`, tau included, in float64. Squared distances are a matrix
product, as there: BoTorch's sampler makes all n·n·d differences at every step of the sampler.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import torch
from jax.scipy.linalg import solve_triangular
from numpyro import distributions
from numpyro.infer import MCMC, NUTS
from torch import Tensor

from milp_ray.search.saas import JITTER, TAU_SCALE, Hyperparameters

_MAX_TREE_DEPTH = 6
_MIN_NOISE = 1e-4


def fit_nuts(
    features: Tensor,
    values: Tensor,
    noise: Tensor | None,
    *,
    warmup_steps: int,
    n_steps: int,
    thinning: int,
    seed: int,
) -> Hyperparameters:
    """Every ``thinning``-th of ``n_steps`` samples of each objective's hyperparameters, after the warm-up.

    Args:
        features: n x d.
        values: m x n, of mean 0 and variance about 1 in every row.
        noise: known variances, m; ``None``: inferred.
        seed: of the sampler.

    Raises:
        torch.linalg.LinAlgError: the sampler found no place to begin, or no finite sample.
    """
    with jax.enable_x64(True):
        sampler = MCMC(
            NUTS(_model, dense_mass=True, max_tree_depth=_MAX_TREE_DEPTH),
            num_warmup=warmup_steps,
            num_samples=n_steps,
            progress_bar=False,
            # One compilation serves all objectives, whose data are of one shape.
            jit_model_args=True,
        )
        x = jnp.asarray(features.cpu().numpy())
        keys = jax.random.split(jax.random.PRNGKey(seed), len(values))
        samples = [
            _sample(sampler, keys[j], x, y, None if noise is None else float(noise[j]), thinning)
            for j, y in enumerate(values)
        ]
    stacked = {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples])).to(values)
        for name in samples[0]
    }
    if not all(bool(torch.isfinite(part).all()) for part in stacked.values()):
        raise torch.linalg.LinAlgError("NUTS gave samples that are not finite")  # type: ignore[attr-defined]
    return Hyperparameters(
        weights=stacked["tau"][:, :, None] * stacked["relative_weights"],
        outputscale=stacked["outputscale"],
        noise=stacked["noise"],
        mean=stacked["mean"],
    )


def _sample(
    sampler: MCMC, key: jax.Array, x: jax.Array, values: Tensor, noise: float | None, thinning: int
) -> dict[str, np.ndarray]:
    y = jnp.asarray(values.cpu().numpy())
    try:
        sampler.run(key, x, y, None if noise is None else jnp.asarray(noise))
    except RuntimeError as error:
        if "valid initial parameters" not in str(error):
            raise
        raise torch.linalg.LinAlgError("NUTS found no place to begin") from error  # type: ignore[attr-defined]
    return {name: np.asarray(values)[::thinning] for name, values in sampler.get_samples().items()}


def _model(x: jax.Array, y: jax.Array, known_noise: jax.Array | None) -> None:
    n, d = x.shape
    tau = numpyro.sample("tau", distributions.HalfCauchy(TAU_SCALE))
    relative = numpyro.sample("relative_weights", distributions.HalfCauchy(jnp.ones(d)))
    scale = numpyro.sample("outputscale", distributions.Gamma(2.0, 0.15))
    mean = numpyro.sample("mean", distributions.Normal(0.0, 1.0))
    if known_noise is None:
        noise = numpyro.deterministic(
            "noise", numpyro.sample("noise_above", distributions.Gamma(0.9, 10.0)) + _MIN_NOISE
        )
    else:
        noise = numpyro.deterministic("noise", known_noise)
    weighted = x * (tau * relative)
    own = (weighted * x).sum(axis=1)
    off_diagonal = 1.0 - jnp.eye(n)
    squared = (own[:, None] + own[None, :] - 2.0 * weighted @ x.T) * off_diagonal
    # The root's derivative is infinite at 0: equal points are held a hair apart.
    distance = math.sqrt(5.0) * jnp.sqrt(jnp.maximum(squared, 1e-20))
    correlation = (1.0 + distance + distance**2 / 3.0) * jnp.exp(-distance)
    covariance = scale * correlation + (noise + JITTER * scale) * jnp.eye(n)
    root = jnp.linalg.cholesky(covariance)
    whitened = solve_triangular(root, y - mean, lower=True)
    log_density = -0.5 * (whitened**2).sum() - jnp.log(jnp.diagonal(root)).sum()
    numpyro.factor("observed", log_density)
