"""From texts to batches: tokenised sequences, the rule for too long ones, and padding.

Everything is tokenised once a job. Rows are padded on the right, where causal attention needs no mask,
because no token sees what stands behind it. A batch whose sequences differ much in length (a history block
among short questions) is run in several pieces of near-equal length: the same step with less padding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from milp_ray.config.prompt import PromptSection
from milp_ray.errors import MilpError
from milp_ray.training.text import history_context, memory_blocks, query_prompt, response_text
from milp_ray.users.records import Example, UserSplit

if TYPE_CHECKING:
    import torch

    from milp_ray.training.base import Base
    from milp_ray.training.reference import Reference

Kind = Literal["memory", "instruction"]

# Tokens of padding that take about as long as one more pass through a small model does of itself, on a CPU.
# Larger models lose nothing that shows.
_WORTH_A_PASS = 100


class TextTokens(Protocol):
    """What of a base makes sequences out of texts; a :class:`~milp_ray.training.base.Base` has it."""

    @property
    def start_ids(self) -> tuple[int, ...]:
        """Ids that stand before every text."""

    @property
    def eos_id(self) -> int:
        """Id that ends a response."""

    def tokenize(self, texts: SequenceOf[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""

    def count_tokens(self, texts: SequenceOf[str]) -> list[int]:
        """Number of tokens of each text, without special tokens."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One tokenised training text.

    ``target_from`` is the index of the first token that is predicted for a loss; all later ones are, too.
    It is at least 1: the first token of a sequence is predicted by nothing. ``weights``, one a target, say
    how much each counts in training, where the mean over targets is then Σ w·loss / Σ w; ``None``: all alike.
    What only measures counts every target alike. ``reference`` (n_targets, hidden), where training is to keep
    what the base says at the targets, are its states there (:mod:`milp_ray.training.reference`).
    """

    ids: tuple[int, ...]
    target_from: int
    kind: Kind
    weights: tuple[float, ...] | None = None
    # On the CPU. It follows from the base and the tokens; and no two tensors are simply equal or not.
    reference: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def n_targets(self) -> int:
        """Tokens that count in the loss."""
        return len(self.ids) - self.target_from

    @property
    def total_weight(self) -> float:
        """The sum of the targets' weights, by which a mean over them divides."""
        return self.n_targets if self.weights is None else sum(self.weights)

    @property
    def target_weights(self) -> tuple[float, ...]:
        """The weights, ones where there are none."""
        return (1.0,) * self.n_targets if self.weights is None else self.weights


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right.

    ids: (n_rows, length) int64; keep: (n_rows, length) bool, True where the *next* token is a target;
    labels: (n_targets,) int64, the targets in the order of ``keep``'s True entries; rows: (n_targets,)
    int64, the row of each; sequences: one a row; weights: (n_targets,) float32, where some sequence has any;
    reference: of the targets that are distributions in training, if there are.
    """

    ids: torch.Tensor
    keep: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    sequences: tuple[Sequence, ...]
    weights: torch.Tensor | None = None
    reference: Reference | None = None

    @property
    def n_targets(self) -> int:
        """Tokens that count in the loss."""
        return int(self.labels.shape[0])

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return sum(len(s.ids) for s in self.sequences)


def memory_set(
    split: UserSplit, base: TextTokens, prompt: PromptSection, *, max_length: int, block_turns: int | None
) -> list[Sequence]:
    """The user's history as sequences for next-content prediction, oldest first.

    Every block is a history document (:func:`~milp_ray.training.text.history_context`). The fixed phrase and
    the start token are context only: what is to be remembered is the turns. A block that is longer than
    ``max_length`` (one huge turn) goes on in further sequences without the phrase.

    Raises:
        MilpError: ``max_length`` leaves no room for a token and the one before it.
    """
    room = _room(max_length, base)
    blocks = memory_blocks(
        split, prompt, count_tokens=base.count_tokens, max_tokens=room, block_turns=block_turns
    )
    documents = base.tokenize([history_context(block, prompt) for block in blocks])
    phrase = base.tokenize([prompt.history])[0] if blocks else []
    sequences: list[Sequence] = []
    for document in documents:
        n_context = _common_prefix(phrase, document)
        for start in range(0, len(document), room):
            ids = (*base.start_ids, *document[start : start + room])
            first = max(1, len(base.start_ids) + (n_context if start == 0 else 0))
            if first < len(ids):
                sequences.append(Sequence(ids, first, "memory"))
    return sequences


def instruction_set(
    examples: SequenceOf[Example],
    base: TextTokens,
    prompt: PromptSection,
    *,
    max_length: int,
    contexts: SequenceOf[str] | None = None,
) -> list[Sequence]:
    """Query → response pairs, in the order given; the loss is on the response and its end token only.

    Args:
        examples: the pairs.
        base: whose tokenizer is used.
        prompt: the fixed phrases.
        max_length: most tokens of a sequence; see :func:`fit` for what is cut.
        contexts: a document before each question (:mod:`milp_ray.training.text`); ``None``: none.

    Raises:
        MilpError: ``max_length`` leaves no room for a token and the one before it.
    """
    room = _room(max_length, base)
    before = contexts if contexts is not None else [""] * len(examples)
    prompts = [query_prompt(e.query, prompt, c) for e, c in zip(examples, before, strict=True)]
    responses = [response_text(e.response) for e in examples]
    prompt_ids = base.tokenize(prompts)
    whole_ids = base.tokenize([p + r for p, r in zip(prompts, responses, strict=True)])
    sequences = []
    for i, (head, whole) in enumerate(zip(prompt_ids, whole_ids, strict=True)):
        # The prompt's tokens are those that generation starts from. A tokenizer that would merge across the
        # seam gets the response tokenised alone.
        joined = whole[: len(head)] == head
        tail = whole[len(head) :] if joined else base.tokenize([responses[i]])[0]
        head, tail = fit(head, [*tail, base.eos_id], room)
        ids = (*base.start_ids, *head, *tail)
        sequences.append(Sequence(ids, len(ids) - len(tail), "instruction"))
    return sequences


def fit(prompt: list[int], response: list[int], room: int) -> tuple[list[int], list[int]]:
    """Cut a pair to ``room`` tokens: the response keeps its first three quarters of ``room`` tokens at most
    (whatever the prompt, so that losses under different prompts are over the same tokens); the prompt keeps
    its last tokens, as many as are left. ``room`` is at least 2: a token of each.
    """
    response = response[: max(1, room - max(1, room // 4))]
    return cut_left(prompt, room - len(response)), response


def cut_left(ids: list[int], room: int) -> list[int]:
    """The last ``room`` tokens: what is nearest to the answer stays."""
    return ids[max(0, len(ids) - max(0, room)) :]


def _room(max_length: int, base: TextTokens) -> int:
    """Tokens of a sequence beside the start: at least one to be predicted and one to predict it from."""
    least = len(base.start_ids) + 2
    if max_length < least:
        raise MilpError(
            f"sequences of at most {max_length} tokens hold nothing to learn from on this base; let "
            f"training.max_length and base.context_length be {least} or more"
        )
    return max_length - len(base.start_ids)


def make_batches(sequences: SequenceOf[Sequence], indices: SequenceOf[int], base: Base) -> list[Batch]:
    """The chosen sequences as one batch, in the fewest pieces that are worth it (:func:`pieces`)."""
    longest_first = sorted(indices, key=lambda i: -len(sequences[i].ids))
    sizes = pieces([len(sequences[i].ids) for i in longest_first])
    batches, start = [], 0
    for size in sizes:
        batches.append(make_batch([sequences[i] for i in longest_first[start : start + size]], base))
        start += size
    return batches


def pieces(lengths: SequenceOf[int]) -> list[int]:
    """How many rows each piece of a batch takes; ``lengths`` are its rows', falling.

    A batch is cut where that saves the most padding, and its pieces again, as long as a cut saves what a
    further pass through the model costs.
    """
    n_rows = len(lengths)
    saved = [(n_rows - k) * (lengths[0] - lengths[k]) for k in range(1, n_rows)]
    if not saved or max(saved) <= _WORTH_A_PASS:
        return [n_rows]
    cut = saved.index(max(saved)) + 1
    return pieces(lengths[:cut]) + pieces(lengths[cut:])


def make_batch(chosen: SequenceOf[Sequence], base: Base) -> Batch:
    """Pad sequences on the right into one batch on the base's device."""
    import torch

    from milp_ray.training.reference import reference_of

    length = max(len(s.ids) for s in chosen)
    ids = torch.tensor([[*s.ids, *[base.pad_id] * (length - len(s.ids))] for s in chosen])
    keep = torch.zeros((len(chosen), length), dtype=torch.bool)
    for row, sequence in enumerate(chosen):
        keep[row, sequence.target_from - 1 : len(sequence.ids) - 1] = True
    labels = torch.tensor([token for s in chosen for token in s.ids[s.target_from :]])
    rows = torch.tensor([row for row, s in enumerate(chosen) for _ in range(s.n_targets)])
    weights = None
    if any(s.weights is not None for s in chosen):
        weights = torch.tensor([w for s in chosen for w in s.target_weights], device=base.device)
    return Batch(
        ids=ids.to(base.device),
        keep=keep.to(base.device),
        labels=labels.to(base.device),
        rows=rows.to(base.device),
        sequences=tuple(chosen),
        weights=weights,
        reference=reference_of([(s.n_targets, s.reference) for s in chosen], base.device),
    )


def epoch_plan(
    sequences: SequenceOf[Sequence], batch_size: int, order: str, rng: random.Random
) -> list[tuple[int, ...]]:
    """Which sequences make each batch of one epoch.

    ``chronological``: as they stand. ``shuffled``: ties shuffled, sorted into buckets of near-equal length,
    and the buckets shuffled; ``rng`` alone decides.
    """
    indices = list(range(len(sequences)))
    if order == "chronological":
        return list(chunks(indices, batch_size))
    rng.shuffle(indices)
    indices.sort(key=lambda i: len(sequences[i].ids))  # stable: the shuffle decides among equals
    plan = list(chunks(indices, batch_size))
    rng.shuffle(plan)
    return plan


def chunks(items: SequenceOf[int], size: int) -> Iterator[tuple[int, ...]]:
    """Consecutive pieces of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])


def _common_prefix(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
