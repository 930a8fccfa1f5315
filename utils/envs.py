"""Environments: flat float32 observations, actions in [-1, 1], a time limit, and success in `info`."""

import contextlib
import os
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from utils.errors import InputError

SUCCESS_KEYS = ("success", "is_success", "goal_achieved")


class ActionRepeat(gym.Wrapper):
    """Applies each action `repeat` times, sums the rewards, and stops at the end of an episode."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def make_env(
    env_id: str,
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int = 0,
    action_repeat: int = 1,
    render: bool = False,
) -> gym.Env:
    """One environment with observations (O,) float32 and actions (A,) in [-1, 1].

    Args:
        env_id: a registered Gymnasium id; gymnasium-robotics' ids are registered if it is installed.
        env_kwargs: handed to `gymnasium.make`.
        max_episode_steps: time limit in actions; 0 keeps the environment's own.
        action_repeat: simulator steps per action.
        render: make it with `render_mode="rgb_array"`.

    Raises:
        InputError: unknown id, no continuous Box action space, an observation that cannot be flattened.
    """
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as devnull, contextlib.redirect_stderr(devnull):
            warnings.simplefilter("ignore")  # of Adroit's dense rewards, which no task here uses
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
    except ImportError:
        pass
    kwargs = dict(env_kwargs or {})
    if render:
        kwargs["render_mode"] = "rgb_array"
    if max_episode_steps:
        kwargs["max_episode_steps"] = -1  # ours goes outside of the action repeat
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env = gym.make(env_id, disable_env_checker=True, **kwargs)
    except gym.error.Error as error:
        raise InputError(f"--env-id {env_id!r}: {' '.join(str(error).split())}") from None
    except ModuleNotFoundError as error:
        raise InputError(f"--env-id {env_id!r} needs a package that is not installed: {error.name}") from None
    if not isinstance(env.action_space, spaces.Box):
        kind = type(env.action_space).__name__
        raise InputError(f"--env-id {env_id!r} has a {kind} action space; EXPO needs a continuous Box one")
    if not (np.isfinite(env.action_space.low).all() and np.isfinite(env.action_space.high).all()):
        raise InputError(f"--env-id {env_id!r} has unbounded actions; wrap it so that its Box has finite bounds")
    if not env.observation_space.is_np_flattenable:
        raise InputError(f"--env-id {env_id!r} has observations that cannot be flattened: {env.observation_space}")
    if action_repeat > 1:
        env = ActionRepeat(env, action_repeat)
    if max_episode_steps:
        env = gym.wrappers.TimeLimit(env, max_episode_steps)
    shape = env.action_space.shape
    if shape is not None and len(shape) != 1:
        env = gym.wrappers.TransformAction(env, lambda a: np.reshape(a, shape), spaces.flatten_space(env.action_space))
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    with warnings.catch_warnings():  # of the precision lost from float64 to float32, which is meant
        warnings.simplefilter("ignore")
        env = gym.wrappers.FlattenObservation(env)
        return gym.wrappers.DtypeObservation(env, np.float32)


def native_action_bounds(env: gym.Env) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound (A,) of the environment's own actions, the ones its data sets are written in."""
    space = env.unwrapped.action_space
    assert isinstance(space, spaces.Box)
    return space.low.reshape(-1), space.high.reshape(-1)


def success_of(info: dict[str, Any]) -> bool | None:
    """Whether the step reports success; None where the environment does not say."""
    for key in SUCCESS_KEYS:
        if key in info:
            return bool(info[key])
    return None
