"""Runs a script with one part of the method changed for which it has no flag.

    python benchmark/ablation.py --change acting_only --script expo_diffusion --task pointmaze-medium --seed 1

acting_only: the on-the-fly policy acts, but the TD target takes a single sample of the base policy, neither edited nor
chosen. online_base: the base policy itself proposes actions for acting and evaluation, not its moving average.
growing_edits: edits of .05 at most during the offline updates, then more by the step, and --edit-scale at the end.
base_until_better: the base policy alone acts until an evaluation finds the on-the-fly policy at least as successful,
and again when one finds it worse. flow_base: the base policy of expo_flow.
All flags but --change and --script go to the script.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not as a module

import expo_flow
from benchmark.wrapper import wrapped_script
from utils import cli
from utils.evaluate import Evaluation, Policy
from utils.logger import Logger


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


def growing_edits(script: Any, first: float = 0.05) -> None:
    """Moves the bound of an edit from `first` to --edit-scale while the run is online, and the entropy target too."""
    update = script.update

    def growing(agent: Any, optimizers: Any, batch: Any) -> dict[str, Tensor]:
        args = agent.args
        online = optimizers.edit_decay.last_epoch - args.offline_steps  # counted by the schedule: part of a checkpoint
        share = min(max(online / args.total_timesteps, 0.0), 1.0)
        scale = first + share * (args.edit_scale - first)
        agent.edit_policy.scale = scale
        if args.edit_entropy == "scaled":
            agent.target_entropy = len(batch.actions[0, 0]) * (math.log(scale) - 0.5)
        return {**update(agent, optimizers, batch), "edit/scale": torch.tensor(scale)}

    script.update = growing


def base_until_better(script: Any) -> None:
    """Lets the base policy act until an evaluation finds the on-the-fly policy at least as successful.

    eval/success_rate is that of the policy that acted up to the evaluation, not of the better one in it: choosing by
    the episodes that are reported would flatter.
    """
    usual = script.Agent.on_the_fly_actions
    script.Agent.trusted = False

    def on_the_fly_actions(agent: Any, obs: Tensor) -> Tensor:
        return usual(agent, obs) if agent.trusted else agent.target_base_policy.sample(obs)

    script.Agent.on_the_fly_actions = script.Agent.forward = on_the_fly_actions

    class Trial(Evaluation):
        """Evaluates both policies and decides which of them acts from here on."""

        def run(self, logger: Logger, step: int, act: Any, base: Policy | None = None) -> None:
            agent, acted = act.__self__, "on_the_fly" if act.__self__.trusted else "base"
            agent.trusted = True
            metrics = self._episodes(act).metrics("eval/on_the_fly_")
            metrics |= self._episodes(agent.target_base_policy.sample).metrics("eval/base_")
            agent.trusted = metrics["eval/on_the_fly_success_rate"] >= metrics["eval/base_success_rate"]
            for name in ("success_rate", "return", "length"):
                metrics[f"eval/{name}"] = metrics[f"eval/{acted}_{name}"]
            logger.write_evaluation(step, metrics)

    script.Evaluation = Trial


def flow_base(script: Any) -> None:
    """Puts the flow-matching base policy into the script's place for one."""
    script.BasePolicy = expo_flow.BasePolicy


CHANGES = {
    "acting_only": acting_only,
    "online_base": online_base,
    "growing_edits": growing_edits,
    "base_until_better": base_until_better,
    "flow_base": flow_base,
}


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
