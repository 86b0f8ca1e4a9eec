"""What a user's mistake, an unreadable image, and a request to stop raise."""

import math
from collections.abc import Callable, Iterable
from typing import Any

# Names of settings with a space between them, whether a value fits, and what to give.
Range = tuple[str, Callable[[Any], bool], str]


class UserError(ValueError):
    """Input that the user can mend: one line with what was wrong, the value received, the remedy.

    The command line prints it without a traceback and exits with code 2. A DataLoader hands a
    worker's error on with the whole traceback as its message, of which the message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f".{type(self).__name__}: ")[2].strip())


def check_ranges(settings: object, ranges: Iterable[Range], owner: str = "") -> None:
    """Raise UserError for the first setting out of its range; None and "auto" are in any."""
    for names, fits, wanted in ranges:
        for name in names.split():
            value = getattr(settings, name)
            if value not in (None, "auto") and not fits(value):
                shown = f"{value:g}" if isinstance(value, float) else repr(value)
                raise UserError(f"{owner}{name} is {shown}; give {wanted}")


def positive(names: str) -> Range:
    """More than 0, and finite."""
    return names, lambda value: 0 < value < math.inf, "a positive number"


def not_negative(names: str) -> Range:
    """0 or more, and finite."""
    return names, lambda value: 0 <= value < math.inf, "0 or more"


def at_least(least: int, names: str) -> Range:
    """A whole number of so much or more."""
    return names, lambda value: value >= least, f"{least} or more"


def fraction(names: str) -> Range:
    """A part of something, of nothing to all."""
    return names, lambda value: 0 <= value <= 1, "a share of 0 to 1"


def share(names: str) -> Range:
    """A part of something, which is not nothing."""
    return names, lambda value: 0 < value <= 1, "a share above 0 and at most 1"


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
