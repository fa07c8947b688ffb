"""A teacher that is a causal language model in this process: a folder, or a Hugging Face model id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from milp_ray.methods.plum.written import document, messages, read_pairs

if TYPE_CHECKING:
    from milp_ray.config.methods import TeacherSection
    from milp_ray.methods.plum.conversations import Conversation
    from milp_ray.methods.plum.qa import QAPair
    from milp_ray.training.base import Base


class LocalTeacher:
    """Generates greedily with the model's chat template, or behind a plain text where it has none.

    Weights are read from safetensors only, and no code that comes with a model is run.

    Raises:
        MilpError: the model cannot be loaded.
    """

    def __init__(self, section: TeacherSection) -> None:
        from milp_ray.config.base import BaseSection
        from milp_ray.training.base import load_base

        self._base = load_base(
            BaseSection(model=section.model, revision=section.revision, device=section.device)
        )
        self._max_new_tokens = section.max_new_tokens

    def pairs(self, conversations: Sequence[Conversation], seed: int) -> list[list[QAPair]]:
        """See :class:`~milp_ray.methods.plum.teacher.Teacher`; replies are greedy, whatever the seed."""
        from milp_ray.training.generation import Questions, generate

        if not conversations:
            return []
        prompts = [prompt_of(conversation, self._base) for conversation in conversations]
        most = max(1, min(self._max_new_tokens, self._base.context_length // 2))
        [replies] = generate(self._base, [Questions(prompts)], max_new_tokens=most, batch_size=8)
        return [read_pairs(reply) for reply in replies]


def prompt_of(conversation: Conversation, base: Base) -> str:
    """What the model is given about one conversation."""
    tokenizer: Any = base.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return document(conversation)
    text = str(
        tokenizer.apply_chat_template(messages(conversation), tokenize=False, add_generation_prompt=True)
    )
    # Generation puts the start token before every prompt.
    return text.removeprefix(tokenizer.bos_token or "")
