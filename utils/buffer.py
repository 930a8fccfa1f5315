"""Replay storage: tensors on the training device, uniform sampling."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Transitions with any leading shape: obs (..., O), actions (..., A), rewards (...), next_obs, terminations (...).

    `terminations` is 1.0 where the task really ended; a time limit (truncation) is never terminal.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    terminations: Tensor


class ReplayBuffer:
    """A ring of `capacity` transitions; the oldest are overwritten."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device | str = "cpu"):
        self.capacity, self.size, self.position = capacity, 0, 0
        self.data = Batch(
            obs=torch.zeros(capacity, obs_dim, device=device),
            actions=torch.zeros(capacity, action_dim, device=device),
            rewards=torch.zeros(capacity, device=device),
            next_obs=torch.zeros(capacity, obs_dim, device=device),
            terminations=torch.zeros(capacity, device=device),
        )

    @classmethod
    def from_arrays(cls, obs, actions, rewards, next_obs, terminations, device: torch.device | str = "cpu"):
        """A full buffer that holds the given arrays (n, ...)."""
        buffer = cls(0, 0, 0)
        buffer.capacity = buffer.size = len(obs)
        arrays = (obs, actions, rewards, next_obs, terminations)
        buffer.data = Batch(*(torch.as_tensor(a, dtype=torch.float32, device=device) for a in arrays))
        return buffer

    def add(self, obs, action, reward: float, next_obs, terminated: bool) -> None:
        """Stores one transition: obs (O,), action (A,), reward, next_obs (O,)."""
        for store, value in zip(self.data, (obs, action, reward, next_obs, float(terminated)), strict=True):
            store[self.position] = torch.as_tensor(value, dtype=torch.float32)
        self.position = (self.position + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, *shape: int) -> Batch:
        """Transitions drawn uniformly with replacement: every field with the leading `shape`."""
        index = torch.randint(self.size, shape, device=self.data.rewards.device)
        return Batch(*(store[index] for store in self.data))
