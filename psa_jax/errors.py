"""Errors for users: one line that says what is wrong, where, and what to do."""

STOPPED = 75  # EX_TEMPFAIL: nothing is lost; the same command continues the run


class PSAError(ValueError):
    """Wrong input or a refused action. The command line prints the text as one line and exits with code 1."""


class Stopped(PSAError):
    """The run was stopped from outside. The same command continues it. The exit code is STOPPED."""


class PeerLost(Stopped):
    """Another process of the group died or does not respond."""
