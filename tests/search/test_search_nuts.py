"""NUTS samples of the SAAS model; compiling the sampler is what takes the time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from milp_ray.search.nuts import fit_nuts
from milp_ray.search.posterior import Posterior

Data = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.slow
def test_nuts_samples_predict_as_the_mode_does(data: Data) -> None:
    x, values = data(30)
    found = fit_nuts(x, values, None, warmup_steps=32, n_steps=16, thinning=4, seed=0)
    assert found.weights.shape == (2, 4, 6)
    assert found.weights.dtype == torch.float64
    assert (found.noise > 1e-4).all()
    new_x, truth = data(200, seed=5)
    predicted = Posterior(x, values, found).mean(new_x).mean(dim=1)
    assert (((predicted - truth) ** 2).mean(dim=1) / truth.var(dim=1) < 0.1).all()
    again = fit_nuts(x, values, None, warmup_steps=32, n_steps=16, thinning=4, seed=0)
    assert torch.equal(found.weights, again.weights)


@pytest.mark.slow
def test_nuts_tells_roughness_from_noise_that_is_known(data: Data) -> None:
    x, values = data(60)
    values = values + 0.3 * torch.randn(values.shape, generator=torch.Generator().manual_seed(3)).double()
    noise = torch.full((2,), 0.04).double()
    found = fit_nuts(x, values, noise, warmup_steps=64, n_steps=32, thinning=4, seed=0)
    assert torch.equal(found.noise, noise[:, None].expand(2, 8))
    # Of the variance 0.09 around a smooth function measuring explains 0.04.
    torch.testing.assert_close(
        found.roughness.mean(dim=1), torch.full((2,), 0.05).double(), atol=0.04, rtol=0
    )
