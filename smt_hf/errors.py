"""The error for faults in what a user gave: a flag, a file, a folder, a row of data."""


class InputError(ValueError):
    """Bad input, with a message of one sentence or two that says how to fix it.

    Recipes print it as one line `error: ...` and exit with status 2. Any other exception is a bug and keeps its
    traceback: torch and transformers raise plain `ValueError` for faults that are not the user's.
    """
