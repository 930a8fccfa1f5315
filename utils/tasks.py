"""The table of tasks: environment, data, and every flag default that a task sets differently from the scripts."""

from collections.abc import Collection
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
        finetune: more settings, for expo_finetune.py alone; they go before the others.
        env_kwargs: handed to `gymnasium.make`.
        source: where the settings are from.
    """

    env_id: str
    dataset: tuple[str, ...]
    about: str
    settings: dict[str, Any]
    finetune: dict[str, Any] = field(default_factory=dict)
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    source: str = "ours"

    def defaults(self, flags: Collection[str]) -> dict[str, Any]:
        """Flag name -> default of this task, for a script that has these `flags`."""
        finetunes = "pretrained" in flags
        settings = {**self.settings, **(self.finetune if finetunes else {})}
        return {name: value for name, value in settings.items() if name in flags}


# Sized for a laptop CPU: small networks, few samples, warm critics before the first environment step.
QUICKSTART = {
    "threads": 1,  # networks this small gain little from a second one, and lose everything to a neighbour that uses it
    # 10 at the goal, 0 before it. With -1 per step, what the critics do not know yet looks better than what they know
    # for some 1 / (tau (1 - gamma)) updates. One action moves the value by a share 1 - gamma: at .99 that drowns in the
    # error of critics this small. Hence also actions as long as the maze allows, and few of them per episode.
    "action_repeat": 10,
    "reward_scale": 10.0,
    "gamma": 0.96,
    "total_timesteps": 600,
    "learning_starts": 0,
    "pretrain_steps": 3_000,
    "offline_steps": 1_500,
    "eval_every": 100,
    "eval_episodes": 20,
    "log_every": 50,
    "checkpoint_every": 500,
    "utd_ratio": 4,
    "batch_size": 128,
    "num_base_samples": 4,
    "num_edit_samples": 4,
    "denoising_steps": 5,
    "num_critics": 4,
    "hidden_dim": 64,
    "hidden_layers": 2,
    "base_hidden_dim": 64,
    "base_blocks": 1,
    "base_expansion": 2,
    "edit_scale": 0.2,
    "init_alpha": 0.1,
    # Value takes 1 / tau updates to travel one action back, and what is wrong of it, as in a pocket beside the goal
    # that few demonstrations enter, 1 / (tau (1 - gamma)) to go away. With .02 success on the large map fell to 0 for
    # 300 environment steps and more; .005 needs a far longer warm-up as well.
    "tau": 0.05,
    "critic_lr": 1e-4,  # steadier than 3e-4 in single runs; not compared by itself
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
    "pointmaze-umaze": _pointmaze("umaze", "PointMaze_UMaze-v3", 24, "a U-shaped corridor, the easiest maze"),
    "pointmaze-medium": _pointmaze("medium", "PointMaze_Medium-v3", 43, "the quickstart: minutes on a laptop CPU"),
    "pointmaze-large": _pointmaze(
        "large", "PointMaze_Large-v3", 80, "a longer way", offline_steps=2_000, total_timesteps=1_000
    ),
}

# The published settings (authors' scripts); everything that is not here is the scripts' own default, published as well.
ANTMAZE = {"num_min_critics": 1, "reward_shift": -1.0, "edit_scale": 0.05, "total_timesteps": 300_000}
ADROIT = {
    "learning_starts": 0,
    "reward_shift": -1.0,
    "edit_scale": 0.7,
    "edit_dropout": 0.1,
    "total_timesteps": 300_000,
    "pretrain_steps": 20_000,  # ours: published are online runs only
}
ADROIT_FINETUNE = {"edit_scale": 0.05, "offline_steps": 2000}  # [ours 7] edits of .7 lose the prior: docs/results.md
ROBOMIMIC = {"edit_scale": 0.05, "eval_every": 10_000, "total_timesteps": 150_000}
OGBENCH = {"edit_scale": 0.1, "eval_every": 25_000, "total_timesteps": 500_000}
OBS_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")


# Diffusion-QL's published weight of its Q term, by maze; its highest-Q backup is on for all but plain umaze.
ANTMAZE_ETA = {
    "umaze": 0.5,
    "umaze-diverse": 2.0,
    "medium-play": 2.0,
    "medium-diverse": 3.0,
    "large-play": 4.5,
    "large-diverse": 3.5,
}


def _antmaze(name: str, env_id: str, about: str) -> Task:
    settings = {**ANTMAZE, "pretrain_steps": 500_000, "expectile": 0.9, "eta": ANTMAZE_ETA[name]}
    settings["max_q_backup"] = name != "umaze"
    return Task(env_id, (f"d4rl:antmaze-{name}-v2",), about, settings, source="published")


def _adroit(name: str, about: str) -> Task:
    data = (f"d4rl:{name}-human-v1", f"d4rl:{name}-cloned-v1")
    env_id, source = f"expo/Adroit{name.capitalize()}Binary-v1", "published, but for fine-tuning; data: docs/data.md"
    return Task(env_id, data, about, ADROIT, finetune=ADROIT_FINETUNE, source=source)


def _robomimic(name: str, about: str, finetune: dict[str, Any] | None = None, **settings: Any) -> Task:
    return Task(
        env_id=f"expo/Robomimic{name.capitalize()}-v1",
        dataset=(f"robomimic:{name}/ph",),
        about=about,
        settings={**ROBOMIMIC, "obs_keys": OBS_KEYS, **settings},
        finetune=finetune or {},
        env_kwargs={"obs_keys": OBS_KEYS},
        source="published",
    )


def _ogbench(name: str, env_id: str, about: str) -> Task:
    return Task(env_id, (f"ogbench:{name}-play-v0",), about, OGBENCH, source="ours, not tuned")


TASKS |= {
    "antmaze-umaze": _antmaze("umaze", "expo/AntMazeUMaze-v2", "an ant walks around one corner"),
    "antmaze-umaze-diverse": _antmaze("umaze-diverse", "expo/AntMazeUMaze-v2", "the same, data from and to anywhere"),
    "antmaze-medium-play": _antmaze("medium-play", "expo/AntMazeMedium-v2", "an ant crosses a medium maze"),
    "antmaze-medium-diverse": _antmaze("medium-diverse", "expo/AntMazeMedium-v2", "the same, data to anywhere"),
    "antmaze-large-play": _antmaze("large-play", "expo/AntMazeLarge-v2", "an ant crosses a large maze"),
    "antmaze-large-diverse": _antmaze("large-diverse", "expo/AntMazeLarge-v2", "the same, data to anywhere"),
    "adroit-pen-binary": _adroit("pen", "a hand turns a pen to a given direction"),
    "adroit-door-binary": _adroit("door", "a hand unlatches and opens a door"),
    "adroit-relocate-binary": _adroit("relocate", "a hand carries a ball to a given place"),
    "adroit-hammer-binary": _adroit("hammer", "a hand drives in a nail"),
    "robomimic-lift": _robomimic("lift", "an arm lifts a cube", total_timesteps=120_000),
    "robomimic-can": _robomimic("can", "an arm puts a can into its bin", total_timesteps=120_000),
    "robomimic-square": _robomimic(
        "square", "an arm puts a square nut on its peg", {"edit_scale": 0.1}, pretrain_steps=200_000
    ),
    "ogbench-cube-single": _ogbench("cube-single", "expo/OGBenchCubeSingle-v0", "an arm moves a cube to its place"),
    "ogbench-cube-double": _ogbench("cube-double", "expo/OGBenchCubeDouble-v0", "an arm moves two cubes"),
    "ogbench-scene": _ogbench("scene", "expo/OGBenchScene-v0", "an arm with a cube, buttons, a drawer and a window"),
    "ogbench-puzzle-3x3": _ogbench("puzzle-3x3", "expo/OGBenchPuzzle3x3-v0", "an arm presses 9 linked buttons"),
}


def make_task_env(args: Any, render: bool = False) -> gym.Env:
    """The environment that a script's `args` ask for (`task`, `env_id`, `max_episode_steps`, `action_repeat`).

    A task's `env_kwargs` go only to that task's own environment, not to one that `--env-id` puts in its place.
    """
    task = TASKS.get(args.task)
    env_kwargs = task.env_kwargs if task and task.env_id == args.env_id else {}
    if "obs_keys" in env_kwargs and args.obs_keys:
        env_kwargs = env_kwargs | {"obs_keys": tuple(args.obs_keys)}
    return make_env(args.env_id, env_kwargs, args.max_episode_steps, args.action_repeat, render)
