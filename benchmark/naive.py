"""The same update, written the obvious way: what benchmark/throughput.py --naive compares the scripts with.

One module per critic. All of them are asked, and a random subset is chosen afterwards. The time code is computed for
every row. The base policy samples slice by slice. Optimizers and averages go parameter by parameter.
"""

import copy
import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(in_dim: int, width: int, layers: int, out_dim: int, norm: bool) -> nn.Sequential:
    """Linear, LayerNorm if `norm`, ReLU, all of that `layers` times, and a linear head."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(in_dim, width), *([nn.LayerNorm(width, eps=1e-6)] if norm else []), nn.ReLU()]
        in_dim = width
    return nn.Sequential(*parts, nn.Linear(in_dim, out_dim))


class NaiveExpo:
    """Networks of the sizes in `args`, with the base policy of `script`."""

    def __init__(self, script: Any, obs_dim: int, action_dim: int, args: Any, device: torch.device):
        self.args, self.action_dim = args, action_dim
        self.base_policy = script.BasePolicy(obs_dim, action_dim, args).to(device)
        self.target_base_policy = copy.deepcopy(self.base_policy)
        width, layers = args.hidden_dim, args.hidden_layers
        self.edit_policy = mlp(obs_dim + action_dim, width, layers, 2 * action_dim, norm=False).to(device)
        critics = [mlp(obs_dim + action_dim, width, layers, 1, norm=True) for _ in range(args.num_critics)]
        self.critic = nn.ModuleList(critics).to(device)
        self.target_critic = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_alpha), device=device))
        self.base_optimizer = torch.optim.AdamW(self.base_policy.parameters(), args.base_lr, foreach=False)
        self.edit_optimizer = torch.optim.Adam(self.edit_policy.parameters(), args.edit_lr, foreach=False)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, foreach=False)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], args.alpha_lr, foreach=False)

    @torch.no_grad()
    def sample(self, policy: Any, obs: Tensor) -> Tensor:
        """Base actions (n, A) at observations (n, O): K network calls on all rows, DDPM or Euler."""
        x, steps = torch.randn(len(obs), self.action_dim, device=obs.device), len(policy.times)
        diffusion = hasattr(policy, "betas")
        for k in reversed(range(steps)) if diffusion else range(steps):
            times = policy.times[k].expand(len(obs), 1)
            output = policy.network(x, obs, policy.network.time_code(times))
            if not diffusion:
                x = x + output / steps
                continue
            x = (x - policy.noise_weights[k] * output) / math.sqrt(1 - policy.betas[k])
            x = x + math.sqrt(policy.betas[k]) * torch.randn_like(x) if k > 0 else x
            x = x.clamp(-1, 1)
        return x.clamp(-1, 1)

    def edit(self, obs: Tensor, base_actions: Tensor) -> tuple[Tensor, Tensor]:
        """Edits (n, A) and their log-density (n,)."""
        mean, log_std = self.edit_policy(torch.cat([obs, base_actions], -1)).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        u = normal.rsample()
        log_prob = normal.log_prob(u) - 2 * (math.log(2) - u - F.softplus(-2 * u)) - math.log(self.args.edit_scale)
        return self.args.edit_scale * u.tanh(), log_prob.sum(-1)

    @torch.no_grad()
    def minimum(self, obs: Tensor, actions: Tensor) -> Tensor:
        """q (n,): all target critics are asked, and the lowest of a random few counts."""
        qs = torch.stack([critic(torch.cat([obs, actions], -1)).squeeze(-1) for critic in self.target_critic])
        return qs[random.sample(range(len(qs)), self.args.num_min_critics)].min(0).values

    @torch.no_grad()
    def best_actions(self, obs: Tensor, policy: Any) -> Tensor:
        """The on-the-fly actions (B, A) at observations (B, O)."""
        n, m = self.args.num_base_samples, self.args.num_edit_samples
        candidates = self.sample(policy, obs.repeat_interleave(n, 0)).view(len(obs), n, -1)
        if m:
            to_edit = candidates[:, [i % n for i in range(m)]].flatten(0, 1)
            edited = to_edit + self.edit(obs.repeat_interleave(m, 0), to_edit)[0]
            candidates = torch.cat([candidates, edited.clamp(-1, 1).view(len(obs), m, -1)], 1)
        q = self.minimum(obs.repeat_interleave(n + m, 0), candidates.flatten(0, 1)).view(len(obs), n + m)
        return candidates[torch.arange(len(obs)), q.argmax(1)]

    def update(self, batch: Any) -> dict[str, float]:
        """U critic steps, and one step of each policy, on a batch (U, B, ...)."""
        args = self.args
        for obs, actions, rewards, next_obs, terminations in zip(*batch, strict=True):
            next_q = self.minimum(next_obs, self.best_actions(next_obs, self.base_policy))
            target_q = rewards + args.gamma * (1 - terminations) * next_q
            qs = torch.stack([critic(torch.cat([obs, actions], -1)).squeeze(-1) for critic in self.critic])
            critic_loss = ((qs - target_q) ** 2).mean()
            self.step(self.critic_optimizer, critic_loss)
            self.average(self.target_critic, self.critic, args.tau)
        base_loss = self.base_policy.loss(obs, actions)
        self.step(self.base_optimizer, base_loss)
        self.average(self.target_base_policy, self.base_policy, args.ema_rate)
        losses = {"critic": critic_loss.item(), "base": base_loss.item()}
        if args.num_edit_samples:
            edits, log_prob = self.edit(obs, actions)
            inputs = torch.cat([obs, (actions + edits).clamp(-1, 1)], -1)
            q = torch.stack([critic(inputs).squeeze(-1) for critic in self.critic]).mean(0)
            edit_loss = (self.log_alpha.exp().detach() * log_prob - q).mean()
            self.step(self.edit_optimizer, edit_loss)
            target_entropy = self.action_dim * (math.log(args.edit_scale) - 0.5)
            self.step(self.alpha_optimizer, self.log_alpha.exp() * (-log_prob.mean().detach() - target_entropy))
            losses["edit"] = edit_loss.item()
        return losses

    @staticmethod
    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @staticmethod
    @torch.no_grad()
    def average(target: nn.Module, online: nn.Module, rate: float) -> None:
        for old, new in zip(target.parameters(), online.parameters(), strict=True):
            old.copy_((1 - rate) * old + rate * new)
