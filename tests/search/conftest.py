from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def data() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``data(n, d=6, seed=0)``: n rows of d bits, and two objectives of them, standardised, with noise.

    The first objective is a sum of two bits with an interaction, the second one bit.
    """

    def make(n: int, d: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(seed)
        x = (rng.random((n, d)) < 0.5).astype(float)
        values = np.stack([x[:, 1] + 2 * x[:, 2] + x[:, 1] * x[:, 2], -x[:, 0]])
        values += 0.05 * rng.standard_normal(values.shape)
        values = (values - values.mean(axis=1, keepdims=True)) / values.std(axis=1, keepdims=True)
        return torch.from_numpy(x), torch.from_numpy(values)

    return make
