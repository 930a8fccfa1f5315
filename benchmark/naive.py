"""The same update, written the obvious way: what benchmark/throughput.py --naive compares the scripts with.

One module per critic. All of them are asked, and a random subset is chosen afterwards. Candidates are made slice by
slice. Optimizers and averages go parameter by parameter, and every loss is read at once.
"""

import copy
import itertools
import math
import random
from typing import Any

import torch
from torch import Tensor, nn


class NaiveExpo:
    """Networks of the sizes in `args`, with the base policy and the edit policy of `script`."""

    def __init__(self, script: Any, obs_dim: int, action_dim: int, args: Any, device: torch.device):
        self.args, self.action_dim = args, action_dim
        self.base_policy = script.BasePolicy(obs_dim, action_dim, args).to(device)
        self.edit_policy = script.EditPolicy(obs_dim, action_dim, args).to(device)
        width, critics = args.hidden_dim, nn.ModuleList()
        for _ in range(args.num_critics):
            inputs = [obs_dim + action_dim] + [width] * (args.hidden_layers - 1)
            layers = [(nn.Linear(i, width), nn.LayerNorm(width, eps=1e-6), nn.ReLU()) for i in inputs]
            critics.append(nn.Sequential(*itertools.chain(*layers), nn.Linear(width, 1)))
        self.critic = critics.to(device)
        self.target_base_policy, self.target_critic = copy.deepcopy(self.base_policy), copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_alpha), device=device))
        trained = {"base": self.base_policy, "edit": self.edit_policy, "critic": self.critic}
        parameters = {name: list(module.parameters()) for name, module in trained.items()} | {"alpha": [self.log_alpha]}
        self.optimizers = {name: torch.optim.Adam(part, 3e-4, foreach=False) for name, part in parameters.items()}

    @torch.no_grad()
    def minimum(self, obs: Tensor, actions: Tensor) -> Tensor:
        """q (n,): all target critics are asked, and the lowest of a random few counts."""
        qs = torch.stack([critic(torch.cat([obs, actions], -1)).squeeze(-1) for critic in self.target_critic])
        return qs[random.sample(range(len(qs)), self.args.num_min_critics)].min(0).values

    @torch.no_grad()
    def best_actions(self, obs: Tensor, policy: Any) -> Tensor:
        """The on-the-fly actions (B, A) at observations (B, O)."""
        n, m = self.args.num_base_samples, self.args.num_edit_samples
        base_actions = policy.sample(obs.repeat_interleave(n, 0)).view(len(obs), n, -1)
        to_edit = base_actions[:, [i % n for i in range(m)]].flatten(0, 1)
        edited = (to_edit + self.edit_policy(obs.repeat_interleave(m, 0), to_edit)[0]).clamp(-1, 1)
        candidates = torch.cat([base_actions, edited.view(len(obs), m, -1)], 1)
        q = self.minimum(obs.repeat_interleave(n + m, 0), candidates.flatten(0, 1)).view(len(obs), n + m)
        return candidates[torch.arange(len(obs)), q.argmax(1)]

    def update(self, batch: Any) -> dict[str, float]:
        """U critic steps, and one step of each policy, on a batch (U, B, ...)."""
        for obs, actions, rewards, next_obs, terminations in zip(*batch, strict=True):
            next_q = self.minimum(next_obs, self.best_actions(next_obs, self.base_policy))
            target_q = rewards + self.args.gamma * (1 - terminations) * next_q
            qs = torch.stack([critic(torch.cat([obs, actions], -1)).squeeze(-1) for critic in self.critic])
            losses = {"critic": self.step("critic", ((qs - target_q) ** 2).mean())}
            self.average(self.target_critic, self.critic, self.args.tau)
        losses["base"] = self.step("base", self.base_policy.loss(obs, actions))
        self.average(self.target_base_policy, self.base_policy, self.args.ema_rate)
        edits, log_prob = self.edit_policy(obs, actions, train=True)
        inputs = torch.cat([obs, (actions + edits).clamp(-1, 1)], -1)
        q = torch.stack([critic(inputs).squeeze(-1) for critic in self.critic]).mean(0)
        losses["edit"] = self.step("edit", (self.log_alpha.exp().detach() * log_prob - q).mean())
        target_entropy = self.action_dim * (math.log(self.args.edit_scale) - 0.5)
        self.step("alpha", self.log_alpha.exp() * (-log_prob.mean().detach() - target_entropy))
        return losses

    def step(self, name: str, loss: Tensor) -> float:
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()
        return loss.item()

    @torch.no_grad()
    def average(self, target: nn.Module, online: nn.Module, rate: float) -> None:
        for old, new in zip(target.parameters(), online.parameters(), strict=True):
            old.copy_((1 - rate) * old + rate * new)
