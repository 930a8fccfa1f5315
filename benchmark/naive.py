"""The same update written the obvious way: the reference that benchmark/throughput.py compares the scripts with.

One module per critic, all of them evaluated and a random subset chosen afterwards; all samples of a slice at once; the
time code computed for every row; plain optimizers; averages parameter by parameter; numbers read at every step.

`STEPS` are what makes it faster without another algorithm, one by one, to show what each of them brings. What then
still separates it from the scripts: all critics in one batched product, the chain of all slices in one call, and no
gradients for the critics in the edit policy's loss.
"""

import copy
import math
import random
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.buffer import Batch


def mlp(in_dim: int, width: int, layers: int, out_dim: int, norm: bool) -> nn.Sequential:
    """Linear (LayerNorm) ReLU, `layers` times, and a linear head."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(in_dim, width), *([nn.LayerNorm(width, eps=1e-6)] if norm else []), nn.ReLU()]
        in_dim = width
    return nn.Sequential(*parts, nn.Linear(in_dim, out_dim))


STEPS = {
    "drawn critics only": "the ranking asks the critics that were drawn, not all",
    "time codes once": "the code of a denoising step is computed once for all rows",
    "chain in parts": "samples in parts that the cache holds",
    "fused optimizers": "one call for all parameters, in optimizers and averages; nothing is read during an update",
}


class NaiveExpo:
    """Networks of the sizes in `args`, with the base policy's network of `script`, and one method: `update`.

    Args:
        script: a module with `BasePolicy`.
        obs_dim: O.
        action_dim: A.
        args: the script's flags.
        device: of everything.
        steps: names in STEPS that are taken.
    """

    def __init__(
        self,
        script: Any,
        obs_dim: int,
        action_dim: int,
        args: Any,
        device: torch.device | str = "cpu",
        steps: Collection[str] = (),
    ):
        self.args, self.action_dim, self.steps = args, action_dim, steps
        self.base_policy = script.BasePolicy(obs_dim, action_dim, args).to(device)
        self.target_base_policy = copy.deepcopy(self.base_policy)
        width, layers = args.hidden_dim, args.hidden_layers
        self.edit_policy = mlp(obs_dim + action_dim, width, layers, 2 * action_dim, norm=False).to(device)
        critics = [mlp(obs_dim + action_dim, width, layers, 1, norm=True) for _ in range(args.num_critics)]
        self.critic = nn.ModuleList(critics).to(device)
        self.target_critic = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_alpha), device=device))
        kind: dict[str, Any] = {"fused": True} if "fused optimizers" in steps else {"foreach": False}
        self.base_optimizer = torch.optim.AdamW(self.base_policy.parameters(), args.base_lr, **kind)
        self.edit_optimizer = torch.optim.Adam(self.edit_policy.parameters(), args.edit_lr, **kind)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, **kind)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], args.alpha_lr, **kind)

    def network(self, x: Tensor, obs: Tensor, time: float) -> Tensor:
        """The base policy's network with the time of every row spelled out."""
        rows = 1 if "time codes once" in self.steps else len(x)
        times = torch.full((rows, 1), time, device=x.device)
        return self.base_policy.network(x, obs, self.base_policy.network.time_code(times))

    @torch.no_grad()
    def sample(self, obs: Tensor) -> Tensor:
        """Base actions (n, A) for observations (n, O): K network calls on all rows, DDPM or Euler."""
        if "chain in parts" in self.steps and len(obs) > 2048:
            return torch.cat([self.sample(part) for part in obs.split(2048)])
        x, steps = torch.randn(len(obs), self.action_dim, device=obs.device), self.args.denoising_steps
        if not hasattr(self.base_policy, "betas"):
            for k in range(steps):
                x = x + self.network(x, obs, k / steps) / steps
            return x.clamp(-1, 1)
        for k in reversed(range(steps)):
            beta = self.base_policy.betas[k]
            x = (x - self.base_policy.noise_weights[k] * self.network(x, obs, k + 1)) / math.sqrt(1 - beta)
            if k > 0:
                x = x + math.sqrt(beta) * torch.randn_like(x)
            x = x.clamp(-1, 1)
        return x

    def edit(self, obs: Tensor, base_actions: Tensor) -> tuple[Tensor, Tensor]:
        """Edits (n, A) and their log-density (n,)."""
        mean, log_std = self.edit_policy(torch.cat([obs, base_actions], -1)).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        u = normal.rsample()
        log_prob = normal.log_prob(u) - 2 * (math.log(2) - u - F.softplus(-2 * u)) - math.log(self.args.edit_scale)
        return self.args.edit_scale * u.tanh(), log_prob.sum(-1)

    @torch.no_grad()
    def minimum(self, obs: Tensor, actions: Tensor) -> Tensor:
        """q (n,): every target critic is asked, the lowest of a random few counts."""
        drawn = random.sample(range(len(self.target_critic)), self.args.num_min_critics)
        asked = drawn if "drawn critics only" in self.steps else range(len(self.target_critic))
        inputs = torch.cat([obs, actions], -1)
        qs = {e: self.target_critic[e](inputs).squeeze(-1) for e in asked}
        return torch.stack([qs[e] for e in drawn]).min(0).values

    @torch.no_grad()
    def next_actions(self, obs: Tensor) -> Tensor:
        """The on-the-fly action (B, A) at observations (B, O)."""
        n, m = self.args.num_base_samples, self.args.num_edit_samples
        base_actions = self.sample(obs.repeat_interleave(n, 0))  # (B N, A)
        candidates = base_actions.view(len(obs), n, -1)
        if m:
            to_edit = candidates[:, [i % n for i in range(m)]]
            repeated = obs.repeat_interleave(m, 0)
            edited = to_edit.flatten(0, 1) + self.edit(repeated, to_edit.flatten(0, 1))[0]
            candidates = torch.cat([candidates, edited.clamp(-1, 1).view(len(obs), m, -1)], 1)
        q = self.minimum(obs.repeat_interleave(n + m, 0), candidates.flatten(0, 1)).view(len(obs), n + m)
        return candidates[torch.arange(len(obs)), q.argmax(1)]

    def update(self, batch: Batch) -> dict[str, Any]:
        """U critic steps and one step of each policy on a batch (U, B, ...)."""
        args = self.args
        for u in range(len(batch.rewards)):
            obs, actions, rewards, next_obs, terminations = (field[u] for field in batch[:5])
            next_q = self.minimum(next_obs, self.next_actions(next_obs))
            target_q = rewards + args.gamma * (1 - terminations) * next_q
            qs = torch.stack([critic(torch.cat([obs, actions], -1)).squeeze(-1) for critic in self.critic])
            critic_loss = ((qs - target_q) ** 2).mean()
            self._step(self.critic_optimizer, critic_loss)
            self._average(self.target_critic, self.critic, args.tau)
        base_loss = self.base_policy.loss(obs, actions)
        self._step(self.base_optimizer, base_loss)
        self._average(self.target_base_policy, self.base_policy, args.ema_rate)
        if not args.num_edit_samples:
            return self._read({"critic": critic_loss, "base": base_loss})
        edits, log_prob = self.edit(obs, actions)
        inputs = torch.cat([obs, (actions + edits).clamp(-1, 1)], -1)
        q = torch.stack([critic(inputs).squeeze(-1) for critic in self.critic]).mean(0)
        edit_loss = (self.log_alpha.exp().detach() * log_prob - q).mean()
        self._step(self.edit_optimizer, edit_loss)
        alpha_loss = self.log_alpha.exp() * (-log_prob.mean().detach() + self.action_dim / 2)
        self._step(self.alpha_optimizer, alpha_loss)
        return self._read({"critic": critic_loss, "base": base_loss, "edit": edit_loss})

    def _read(self, losses: dict[str, Tensor]) -> dict[str, Any]:
        return losses if "fused optimizers" in self.steps else {key: loss.item() for key, loss in losses.items()}

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def _average(self, target: nn.Module, online: nn.Module, rate: float) -> None:
        if "fused optimizers" in self.steps:
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)  # pyright: ignore
            return
        for old, new in zip(target.parameters(), online.parameters(), strict=True):
            old.copy_((1 - rate) * old + rate * new)
