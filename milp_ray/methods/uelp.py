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
from milp_ray.methods.shared import Shared
from milp_ray.training.text import turn_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from milp_ray.methods.protocol import FitRequest, Personalizer
    from milp_ray.methods.soft_training import PastExample


def share(requests: Sequence[FitRequest]) -> Shared:
    """Train the encoder; nothing is shared where nobody has past examples to train it on."""
    from milp_ray.methods.soft_training import past_examples, pretrain, train_on_responses
    from milp_ray.methods.user_encoder import new_encoder, padded

    if not requests:
        return Shared()
    one = requests[0]
    base, section, seed = one.base, one.methods.user_encoder, one.seed
    examples = past_examples(requests, section.n_soft)
    if not examples:
        return Shared()
    vectors = turn_vectors(requests)
    encoder = new_encoder(base, vectors, section, seed)
    pretrain(encoder, vectors, base, section, seed)

    def soft_of(some: Sequence[PastExample]) -> Tensor:
        users = list(dict.fromkeys(one.user for one in some))
        soft: Tensor = encoder(*padded([vectors[user] for user in users], base.device))
        return soft[[users.index(one.user) for one in some]]

    train_on_responses(encoder, soft_of, examples, base, section, seed)
    return Shared(tensors={name: t.detach().cpu() for name, t in encoder.state_dict().items()})


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Compute each user's soft prompt."""
    import torch

    from milp_ray.methods.user_encoder import new_encoder, padded

    if not requests:
        return []
    one = requests[0]
    if one.shared is None or not one.shared.tensors:
        return [Answerer(request) for request in requests]
    vectors = turn_vectors(requests)
    encoder = new_encoder(one.base, vectors, one.methods.user_encoder, one.seed).eval()
    encoder.load_state_dict(dict(one.shared.tensors))
    with torch.no_grad():
        return [
            Answerer(request, soft=encoder(*padded([own], one.base.device))[0].cpu())
            for request, own in zip(requests, vectors, strict=True)
        ]


def turn_vectors(requests: Sequence[FitRequest]) -> list[Tensor]:
    """(n_turns, hidden) of each user's latest turns, in time order."""
    from milp_ray.methods.user_encoder import text_vectors

    most = requests[0].methods.user_encoder.max_turns
    texts = [[turn_line(turn, one.prompt) for turn in one.split.history[-most:]] for one in requests]
    return text_vectors(requests[0].base, texts)
