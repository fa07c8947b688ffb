"""Question and answer pairs as training sequences whose tokens count unevenly."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import TYPE_CHECKING

from milp_ray.training.data import Sequence, instruction_set
from milp_ray.training.text import query_prompt
from milp_ray.users.records import Example

if TYPE_CHECKING:
    from milp_ray.config.methods import PlumSection
    from milp_ray.config.prompt import PromptSection
    from milp_ray.methods.plum.qa import QAPair
    from milp_ray.training.data import TextTokens

_SLOT = "{query}"


def qa_sequences(
    pairs: SequenceOf[QAPair],
    base: TextTokens,
    prompt: PromptSection,
    section: PlumSection,
    *,
    max_length: int,
    contexts: SequenceOf[str] | None = None,
) -> list[Sequence]:
    """One sequence a pair, with the weights of instruction, question and answer tokens.

    The instruction is the fixed phrases around the question; the answer is what the model is to write, its
    end token included. A context, which is there to be read, weighs nothing. Tokens before the first that
    counts are no targets at all. A pair that is longer than ``max_length`` is cut like any other
    (:func:`milp_ray.training.data.fit`), and only its answer counts then.

    Args:
        pairs: the questions and answers.
        base: whose tokenizer is used.
        prompt: the fixed phrases.
        section: the weights.
        max_length: most tokens of a sequence.
        contexts: a document before each question; ``None``: none.
    """
    examples = [Example(pair.question, _answer(pair, section)) for pair in pairs]
    whole = instruction_set(examples, base, prompt, max_length=max_length, contexts=contexts)
    before = contexts if contexts is not None else [""] * len(pairs)
    head, _, _ = query_prompt(_SLOT, prompt).partition(_SLOT)
    ends = [
        base.tokenize(
            [
                context,
                context + head,
                context + head + example.query,
                query_prompt(example.query, prompt, context),
            ]
        )
        for example, context in zip(examples, before, strict=True)
    ]
    return [
        _weighted(one, parts, len(base.start_ids), section) for one, parts in zip(whole, ends, strict=True)
    ]


def scaled(one: Sequence, factor: float) -> Sequence:
    """The same, whose every target counts so many times as much."""
    return replace(one, weights=tuple(factor * weight for weight in one.target_weights))


def _answer(pair: QAPair, section: PlumSection) -> str:
    """The answer in the words of the configuration."""
    if pair.kind == "open":
        return pair.answer
    return section.yes if pair.is_positive else section.no


def _weighted(one: Sequence, parts: SequenceOf[list[int]], n_start: int, section: PlumSection) -> Sequence:
    """The sequence with its weights; ``parts`` are the tokens of its beginnings, up to the whole prompt."""
    weights = [section.answer_weight] * one.n_targets
    prompt = list(one.ids[n_start : one.target_from])
    if prompt == parts[-1]:
        context, head, question, _ = (n_start + _common(part, prompt) for part in parts)
        before = [0.0] * context + [section.instruction_weight] * (head - context)
        before += [section.question_weight] * (question - head)
        before += [section.instruction_weight] * (one.target_from - question)
        weights = [*before, *weights]
    else:
        weights = [0.0] * one.target_from + weights
    first = next((i for i, weight in enumerate(weights) if i > 0 and weight > 0.0), one.target_from)
    return Sequence(one.ids, first, one.kind, tuple(weights[first:]))


def _common(part: list[int], whole: list[int]) -> int:
    """Tokens of ``whole`` that ``part`` begins with as well: up to a seam that the tokenizer may merge."""
    n = 0
    while n < min(len(part), len(whole)) and part[n] == whole[n]:
        n += 1
    return n
