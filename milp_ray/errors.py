"""The one exception that means "the caller can mend this", and how any other one is told."""

from __future__ import annotations

import errno
import os

_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
_WITHHELD = "(its message is withheld: it may quote a user's text)"


def safe_traceback(error: BaseException) -> str:
    """Where an unexpected exception came from, and its class; not its message, which may quote a user's text.

    Of the system's own errors the cause is told ("No space left on device").
    """
    import traceback

    parts = []
    chain: BaseException | None = error
    while chain is not None:
        frames = "".join(traceback.format_tb(chain.__traceback__))
        said = os.strerror(chain.errno) if isinstance(chain, OSError) and chain.errno else _WITHHELD
        parts.append(f"{frames}{type(chain).__name__}: {said}")
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    return "\n\nwhich came after:\n\n".join(parts)


def is_of_the_disk(error: OSError) -> bool:
    """Whether a disk is full, read-only or not ours, which the caller can mend."""
    return error.errno in _OF_THE_DISK


class MilpError(Exception):
    """A mistake in a configuration, a users file or the environment.

    The message says what was given, what is allowed and what to do. The command line prints it without a
    traceback and exits with code 2. It never carries text out of a user's history, prompt or adapter.
    """
