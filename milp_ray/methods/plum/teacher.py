"""Who writes the questions: the protocol of teachers, and the one that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from milp_ray.config.methods import TeacherSection
    from milp_ray.methods.plum.conversations import Conversation
    from milp_ray.methods.plum.qa import QAPair


class Teacher(Protocol):
    """Reads one user's conversations and writes question and answer pairs about each."""

    def pairs(self, conversations: Sequence[Conversation], seed: int) -> list[list[QAPair]]:
        """Pairs about each conversation, in their order, not yet balanced.

        What is written about a conversation depends on it and on earlier ones, never on later ones: at its
        time the later ones are not there.

        Raises:
            MilpError: the teacher cannot be asked.
        """
        ...


def teacher_of(section: TeacherSection, per_statement: int) -> Teacher:
    """The teacher that a configuration names.

    Args:
        section: which, and where it is.
        per_statement: yes/no questions about each statement that the rules of the embedded one write.

    Raises:
        MilpError: the configuration lacks what that teacher needs.
    """
    if section.kind == "hf":
        from milp_ray.methods.plum.hf import LocalTeacher

        return LocalTeacher(section)
    if section.kind == "openai":
        from milp_ray.methods.plum.openai import EndpointTeacher

        return EndpointTeacher(section)
    from milp_ray.methods.plum.rule import RuleTeacher

    return RuleTeacher(per_statement)
