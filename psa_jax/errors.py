"""The one error a user sees: a single line that says what is wrong, where, and what to do."""


class PSAError(ValueError):
    """Bad input or a refused action. The command line prints its text as one line and exits with 1."""
