"""Commands for people: tools/data.py, tools/evaluate.py, tools/cuda_graph.py. No script imports them."""

import argparse
import os
import sys
from collections.abc import Callable

from utils import InputError


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} (--help shows what there is)")


def one_line_errors(main: Callable[[], None]) -> None:
    """main(), where bad input ends with one line on stderr and exit code 2."""
    try:
        getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `... | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, FloatingPointError) as error:  # as the scripts do
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
