"""Runs a script with one part of the method changed, for changes that no flag makes.

    python benchmark/ablation.py --change acting_only --script expo_diffusion --task pointmaze-medium --seed 1

The changes are the functions below. All flags but --change and --script go to the script.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts when this file is run

import expo_flow
from tools import one_line_errors
from utils.tasks import parse_args


def acting_only(script: Any) -> None:
    """The TD target takes one sample of the base policy, neither edited nor chosen. The candidates only act."""
    candidates = script.next_candidates
    script.next_candidates = lambda agent, next_obs: candidates(agent, next_obs)[..., :1, :]


def online_base(script: Any) -> None:
    """The base policy itself proposes the actions to choose from, not its moving average."""
    samples = script.Agent.base_actions
    script.Agent.base_actions = lambda agent, obs, policy, num: samples(agent, obs, agent.base_policy, num)


def flow_base(script: Any) -> None:
    """The base policy is that of expo_flow."""
    script.BasePolicy = expo_flow.BasePolicy


def edit_without_choice(script: Any) -> None:
    """One edit is the only candidate, when acting and in the TD target: no Q chooses."""
    edits = script.Agent.with_edits
    script.Agent.with_edits = lambda agent, obs, base_actions: edits(agent, obs, base_actions)[..., -1:, :]


def run_changed(*changes: Callable[[Any], None]) -> None:
    """Reads --script, and --change if there are several, and runs the script with the change made."""
    parser, names = argparse.ArgumentParser(add_help=False, allow_abbrev=False), {f.__name__: f for f in changes}
    parser.add_argument("--change", choices=names, required=len(changes) > 1, default=changes[0].__name__)
    parser.add_argument("--script", required=True)
    options, flags = parser.parse_known_args()
    script = importlib.import_module(options.script)
    names[options.change](script)
    one_line_errors(lambda: script.main(parse_args(script.Args, script.__doc__, flags)))


if __name__ == "__main__":
    run_changed(acting_only, online_base, flow_base, edit_without_choice)
