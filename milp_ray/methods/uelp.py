"""UeLP (user-embedding-based personalisation): the base gets a soft prompt made of the history.

As MiLP's paper calls the family that it compares with: User Embedding Model (Doddapaneni et al. 2024, arXiv
2401.04858), User-LLM (Ning et al. 2024, arXiv 2402.13598). Each turn is a vector (the frozen base's mean
hidden state); a transformer over the turns is pretrained to predict the next one on all users' histories;
learned latents compress what it found to ``n_soft`` vectors that stand before the query as a soft prompt
(:mod:`milp_ray.methods.user_encoder`); the whole is trained on everybody's past examples through the frozen
base. A user needs no training: their soft prompt is computed from the history.

Where it departs from User-LLM: what is predicted in pretraining is the next turn's vector among all others of
the batch (InfoNCE), as there are no items with ids; turns are text, with no features of several kinds; and
the base stays frozen throughout.

The encoder is trained on all users' histories and past examples; a user's soft prompt is made of their own
history by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.methods.protocol import Answerer
from milp_ray.training.text import turn_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from milp_ray.methods.protocol import FitRequest, Personalizer
    from milp_ray.methods.shared import Shared
    from milp_ray.methods.soft_training import PastExample, SoftModel


def share(requests: Sequence[FitRequest]) -> Shared:
    """Train the encoder; nothing is shared where nobody has past examples to train it on."""
    from milp_ray.methods.soft_training import train_shared

    return train_shared(requests, _new_model)


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Compute each user's soft prompt."""
    import torch

    from milp_ray.methods.soft_training import shared_state
    from milp_ray.methods.user_encoder import padded

    state = shared_state(requests)
    if not state:
        return [Answerer(request) for request in requests]
    model = _new_model(requests)
    encoder = model.encoder.eval()
    encoder.load_state_dict(state)
    base = requests[0].base
    with torch.no_grad():
        return [
            Answerer(request, soft=encoder(*padded([own], base.device))[0].cpu())
            for request, own in zip(requests, model.histories, strict=True)
        ]


def _new_model(requests: Sequence[FitRequest]) -> SoftModel:
    """An untrained encoder."""
    from milp_ray.methods.soft_training import SoftModel
    from milp_ray.methods.user_encoder import new_encoder, padded

    one = requests[0]
    base, vectors = one.base, turn_vectors(requests)
    encoder = new_encoder(base, vectors, one.methods.user_encoder, one.seed)

    def soft_of(some: Sequence[PastExample]) -> Tensor:
        users = list(dict.fromkeys(one.user for one in some))
        soft: Tensor = encoder(*padded([vectors[user] for user in users], base.device))
        return soft[[users.index(one.user) for one in some]]

    return SoftModel(encoder, encoder, vectors, soft_of)


def turn_vectors(requests: Sequence[FitRequest]) -> list[Tensor]:
    """(n_turns, hidden) of each user's latest turns, in time order."""
    from milp_ray.methods.user_encoder import text_vectors

    most = requests[0].methods.user_encoder.max_turns
    texts = [[turn_line(turn, one.prompt) for turn in one.split.history[-most:]] for one in requests]
    return text_vectors(requests[0].base, texts)
