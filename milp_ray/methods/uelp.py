"""UeLP (user-embedding-based personalisation): the base gets a few vectors made of the history.

As MiLP's paper calls the family that it compares with: User Embedding Model (Doddapaneni et al. 2024, arXiv
2401.04858), User-LLM (Ning et al. 2024, arXiv 2402.13598). Each turn is a vector (the frozen base's mean
hidden state); a transformer over the turns is pretrained to predict the next one on all users' histories;
learned latents compress what it found to ``n_soft`` vectors (:mod:`milp_ray.methods.user_encoder`). These
are integrated into the base as ``methods.uelp.integration`` says: they stand before the query as a soft
prompt, or the base's layers look at them through gated cross-attention, and the prompt is the query alone
(:mod:`milp_ray.training.cross_attention`). The whole is trained on everybody's past examples through the
frozen base. A user needs no training: their vectors are computed from the history.

Where it departs from User-LLM: what is predicted in pretraining is the next turn's vector among all others of
the batch (InfoNCE), as there are no items with ids; turns are text, with no features of several kinds; and
the base stays frozen throughout.

The encoder, and what looks at its vectors, are trained on all users' histories and past examples; a user's
vectors are made of their own history by it.
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
    """Train the encoder, and blocks of cross-attention where they are asked for.

    Nothing is shared where nobody has past examples to train on.
    """
    from milp_ray.methods.soft_training import train_shared

    return train_shared(requests, new_model)


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Compute each user's vectors."""
    import torch

    from milp_ray.methods.soft_training import load_shared, shared_state
    from milp_ray.methods.user_encoder import padded
    from milp_ray.training.cross_attention import Latents

    state = shared_state(requests)
    if not state:
        return [Answerer(request) for request in requests]
    model = new_model(requests)
    load_shared(model.module, state)
    device = requests[0].base.device
    with torch.no_grad():
        found = [model.encoder(*padded([own], device))[0].cpu() for own in model.histories]
    if model.blocks is None:
        return [Answerer(request, soft=own) for request, own in zip(requests, found, strict=True)]
    return [
        Answerer(request, latents=Latents(own, model.blocks))
        for request, own in zip(requests, found, strict=True)
    ]


def new_model(requests: Sequence[FitRequest]) -> SoftModel:
    """An untrained encoder, with blocks of cross-attention where these integrate what it makes."""
    from torch import nn

    from milp_ray.methods.soft_training import SoftModel
    from milp_ray.methods.user_encoder import new_encoder, padded
    from milp_ray.training.cross_attention import new_cross_attention

    one = requests[0]
    base, section, uelp = one.base, one.methods.user_encoder, one.methods.uelp
    vectors = turn_vectors(requests)
    is_soft_prompt = uelp.integration == "soft_prompt"
    # Latents that are no embeddings of the base need not be as large as those.
    encoder = new_encoder(base, vectors, section, one.seed, None if is_soft_prompt else section.width)

    def soft_of(some: Sequence[PastExample]) -> Tensor:
        users = list(dict.fromkeys(one.user for one in some))
        soft: Tensor = encoder(*padded([vectors[user] for user in users], base.device))
        return soft[[users.index(one.user) for one in some]]

    if is_soft_prompt:
        return SoftModel(encoder, encoder, vectors, soft_of)
    blocks = new_cross_attention(base, section.width, uelp.cross_attention, one.seed)
    module = nn.ModuleDict({"encoder": encoder, "blocks": blocks})
    return SoftModel(module, encoder, vectors, soft_of, blocks)


def turn_vectors(requests: Sequence[FitRequest]) -> list[Tensor]:
    """(n_turns, hidden) of each user's latest turns, in time order."""
    from milp_ray.methods.user_encoder import text_vectors

    most = requests[0].methods.user_encoder.max_turns
    texts = [[turn_line(turn, one.prompt) for turn in one.split.history[-most:]] for one in requests]
    return text_vectors(requests[0].base, texts)
