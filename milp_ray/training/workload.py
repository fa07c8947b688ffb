"""How much there is to train and to answer: tokens, padding, steps and queries of an average user.

Sequences are made by the code that training uses, with the base's tokenizer where it can be had. Without
one, :class:`CharacterTokens` guesses; without users, :func:`invented_work` takes numbers.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.training.data import Sequence, TextTokens, chunks, instruction_set, memory_set, pieces
from milp_ray.training.text import query_prompt
from milp_ray.users.records import UserSplit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# English prose under the vocabularies of the bases in question.
CHARACTERS_A_TOKEN = 4
# An invented history's turn, where training.memory_block_turns asks how many there are.
TOKENS_A_TURN = 32


class TokenizerTokens:
    """Texts counted by the base's tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from milp_ray.training.base import start_ids_of

        self._tokenizer: Any = tokenizer
        self.start_ids = start_ids_of(tokenizer)
        self.eos_id = 0

    def tokenize(self, texts: SequenceOf[str]) -> list[list[int]]:
        """Token ids of each text."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def count_tokens(self, texts: SequenceOf[str]) -> list[int]:
        """Number of tokens of each text."""
        return [len(ids) for ids in self.tokenize(texts)]


class CharacterTokens:
    """Texts counted by their length: one token for every :data:`CHARACTERS_A_TOKEN` characters."""

    start_ids = (0,)
    eos_id = 0

    def tokenize(self, texts: SequenceOf[str]) -> list[list[int]]:
        """As many zeros as a text may have tokens."""
        return [[0] * n for n in self.count_tokens(texts)]

    def count_tokens(self, texts: SequenceOf[str]) -> list[int]:
        """Number of tokens that each text may have."""
        return [-(-len(text) // CHARACTERS_A_TOKEN) for text in texts]


@dataclass(frozen=True, slots=True)
class PassWork:
    """One pass over some sequences, a mean over users: every count may be a fraction.

    ``padded`` are tokens with padding, ``pairs`` Σ length² of the padded rows, ``passes`` calls of the model
    and ``steps`` optimizer steps. ``longest_row``, ``step_tokens`` (padded, of one batch) and
    ``step_targets`` are the largest that any user has.
    """

    sequences: float = 0.0
    tokens: float = 0.0
    padded: float = 0.0
    pairs: float = 0.0
    targets: float = 0.0
    passes: float = 0.0
    steps: float = 0.0
    longest_row: int = 0
    step_tokens: int = 0
    step_targets: int = 0


@dataclass(frozen=True, slots=True)
class StageWork:
    """A stage of training: ``epochs`` times ``work``."""

    name: str
    epochs: int
    work: PassWork


@dataclass(frozen=True, slots=True)
class QueryWork:
    """Queries that are answered, a mean over users; tokens of one prompt and one answer are means, too."""

    queries: float
    prompt_tokens: float
    new_tokens: float
    longest_answer: int


@dataclass(frozen=True, slots=True)
class UserWork:
    """What an average user's job does, and what is measured with its adapter."""

    stages: tuple[StageWork, ...]
    validation: PassWork
    validation_queries: QueryWork
    history_tokens: float

    @property
    def trained_tokens(self) -> float:
        """Tokens that the job is trained on, all epochs together, padding not counted."""
        return sum(stage.epochs * stage.work.tokens for stage in self.stages)

    @property
    def largest(self) -> PassWork:
        """The largest row and batch of any stage."""
        works = [stage.work for stage in self.stages] or [PassWork()]
        names = ("longest_row", "step_tokens", "step_targets")
        return PassWork(**{name: max(getattr(work, name) for work in works) for name in names})


def user_work(
    splits: SequenceOf[UserSplit],
    tokens: TextTokens,
    training: TrainingSection,
    prompt: PromptSection,
    *,
    parts: frozenset[str],
    context_length: int,
    max_new_tokens: int,
) -> UserWork:
    """The mean over ``splits``, each of them trained on ``parts`` ("memory", "instruction")."""
    max_length = training.max_length or context_length
    found: list[UserWork] = []
    for split in splits:
        memory = memory_set(
            split, tokens, prompt, max_length=max_length, block_turns=training.memory_block_turns
        )
        instruction = instruction_set(split.train, tokens, prompt, max_length=max_length)
        validation = instruction_set(split.validation, tokens, prompt, max_length=context_length)
        prompts = tokens.count_tokens([query_prompt(e.query, prompt) for e in split.validation])
        found.append(_one_user(memory, instruction, validation, prompts, training, parts, max_new_tokens))
    return _mean_user(found)


def invented_work(
    training: TrainingSection,
    *,
    history_tokens: int,
    n_train: int,
    n_validation: int,
    example_tokens: int,
    parts: frozenset[str],
    context_length: int,
    max_new_tokens: int,
) -> UserWork:
    """A user of so many tokens: half of an example is its query, half its response."""
    max_length = training.max_length or context_length
    block = max_length
    if training.memory_block_turns is not None:
        block = min(block, training.memory_block_turns * TOKENS_A_TURN)
    memory = [
        Sequence((0,) * min(block, history_tokens - start), 1, "memory")
        for start in range(0, history_tokens, block)
        if history_tokens - start > 1
    ]
    size = min(max(2, example_tokens), max_length)
    example = Sequence((0,) * size, size - size // 2, "instruction")
    return _one_user(
        memory,
        [example] * n_train,
        [example] * n_validation,
        [example.target_from] * n_validation,
        training,
        parts,
        max_new_tokens,
    )


def pass_work(sequences: SequenceOf[Sequence], batch_size: int, accumulation: int = 1) -> PassWork:
    """One pass over one user's sequences, in batches of near-equal length and their pieces."""
    if not sequences:
        return PassWork()
    longest_first = sorted(sequences, key=lambda s: -len(s.ids))
    padded = pairs = passes = largest = most_targets = n_batches = 0
    for batch in chunks([*range(len(longest_first))], batch_size):
        rows = [longest_first[i] for i in batch]
        n_batches += 1
        start = of_batch = 0
        for size in pieces([len(row.ids) for row in rows]):
            length = len(rows[start].ids)
            of_batch += size * length
            pairs += size * length**2
            passes += 1
            start += size
        padded += of_batch
        largest = max(largest, of_batch)
        most_targets = max(most_targets, sum(row.n_targets for row in rows))
    return PassWork(
        sequences=len(sequences),
        tokens=sum(len(s.ids) for s in sequences),
        padded=padded,
        pairs=pairs,
        targets=sum(s.n_targets for s in sequences),
        passes=passes,
        steps=-(-n_batches // accumulation),
        longest_row=len(longest_first[0].ids),
        step_tokens=largest,
        step_targets=most_targets,
    )


def _one_user(
    memory: list[Sequence],
    instruction: list[Sequence],
    validation: list[Sequence],
    prompt_tokens: list[int],
    training: TrainingSection,
    parts: frozenset[str],
    max_new_tokens: int,
) -> UserWork:
    of_part = {"memory": memory, "instruction": instruction}
    epochs = {"memory": training.memory_epochs, "instruction": training.instruction_epochs}
    wanted = [name for name in of_part if name in parts]
    if training.stages == "joint" and len(wanted) > 1:
        plan = [("joint", max(epochs.values()), memory + instruction)]
    else:
        plan = [(name, epochs[name], of_part[name]) for name in wanted]
    answers = [min(sequence.n_targets, max_new_tokens) for sequence in validation]
    return UserWork(
        stages=tuple(
            StageWork(name, n, pass_work(s, training.batch_size, training.gradient_accumulation))
            for name, n, s in plan
        ),
        validation=pass_work(validation, training.batch_size),
        validation_queries=QueryWork(
            queries=len(validation),
            prompt_tokens=fmean(prompt_tokens or [0]),
            new_tokens=fmean(answers or [0]),
            longest_answer=max(answers, default=0),
        ),
        history_tokens=sum(len(sequence.ids) for sequence in memory),
    )


def _mean_user(users: SequenceOf[UserWork]) -> UserWork:
    stages = [
        StageWork(same[0].name, same[0].epochs, _mean_pass([stage.work for stage in same]))
        for same in zip(*(user.stages for user in users), strict=True)
    ]
    queries = [user.validation_queries for user in users]
    return UserWork(
        stages=tuple(stages),
        validation=_mean_pass([user.validation for user in users]),
        validation_queries=QueryWork(
            queries=fmean(q.queries for q in queries),
            prompt_tokens=fmean(q.prompt_tokens for q in queries),
            new_tokens=fmean(q.new_tokens for q in queries),
            longest_answer=max(q.longest_answer for q in queries),
        ),
        history_tokens=fmean(user.history_tokens for user in users),
    )


def _mean_pass(works: SequenceOf[PassWork]) -> PassWork:
    largest = {"longest_row", "step_tokens", "step_targets"}
    values: dict[str, Any] = {
        field.name: (max if field.name in largest else fmean)(getattr(w, field.name) for w in works)
        for field in fields(PassWork)
    }
    return PassWork(**values)
