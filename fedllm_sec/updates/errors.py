"""The one kind of error that a user can mend."""


class InputError(ValueError):
    """What the user gave cannot be used: the message names the culprit and the remedy.

    The command line prints it on one line and ends with exit code 2; everything else is a defect of ours and keeps
    its traceback.
    """
