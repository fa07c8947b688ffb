"""Batched greedy generation with a key-value cache, for many users' adapters at once.

A loop of our own, because for small models most of ``model.generate``'s time is not the model's: here rows of
all users share a batch, finished rows leave it, prompts are sorted by length, and masks are built once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from milp_ray.errors import MilpError
from milp_ray.training.cross_attention import LatentView, cross_attended, latents_of_each, only_blocks
from milp_ray.training.data import chunks, cut_left
from milp_ray.training.fused import fused_operations
from milp_ray.training.seating import Seating, seated
from milp_ray.training.soft import embeddings, n_soft_of, soft_of_each, with_places

if TYPE_CHECKING:
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.training.cross_attention import Latents


@dataclass(frozen=True, slots=True)
class Questions:
    """Complete prompts (:func:`milp_ray.training.text.query_prompt`) for one adapter; ``None``: the base.

    ``soft``, a soft prompt between the start token and a prompt's tokens, is (n_soft, hidden) for all of
    them, or (n_prompts, n_soft, hidden). ``latents`` are what the base looks at from within its layers; all
    entries of one call that have any look at as many, by the same blocks.
    """

    prompts: Sequence[str]
    adapter: Adapter | None = None
    soft: Tensor | None = None
    latents: Latents | None = None


def generate(
    base: Base, asked: Sequence[Questions], *, max_new_tokens: int, batch_size: int
) -> list[list[str]]:
    """Continue each prompt greedily until the end token or ``max_new_tokens``.

    A prompt that leaves no room for ``max_new_tokens`` within the base's context loses its beginning: it
    keeps its last (context length − ``max_new_tokens``) tokens, the start token and a soft prompt counted
    among them.

    Args:
        base: the frozen base, afterwards as it was.
        asked: prompts and the adapters that answer them.
        max_new_tokens: most tokens of an answer.
        batch_size: rows at once, of any adapters; answers do not depend on it.

    Returns:
        For each entry of ``asked`` the answers, without special tokens and surrounding white space, in the
        order of its prompts.

    Raises:
        MilpError: ``max_new_tokens`` leaves no room for any prompt, or an adapter, a soft prompt or latents
            do not fit the base or each other.
    """
    owners = [i for i, questions in enumerate(asked) for _ in questions.prompts]
    soft = [one for q in asked for one in soft_of_each(q.soft, len(q.prompts), base)]
    token_ids = [ids for questions in asked for ids in _rows(base, questions, max_new_tokens)]
    answers: list[list[int]] = [[] for _ in token_ids]
    longest_first = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
    adapters = [questions.adapter for questions in asked]
    latents = [one for q in asked for one in latents_of_each(q.latents, len(q.prompts))]
    blocks = only_blocks([questions.latents for questions in asked])
    with (
        seated(base, adapters) as seating,
        fused_operations(base),
        cross_attended(base, blocks) as view,
        torch.inference_mode(),
    ):
        for indices in chunks(longest_first, batch_size):
            # Rows of one adapter next to each other.
            rows = sorted(indices, key=lambda i: (seating.place(owners[i]), owners[i]))
            own = [owners[i] for i in rows]
            ids, own_soft = [token_ids[i] for i in rows], [soft[i] for i in rows]
            view.show([latents[i] for i in rows])
            batch = _GreedyBatch(base, seating, view, own, ids, own_soft, max_new_tokens)
            for index, answer in zip(rows, batch.run(), strict=True):
                answers[index] = answer
    texts = iter(str(base.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers)
    return [[next(texts) for _ in questions.prompts] for questions in asked]


def _rows(base: Base, questions: Questions, max_new_tokens: int) -> list[list[int]]:
    """Token ids with places for the soft prompt."""
    n_soft = n_soft_of(questions.soft)
    rows = prompt_tokens(base, questions.prompts, max_new_tokens, n_soft)
    return [with_places(ids, n_soft, base) for ids in rows] if n_soft else rows


def prompt_tokens(
    base: Base, prompts: Sequence[str], max_new_tokens: int, n_soft: int = 0
) -> list[list[int]]:
    """Token ids of the prompts, start token included, cut as :func:`generate` says for ``n_soft`` places."""
    room = base.context_length - max_new_tokens - len(base.start_ids) - n_soft
    if room < 1 or max_new_tokens < 1:
        raise MilpError(
            f"max_new_tokens {max_new_tokens} leaves no room for a prompt in the base's context of "
            f"{base.context_length} tokens; use 1 to {max_new_tokens + room - 1}"
        )
    # A text of no tokens on a base without a start token still needs something to follow.
    return [[*base.start_ids, *cut_left(ids, room)] or [base.eos_id] for ids in base.tokenize(list(prompts))]


class _GreedyBatch:
    """Rows that are decoded together; a row that has ended leaves.

    Prompts are padded on the left, so that all rows write at the same place of the cache; a row's positions
    count from its own first token.
    """

    def __init__(
        self,
        base: Base,
        seating: Seating,
        view: LatentView,
        owners: Sequence[int],
        prompts: Sequence[Sequence[int]],
        soft: Sequence[Tensor | None],
        max_new_tokens: int,
    ) -> None:
        from milp_ray.training.roomy_cache import roomy_cache

        self._base, self._model = base, base.model
        self._seating, self._owners, self._view = seating, list(owners), view
        self._answers: list[list[int]] = [[] for _ in prompts]
        self._rows = list(range(len(prompts)))  # which answer each row of the batch writes
        length = max(len(prompt) for prompt in prompts)
        self._cache = roomy_cache(base, length + max_new_tokens)
        self._max_new_tokens = max_new_tokens
        padding = [length - len(prompt) for prompt in prompts]
        rows = [[base.pad_id] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
        self._ids = torch.tensor(rows, device=base.device)
        self._padding = torch.tensor(padding, device=base.device)
        self._length = 0  # tokens in the cache
        self._padded = any(padding)
        self._embeddings: Tensor | None = None  # what enters first, in place of token ids
        if any(one is not None for one in soft):
            begins = [row * length + n for row, n in enumerate(padding)]
            self._embeddings = embeddings(base, self._ids, begins, soft)

    def run(self) -> list[list[int]]:
        """The answers' token ids, without the end token."""
        for _ in range(self._max_new_tokens):
            tokens = self._next_tokens().tolist()
            going = [i for i, token in enumerate(tokens) if token != self._base.eos_id]
            for i in going:
                self._answers[self._rows[i]].append(tokens[i])
            if not going:
                break
            if len(going) < len(tokens):
                self._keep_rows(going)
            self._ids = torch.tensor([[tokens[i]] for i in going], device=self._base.device)
        return self._answers

    def _next_tokens(self) -> Tensor:
        """Feed what is new; the most likely next token of each row, the lowest id among equals."""
        n_new = self._ids.shape[1]
        columns = torch.arange(self._length, self._length + n_new, device=self._base.device)
        positions = (columns - self._padding[:, None]).clamp(min=0) + self._base.first_position
        inputs: dict[str, Any] = {"position_ids": positions}
        if self._embeddings is None:
            inputs["input_ids"] = self._ids
        else:
            inputs["inputs_embeds"], self._embeddings = self._embeddings, None
        self._length += n_new
        if self._padded:
            inputs["attention_mask"] = self._mask(columns)
        self._seating.show(self._owners, n_new)
        output = self._model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(dim=-1)

    def _mask(self, queries: Tensor) -> Tensor:
        """What each new token may see: itself and all before it but padding.

        Bool (rows, 1, n_new, length), built here because transformers would work it out anew for every token;
        an attention that is not torch's own gets the plain (rows, length) mask instead.
        """
        keys = torch.arange(self._length, device=self._base.device)
        real = keys >= self._padding[:, None]
        if self._base.model.config._attn_implementation != "sdpa":
            return real.long()
        # Padding sees itself: a row of nothing but False would give NaN.
        seen = (keys <= queries[:, None]) & real[:, None, :] | (keys == queries[:, None])
        return seen[:, None]

    def _keep_rows(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self._base.device)
        self._cache.batch_select_indices(index)
        self._view.keep_rows(index)
        self._padding = self._padding[index]
        self._rows = [self._rows[i] for i in rows]
        self._owners = [self._owners[i] for i in rows]
