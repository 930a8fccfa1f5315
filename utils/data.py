"""Offline data sets: every source ends in the same arrays, checked.

    python -m utils.data list                  every task, its data, and whether it lies on this machine
    python -m utils.data inspect FILE          shapes, episodes, success, returns and problems of a data set
    python -m utils.data generate NAME         writes a generated data set into the cache and prints its path

`load_specs` reads what `--dataset` names. HDF5 only; nothing is ever unpickled.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import tyro

from utils.errors import InputError

ACTION_LIMIT = 1 - 1e-5  # a tanh-Gaussian has no density at +-1


@dataclass
class Dataset:
    """n transitions in m episodes.

    Attributes:
        obs, next_obs: (n, O) float32.
        actions: (n, A) float32; in [-1, 1] once `to_unit_actions` has run.
        rewards: (n,) float32, as in the source: shift and scale are the script's business.
        terminations: (n,) float32, 1 where the task ended. A time limit is never one.
        episodes: (m, 2) int64, first row and one past the last of each episode.
        success: (m,) bool, or None where the source does not say.
        dropped: rows left out because their successor is not in the file.
    """

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_obs: np.ndarray
    terminations: np.ndarray
    episodes: np.ndarray
    success: np.ndarray | None = None
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.rewards)

    def returns(self) -> np.ndarray:
        """Undiscounted return (m,) of every episode."""
        return np.array([self.rewards[start:stop].sum() for start, stop in self.episodes])

    def split(self, heldout_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers for training and for a held-out loss: whole episodes, drawn at random, `heldout_share` of them.

        At least one episode is held out unless the share is 0 or there is only one: then both are all rows.
        """
        order = np.random.default_rng(seed).permutation(len(self.episodes))
        count = min(max(1, round(heldout_share * len(order))), len(order) - 1) if heldout_share else 0
        rows = [np.arange(*self.episodes[i]) for i in order]
        if count == 0:
            return np.concatenate(rows), np.concatenate(rows)
        return np.concatenate(rows[count:]), np.concatenate(rows[:count])


def cache_dir() -> Path:
    """Where generated data lies: `EXPO_CACHE_DIR`, else `~/.cache/expo`."""
    return Path(os.environ.get("EXPO_CACHE_DIR") or Path.home() / ".cache" / "expo")


def load(args: Any, env: Any) -> Dataset:
    """The data that a script's flags ask for (`args.dataset`), fitted to its environment."""
    return load_specs(args.dataset, env)


def load_specs(specs: Sequence[str], env: Any = None) -> Dataset:
    """The data sets that `specs` name, joined.

    Args:
        specs: each a path to a D4RL-layout HDF5 file, or `generated:NAME`.
        env: the environment that the rows must fit (as `utils.envs.make_env` makes it); None checks the file alone.
            Actions are rescaled from the environment's own bounds to [-1, 1] and clipped to +-(1 - 1e-5).

    Raises:
        InputError: a missing, broken or unfit file.
    """
    parts = []
    for spec in specs:
        part = read_d4rl(resolve(spec))
        if env is not None:
            fit_to_env(part, env, spec)
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    for spec, part in zip(specs, parts, strict=True):
        widths = (part.obs.shape[1], part.actions.shape[1])
        first = (parts[0].obs.shape[1], parts[0].actions.shape[1])
        if widths != first:
            raise InputError(f"{spec}: observation and action widths {widths} differ from {first} of {specs[0]}")
    offsets = np.cumsum([0, *(len(part) for part in parts[:-1])])
    known = [part.success for part in parts if part.success is not None]
    fields = ("obs", "actions", "rewards", "next_obs", "terminations")
    return Dataset(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields},
        episodes=np.concatenate([part.episodes + offset for part, offset in zip(parts, offsets, strict=True)]),
        success=np.concatenate(known) if len(known) == len(parts) else None,
        dropped=sum(part.dropped for part in parts),
    )


def resolve(spec: str) -> Path:
    """The file behind one `--dataset` word; generated data is made on first use."""
    kind, _, name = spec.partition(":")
    if kind == "generated":
        return generate(name)
    return Path(spec).expanduser()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path, renamed to `path` if the block succeeds: readers see all or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written ({error.strerror}); set EXPO_CACHE_DIR") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- generated data


def generate(name: str, num_episodes: int = 60, seed: int = 0) -> Path:
    """Path of the generated data set `name` in the cache; made if it is not there (deterministic for a seed)."""
    from utils import pointmaze, tasks  # here, because the table of tasks needs MuJoCo and reading a file does not

    maze = name.removeprefix("pointmaze-")
    if maze not in pointmaze.MAPS or maze == name:
        known = ", ".join(f"generated:pointmaze-{key}" for key in pointmaze.MAPS)
        raise InputError(f"generated:{name} is unknown (known: {known})")
    task = tasks.TASKS[name]
    settings = task.settings
    path = cache_dir() / f"{name}-{num_episodes}x{settings['max_episode_steps']}-seed{seed}.hdf5"
    if path.exists():
        return path
    env = tasks.make_env(task.env_id, task.env_kwargs, settings["max_episode_steps"], settings["action_repeat"])
    arrays = pointmaze.generate(env, maze, num_episodes, seed)
    env.close()
    attributes = {"task": name, "seed": seed, "num_episodes": num_episodes}
    with atomic_write(path) as temporary:
        write_d4rl(temporary, arrays, attributes)
    return path


def write_d4rl(path: Path, arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
    """Writes a D4RL-layout HDF5 file; `arrays` maps a key such as "infos/success" to an array (n, ...)."""
    with h5py.File(path, "w", track_order=True) as file:
        file.attrs.update(attributes)
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip", track_times=False)


# ------------------------------------------------------------------------------------------------ D4RL's layout


def read_d4rl(path: Path) -> Dataset:
    """Reads flat arrays observations, actions, rewards, terminals and, where present, timeouts and next_observations.

    Without next_observations a row's successor is the next row, so that a row with its timeout flag set and the file's
    last row have none: they are dropped, and never made terminal. A terminal row needs no successor and stays.

    Raises:
        InputError: with the file's name and what is wrong.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give an HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            arrays = {key: _read(file, key, path) for key in ("observations", "actions", "rewards", "terminals")}
            optional = ("timeouts", "next_observations", "infos/success", "infos/goal_achieved")
            arrays |= {key: _read(file, key, path) for key in optional if key in file}
    except OSError as error:
        raise InputError(f"{path} is not a complete HDF5 file ({str(error).splitlines()[0][:100]})") from None
    return from_d4rl_arrays(arrays, str(path))


def _read(file: h5py.File, key: str, path: Path) -> np.ndarray:
    if key not in file:
        raise InputError(f"{path} has no {key!r} (it has: {', '.join(list(file)[:12]) or 'nothing'})")
    item = file[key]
    if not isinstance(item, h5py.Dataset):
        raise InputError(f"{path}: {key!r} is a group; D4RL's layout has an array there")
    if item.dtype.kind not in "fiub":
        raise InputError(f"{path}: {key!r} holds {item.dtype}, not numbers")
    try:
        return item[()] if item.shape == () else item[:]
    except (OSError, ValueError, TypeError, MemoryError) as error:
        raise InputError(f"{path}: {key!r} cannot be read ({str(error).splitlines()[0][:100]})") from None


def from_d4rl_arrays(arrays: dict[str, np.ndarray], source: str) -> Dataset:
    """A checked Dataset from D4RL's flat arrays; `source` names them in errors."""
    observations, actions = arrays["observations"], arrays["actions"]
    n = len(observations) if observations.ndim else 0
    if n == 0:
        raise InputError(f"{source} is empty: it has no rows")
    for key, value in arrays.items():
        if value.ndim == 0 or len(value) != n:
            rows = 0 if value.ndim == 0 else len(value)
            raise InputError(f"{source}: {key!r} has {rows:,} rows but 'observations' has {n:,}")
    for key in ("observations", "actions"):
        if arrays[key].ndim != 2 or arrays[key].shape[1] == 0:
            raise InputError(f"{source}: {key!r} has shape {arrays[key].shape}; (rows, width) is needed")
    flags = {}
    for key in ("rewards", "terminals", "timeouts", "infos/success", "infos/goal_achieved"):
        if key in arrays:
            if arrays[key].size != n:
                raise InputError(f"{source}: {key!r} has shape {arrays[key].shape}; ({n},) or ({n}, 1) is needed")
            flags[key] = arrays[key].reshape(n)
    if arrays.get("next_observations", observations).shape != observations.shape:
        shape = arrays["next_observations"].shape
        raise InputError(f"{source}: 'next_observations' has shape {shape}, 'observations' {observations.shape}")
    for key in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts"):
        if key in arrays:
            check_finite(arrays[key], key, source)

    terminals = flags["terminals"].astype(bool)
    ends = terminals | flags.get("timeouts", np.zeros(n)).astype(bool)
    ends[-1] = True
    obs = observations.astype(np.float32, copy=False)
    if "next_observations" in arrays:
        next_obs, keep = arrays["next_observations"].astype(np.float32, copy=False), np.ones(n, bool)
    else:
        next_obs, keep = np.concatenate([obs[1:], obs[-1:]]), terminals | ~ends
    if not keep.any():
        raise InputError(f"{source} has no complete transition: every row ends an episode without a successor")
    starts = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    bounds = np.stack([starts, np.flatnonzero(ends) + 1], axis=1)
    success = None
    for key in ("infos/success", "infos/goal_achieved"):
        if key in flags:
            success = np.maximum.reduceat(flags[key].astype(bool), starts)
            break
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    episodes = kept_before[bounds]
    nonempty = episodes[:, 1] > episodes[:, 0]
    return Dataset(
        obs=obs[keep],
        actions=actions.astype(np.float32, copy=False)[keep],
        rewards=flags["rewards"].astype(np.float32, copy=False)[keep],
        next_obs=next_obs[keep],
        terminations=terminals[keep].astype(np.float32),
        episodes=episodes[nonempty],
        success=None if success is None else success[nonempty],
        dropped=int(n - keep.sum()),
    )


def check_finite(array: np.ndarray, key: str, source: str) -> None:
    """Raises InputError that names the first row with NaN, an infinite value, or one too large for float32."""
    if array.dtype.kind != "f":
        return
    bad = ~(np.abs(array) <= np.finfo(np.float32).max)
    if bad.any():
        row = int(np.flatnonzero(bad.reshape(len(array), -1).any(axis=1))[0])
        value = array[row].reshape(-1)[bad[row].reshape(-1)][0]
        raise InputError(
            f"{source}: {key!r} has {int(bad.sum()):,} values that are not finite, the first {value} in row {row:,}"
        )


def fit_to_env(data: Dataset, env: Any, source: str) -> None:
    """Checks widths and action bounds against `env` and rescales the actions to [-1, 1], in place."""
    from utils.envs import native_action_bounds

    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    if data.obs.shape[1] != obs_dim:
        raise InputError(f"{source}: observations are {data.obs.shape[1]} wide, the environment's {obs_dim}")
    if data.actions.shape[1] != action_dim:
        raise InputError(f"{source}: actions are {data.actions.shape[1]} wide, the environment's {action_dim}")
    low, high = native_action_bounds(env)
    actions = 2 * (data.actions - low) / (high - low) - 1
    outside = np.abs(actions) > 1 + 1e-3
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        value = data.actions[row, column]
        raise InputError(
            f"{source}: {int(outside.any(axis=1).sum()):,} rows have actions outside the environment's bounds, the "
            f"first {value:.4g} in transition {row:,}, dimension {column} ({low[column]:.4g} to {high[column]:.4g})"
        )
    data.actions = np.clip(actions, -ACTION_LIMIT, ACTION_LIMIT).astype(np.float32)


# ------------------------------------------------------------------------------------------------- command line


def inspect(file: Annotated[str, tyro.conf.Positional]) -> None:
    """Prints shapes, episodes, success, returns and problems of a data set (a path, or any --dataset word)."""
    data = load_specs([file])
    lengths = data.episodes[:, 1] - data.episodes[:, 0]
    returns = data.returns()
    print(f"{file}")
    print(f"  transitions   {len(data):,} ({data.dropped:,} rows dropped: no successor in the file)")
    print(f"  observations  {data.obs.shape[1]} wide, {data.obs.min():.4g} to {data.obs.max():.4g}")
    print(f"  actions       {data.actions.shape[1]} wide, {data.actions.min():.4g} to {data.actions.max():.4g}")
    print(f"  rewards       {data.rewards.min():.4g} to {data.rewards.max():.4g}, mean {data.rewards.mean():.4g}")
    least, median, most = lengths.min(), int(np.median(lengths)), lengths.max()
    print(f"  episodes      {len(lengths):,}, length {least} / {median} / {most} (least, median, most)")
    print(f"  terminations  {int(data.terminations.sum()):,}")
    print(f"  returns       {returns.min():.4g} / {np.median(returns):.4g} / {returns.max():.4g} (least, median, most)")
    if data.success is None:
        print("  success       not in the file")
    else:
        print(f"  success       {int(data.success.sum())} of {len(data.success)} episodes ({data.success.mean():.1%})")
    problems = find_problems(data)
    print("  problems      " + ("none found" if not problems else "\n                ".join(problems)))


def find_problems(data: Dataset) -> list[str]:
    """What a user should know before training on `data`, one line each; empty if nothing stands out."""
    problems = []
    lengths = data.episodes[:, 1] - data.episodes[:, 0]
    if len(lengths) == 1 and len(data) > 1:
        problems.append("one single episode: are the timeouts flags missing?")
    if (lengths == 1).any():
        problems.append(f"{int((lengths == 1).sum())} episodes of one transition")
    if np.ptp(data.rewards) == 0:
        problems.append(f"every reward is {data.rewards[0]:g}")
    for name, array in (("observation", data.obs), ("action", data.actions)):
        constant = np.flatnonzero(np.ptp(array, axis=0) == 0)
        if len(constant):
            problems.append(f"constant {name} dimensions: {', '.join(map(str, constant))}")
    if np.abs(data.actions).max() > 1:
        rows = int((np.abs(data.actions) > 1).any(axis=1).sum())
        problems.append(f"{rows:,} rows have actions beyond +-1 (fine only if the environment's bounds are wider)")
    if data.success is not None and not data.success.any():
        problems.append("no successful episode")
    return problems


def list_tasks() -> None:
    """Prints every task with its data and whether the data lies on this machine."""
    from utils.tasks import TASKS

    width = max(map(len, TASKS))
    for name, task in TASKS.items():
        print(f"{name:<{width}}  {task.about}  [{' '.join(task.dataset)}]")


def main() -> None:
    """`python -m utils.data`."""

    def generate_(name: Annotated[str, tyro.conf.Positional], episodes: int = 60, seed: int = 0) -> None:
        """Writes a generated data set into the cache and prints its path."""
        print(generate(name, episodes, seed))

    try:
        tyro.extras.subcommand_cli_from_dict({"list": list_tasks, "inspect": inspect, "generate": generate_})
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
