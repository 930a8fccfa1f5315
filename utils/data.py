"""Offline data: files of four layouts become the same five arrays. Nothing is ever unpickled.

D4RL's layout is flat arrays, one row per step, as HDF5 or npz. Minari and robomimic (MimicGen too) have an HDF5 group
for each episode. OGBench's play data is an npz file without rewards. What is in a file decides how it is read. Every
layout becomes flat arrays under D4RL's keys, and `ends` marks the last row of each episode. Then all go the same way.
"""

import zipfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np

from utils import InputError, reason
from utils.arrays import Arrays, Dataset, Transitions, check, numbers
from utils.sources import find_file, split_count

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations", "masks", "infos/success", "infos/goal_achieved")


def load_dataset(specs: Sequence[str], env: gym.Env, obs_keys: Sequence[str] = ()) -> Transitions:
    """The rows of `read_dataset`. It prints one line about them, and one for each thing that looks wrong."""
    data = read_dataset(specs, env, obs_keys)
    success = "" if data.success is None else f", {data.success.mean():.1%} of them successful"
    print(f"data: {len(data.rows.obs):,} transitions in {len(data.episodes):,} episodes{success} ({' '.join(specs)})")
    if not all(spec.startswith("generated:") for spec in specs):  # what is made here is known to be right
        for problem in import_module("utils.problems").find_problems(data, env, specs):
            print(f"data: warning: {problem}")
    return data.rows


def read_dataset(specs: Sequence[str], env: gym.Env | None = None, obs_keys: Sequence[str] = ()) -> Dataset:
    """Everything that `specs` (paths, or words as in docs/data.md) name, joined; an InputError names a bad file.

    The rows must fit `env`. Its task may change their rewards and ends (`relabel_rows`). Actions are rescaled from its
    bounds to [-1, 1]. None reads the files alone. `obs_keys` chooses observations where a file has several.
    """
    if not specs:
        raise InputError("no data: name it with --dataset (a file, d4rl:NAME, minari:ID, ...; see docs/data.md)")
    relabel = env.get_wrapper_attr("relabel_rows") if env is not None and env.has_wrapper_attr("relabel_rows") else None
    parts: list[Dataset] = []
    for spec in specs:
        name, count = split_count(spec)
        place = spec if spec.startswith("generated:") else find_file(name)
        try:
            part = to_dataset(read(place, env, obs_keys), relabel)
            part = first_episodes(part, count) if count else part
            part.rows = part.rows if env is None else fit(part.rows, env)
            if parts and part.rows.obs.shape[1:] != parts[0].rows.obs.shape[1:]:
                raise InputError(f"observations are {part.rows.obs.shape[1]} wide, those of {specs[0]} are not")
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    rows = Transitions(*(np.concatenate(columns) for columns in zip(*(part.rows for part in parts), strict=True)))
    offsets = np.cumsum([0, *(len(part.rows.obs) for part in parts)])
    episodes = np.concatenate([part.episodes + offset for part, offset in zip(parts, offsets, strict=False)])
    known = [part.success for part in parts if part.success is not None]
    success = np.concatenate(known) if len(known) == len(parts) else None
    return Dataset(rows, episodes, success, sum(part.dropped for part in parts))


def first_episodes(data: Dataset, count: int) -> Dataset:
    """The first `count` episodes, in the order of the file."""
    if len(data.episodes) < count:
        raise InputError(f"the first {count:,} episodes are asked for; it has {len(data.episodes):,}")
    rows = Transitions(*(column[: data.episodes[count - 1, 1]] for column in data.rows))
    return Dataset(rows, data.episodes[:count], None if data.success is None else data.success[:count], data.dropped)


def read(path: Path | str, env: gym.Env | None = None, obs_keys: Sequence[str] = ()) -> Arrays:
    """The flat arrays of a file of any layout, not yet checked; "generated:NAME" is made here."""
    if isinstance(path, str):
        return import_module("demonstrations").demonstrations(path.partition(":")[2], env)
    kind = "npz" if zipfile.is_zipfile(path) else "HDF5" if h5py.is_hdf5(path) else "npz or HDF5"
    try:
        with np.load(path, allow_pickle=False) if kind == "npz" else h5py.File(path, "r") as file:
            keys = {str(key).rstrip("0123456789") for key in file}
            play = {"qpos"} if env is None or env.has_wrapper_attr("relabel_rows") else set()  # the task gives rewards
            if keys & {"rewards", *OPTIONAL} or not keys & {"data", "episode_", *play}:
                return {key: numbers(file, key) for key in (*REQUIRED, *OPTIONAL) if key in file or key in REQUIRED}
            layouts = import_module("utils.layouts")  # not needed for D4RL's layout
            if "data" in keys:
                return layouts.read_robomimic(file["data"], env, obs_keys)
            return layouts.read_minari(file, env) if "episode_" in keys else layouts.read_ogbench(file)
    except InputError:
        raise
    except BlockingIOError:
        raise InputError("another program has it open to write; close it there first") from None
    except Exception as error:  # h5py, zipfile and numpy raise a dozen kinds of exception for a damaged file
        raise InputError(f"not a complete {kind} file ({reason(error)})") from error


def to_dataset(arrays: Arrays, relabel: Any = None) -> Dataset:
    """Checked transitions of flat arrays; `relabel` is a task's own rewards and ends (arrays -> arrays).

    Without `next_observations` the successor of a row is the next row. The last row of an episode has none then: it is
    dropped, unless it is terminal and needs none. It is never made terminal.
    """
    check(arrays)
    find_ends(arrays)
    if relabel is not None:
        arrays = relabel(arrays)
    n, ends, terminals = len(arrays["rewards"]), arrays["ends"], arrays["terminals"].astype(bool)
    obs, next_obs = arrays.pop("observations").astype(np.float32, copy=False), arrays.pop("next_observations", None)
    keep = terminals | ~ends if next_obs is None else np.ones(n, bool)
    if not keep.any():
        raise InputError("no complete transition: every row ends an episode, and its successor is not in the file")
    if next_obs is None:
        next_obs = obs[np.minimum(np.flatnonzero(keep) + 1, n - 1)]
    starts = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    episodes = kept_before[np.stack([starts, np.flatnonzero(ends) + 1], axis=1)]
    nonempty = episodes[:, 1] > episodes[:, 0]
    success = arrays.get("infos/success")
    if success is not None:
        success = np.maximum.reduceat(success, starts)[nonempty]
    kept = slice(None) if keep.all() else keep  # a slice makes no copy
    columns = (obs[kept], arrays.pop("actions")[kept], arrays["rewards"][kept], next_obs, terminals[kept])
    rows = Transitions(*(column.astype(np.float32, copy=False) for column in columns))
    return Dataset(rows, episodes[nonempty], success, int(n - keep.sum()))


def find_ends(arrays: Arrays) -> None:
    """Adds `ends` (n,) bool, and one name for success. D4RL's AntMaze goes on after a terminal row: no episode ends."""
    said = [arrays.pop(key) > 0 for key in ("infos/success", "infos/goal_achieved") if key in arrays]
    arrays |= {"infos/success": said[0]} if said else {}
    terminals = arrays["terminals"].astype(bool)
    timeouts = arrays.get("timeouts", np.zeros(len(terminals))).astype(bool)
    if "masks" in arrays:  # OGBench's word for "not terminal": its `terminals` end a trajectory for whatever reason
        arrays["ends"], arrays["terminals"] = terminals | timeouts, arrays["masks"] == 0
    elif "ends" not in arrays:
        arrays["ends"], obs = terminals | timeouts, arrays["observations"]
        if timeouts.any() and "next_observations" in arrays:
            follows = (arrays["next_observations"][:-1] == obs[1:]).all(axis=1)
            arrays["ends"][:-1] = timeouts[:-1] | (terminals[:-1] & ~follows)
        elif timeouts[:-1].any() and terminals.any():
            inside = import_module("utils.layouts").steps_within_episodes(obs, terminals, timeouts)
            arrays["ends"][:-1] &= timeouts[:-1] | ~inside
    arrays["ends"][-1] = True


def fit(rows: Transitions, env: gym.Env) -> Transitions:
    """The rows with actions rescaled to [-1, 1] from the bounds of `env`, as it was before `make_env` wrapped it."""
    space: Any = (env.get_wrapper_attr("native") if env.has_wrapper_attr("native") else env).action_space
    low, high = space.low.reshape(-1), space.high.reshape(-1)
    for name, array, there in (("observations", rows.obs, env.observation_space), ("actions", rows.actions, space)):
        width = int(np.prod(there.shape or ()))
        if array.shape[1] != width:
            raise InputError(f"{name} are {array.shape[1]} wide, the environment's {width}")
    actions = 2 * (rows.actions - low) / (high - low) - 1
    outside = np.abs(actions) > 1 + 1e-3
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        count, value = outside.any(axis=1).sum(), rows.actions[row, column]
        place = f"transition {row:,}, dimension {column} ({low[column]:.4g} to {high[column]:.4g})"
        raise InputError(f"{count:,} rows have actions outside the bounds, the first {value:.4g} in {place}")
    # A tanh-Gaussian has no density at +-1.
    return rows._replace(actions=np.clip(actions, -1 + 1e-5, 1 - 1e-5).astype(np.float32))
