"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """Input that the user can mend: one line with what was wrong, the value received, the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
