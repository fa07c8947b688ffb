"""A user's texts as a few vectors: those of turns, a transformer over them, and learned latents.

The transformer goes over the vectors in time order and sees backwards only; pretrained, it predicts each next
turn. Latents then look at all of its states by cross-attention and become vectors of the base's input space,
a soft prompt, or ones for the base's layers to look at: as many as there are latents, however long the
history (Perceiver, Jaegle et al. 2021, arXiv 2103.03206, in the form of Flamingo's resampler, Alayrac et al.
2022, arXiv 2204.14198).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from milp_ray.training.encode import mean_states
from milp_ray.training.soft import embedding_table

if TYPE_CHECKING:
    from milp_ray.config.methods import UserEncoderSection
    from milp_ray.training.base import Base

_TEMPERATURE = 0.1
_SAME = 0.999  # vectors of so large a cosine are the same turn said again, and not told apart
_FURTHEST = 10_000.0  # longest wave of the positions, in turns


class UserEncoder(nn.Module):
    """Vectors of a user's turns → a few latents, such as a soft prompt.

    Args:
        n_in: numbers of a turn's vector.
        n_out: numbers of one latent; in a soft prompt, of one embedding of the base.
        section: sizes.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, n_in: int, n_out: int, section: UserEncoderSection) -> None:
        super().__init__()
        width = section.width
        self.register_buffer("mean", torch.zeros(n_in))
        self.register_buffer("scale", torch.ones(n_in))
        self.enter = nn.Linear(n_in, width)
        self.drop = nn.Dropout(section.dropout)
        layer = nn.TransformerEncoderLayer(
            width,
            section.n_heads,
            2 * width,
            dropout=0.0,  # inside attention it would take the quick kernels away
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, section.n_layers, enable_nested_tensor=False)
        self.following = nn.Linear(width, n_in)
        self.nothing = nn.Parameter(0.02 * torch.randn(width))
        self.latents = nn.Parameter(torch.randn(section.n_soft, width))
        self.resample = nn.ModuleList(
            Resample(width, section.n_heads) for _ in range(section.n_latent_layers)
        )
        self.leave = nn.Linear(width, n_out)
        self.norm = nn.LayerNorm(n_out)

    def fit_inputs(self, vectors: Tensor) -> None:
        """Standardise what enters as ``vectors`` (n, n_in) are."""
        self.mean.copy_(vectors.mean(0))
        self.scale.copy_(vectors.std(0, correction=0).clamp(min=1e-6))

    def fit_outputs(self, table: Tensor) -> None:
        """Begin with outputs of the size of the base's embeddings, ``table`` (n_tokens, n_out), around their
        mean.
        """
        mean = table.float().mean(0)
        with torch.no_grad():
            self.norm.weight.fill_(float((table.float() - mean).square().mean().sqrt()))
            self.norm.bias.copy_(mean)

    def states(self, vectors: Tensor, real: Tensor) -> Tensor:
        """(n, length, width) of turns (n, length, n_in) in time order; ``real`` (n, length): not padding."""
        length = vectors.shape[1]
        # Counted from the latest turn: what was said last is at the same place in any history.
        ages = real.sum(1, keepdim=True) - 1 - torch.arange(length, device=vectors.device)
        hidden = self.drop(self.enter(self.standardised(vectors)))
        hidden = hidden + waves(ages, hidden.shape[-1]).to(hidden.dtype)
        later = torch.ones(length, length, dtype=torch.bool, device=vectors.device).triu(1)
        states: Tensor = self.layers(hidden, mask=later)
        return states

    def forward(self, vectors: Tensor, real: Tensor) -> Tensor:
        """(n, n_soft, n_out): the latents of turns (n, length, n_in); padding stands on the right."""
        n = vectors.shape[0]
        # Who has said nothing has this state, too: attention to nothing at all would be no number.
        nothing = self.nothing.expand(n, 1, -1)
        states = torch.cat([nothing, self.states(vectors, real)], 1) if vectors.shape[1] else nothing
        hidden = torch.cat([real.new_zeros(n, 1), ~real], 1)
        latents = self.latents.expand(n, -1, -1)
        for block in self.resample:
            latents = block(latents, states, hidden)
        soft: Tensor = self.norm(self.leave(self.drop(latents)))
        return soft

    def next_turn_loss(self, vectors: Tensor, real: Tensor) -> Tensor:
        """How well the state of each turn tells the next one's vector from all others here: InfoNCE, nats.

        A scalar; 0 where no user has two turns.
        """
        predicted = self.following(self.states(vectors, real)[:, :-1])
        has_next = real[:, 1:]
        guesses = functional.normalize(predicted[has_next], dim=-1)
        turns = functional.normalize(self.standardised(vectors)[:, 1:][has_next], dim=-1)
        if not len(turns):
            return predicted.sum() * 0.0
        same = (turns @ turns.T > _SAME) & ~torch.eye(len(turns), dtype=torch.bool, device=turns.device)
        scores = (guesses @ turns.T / _TEMPERATURE).masked_fill(same, float("-inf"))
        return functional.cross_entropy(scores, torch.arange(len(turns), device=turns.device))

    def standardised(self, vectors: Tensor) -> Tensor:
        """Vectors of mean 0 and variance 1 over the turns that it was fitted to."""
        found: Tensor = (vectors - self.mean) / self.scale
        return found


class Resample(nn.Module):
    """Latents look at states, and then each for itself: (n, n_latents, width) → the same."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm_latents, self.norm_states = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, n_heads, batch_first=True)
        self.alone = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, latents: Tensor, states: Tensor, hidden: Tensor) -> Tensor:
        """``hidden`` (n, n_states) is True where a state is not to be looked at."""
        keys = self.norm_states(states)
        seen, _ = self.attend(
            self.norm_latents(latents), keys, keys, key_padding_mask=hidden, need_weights=False
        )
        latents = latents + seen
        found: Tensor = latents + self.alone(latents)
        return found


def new_encoder(
    base: Base, vectors: Sequence[Tensor], section: UserEncoderSection, seed: int, n_out: int | None = None
) -> UserEncoder:
    """Fresh weights, drawn from ``seed`` alone, for turns like ``vectors`` (n_turns, n_in).

    ``n_out`` is the size of a latent; ``None``: that of the base's embeddings, which the latents begin alike.
    """
    table = embedding_table(base).detach().cpu()
    size = table.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = UserEncoder(size if not vectors else vectors[0].shape[1], n_out or size, section)
    every = torch.cat(list(vectors)) if vectors else torch.empty(0, size)
    encoder.fit_inputs(every if len(every) else torch.zeros(1, encoder.mean.shape[0]))
    if n_out is None:
        encoder.fit_outputs(table)
    return encoder.to(base.device)


def text_vectors(base: Base, texts: Sequence[Sequence[str]]) -> list[Tensor]:
    """(n_texts, hidden) float32 on the CPU for each of several lists of texts, encoded together."""
    found = mean_states(base, [text for own in texts for text in own])
    return list(found.split([len(own) for own in texts]))


def padded(vectors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, length, size) with zeros on the right, and (n, length) True where they are not."""
    lengths = torch.tensor([len(own) for own in vectors])
    rows = nn.utils.rnn.pad_sequence(list(vectors), batch_first=True)
    real = torch.arange(rows.shape[1]) < lengths[:, None]
    return rows.to(device), real.to(device)


def waves(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of places, any shape (…): (…, width), as in Vaswani et al. 2017."""
    half = (width + 1) // 2
    steps = torch.arange(half, device=places.device) / half
    angles = places[..., None] * torch.exp(-math.log(_FURTHEST) * steps)
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :width]
