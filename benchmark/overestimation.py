"""Runs a script and logs at every evaluation how far its critics are from what its policy then really earns.

    python benchmark/overestimation.py --script expo_diffusion --task pointmaze-medium --seed 1
    python benchmark/overestimation.py --script baselines.rlpd --task pointmaze-medium --seed 1

All flags but --script go to the script. The training is the script's own to the last bit; the rows of the evaluations
have three columns more, means over the state-action pairs (s, a) that the evaluated policy visits:

    value/q               Q(s, a), mean over all online critics
    value/return          discounted return from (s, a) on, of rewards as the critics see them (scaled and shifted)
    value/overestimation  the difference of the two; above 0 is over-estimation

Episodes may take three times as long here as in the task, and of those that end by time the last pairs are left out,
whose return lacks more than a twentieth of its weights.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not as a module

from benchmark.wrapper import wrapped_script
from utils import cli
from utils.evaluate import SCRIPTS, Evaluation, evaluate
from utils.logger import Logger
from utils.tasks import make_task_env

HORIZON = 3  # times the task's time limit
REST = 0.05  # largest weight of what is not seen of a return


class Recorder(gym.Wrapper):
    """Keeps the episodes: obs (n, O), actions (n, A), rewards (n,) and whether the episode ended, not by time."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.episodes: list[dict[str, Any]] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.obs, info = self.env.reset(**kwargs)
        self.episodes.append({"obs": [], "actions": [], "rewards": [], "terminated": False})
        return self.obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        episode = self.episodes[-1]
        for key, value in (("obs", self.obs), ("actions", action), ("rewards", reward)):
            episode[key].append(value)
        episode["terminated"] = terminated
        self.obs = obs
        return obs, reward, terminated, truncated, info


def discounted_returns(rewards: np.ndarray, gamma: float, terminated: bool) -> np.ndarray:
    """Returns (m,) from each of the first m steps on, m as many as have all but REST of their weights; rewards (n,)."""
    returns, total = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        total = rewards[t] + gamma * total
        returns[t] = total
    if terminated:
        return returns
    return returns[: int((gamma ** np.arange(len(rewards), 0, -1) <= REST).sum())]


@torch.no_grad()
def overestimation(agent: Any, act: Callable[..., Any], envs: list[Recorder], args: Any, seed: int) -> dict[str, float]:
    """The three columns, from `args.eval_episodes` episodes of the policy `act`; nothing if no return is complete."""
    device = next(agent.parameters()).device
    for env in envs:
        env.episodes = []
    evaluate(act, list[gym.Env](envs), args.eval_episodes, seed, device)
    q, returns = [], []
    for episode in (episode for env in envs for episode in env.episodes if episode["rewards"]):
        rewards = args.reward_scale * np.array(episode["rewards"]) + args.reward_shift
        found = discounted_returns(rewards, args.gamma, episode["terminated"])
        if len(found):
            pairs = [np.array(episode[key][: len(found)], np.float32) for key in ("obs", "actions")]
            q.append(agent.critic(*(torch.as_tensor(part, device=device) for part in pairs)).mean(0).cpu().numpy())
            returns.append(found)
    if not q:
        return {}
    mean_q, mean_return = float(np.concatenate(q).mean()), float(np.concatenate(returns).mean())
    return {"value/q": mean_q, "value/return": mean_return, "value/overestimation": mean_q - mean_return}


class MeasuringEvaluation(Evaluation):
    """An evaluation whose rows have the three columns, too."""

    def __init__(self, args: Any, device: torch.device):
        super().__init__(args, device)
        longer = copy.copy(args)
        spec = self.envs[0].spec
        limit = args.max_episode_steps or (spec.max_episode_steps if spec else None)
        assert limit, "an environment without a time limit"
        longer.max_episode_steps = HORIZON * limit
        self.long_envs = [Recorder(make_task_env(longer)) for _ in self.envs]

    def run(self, logger: Logger, step: int, act: Callable[..., Any], base: Callable[..., Any] | None = None) -> None:
        agent = act if isinstance(act, nn.Module) else act.__self__  # pyright: ignore[reportFunctionMemberAccess]
        found = overestimation(agent, act, self.long_envs, self.args, self.seed)
        write = logger.write_evaluation

        def write_all(step: int, values: dict[str, float]) -> None:
            write(step, values | found)

        logger.write_evaluation = write_all
        try:
            super().run(logger, step, act, base)
        finally:
            logger.write_evaluation = write


def main() -> None:
    """Parses --script and hands the rest on."""
    script, rest = wrapped_script(SCRIPTS)
    script.Evaluation = MeasuringEvaluation
    cli.run(script.main, script.Args, script.__doc__, rest)


if __name__ == "__main__":
    main()
