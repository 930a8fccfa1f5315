"""Runs a script, and logs at every evaluation how far its critics are from what its policy then earns.

    python benchmark/overestimation.py --script baselines.rlpd --task pointmaze-medium --seed 1

All flags but --script go to the script. Its training stays the same to the last bit. An evaluation logs three more
means over the state-action pairs (s, a) that the policy visits, in episodes that may last three times as long as usual:

    value/q               Q(s, a), mean over all online critics
    value/return          discounted return from (s, a) on, of rewards as the critics see them (scaled and shifted)
    value/overestimation  the difference of the two; above 0 the critics are too optimistic
"""

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts when this file is run

from tools.changed import run_changed
from utils import InputError
from utils.envs import make_env


class Recorder(gym.Wrapper):
    """Keeps the episodes: a list of (observation, action, reward, whether the task ended) of each."""

    episodes: list[list[tuple[Any, Any, float, bool]]]

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.obs, info = self.env.reset(**kwargs)
        self.episodes.append([])
        return self.obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        before, (self.obs, reward, terminated, truncated, info) = self.obs, self.env.step(action)
        self.episodes[-1].append((before, action, float(reward), terminated))
        return self.obs, reward, terminated, truncated, info


def discounted_returns(rewards: np.ndarray, gamma: float, terminated: bool) -> np.ndarray:
    """Returns (m,) from each of the first m steps on, of rewards (n,).

    If time ended the episode, the last steps are left out: their return lacks more than a twentieth of its weights.
    """
    returns, total = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = total = rewards[t] + gamma * total
    lacking = gamma ** np.arange(len(rewards), 0, -1)
    return returns if terminated else returns[: int((lacking <= 0.05).sum())]


@torch.no_grad()
def value_rows(agent: Any, episodes: list[Any], args: Any) -> dict[str, float]:
    """The three means; none if no return is complete."""
    device, q, returns = next(agent.parameters()).device, [], []
    for episode in episodes:
        obs, actions, rewards, ends = (np.array(column, np.float32) for column in zip(*episode, strict=True))
        found = discounted_returns(args.reward_scale * rewards + args.reward_shift, args.gamma, bool(ends[-1]))
        pairs = (torch.as_tensor(part[: len(found)], device=device) for part in (obs, actions))
        q += agent.critic(*pairs).mean(0).tolist()
        returns += found.tolist()
    means = {"value/q": float(np.mean(q)), "value/return": float(np.mean(returns))} if q else {}
    return means | ({"value/overestimation": means["value/q"] - means["value/return"]} if q else {})


def overestimation(script: Any) -> None:
    """Makes the script's `evaluate` measure, too, in environments of its own."""
    if hasattr(script.Args, "chunk_length"):
        raise InputError(f"{script.__name__}: its critics judge chunks, and here they would get single actions")
    evaluate, create, recorders, agents = script.evaluate, script.Agent, [], []
    script.Agent = lambda *args: agents.append(create(*args)) or agents[-1]

    def measured(policies: dict[str, Any], envs: list[gym.Env], args: Any, device: torch.device) -> dict[str, float]:
        limit: Any = args.max_episode_steps or -(-envs[0].spec.max_episode_steps // args.action_repeat)  # pyright: ignore
        flags = args.env_id, args.task, 3 * limit, args.action_repeat, args.obs_keys
        recorders[:] = recorders or [Recorder(make_env(*flags)) for _ in envs]
        for recorder in recorders:
            recorder.episodes = []
        evaluate({"eval/": policies["eval/"]}, recorders, args, device)
        episodes = [episode for recorder in recorders for episode in recorder.episodes]
        return evaluate(policies, envs, args, device) | value_rows(agents[-1], episodes, args)

    script.evaluate = measured


if __name__ == "__main__":
    run_changed({overestimation: ()})
