"""Runs a script with a part of it changed: for benchmark/ablation.py, benchmark/overestimation.py, cuda_graph.py."""

import argparse
import importlib
from collections.abc import Mapping
from typing import Any

from tools import one_line_errors
from utils import InputError
from utils.tasks import parse_args


def load_script(name: str) -> Any:
    """The module of a script; an InputError for any other name."""
    try:
        script = importlib.import_module(name)
        if not hasattr(script, "Args"):
            raise ImportError("it has no Args")
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"{name!r} is no script, such as expo_flow: {error}") from None
    return script


def run_changed(changes: Mapping[Any, tuple[str, ...]]) -> None:
    """Reads --script, and --change if there are several, and runs the script with the change made.

    `changes` names the scripts that a change is for; () means all of them. All other flags go to the script.
    """
    parser, names = argparse.ArgumentParser(add_help=False, allow_abbrev=False), {f.__name__: f for f in changes}
    parser.add_argument("--change", choices=names, required=len(changes) > 1, default=next(iter(names)))
    parser.add_argument("--script", required=True)
    options, flags = parser.parse_known_args()

    def run() -> None:
        change = names[options.change]
        if changes[change] and options.script not in changes[change]:
            raise InputError(f"--change {options.change} is for --script {' or '.join(changes[change])}")
        script = load_script(options.script)
        change(script)
        script.main(parse_args(script.Args, script.__doc__, flags))

    one_line_errors(run)
