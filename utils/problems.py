"""What looks wrong in offline data: `tools/data.py inspect` prints it, and so does a run at its start."""

import json
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np

from utils import InputError, reason
from utils.arrays import Dataset
from utils.sources import find_file


def recorded_elsewhere(path: Path, env: gym.Env) -> list[str]:
    """How the environment that a file was recorded in differs from `env`. Minari and robomimic write it down."""
    if not h5py.is_hdf5(path) or env.spec is None:
        return []
    try:
        with h5py.File(path, "r") as file:
            said: dict[str, Any] = {**file.attrs, **(file["data"].attrs if "data" in file else {})}
        beside = path.with_name("metadata.json")  # Minari's since 0.5
        said |= json.loads(beside.read_text()) if beside.exists() else {}
        there, robomimic = (json.loads(said.get(key) or "{}") for key in ("env_spec", "env_args"))
    except ValueError as error:
        raise InputError(f"{path}: what it says about its environment cannot be read ({reason(error)})") from None
    lines, repeat = [], env.get_wrapper_attr("repeat")
    if there.get("id", env.spec.id) != env.spec.id:
        lines.append(f"recorded in {there['id']}, the task is {env.spec.id}")
    said, here = there.get("kwargs") or {}, json.loads(json.dumps(env.spec.kwargs, default=str))
    lines += [f"recorded with another {key} than the task's" for key in said if here.get(key, said[key]) != said[key]]
    if there and repeat > 1:
        lines.append(f"a row is one step of {there.get('id')}, but an action of the task lasts {repeat} steps")
    version = robomimic.get("env_version")
    if version and util.find_spec("robosuite") and version != metadata.version("robosuite"):
        lines.append(f"recorded with robosuite {version}, another one is installed")
    return lines


def find_problems(data: Dataset, env: gym.Env | None = None, specs: Sequence[str] = ()) -> list[str]:
    """What a user should know before training on `data`, one line each; `specs` are the files that it came from."""
    rows, lengths = data.rows, data.episodes[:, 1] - data.episodes[:, 0]
    files = [find_file(spec) for spec in specs if not spec.startswith("generated:")]
    problems = [line for file in files for line in recorded_elsewhere(file, env)] if env is not None else []
    limit = env.spec.max_episode_steps if env is not None and env.spec else None
    if limit and lengths.max() > limit:
        problems.append(f"{(lengths > limit).sum():,} episodes exceed the limit of {limit}, up to {lengths.max():,}")
    if len(lengths) == 1 and len(rows.obs) > 1:
        problems.append("one single episode: are the 'timeouts' missing?")
    if (lengths == 1).any():
        problems.append(f"{(lengths == 1).sum():,} episodes of one transition")
    steps = np.abs(rows.next_obs - rows.obs)
    steps[rows.terminations > 0] = 0
    usual = np.quantile(steps, 0.95, axis=0)  # within an episode, simulators seldom exceed five times this
    jumps = (steps > 10 * usual) & (usual > 0.003 * np.ptp(rows.obs, axis=0))  # other dimensions hardly ever change
    if jumps.any():
        place = (jumps * steps / (usual + 1e-30)).max(axis=0).argmax()
        size = f"up to {steps[:, place].max():.3g} in observation {place}, where {usual[place]:.2g} is usual"
        problems.append(f"{jumps.any(axis=1).sum():,} transitions jump, {size}: are ends of episodes missing?")
    still = (steps.max(axis=1) == 0) & (rows.terminations == 0)
    if still.mean() > 0.01:
        problems.append(f"{still.sum():,} transitions do not change the observation")
    if np.ptp(rows.rewards) == 0:
        problems.append(f"every reward is {rows.rewards[0]:g}")
    for name, array in (("observation", rows.obs), ("action", rows.actions)):
        constant = np.flatnonzero(np.ptp(array, axis=0) == 0)
        if len(constant):
            problems.append(f"constant {name} dimensions: {', '.join(map(str, constant))}")
    if data.success is not None and not data.success.any():
        problems.append("no successful episode")
    return problems
