"""Runs a script with one part of the method changed, for changes that no flag makes.

    python benchmark/ablation.py --change acting_only --script expo_diffusion --task pointmaze-medium --seed 1

The changes are the functions below. All flags but --change and --script go to the script.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts when this file is run

from tools.changed import run_changed


def acting_only(script: Any) -> None:
    """The TD target takes one sample of the base policy, neither edited nor chosen. The candidates only act."""
    candidates = script.next_candidates
    script.next_candidates = lambda agent, next_obs: candidates(agent, next_obs)[..., :1, :]


def gaussian_base(script: Any) -> None:
    """The base policy is a Gaussian that imitates by maximum likelihood, with as many blocks of the same width."""

    class Gaussian(nn.Module):
        def __init__(self, obs_dim: int, action_dim: int, args: Any):
            super().__init__()
            width, linear = args.base_hidden_dim, script.linear
            blocks = (script.ResidualBlock(width, args.base_expansion) for _ in range(args.base_blocks))
            self.layers = nn.Sequential(linear(obs_dim, width), *blocks, nn.SiLU(), linear(width, 2 * action_dim))

        def loss(self, obs: Tensor, actions: Tensor) -> Tensor:
            return -gaussian(*self.layers(obs).chunk(2, -1)).log_prob(actions).sum(-1).mean()

        @torch.no_grad()
        def sample(self, obs: Tensor) -> Tensor:
            return gaussian(*self.layers(obs).chunk(2, -1)).sample().clamp(-1, 1)

    script.BasePolicy = Gaussian


def gaussian(*mean_and_log_std: Tensor) -> torch.distributions.Normal:
    """Actions (B, A) around tanh(mean). Before the tanh, the many actions at +-1 would be infinitely far."""
    mean, log_std = mean_and_log_std
    return torch.distributions.Normal(mean.tanh(), log_std.clamp(-5, 2).exp())


def edit_without_choice(script: Any) -> None:
    """One edit is the only candidate, when acting and in the TD target: no Q chooses."""
    edits = script.Agent.with_edits
    script.Agent.with_edits = lambda agent, obs, base_actions: edits(agent, obs, base_actions)[..., -1:, :]


def former_starts(script: Any) -> None:
    """Evaluation episodes start as at commit 1413312, and so as in the authors' curves: their seeds are consecutive."""
    seed = script.episode_seed
    script.episode_seed = lambda run, kind, episode: 1_000_000 + run + episode if kind else seed(run, kind, episode)


def imitate_first(script: Any, share: float = 1.0) -> None:
    """RLPD: in this share of the offline updates its actor only imitates. Its critics learn as usual."""
    update, reinforce = script.update, script.Agent.actor_loss

    def actor_loss(agent: Any, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if not agent.imitates:
            return reinforce(agent, batch)
        loss = -gaussian(*agent.actor.gaussian(batch.obs)).log_prob(batch.actions).sum(-1).mean()
        return loss, torch.tensor(agent.target_entropy), {"losses/imitation": loss}  # alpha stands still

    def counted(agent: Any, optimizers: Any, batch: Any) -> dict[str, Tensor]:
        agent.imitates = steps_of(optimizers.actor) < share * agent.args.offline_steps
        return update(agent, optimizers, batch)

    script.update, script.Agent.actor_loss = counted, actor_loss


def imitate_half(script: Any) -> None:
    """RLPD: its actor imitates in the first half of the offline updates."""
    imitate_first(script, 0.5)


# ---- cures: what might help where edits harm -------------------------------------------------------------------------
def online_mean(script: Any) -> None:
    """The mean of all online critics ranks the candidates. Two target critics give the value, as before."""

    @torch.no_grad()
    def rank(agent: Any, obs: Tensor, candidates: Tensor) -> Tensor:
        return agent.critic(obs.unsqueeze(-2).expand(*candidates.shape[:-1], -1), candidates).mean(0)

    script.Agent.rank = rank


def other_heads(script: Any) -> None:
    """One half of the target critics always ranks the candidates, and the other half gives the value of the best."""

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
    """Alpha starts at .01, and edits start small and without direction: their last layer is 0, with a bias of -3."""
    init = script.Agent.__init__

    def changed(agent: Any, *dims_and_args: Any) -> None:
        init(agent, *dims_and_args)
        for parameter in (*agent.edit_policy.mean.parameters(), agent.edit_policy.log_std.weight):
            nn.init.zeros_(parameter)
        nn.init.constant_(agent.edit_policy.log_std.bias, -3.0)
        nn.init.constant_(agent.log_alpha, -4.6)  # log .01

    script.Agent.__init__ = changed


def fresh_actions(script: Any) -> None:
    """Edits are trained on new samples of the base policy, not on the actions of the batch."""
    loss = script.Agent.edit_policy_loss

    def changed(agent: Any, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        actions = agent.base_actions(batch.obs, agent.base_policy, 1).squeeze(-2)
        return loss(agent, batch._replace(actions=actions))

    script.Agent.edit_policy_loss = changed


def base_acts_first(script: Any) -> None:
    """The base policy alone takes the first quarter of the environment steps (evaluations have several episodes)."""
    create, act, optimizers = script.Optimizers, script.Agent.on_the_fly_actions, []
    script.Optimizers = lambda *args: optimizers.append(create(*args)) or optimizers[-1]

    def first(agent: Any, obs: Tensor) -> Tensor:
        updates = agent.args.offline_steps + agent.args.utd_ratio * (agent.args.total_timesteps // 4)  # of the critics
        if len(obs) == 1 and steps_of(optimizers[-1].critic) <= updates:  # not in an evaluation
            return agent.base_actions(obs, agent.target_base_policy, 1).squeeze(-2)
        return act(agent, obs)

    script.Agent.on_the_fly_actions = first


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """How many steps it has made, also before the run was resumed."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


if __name__ == "__main__":
    controls = acting_only, gaussian_base, edit_without_choice, former_starts
    cures = online_mean, other_heads, lower_bound, small_first_edits, fresh_actions, base_acts_first
    expo = dict.fromkeys((*controls, *cures), ("expo_diffusion", "expo_flow", "expo_finetune"))
    run_changed(expo | dict.fromkeys((imitate_first, imitate_half), ("baselines.rlpd",)))
