"""What the scripts share besides the algorithm: offline data, environments, and the table of tasks."""


class InputError(OSError):
    """Bad input: a flag, a file or an environment. The message is one line: what is wrong, and what to do about it."""


def reason(error: BaseException) -> str:
    """The last line of an exception's text, cut to 150 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:150]
