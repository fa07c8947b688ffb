"""Texts that the base writes by itself: what it knows of the world, without any data (Robins 1995).

Trained on beside a user's pairs they hold the adapted base to what the base alone says: the cross-entropy on
samples of a distribution is least where the distribution is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from milp_ray.training.data import Sequence

if TYPE_CHECKING:
    from milp_ray.training.base import Base

N_TEXTS = 128
LENGTH = 256  # tokens
_AT_ONCE = 64


def written_by_itself(base: Base, seed: int, n_texts: int | None = None) -> list[Sequence]:
    """``n_texts`` samples of at most ``LENGTH`` tokens from the base's distribution; every token is a target.

    Args:
        base: the frozen base; it is asked without any adapter.
        seed: of the samples. Torch's own random state stays as it was.
        n_texts: how many; ``None``: ``N_TEXTS``.
    """
    import torch

    start = list(base.start_ids) or [base.eos_id]
    length = min(LENGTH, base.context_length)
    wanted = N_TEXTS if n_texts is None else n_texts
    asked = torch.tensor([start] * min(_AT_ONCE, wanted), device=base.device)
    texts: list[Sequence] = []
    model: Any = base.model
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        while len(texts) < wanted:
            rows = model.generate(
                asked,
                attention_mask=torch.ones_like(asked),
                do_sample=True,
                top_k=0,
                max_length=length,
                eos_token_id=base.eos_id,
                pad_token_id=base.eos_id,
            )
            texts += [_sequence(row, len(start), base.eos_id) for row in rows.tolist()]
    return texts[:wanted]


def _sequence(ids: list[int], n_start: int, eos_id: int) -> Sequence:
    """A sample up to its first end token, that included."""
    end = next((i for i, token in enumerate(ids) if i >= n_start and token == eos_id), len(ids) - 1)
    return Sequence(tuple(ids[: end + 1]), 1, "memory")
