"""The one exception that means "the caller can mend this"."""


class MilpError(Exception):
    """A mistake in a configuration, a users file or the environment.

    The message says what was given, what is allowed and what to do. The command line prints it without a
    traceback and exits with code 2. It never carries text out of a user's history, prompt or adapter.
    """
