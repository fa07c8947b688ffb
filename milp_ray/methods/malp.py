"""MaLP (Zhang et al. 2023, arXiv 2309.11696): short- and long-term memory, and a shared adapter.

A user's turns go through working and short-term memory in time order; a turn that later turns and the user's
past queries come back to moves to long-term memory, and what nothing comes back to is forgotten at last
(:mod:`milp_ray.methods.memories`). For a query the turns it is about are retrieved from all that is kept and
stand before it. One LoRA adapter is trained on everybody's past examples, each behind what its own user's
memory gave for it, so that the model learns to use such prompts.

Where it departs from the paper: a turn is kept as it was said, while there a language model writes notes; and
what counts as use is being ranked high by BM25, while there it is a threshold on distances between vectors.
The adapter has MiLP's layout and recipe (in the paper LoRA on attention), so that the memory is what differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.methods.memories import Memories
from milp_ray.methods.protocol import Answerer, count_tokens, text_bytes
from milp_ray.methods.ranking import ranking
from milp_ray.methods.retrieval import top_turns
from milp_ray.methods.shared import Shared
from milp_ray.methods.shared_adapter import trained_on
from milp_ray.training.text import response_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.protocol import ContextRule, FitRequest, Personalizer
    from milp_ray.users.records import Turn


def share(requests: Sequence[FitRequest]) -> Shared:
    """Train the adapter on everybody's past examples behind their memories."""
    from milp_ray.training.data import instruction_set
    from milp_ray.training.job import INSTRUCTION, Stage

    sequences = []
    for request in requests:
        context, base = _context_rule(request, remembered(request)), request.base
        examples = request.split.train
        contexts = [
            context(one.query, max(request.max_new_tokens, count_tokens(base, response_text(one.response))))
            for one in examples
        ]
        limit = base.context_length
        sequences += instruction_set(examples, base, request.prompt, max_length=limit, contexts=contexts)
    if not sequences:
        return Shared()
    epochs = requests[0].training.instruction_epochs
    return Shared(trained_on(requests[0], (Stage(INSTRUCTION, tuple(sequences), epochs),)))


def fit(requests: Sequence[FitRequest]) -> list[Personalizer | None]:
    """Fill each user's memories."""
    found: list[Personalizer | None] = []
    for request in requests:
        kept = remembered(request)
        found.append(
            Answerer(
                request,
                adapter=request.shared_adapter,
                context=_context_rule(request, kept),
                context_bytes=text_bytes(kept),
            )
        )
    return found


def remembered(request: FitRequest) -> list[Turn]:
    """The turns that a user's memories hold after the history and the past queries, in time order."""
    history, section = request.split.history, request.methods.malp
    memories = Memories([turn.text for turn in history], section)
    for place in range(len(history)):
        memories.observe(place)
    for example in request.split.train:
        memories.use(example.query, k=section.k)
    return [history[place] for place in memories.kept]


def _context_rule(request: FitRequest, kept: Sequence[Turn]) -> ContextRule:
    rank = ranking("fusion", [turn.text for turn in kept], request.base, request.methods.retrieval)
    return top_turns(request, kept, rank, request.methods.malp.k)
