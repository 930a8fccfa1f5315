"""The one exception for bad input: its message is all that the user sees."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input (a flag, a file, an environment). The message is one line that says what is wrong and what to do."""


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Around a command: bad input ends it with one line on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
