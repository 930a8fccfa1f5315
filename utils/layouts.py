"""Minari's, robomimic's and OGBench's layouts as flat arrays under D4RL's keys, with `ends` and next_observations."""

import json
import re
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import h5py
import numpy as np

from utils import InputError
from utils.arrays import Arrays, numbers
from utils.tasks import OBS_KEYS


def read_ogbench(file: Any) -> Arrays:
    """OGBench's play data. Its `terminals` mark a trajectory's last row, which is there for its observation only."""
    last = numbers(file, "terminals").reshape(-1) != 0
    keys = [key for key in ("qpos", "qvel", "button_states") if key in file]
    arrays = {key: numbers(file, key, len(last)) for key in ("observations", "actions", *keys)}
    rows = np.flatnonzero(~last[:-1])
    following, zeros = arrays["observations"][rows + 1], np.zeros(len(rows), np.float32)  # the task gives the rewards
    arrays = {key: value[rows] for key, value in arrays.items()}
    return arrays | {"next_observations": following, "rewards": zeros, "terminals": zeros, "ends": last[rows + 1]}


def read_minari(file: Any, env: gym.Env | None) -> Arrays:
    """Minari's layout: an episode of T steps has T + 1 observations, and may have T + 1 values of success."""
    episodes = []
    for group in numbered(file, "episode_"):
        actions = numbers(group, "actions")
        steps, width = len(actions), actions[:1].size or 1
        obs = minari_observations(group, env, steps + 1)
        episode = {"observations": obs[:-1], "next_observations": obs[1:], "rewards": numbers(group, "rewards", steps)}
        episode |= {"actions": actions.reshape(steps, width), "terminals": numbers(group, "terminations", steps)}
        for key in ("infos/goal_achieved", "infos/is_success", "infos/success"):  # the last one counts
            if key in group:
                episode["infos/success"] = numbers(group, key).reshape(-1)[-steps:]
        episodes.append(episode)
    return join(episodes)


def minari_observations(group: Any, env: gym.Env | None, rows: int) -> np.ndarray:
    """Observations (rows, O) of an episode. Parts of a Dict or Tuple stand in the environment's order, or by name."""
    item = group.get("observations")
    if not isinstance(item, h5py.Group):
        return numbers(group, "observations", rows).reshape(rows, -1)
    names: list[str] = []
    item.visititems(lambda name, child: names.append(name) if isinstance(child, h5py.Dataset) else None)
    names.sort(key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name.replace("/", "\0"))])
    order = leaves(env.get_wrapper_attr("native").observation_space) if env and env.has_wrapper_attr("native") else [""]
    if order != [""] and set(order) != set(names):  # [""]: a plain Box
        raise InputError(f"observations have the parts {', '.join(names)}; the environment's are {', '.join(order)}")
    names = names if order == [""] else order
    return np.concatenate([numbers(item, name, rows).reshape(rows, -1) for name in names], axis=1)


def leaves(space: gym.Space, path: str = "") -> list[str]:
    """Names that Minari gives to the parts of a Dict or Tuple space, in the order in which Gymnasium flattens them."""
    if isinstance(space, gym.spaces.Dict):
        parts = list(space.items())
    elif isinstance(space, gym.spaces.Tuple):
        parts = [(f"_index_{i}", part) for i, part in enumerate(space)]
    else:
        return [path]
    return [leaf for key, part in parts for leaf in leaves(part, f"{path}/{key}".strip("/"))]


def read_robomimic(data: Any, env: gym.Env | None, obs_keys: Sequence[str]) -> Arrays:
    """robomimic's layout. A row is terminal where it is done *and* successful; done alone is a time limit."""
    if env is not None and env.has_wrapper_attr("check_recording"):
        env.get_wrapper_attr("check_recording")(json.loads(data.attrs.get("env_args", "{}")))
    episodes, demos, obs_keys = [], numbered(data, "demo_"), obs_keys or OBS_KEYS
    successors = ["next_obs"] if all("next_obs" in demo for demo in demos) else []  # else the last row of each has none
    for demo in demos:
        lacks = [key for key in ("obs", "rewards", "dones") if key not in demo]
        if lacks and "states" in demo:
            raise InputError(f"{demo.name} has states but no {lacks[0]!r}; run robomimic's dataset_states_to_obs.py")
        episode = {"actions": numbers(demo, "actions")}
        steps = len(episode["actions"])
        for name, group in zip(("observations", "next_observations"), ("obs", *successors), strict=False):
            for key in obs_keys:
                if key not in demo[group]:
                    known = ", ".join(sorted(demo[group]))[:300]
                    raise InputError(f"{demo.name}/{group} has no {key!r}; choose --obs-keys from: {known}")
            columns = [numbers(demo[group], key, steps).reshape(steps, -1) for key in obs_keys]
            episode[name] = np.concatenate(columns, axis=1)
        episode["rewards"] = numbers(demo, "rewards", steps)
        success = episode["rewards"].reshape(steps, -1).max(axis=1) > 0
        done = numbers(demo, "dones", steps).reshape(steps, -1).max(axis=1) > 0
        episodes.append(episode | {"infos/success": success, "terminals": success & done})
    return join(episodes)


def numbered(parent: Any, prefix: str) -> list[Any]:
    """The groups prefix0, prefix1, ... of a file, in the order of their numbers."""
    keys = [key for key in parent if re.fullmatch(rf"{prefix}\d+", key) and isinstance(parent[key], h5py.Group)]
    if not keys:
        raise InputError(f"has no groups {prefix}0, {prefix}1, ...")
    return [parent[key] for key in sorted(keys, key=lambda key: int(key.removeprefix(prefix)))]


def join(episodes: list[Arrays]) -> Arrays:
    """Flat arrays of episodes; one key after the other, so that only one key is held twice."""
    lengths = [len(episode["actions"]) for episode in episodes]
    widths = [{key: value.shape[1:] for key, value in episode.items()} for episode in episodes]
    for number, width in enumerate(widths):
        if width != widths[0] or not lengths[number]:
            raise InputError(f"episode {number} of the file is empty, or has other keys or widths than the first")
    ends = np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)
    return {key: np.concatenate([episode.pop(key) for episode in episodes]) for key in widths[0]} | {"ends": ends}


def steps_within_episodes(obs: np.ndarray, terminals: np.ndarray, timeouts: np.ndarray) -> np.ndarray:
    """Whether the step from each row of a D4RL file to the next (n - 1,) is no longer than the steps within episodes.

    That can only be told if the time limits in the file show that a reset jumps further. Else no step from an end is.
    """
    steps, inside = np.abs(np.diff(obs, axis=0)), ~(terminals | timeouts)[:-1]  # (n - 1, O), (n - 1,)
    lengths = (steps / (steps[inside].max(axis=0, initial=0) + 1e-9)).max(axis=1)  # 1: the longest within an episode
    return lengths < 1.2 if np.median(lengths[timeouts[:-1]]) > 2 else inside
