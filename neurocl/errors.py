"""The errors that end a command in one clear line, and the exit code of each."""


class NeuroclError(Exception):
    """A failure that is told in one sentence; the command line prints it without a traceback."""

    exit_code = 1


class RunError(NeuroclError):
    """The run itself failed (NaN in the loss, full disk); what was saved before is intact. Exit code 1."""


class UserError(NeuroclError):
    """Wrong usage, configuration or input file: the message names the bad value and the fix. Exit code 2."""

    exit_code = 2


class Interrupted(NeuroclError):
    """The user stopped the run; a checkpoint has been written. Exit code 130."""

    exit_code = 130
