"""Environments with flat float32 observations, actions in [-1, 1], a time limit, and `success` in their infos."""

import atexit
import contextlib
import io
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from utils import InputError
from utils.tasks import TASKS

# This project's own environments are expo/AntMaze... and so on. Each simulator's module registers its own.
SIMULATORS = {"AntMaze": "antmaze", "Adroit": "adroit", "OGBench": "ogbench_env", "Robomimic": "robosuite_env"}
SIMULATORS |= {"MimicGen": "robosuite_env", "FetchPickAndPlace": "fetch_env"}


def make_env(env_id: str, task="", max_episode_steps=0, action_repeat=1, obs_keys=(), render_mode=None) -> gym.Env:
    """One environment with observations (O,) float32 and actions (A,) in [-1, 1]; an InputError if that cannot be.

    `task` brings the arguments of its environment, as a maze's map. `max_episode_steps` counts actions, 0 keeps the
    environment's limit. `obs_keys` chooses observations where the environment can (robomimic).
    """
    kwargs: dict[str, Any] = dict(TASKS[task].env_kwargs) if task in TASKS and TASKS[task].env_id == env_id else {}
    if obs_keys and "obs_keys" in kwargs:
        kwargs["obs_keys"] = tuple(obs_keys)
    if max_episode_steps:
        kwargs["max_episode_steps"] = -1  # the limit goes outside of the action repeat
    try:
        pictures = import_module("utils.failures").with_pictures if render_mode else None
        env = pictures(create, env_id, kwargs | {"render_mode": render_mode}) if pictures else create(env_id, kwargs)
        space = env.action_space
        if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
            raise InputError(f"{type(space).__name__} actions of {space.dtype}; they must be a continuous Box")
        unusable = ~((space.low < space.high) & (space.high.astype(np.float64) - space.low < 1e30))
        if unusable.any():
            low, high, place = space.low[unusable][0], space.high[unusable][0], unusable.argmax()
            raise InputError(f"action dimension {place} goes from {low} to {high}; wrap it with finite, unequal bounds")
        if not env.observation_space.is_np_flattenable:
            raise InputError(f"observations that cannot be flattened: {env.observation_space}")
        if not max_episode_steps and (env.spec is None or env.spec.max_episode_steps is None):
            raise InputError("it has no time limit; give --max-episode-steps")
    except Exception as error:
        raise import_module("utils.failures").failure(error, f"--env-id {env_id!r}") from error
    env = ActionRepeat(env, action_repeat)
    if max_episode_steps:
        env = gym.wrappers.TimeLimit(env, max_episode_steps)
    flat: Any = spaces.flatten_space(space)
    bounds: Any = dict(a_min=flat.low, a_max=flat.high, dtype=flat.dtype)  # rounding may exceed them
    env = gym.wrappers.TransformAction(env, lambda a: np.clip(a, **bounds).reshape(space.shape), flat)
    env = Checked(gym.wrappers.RescaleAction(env, *np.array([-1, 1], flat.dtype)))
    if render_mode:
        atexit.register(env.close)  # while the graphics library is still there
    return env


def create(env_id: str, kwargs: dict[str, Any]) -> gym.Env:
    """`gymnasium.make`, with everything registered that `env_id` can mean."""
    for prefix, module in SIMULATORS.items():
        if env_id.startswith(f"expo/{prefix}"):
            import_module(f"utils.{module}")
    with warnings.catch_warnings(action="ignore"):
        with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):  # it talks about other tasks
            gym.register_envs(import_module("gymnasium_robotics"))
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
    if hasattr(env.unwrapped, "tmp_xml_file_path"):  # gymnasium-robotics leaves a maze's model file behind
        Path(env.get_wrapper_attr("tmp_xml_file_path")).unlink(missing_ok=True)
    return env


class ActionRepeat(gym.Wrapper):
    """Applies each action `repeat` times and sums the rewards. An action succeeds if one of its steps does."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat
        self.native = env  # as it was made: what its data was recorded with

    def step(self, action):
        total, said = 0.0, []  # whatever the environment says about success
        for _ in range(self.repeat):
            obs, reward, *ended, info = self.env.step(action)
            terminated, truncated = (bool(float(np.asarray(end).item())) for end in ended)
            total = total + np.asarray(reward, float).squeeze()
            said += [np.any(np.float32(info[k]) > 0) for k in ("success", "is_success", "goal_achieved") if k in info]
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info | {"success": any(said)} if said else info


class Checked(gym.Wrapper):
    """Observations become flat float32. Whatever goes wrong in the environment is an InputError that says where."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (spaces.flatdim(env.observation_space),), np.float32)
        self.steps = 0  # of the episode

    def reset(self, **kwargs):
        self.steps = 0
        return self.checked(self.env.reset, **kwargs)

    def step(self, action):
        self.steps += 1
        return self.checked(self.env.step, action)

    def close(self):
        with contextlib.suppress(Exception):  # by then everything is saved
            self.env.close()

    def checked(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """What `function` of the environment returns: an observation first, and a reward if there are five values."""
        try:
            if args and not np.isfinite(args[0]).all():
                raise InputError("the action is not finite, so the networks are not; lower the learning rates")
            obs, *rest = answer = function(*args, **kwargs)
            if not isinstance(answer, tuple) or len(rest) not in (1, 4):
                raise InputError("Gymnasium's reset returns (obs, info), and its step five values")
            space: Any = self.env.observation_space  # a Box of integers may come with floats: they stay what they are
            obs = np.array(obs if isinstance(space, spaces.Box) else spaces.flatten(space, obs), np.float32).ravel()
            if obs.shape != self.observation_space.shape:
                raise InputError(f"the observation has shape {obs.shape}, its space {self.observation_space.shape}")
            if not np.isfinite(obs).all():
                raise InputError(f"the observation is not finite in dimension {np.isfinite(obs).argmin()}")
            if len(rest) == 4 and (np.size(rest[0]) != 1 or not np.isfinite(rest[0])):
                raise InputError(f"the reward is {rest[0]}; one finite number is needed")
            return obs, *rest
        except Exception as error:
            name = self.spec.id if self.spec else type(self.unwrapped).__name__
            moment = f"step {self.steps} of an episode" if self.steps else "reset"
            raise import_module("utils.failures").failure(error, f"environment {name!r}, {moment}") from error
