"""The table of tasks: environment, data, and every flag default that a task sets differently from the scripts."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym

from utils.envs import make_env
from utils.pointmaze import maze_map


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        env_id: the Gymnasium id.
        dataset: what `--dataset` would name, see `utils.data.load`.
        about: one line for `--help` and `python -m utils.data list`.
        settings: flag name -> default of this task; a flag given on the command line wins. Flags that a script does not
            have (a baseline's) are passed over there.
        env_kwargs: handed to `gymnasium.make`.
        source: where the settings are from.
    """

    env_id: str
    dataset: tuple[str, ...]
    about: str
    settings: dict[str, Any]
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    source: str = "ours"


# Sized for a laptop CPU: small networks, few samples, warm critics before the first environment step.
QUICKSTART = {
    "action_repeat": 5,
    "reward_shift": -1.0,
    "total_timesteps": 2_000,
    "learning_starts": 0,
    "pretrain_steps": 3_000,
    "offline_steps": 2_000,
    "eval_every": 100,
    "eval_episodes": 20,
    "log_every": 50,
    "utd_ratio": 4,
    "batch_size": 128,
    "num_base_samples": 4,
    "num_edit_samples": 4,
    "denoising_steps": 5,
    "num_critics": 4,
    "hidden_dim": 128,
    "base_hidden_dim": 64,
    "base_blocks": 2,
    "base_expansion": 2,
    "edit_scale": 0.2,
    "tau": 0.02,  # rewards of -1 take 1 / tau critic updates a step to sink in; .005 needs three times the warm-up
    "ema_rate": 0.005,  # an average over 200 updates, since a run has a few thousand
}


def _pointmaze(maze: str, env_id: str, max_episode_steps: int, about: str, **settings: Any) -> Task:
    return Task(
        env_id=env_id,
        dataset=(f"generated:pointmaze-{maze}",),
        about=about,
        settings={**QUICKSTART, "max_episode_steps": max_episode_steps, **settings},
        env_kwargs={"maze_map": maze_map(maze), "continuing_task": False},
    )


TASKS = {
    "pointmaze-umaze": _pointmaze("umaze", "PointMaze_UMaze-v3", 42, "a U-shaped corridor, the easiest maze"),
    "pointmaze-medium": _pointmaze("medium", "PointMaze_Medium-v3", 85, "the quickstart: minutes on a laptop CPU"),
    "pointmaze-large": _pointmaze(
        "large", "PointMaze_Large-v3", 160, "a longer way", total_timesteps=4_000, offline_steps=3_000
    ),
}


def make_task_env(args: Any, render: bool = False) -> gym.Env:
    """The environment that a script's `args` ask for (`task`, `env_id`, `max_episode_steps`, `action_repeat`).

    A task's `env_kwargs` go only to that task's own environment, not to one that `--env-id` puts in its place.
    """
    task = TASKS.get(args.task)
    env_kwargs = task.env_kwargs if task and task.env_id == args.env_id else {}
    return make_env(args.env_id, env_kwargs, args.max_episode_steps, args.action_repeat, render)
