"""What looks wrong in offline data: `tools/data.py inspect` prints it, and so does a run at its start."""

import json
from importlib import metadata, util
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np

from utils import InputError, reason
from utils.arrays import Dataset


def recorded_elsewhere(path: Path, env: gym.Env) -> tuple[str, ...]:
    """How the environment that a file was recorded in differs from `env`. Minari and robomimic write it down."""
    if not h5py.is_hdf5(path) or env.spec is None:
        return ()
    try:
        with h5py.File(path, "r") as file:
            said = dict(file.attrs) | (dict(file["data"].attrs) if "data" in file else {})
        beside = path.with_name("metadata.json")  # Minari's since 0.5
        said |= json.loads(beside.read_text()) if beside.exists() else {}
        there, robomimic = (json.loads(said.get(key) or "{}") for key in ("env_spec", "env_args"))
    except ValueError as error:
        raise InputError(f"what it says about its environment cannot be read ({reason(error)})") from None
    lines, repeat = [], env.get_wrapper_attr("repeat")
    if there.get("id", env.spec.id) != env.spec.id:
        lines.append(f"recorded in {there['id']}, the task is {env.spec.id}")
    for key, value in (there.get("kwargs") or {}).items():
        if env.spec.kwargs.get(key, value) != value:
            lines.append(f"recorded with another {key} than the task's")
    if there and repeat > 1:
        lines.append(f"a row is one step of {there.get('id')}, but an action of the task lasts {repeat} steps")
    version = robomimic.get("env_version")
    here = metadata.version("robosuite") if version and util.find_spec("robosuite") else version
    return (*lines, f"recorded with robosuite {version}, and {here} is installed") if version != here else tuple(lines)


def find_problems(data: Dataset, env: gym.Env | None = None) -> list[str]:
    """What a user should know before training on `data`, one line each; empty if nothing stands out."""
    rows, lengths, problems = data.rows, data.episodes[:, 1] - data.episodes[:, 0], list(data.notes)
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
