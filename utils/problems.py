"""What looks wrong in offline data: `tools/data.py inspect` prints it, and so does a run at its start."""

import inspect
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
    usual = {p.name: p.default for p in inspect.signature(type(env.unwrapped).__init__).parameters.values()}
    said, here = json.loads(json.dumps([usual | (there.get("kwargs") or {}), usual | env.spec.kwargs], default=str))
    different = [key for key in sorted(said | here) if said.get(key) != here.get(key) and key != "render_mode"]
    lines += [f"recorded with another {key} than the task's" for key in different if there]
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
    limit = (env.spec.max_episode_steps if env is not None and env.spec else None) or np.inf
    ends = rows.terminations[data.episodes[lengths == limit, 1] - 1]  # of the episodes that the limit may have cut
    steps = np.abs(rows.next_obs - rows.obs)
    steps[rows.terminations > 0] = 0
    usual = np.quantile(steps, 0.95, axis=0)  # within an episode, simulators seldom exceed five times this
    jumps = (steps > 10 * usual) & (usual > 0.003 * np.ptp(rows.obs, axis=0))  # other dimensions hardly ever change
    if jumps.any():
        place = (jumps * steps / (usual + 1e-30)).max(axis=0).argmax()
        size = f"up to {steps[:, place].max():.3g} in observation {place}, where {usual[place]:.2g} is usual"
        problems.append(f"{jumps.any(axis=1).sum():,} transitions jump, {size}: are ends of episodes missing?")
    still, success = (steps.max(axis=1) == 0) & (rows.terminations == 0), data.success
    for wrong, problem in (
        (lengths.max() > limit, f"{sum(lengths > limit)} episodes exceed the limit of {limit}, up to {lengths.max()}"),
        (ends.size and ends.all(), f"every episode of {limit} steps ends terminal: are time limits in 'terminals'?"),
        (len(lengths) == 1 and len(rows.obs) > 1, "one single episode: are the 'timeouts' missing?"),
        ((lengths == 1).any(), f"{sum(lengths == 1):,} episodes of one transition"),
        (still.mean() > 0.01, f"{still.sum():,} transitions do not change the observation"),
        (np.ptp(rows.rewards) == 0, f"every reward is {rows.rewards[0]:g}"),
        (success is not None and not success.any(), "no successful episode"),
    ):
        problems += [problem] if wrong else []
    for name, array in (("observation", rows.obs), ("action", rows.actions)):
        constant = np.flatnonzero(np.ptp(array, axis=0) == 0)
        problems += [f"constant {name} dimensions: {', '.join(map(str, constant))}"] if len(constant) else []
    return problems
