"""Runs a script with one part of the method changed for which it has no flag.

    python benchmark/ablation.py --change acting_only --script expo_diffusion --task pointmaze-medium --seed 1

acting_only: the on-the-fly policy acts, but the TD target takes a single sample of the base policy, neither edited nor
chosen. online_base: the base policy itself proposes actions for acting and evaluation, not its moving average.
All flags but --change and --script go to the script.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not as a module

from benchmark.wrapper import wrapped_script
from utils import cli


def acting_only(script: Any) -> None:
    """Leaves the TD target one candidate, the first base action."""
    next_candidates = script.next_candidates
    script.next_candidates = lambda agent, batch: next_candidates(agent, batch)[..., :1, :]


def online_base(script: Any) -> None:
    """Lets the base policy itself propose what is acted on."""

    def on_the_fly_actions(agent: Any, obs: Tensor) -> Tensor:
        candidates = agent.with_edits(obs, agent.base_actions(obs, agent.base_policy))
        return script.take(candidates, agent.rank(obs, candidates).argmax(-1))

    script.Agent.on_the_fly_actions = script.Agent.forward = on_the_fly_actions


CHANGES = {"acting_only": acting_only, "online_base": online_base}


def main() -> None:
    """Parses --change and --script and hands the rest on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--change", choices=CHANGES, required=True)
    options, rest = parser.parse_known_args()
    script, rest = wrapped_script(("expo_diffusion", "expo_flow", "expo_finetune"), rest)
    CHANGES[options.change](script)
    cli.run(script.main, script.Args, script.__doc__, rest)


if __name__ == "__main__":
    main()
