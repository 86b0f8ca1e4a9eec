"""What a user's mistake, an unreadable image, and a request to stop raise."""


class UserError(ValueError):
    """Input that the user can mend: one line with what was wrong, the value received, the remedy.

    The command line prints it without a traceback and exits with code 2. A DataLoader hands a
    worker's error on with the whole traceback as its message, of which the message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f".{type(self).__name__}: ")[2].strip())


class BrokenImage(Exception):  # noqa: N818 - it is an event to count, not yet an error
    """Bytes that hold no readable image; the message is the reason, in one line."""


def first_line(error: BaseException) -> str:
    """What it says at first, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class RunStopped(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to stop, by the signal of this number, and did so behind a checkpoint."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
