"""What looks wrong in offline data: `tools/data.py inspect` prints it, and so does a run at its start."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np

from utils import reason
from utils.arrays import Dataset
from utils.sources import find_file


def recorded_elsewhere(path: Path, env: gym.Env) -> list[str]:
    """How the environment that a file was recorded in differs from `env`. Minari writes it down."""
    if not h5py.is_hdf5(path) or env.spec is None:
        return []
    try:
        with h5py.File(path, "r") as file:
            said: dict[str, Any] = dict(file.attrs)
        beside = path.with_name("metadata.json")  # Minari's since 0.5
        said |= json.loads(beside.read_text()) if path.name == "main_data.hdf5" and beside.exists() else {}
        there, space = (dict(json.loads(said.get(key) or "{}")) for key in ("env_spec", "action_space"))
        usual = {p.name: p.default for p in inspect.signature(type(env.unwrapped).__init__).parameters.values()}
        both = usual | (there.get("kwargs") or {}), usual | env.spec.kwargs
        said, here = json.loads(json.dumps(both, default=str, skipkeys=True))
    except (ValueError, TypeError) as error:
        return [f"{path}: its environment cannot be compared with the task's ({reason(error)})"]
    lines, repeat, native = [], env.get_wrapper_attr("repeat"), env.get_wrapper_attr("native")
    bounds = np.ravel([native.action_space.low, native.action_space.high])
    if "low" in space and not np.allclose(np.ravel([space["low"], space["high"]]), bounds):
        lines.append("recorded with other bounds of actions than the task's")
    own = {w.name for w in native.spec.additional_wrappers} | {"FlattenObservation", "RecordVideo"}
    wrappers = {w["name"] for w in there.get("additional_wrappers") or ()} - own
    lines += [f"recorded with the wrapper {name}, which the task does not have" for name in sorted(wrappers)]
    if there.get("id", env.spec.id) != env.spec.id:
        lines.append(f"recorded in {there['id']}, the task is {env.spec.id}")
    different = [key for key in sorted(said | here) if said.get(key) != here.get(key) and key != "render_mode"]
    lines += [f"recorded with another {key} than the task's" for key in different if there]
    if there and repeat > 1:
        lines.append(f"a row is one step of {there.get('id')}, but an action of the task lasts {repeat} steps")
    return lines


def find_problems(data: Dataset, env: gym.Env | None = None, specs: Sequence[str] = ()) -> list[str]:
    """What a user should know before training on `data`, one line each; `specs` are the files that it came from."""
    rows, lengths = data.rows, data.episodes[:, 1] - data.episodes[:, 0]
    problems = [line for s in specs if env and s[:10] != "generated:" for line in recorded_elsewhere(find_file(s), env)]
    limit = (env.spec.max_episode_steps if env is not None and env.spec else None) or np.inf
    finals = rows.terminations[data.episodes[:, 1] - 1]  # with `dropped`, an episode that is not terminal lost one row
    ends = finals[lengths + ((data.dropped > 0) & (finals == 0)) == limit]  # the limit may have cut here
    steps = np.abs(rows.next_obs - rows.obs)
    steps[rows.terminations > 0] = 0
    last = data.episodes[:-1, 1] - 1  # the last row of every episode that another one follows
    usual = np.quantile(np.delete(steps, last, axis=0), 0.95, axis=0)  # simulators seldom exceed five times usual
    jumps = (steps > 10 * usual) & (usual > 0.003 * np.ptp(rows.obs, axis=0))  # other dimensions hardly ever change
    place = (jumps.any(axis=0) * steps.max(axis=0) / (usual + 1e-30)).argmax()
    size = f"up to {steps[:, place].max():.3g} in observation {place}, where {usual[place]:.2g} is usual"
    constant = np.flatnonzero(np.ptp(rows.actions, axis=0) <= (0.01 if env else 0))  # of a range of 2
    still, success = (steps.max(axis=1) == 0) & (rows.terminations == 0), data.success
    torn = np.delete(~np.isclose(rows.next_obs[:-1], rows.obs[1:], atol=0.1 * usual + 1e-5).all(axis=1), last)
    reset = ((rows.next_obs[last] == rows.obs[last + 1]).all(axis=1) & (steps[last] > 2 * usual).any(axis=1)).sum()
    space: Any = env.get_wrapper_attr("native").action_space if env is not None else gym.spaces.Box(-1, 1)
    high = space.high.reshape(-1) * (space.low == -space.high).all()  # 0: no bounds that someone would divide by
    divided = high.min() > 1 and 0.99 < (np.abs(rows.actions) * high).max() < 1.01
    possible = (
        (jumps.any(), f"{jumps.any(axis=1).sum():,} transitions jump, {size}: are ends of episodes missing?"),
        (constant.size, f"(almost) constant action dimensions: {', '.join(map(str, constant))}"),
        (lengths.max() > limit, f"{sum(lengths > limit)} episodes exceed the limit of {limit}, up to {lengths.max()}"),
        (ends.size and ends.all(), f"every episode of {limit} steps ends terminal: are time limits in 'terminals'?"),
        (len(lengths) == 1 and len(rows.obs) > 1, "one single episode: are the 'timeouts' missing?"),
        (torn.size and torn.mean() > 0.5, "next_observations are not the rows that follow: other units or order?"),
        (2 * reset > sum(finals[:-1] == 0), "episodes end with the observation after a reset, not with their last"),
        (divided, "all actions are in [-1, 1], and the bounds are wider: must they be multiplied by the bounds?"),
        (rows.terminations.mean() > 0.5 and lengths.mean() > 2, "most rows are terminal: are 'masks' upside down?"),
        (still.mean() > 0.01, f"{still.sum():,} transitions do not change the observation"),
        (np.ptp(rows.rewards) == 0, f"every reward is {rows.rewards[0]:g}"),
        (success is not None and not success.any(), "no successful episode"),
    )
    return problems + [problem for wrong, problem in possible if wrong]
