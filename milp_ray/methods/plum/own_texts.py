"""Texts that the base writes by itself: what it knows of the world, without any data (Robins 1995).

Trained on beside a user's pairs they hold the adapted base to what the base alone says: the cross-entropy on
samples of a distribution is least where the distribution is kept. With few texts that is a noisy hold, and
the distributions themselves can be the targets (:func:`milp_ray.training.encode.with_reference`). A text goes
on past an end token, as the rows do that bases are pretrained on: what comes after one is to be kept as well.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from milp_ray.training.data import Sequence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from milp_ray.training.base import Base

MOST_TEXTS = 1024  # of which every conversation draws some
LENGTH = 384  # tokens
_AT_ONCE = 64


def written_by_itself(base: Base, seed: int, n_texts: int) -> list[Sequence]:
    """``n_texts`` samples of ``LENGTH`` tokens from the base's distribution; every token is a target.

    Args:
        base: the frozen base; it is asked without any adapter, and whatever its generation configuration.
        seed: of the samples. Torch's own random state stays as it was.
        n_texts: how many. The first of them do not depend on it.
    """
    import torch

    start = list(base.start_ids) or [base.eos_id]
    # Always whole batches: what is drawn for one row depends on how many there are.
    asked = torch.tensor([start] * _AT_ONCE, device=base.device)
    texts: list[Sequence] = []
    with torch.random.fork_rng(), torch.inference_mode(), _own_distribution(base) as model:
        torch.manual_seed(seed)
        while len(texts) < n_texts:
            rows = model.generate(
                asked,
                attention_mask=torch.ones_like(asked),
                do_sample=True,
                top_k=0,
                max_length=min(LENGTH, base.context_length),
                pad_token_id=base.eos_id,
            )
            texts += [Sequence(tuple(row), 1, "memory") for row in rows.tolist()]
    return texts[:n_texts]


@contextmanager
def _own_distribution(base: Base) -> Iterator[Any]:
    """The model without its generation configuration, which may sharpen or cut, or stop at an end token."""
    from transformers import GenerationConfig

    model: Any = base.model
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = kept
