"""What the programs share that run one of the scripts with something changed or measured around it."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.errors import exit_on_input_error
from utils.logger import read_record


def wrapped_script(scripts: Sequence[str], flags: Sequence[str] | None = None) -> tuple[Any, list[str]]:
    """The script that `--script` names, or that made the run to `--resume`, or the first; and all other flags.

    flags: those of the command line unless given.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--script", choices=scripts)
    parser.add_argument("--resume", type=Path)
    options, rest = parser.parse_known_args(flags)
    if options.resume:
        rest += ["--resume", str(options.resume)]
    with exit_on_input_error():
        resumed = read_record(options.resume)["script"] if options.resume else None
    return importlib.import_module(options.script or resumed or scripts[0]), rest
