"""Runs a script with one part of the method changed, for changes that no flag makes.

    python benchmark/ablation.py --change acting_only --script expo_diffusion --task pointmaze-medium --seed 1

The changes are the functions below. All flags but --change and --script go to the script.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def former_starts(script: Any) -> None:
    """Evaluation episodes start as at commit 1413312, and so as in the authors' curves: their seeds are consecutive."""
    seed = script.episode_seed
    script.episode_seed = lambda run, kind, episode: 1_000_000 + run + episode if kind else seed(run, kind, episode)


def imitate_first(script: Any) -> None:
    """RLPD: in the offline updates its actor only imitates, by maximum likelihood. Its critics learn as usual."""
    update, reinforce = script.update, script.Agent.actor_loss

    def actor_loss(agent: Any, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if not agent.imitates:
            return reinforce(agent, batch)
        mean, log_std = agent.actor.gaussian(batch.obs)
        actions = batch.actions.clamp(-0.999, 0.999).atanh()  # before the tanh
        loss = -torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1).mean()
        return loss, torch.tensor(agent.target_entropy), {"losses/imitation": loss}  # alpha stands still

    def counted(agent: Any, optimizers: Any, batch: Any) -> dict[str, Tensor]:
        agent.imitates = steps_of(optimizers.actor) < agent.args.offline_steps
        return update(agent, optimizers, batch)

    script.update, script.Agent.actor_loss = counted, actor_loss


# ---- cures: what might help where edits harm -------------------------------------------------------------------------
def online_mean(script: Any) -> None:
    """The mean of all online critics ranks the candidates. Two target critics give the value, as before."""

    @torch.no_grad()
    def rank(agent: Any, obs: Tensor, candidates: Tensor) -> Tensor:
        return agent.critic(obs.unsqueeze(-2).expand(*candidates.shape[:-1], -1), candidates).mean(0)

    script.Agent.rank = rank


def other_heads(script: Any) -> None:
    """One half of the target critics ranks the candidates, and the other half gives the value of the best."""

    def random_min(critic: Any, obs: Tensor, actions: Tensor, num: int, first: int = 0) -> Tensor:
        heads = first + torch.randperm(critic.num // 2, device=obs.device)[:num]
        return critic(obs, actions, heads).amin(0)

    @torch.no_grad()
    def rank(agent: Any, obs: Tensor, candidates: Tensor) -> Tensor:
        obs, critic = obs.unsqueeze(-2).expand(*candidates.shape[:-1], -1), agent.target_critic
        return random_min(critic, obs, candidates, agent.args.num_min_critics, critic.num // 2)

    script.Critic.random_min, script.Agent.rank = random_min, rank


def lower_bound(script: Any) -> None:
    """A value is the mean of all target critics less half of their standard deviation, not the minimum of two."""

    def bound(critic: Any, obs: Tensor, actions: Tensor, num: int) -> Tensor:
        q = critic(obs, actions)
        return q.mean(0) - 0.5 * q.std(0)

    script.Critic.random_min = bound


def small_first_edits(script: Any) -> None:
    """The last layer of the edit policy is 0, and alpha starts at .01: at first, edits push in no direction."""
    init = script.Agent.__init__

    def changed(agent: Any, *dims_and_args: Any) -> None:
        init(agent, *dims_and_args)
        for parameter in (*agent.edit_policy.mean.parameters(), *agent.edit_policy.log_std.parameters()):
            torch.nn.init.zeros_(parameter)
        torch.nn.init.constant_(agent.log_alpha, math.log(0.01))

    script.Agent.__init__ = changed


def fresh_actions(script: Any) -> None:
    """Edits are trained on new samples of the base policy, not on the actions of the batch."""
    loss = script.Agent.edit_policy_loss

    def changed(agent: Any, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        actions = agent.base_actions(batch.obs, agent.base_policy, 1).squeeze(-2)
        return loss(agent, batch._replace(actions=actions))

    script.Agent.edit_policy_loss = changed


def base_acts_first(script: Any) -> None:
    """The base policy alone takes the first tenth of the environment steps (evaluations have several episodes)."""
    update, act = script.update, script.Agent.on_the_fly_actions

    def counted(agent: Any, optimizers: Any, batch: Any) -> dict[str, Tensor]:
        info, args = update(agent, optimizers, batch), agent.args
        agent.base_acts = steps_of(optimizers.base) < args.offline_steps + args.total_timesteps // 10
        return info

    def first(agent: Any, obs: Tensor) -> Tensor:
        if agent.base_acts and len(obs) == 1:  # not in an evaluation
            return agent.base_actions(obs, agent.target_base_policy, 1).squeeze(-2)
        return act(agent, obs)

    script.update, script.Agent.on_the_fly_actions, script.Agent.base_acts = counted, first, True


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """How many steps it has made, also before the run was resumed."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


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
    controls = acting_only, online_base, flow_base, edit_without_choice, former_starts, imitate_first
    run_changed(*controls, online_mean, other_heads, lower_bound, small_first_edits, fresh_actions, base_acts_first)
