"""Demonstrations that are made at the start of a run, in seconds, by a task's own controller: `generated:` data."""

import functools
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np

from utils import InputError
from utils.arrays import Arrays
from utils.envs import make_env
from utils.sources import split_count
from utils.tasks import TASKS


def demonstrations(spec: str, env: gym.Env | None = None) -> Arrays:
    """The data of a task; `spec` is its name, or "NAME:200" for another number of episodes than a run gets.

    `env` is where it will be used: an action must last as long there as it did here.
    """
    name, num_episodes = split_count(spec)
    repeat = settings_of(name)["action_repeat"]
    there = env.get_wrapper_attr("repeat") if env is not None and env.has_wrapper_attr("repeat") else repeat
    if there != repeat:
        raise InputError(f"--action-repeat {there}: it is made with {repeat}; its actions are others")
    print(f"data: making the demonstrations of {name}", flush=True)  # before seconds of silence
    return dict(generate(name, num_episodes))


def settings_of(name: str) -> dict[str, Any]:
    """The settings of a task whose data is made here."""
    known = [task for task in TASKS if TASKS[task].dataset == (f"generated:{task}",)]
    if name not in known:
        raise InputError(f"no such task (known: {', '.join(f'generated:{task}' for task in known)})")
    return TASKS[name].settings


@functools.cache
def generate(name: str, num_episodes: int = 0, seed: int = 0) -> Arrays:
    """The same for the same seed. 0 episodes: as many as a run gets."""
    limit, repeat = (settings_of(name)[key] for key in ("max_episode_steps", "action_repeat"))
    module = import_module(f"demonstrations.{name.partition('-')[0]}")
    env = make_env(TASKS[name].env_id, name, limit, repeat)
    return record(env, module.Controller, num_episodes or module.NUM_EPISODES, seed)


def record(env: gym.Env, controller: Any, num_episodes: int, seed: int) -> Arrays:
    """Episodes of a controller as flat arrays under D4RL's keys.

    `controller(env, obs, rng)` is made anew for every episode, and its `act(obs)` says the next action.
    """
    rng, rows = np.random.default_rng(seed), []
    for episode in range(num_episodes):
        obs, _ = env.reset(seed=(seed * 1_000_003 + episode) % 2**31)
        act, done = controller(env, obs, rng).act, False
        while not done:
            action = np.clip(act(obs), -1, 1).astype(np.float32)
            next_obs, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            flags = terminated, truncated and not terminated, info["success"]
            rows.append((obs, action, np.float32(reward), next_obs, *flags))
            obs = next_obs
    keys = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts", "infos/success")
    return {key: np.array(column) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}
