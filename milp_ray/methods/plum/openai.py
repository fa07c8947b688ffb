"""A teacher behind any OpenAI-compatible endpoint; the users' conversations are sent there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from milp_ray.chat import Chat, Endpoint
from milp_ray.methods.plum.written import messages, read_pairs

if TYPE_CHECKING:
    from milp_ray.config.methods import TeacherSection
    from milp_ray.methods.plum.conversations import Conversation
    from milp_ray.methods.plum.qa import QAPair


class EndpointTeacher:
    """Asks an endpoint about each conversation by itself.

    Args:
        section: where it is, and how long it may take.
        sleep: waits a number of seconds.

    Raises:
        MilpError: the address or the key's variable is no good.
    """

    def __init__(self, section: TeacherSection, *, sleep: Callable[[float], None] = time.sleep) -> None:
        endpoint = Endpoint(
            base_url=section.base_url,
            model=section.model,
            key_env=section.key_env,
            timeout=section.timeout_seconds,
            attempts=section.attempts,
            at_once=section.at_once,
            max_tokens=section.max_new_tokens,
        )
        self._chat = Chat(endpoint, sleep=sleep)

    def pairs(self, conversations: Sequence[Conversation], seed: int) -> list[list[QAPair]]:
        """See :class:`~milp_ray.methods.plum.teacher.Teacher`; replies are greedy, whatever the seed."""
        return [read_pairs(reply) for reply in self._chat.replies([messages(c) for c in conversations])]
