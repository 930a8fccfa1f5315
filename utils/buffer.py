"""Replay storage: tensors on the training device, uniform sampling."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from utils.data import Dataset


class Batch(NamedTuple):
    """Transitions with any leading shape: obs (..., O), actions (..., A), rewards (...), next_obs, terminations (...).

    `terminations` is 1.0 where the task really ended; a time limit (truncation) is never terminal.
    `next_base_actions` (..., N, A) are base samples at next_obs that are kept beside a transition; N is 0 if none are.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    terminations: Tensor
    next_base_actions: Tensor


class ReplayBuffer:
    """A ring of `capacity` transitions; the oldest are overwritten.

    Args:
        capacity: how many transitions.
        obs_dim: O.
        action_dim: A.
        device: where all of it lies.
        num_kept: base samples kept beside every transition, see `next_turns`.
    """

    def __init__(
        self, capacity: int, obs_dim: int, action_dim: int, device: torch.device | str = "cpu", num_kept: int = 0
    ):
        self.capacity, self.size, self.position = capacity, 0, 0
        self.turn = 0  # the row whose kept samples are drawn anew next ...
        self.unsampled: list[int] = []  # ... after these, which have none
        self.data = Batch(
            obs=torch.zeros(capacity, obs_dim, device=device),
            actions=torch.zeros(capacity, action_dim, device=device),
            rewards=torch.zeros(capacity, device=device),
            next_obs=torch.zeros(capacity, obs_dim, device=device),
            terminations=torch.zeros(capacity, device=device),
            next_base_actions=torch.zeros(capacity, num_kept, action_dim, device=device),
        )

    @classmethod
    def from_dataset(cls, dataset: "Dataset", device: torch.device | str = "cpu", num_kept: int = 0) -> "ReplayBuffer":
        """A full buffer that holds a data set."""
        buffer = cls(0, dataset.obs.shape[1], dataset.actions.shape[1], device)
        buffer.capacity = buffer.size = len(dataset)
        arrays = (dataset.obs, dataset.actions, dataset.rewards, dataset.next_obs, dataset.terminations)
        rows = [torch.as_tensor(array, dtype=torch.float32, device=device) for array in arrays]
        rows.append(torch.zeros(len(dataset), num_kept, dataset.actions.shape[1], device=device))
        buffer.data = Batch(*rows)
        buffer.unsampled = list(range(len(dataset) if num_kept else 0))
        return buffer

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """The five fields of a transition, without what is kept beside it."""
        return self.data[:5]

    def add(self, obs, action, reward: float, next_obs, terminated: bool) -> None:
        """Stores one transition: obs (O,), action (A,), reward, next_obs (O,)."""
        for store, value in zip(self.rows, (obs, action, reward, next_obs, float(terminated)), strict=True):
            store[self.position] = torch.as_tensor(value, dtype=torch.float32)
        if self.data.next_base_actions.shape[1]:  # what was kept here was another transition's
            self.unsampled.append(self.position)
        self.position = (self.position + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, *shape: int) -> Batch:
        """Transitions drawn uniformly with replacement: every field with the leading `shape`."""
        index = torch.randint(self.size, shape, device=self.data.rewards.device)
        return Batch(*(store[index] for store in self.data))

    # ------------------------------------------------------------------------------------- samples that are kept

    def next_turns(self, count: int) -> Tensor:
        """Rows (n,) whose kept samples are to be drawn anew: all that have none yet, then those that waited longest.

        The caller fills them. n is `count` and as many as have none; 0 if `count` is 0 or nothing is kept.
        """
        device = self.data.rewards.device
        if not count or not self.data.next_base_actions.shape[1]:
            return torch.zeros(0, dtype=torch.long, device=device)
        first = torch.as_tensor(self.unsampled, dtype=torch.long, device=device)
        count = min(count, self.size)
        waiting = (self.turn + torch.arange(count, device=device)) % max(self.size, 1)
        self.turn, self.unsampled = (self.turn + count) % max(self.size, 1), []
        return torch.cat([first, waiting]).unique()

    def kept(self) -> dict[str, Any]:
        """The kept samples and whose turn it is, to be saved."""
        actions = self.data.next_base_actions[: self.size].clone()  # a view would be saved with all it is a part of
        return {"actions": actions, "turn": self.turn, "unsampled": torch.as_tensor(self.unsampled, dtype=torch.long)}

    def restore_kept(self, state: dict[str, Any]) -> None:
        """Takes what `kept` gave.

        Raises:
            ValueError: it does not fit this buffer.
        """
        actions, unsampled, store = state["actions"], state["unsampled"].tolist(), self.data.next_base_actions
        if actions.shape != store[: self.size].shape or not all(0 <= row < self.size for row in unsampled):
            raise ValueError("kept base actions of another shape")
        store[: self.size] = actions
        self.turn, self.unsampled = int(state["turn"]), unsampled
