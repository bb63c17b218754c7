"""The one exception that means: the user can mend this."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a recipe, a file or a command line.

    The message is one line that says what is wrong, where, and how to mend it. The command line prints it
    without a traceback and exits with status 2.
    """
