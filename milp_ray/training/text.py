r"""The texts that a model reads: one place for training, prompting and generation.

Three formats, all built from the fixed phrases of :class:`~milp_ray.config.prompt.PromptSection`:

* history document: ``prompt.history`` + turns joined by ``prompt.turn_separator`` + ``"\n"``;
* profile document: ``prompt.profile`` + profile + ``"\n"``;
* question and answer: ``prompt.query`` with the query in it, then ``" "`` + response, then the end token.

A prompt with context is a document directly followed by a question. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from milp_ray.config.prompt import PromptSection
from milp_ray.errors import MilpError
from milp_ray.users.records import Turn, UserSplit

DOCUMENT_END = "\n"
USER_ROLE = "user"


def turn_line(turn: Turn, prompt: PromptSection) -> str:
    """One turn as it stands in a history document.

    A turn of role ``user`` is its text; any other role goes through ``prompt.assistant_turn``.
    """
    if turn.role == USER_ROLE:
        return turn.text
    return _fill(prompt.assistant_turn, "text", turn.text, option="prompt.assistant_turn")


def history_context(turns: Sequence[Turn], prompt: PromptSection) -> str:
    """The history document of some turns; ``""`` for no turns."""
    if not turns:
        return ""
    lines = prompt.turn_separator.join(turn_line(turn, prompt) for turn in turns)
    return prompt.history + lines + DOCUMENT_END


def profile_context(profile: str | None, prompt: PromptSection) -> str:
    """The profile document; ``""`` where there is no profile."""
    return prompt.profile + profile + DOCUMENT_END if profile else ""


def query_prompt(query: str, prompt: PromptSection, context: str = "") -> str:
    """What the model is given to answer ``query``: the context document, if any, and the question."""
    return context + _fill(prompt.query, "query", query, option="prompt.query")


def response_text(response: str) -> str:
    """How a response follows its prompt: one space, then the text (the end token is added as a token)."""
    return " " + response


def memory_blocks(
    split: UserSplit,
    prompt: PromptSection,
    *,
    count_tokens: Callable[[Sequence[str]], Sequence[int]],
    max_tokens: int,
    block_turns: int | None = None,
) -> list[tuple[Turn, ...]]:
    """The user's history cut into blocks of whole turns in time order, one block a memory sequence.

    A block takes turns until the next one would lift its history document above ``max_tokens`` or, with
    ``block_turns``, until it holds that many. A turn that is too long by itself gets a block of its own (the
    tokenised block is then cut further, see :func:`milp_ray.training.data.memory_set`).

    Args:
        split: whose history.
        prompt: the fixed phrases.
        count_tokens: number of tokens of each of several texts, without special tokens.
        max_tokens: most tokens of a block, the fixed phrase included, special tokens not.
        block_turns: most turns of a block; ``None``: as many as fit.
    """
    lines = [turn_line(turn, prompt) + prompt.turn_separator for turn in split.history]
    if not lines:
        return []
    frame, *sizes = count_tokens([prompt.history + DOCUMENT_END, *lines])
    blocks: list[tuple[Turn, ...]] = []
    current: list[Turn] = []
    used = frame
    for turn, size in zip(split.history, sizes, strict=True):
        full = used + size > max_tokens or (block_turns is not None and len(current) == block_turns)
        if current and full:
            blocks.append(tuple(current))
            current, used = [], frame
        current.append(turn)
        used += size
    blocks.append(tuple(current))
    return blocks


def _fill(template: str, name: str, value: str, *, option: str) -> str:
    """``template`` with ``{name}`` replaced; other braces, in the template or in the text, are left alone."""
    slot = "{" + name + "}"
    if slot not in template:
        raise MilpError(f"{option} is {template!r}: it must hold {slot} where the text goes; add it")
    return template.replace(slot, value)
