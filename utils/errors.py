"""The one exception for bad input: its message is all that the user sees."""


class InputError(ValueError):
    """Bad input (a flag, a file, an environment). The message is one line that says what is wrong and what to do."""
