"""Mistakes of the person who uses the program, as opposed to faults of the program itself."""


def printable(text: object) -> str:
    """Return a text for a display: what moves a cursor, ends a line, turns its direction or is no letter, escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))


class UserError(ValueError):
    """Something that the user can mend: settings, data, files, a cluster that do not fit.

    Its text is one line that says what is wrong, where, and what to do; commands print that line and exit with 1. Any
    other error is a fault of the program: commands show its trace and exit with 70. See `pipeline.errors`.
    """


class StoreError(UserError):
    """Remote storage cannot be reached, refuses, or fails again and again; what it holds may be whole all the same."""


class RequestError(UserError):
    """What was asked cannot be answered: of a history, a candidate or an event something is missing, unknown or wrong.

    Its sender can mend it, where any other `UserError` is for whoever runs the server: a file that is damaged.
    """

    def __init__(self, line: str) -> None:
        """Say what is wrong in one line, whatever a sender has put into names and values."""
        super().__init__(printable(line))


class StoppedError(UserError):
    """The work was asked to stop, by Ctrl-C or a signal, before its end; its text says how it goes on.

    The exit code is 1, and after Ctrl-C 130.
    """
