"""``prompt``: the fixed phrases around a user's texts."""

from __future__ import annotations

from milp_ray.config.section import Section


class PromptSection(Section):
    """The fixed phrases around a user's texts; the same ones in training, prompting and generation."""

    history: str = "User history:\n"  # the fixed phrase before turns (memory injection and text prompts)
    profile: str = "User profile:\n"
    turn_separator: str = "\n"
    query: str = "Question: {query}\nAnswer:"  # the response follows after one space
    assistant_turn: str = "Assistant: {text}"  # how a turn of another role than "user" is written
