"""What a command's exit code says, beside 0 for all is well."""

BUG = 1
MISTAKE = 2  # the caller can mend it: a configuration, a path, a users file
SOME_FAILED = 3  # the command came to its end, and some users have no adapter or no scores
FOUND = 3  # an audit came to its end, and found what must not be
INTERRUPTED = 130  # 128 + SIGINT, as a shell has it
