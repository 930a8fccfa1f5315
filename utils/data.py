"""Offline data sets: every source ends in the same arrays, checked.

    python -m utils.data list                      every task, its data, and whether it lies on this machine
    python -m utils.data inspect FILE              shapes, episodes, success, returns and problems of a data set
    python -m utils.data replay FILE --task NAME   does the simulator do what the file says?
    python -m utils.data generate NAME             writes a generated data set and prints its path
    python -m utils.data thin FILE OUT             keeps some episodes, drawn at random, of a D4RL-layout file
    python -m utils.data download NAME             fetches a task's data

`load` reads what `--dataset` names. One small module a format; HDF5, npz and JSON only, and nothing is ever unpickled.
"""

import contextlib
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from utils import d4rl, download, minari_data, ogbench_data, robomimic
from utils.errors import InputError, exit_on_input_error
from utils.files import atomic_write, cache_dir, check_finite, human_size, making, open_hdf5

Positional = Annotated[str, tyro.conf.Positional]
Relabel = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
FLAGS = ("rewards", "terminals", "timeouts", "infos/success", "infos/goal_achieved", "ends", "fillers")
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


def load(args: Any, env: Any) -> Dataset:
    """The data that a script's flags ask for (`args.dataset`, `args.obs_keys`), fitted to its environment.

    Raises:
        InputError: as `load_specs`, or generated data whose actions last longer or shorter than the environment's.
    """
    for spec in args.dataset:
        kind, _, name = spec.partition(":")
        if kind == "generated":
            made_with = _generated_settings(name)["action_repeat"]
            if args.action_repeat != made_with:
                raise InputError(
                    f"--action-repeat {args.action_repeat}: {spec} was made with {made_with}, where an action does "
                    f"something else; give --action-repeat {made_with}"
                )
    return load_specs(args.dataset, env, getattr(args, "obs_keys", ()))


def load_specs(specs: Sequence[str], env: Any = None, obs_keys: Sequence[str] = ()) -> Dataset:
    """The data sets that `specs` name, joined.

    Args:
        specs: each a path or one of the words of `locate`; what is not on this machine is downloaded or generated.
        env: the environment that the rows must fit (as `utils.envs.make_env` makes it); None checks the file alone.
            A task that counts rewards or ends in its own way relabels the rows here. Actions are rescaled from the
            environment's own bounds to [-1, 1] and clipped to +-(1 - 1e-5).
        obs_keys: observation keys, in this order, of files that have several (robomimic).

    Raises:
        InputError: a missing, broken or unfit file.
    """
    if not specs:
        raise InputError("no data: name it with --dataset (a file, d4rl:NAME, minari:ID, ...; see docs/data.md)")
    parts = []
    for spec in specs:
        part = read(resolve(spec), env, obs_keys)
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
    fields: dict[str, Any] = {
        "episodes": np.concatenate([part.episodes + offset for part, offset in zip(parts, offsets, strict=True)]),
        "success": np.concatenate(known) if len(known) == len(parts) else None,
        "dropped": sum(part.dropped for part in parts),
    }
    for name in ("obs", "actions", "rewards", "next_obs", "terminations"):
        fields[name] = np.concatenate([getattr(part, name) for part in parts])
        for part in parts:
            setattr(part, name, None)  # one field at a time is held twice, not all of them
    return Dataset(**fields)


def locate(spec: str) -> tuple[Path, str]:
    """Where the data of one `--dataset` word lies (or would lie) on this machine, and its address ("" for a path).

    Args:
        spec: a path, `d4rl:NAME`, `minari:ID`, `ogbench:NAME`, `robomimic:TASK/TYPE` or `generated:NAME`.
    """
    kind, colon, name = spec.partition(":")
    finders = {
        "d4rl": d4rl.locate,
        "minari": minari_data.locate,
        "ogbench": ogbench_data.locate,
        "robomimic": robomimic.locate,
        "generated": _locate_generated,
    }
    if colon and kind in finders:
        return finders[kind](name)
    return Path(spec).expanduser(), ""


def resolve(spec: str) -> Path:
    """The file behind one `--dataset` word; it is downloaded or generated if it is not there."""
    path, address = locate(spec)
    kind, _, name = spec.partition(":")
    if path.exists() or not address:
        return path
    if kind == "generated":
        return generate(name)
    with making(path) as missing:
        if missing and kind == "minari":
            minari_data.download(name, path)
        elif missing:
            download.fetch(address, path)
    return path


def read(path: Path, env: Any = None, obs_keys: Sequence[str] = ()) -> Dataset:
    """Reads a file of any known layout, told apart by what is in it, and relabels it for the task of `env`."""
    relabel = None
    with contextlib.suppress(AttributeError):  # most environments take the rows as they are
        relabel = env.get_wrapper_attr("relabel")
    if path.is_dir():
        arrays = minari_data.read(minari_data.main_file(path))
    elif zipfile.is_zipfile(path):
        arrays = ogbench_data.read(path)
    else:
        with open_hdf5(path) as file:
            keys = set(file)
        if "data" in keys:
            arrays = robomimic.read(path, obs_keys, env)
        elif any(key.startswith("episode_") for key in keys):
            arrays = minari_data.read(path)
        else:
            arrays = d4rl.read(path)
    return from_d4rl_arrays(arrays, str(path), relabel)


# ---------------------------------------------------------------------------------------------- generated data


def _generated_settings(name: str) -> dict[str, Any]:
    """The settings of the task that `generated:name` is for."""
    from utils import pointmaze, tasks  # here, because the table of tasks needs MuJoCo and reading a file does not

    maze = name.removeprefix("pointmaze-")
    if maze not in pointmaze.MAPS or maze == name:
        known = ", ".join(f"generated:pointmaze-{key}" for key in pointmaze.MAPS)
        raise InputError(f"generated:{name} is unknown (known: {known})")
    return tasks.TASKS[name].settings


def _locate_generated(name: str, num_episodes: int = 60, seed: int = 0) -> tuple[Path, str]:
    settings = _generated_settings(name)
    length = f"{settings['max_episode_steps']}x{settings['action_repeat']}"
    return cache_dir() / f"{name}-{num_episodes}x{length}-seed{seed}.hdf5", "made here at its first use"


def generate(name: str, num_episodes: int = 60, seed: int = 0) -> Path:
    """Path of the generated data set `name` in the cache; made if it is not there (deterministic for a seed)."""
    from utils import pointmaze, tasks

    path, _ = _locate_generated(name, num_episodes, seed)
    with making(path) as missing:
        if missing:
            task = tasks.TASKS[name]
            settings = task.settings
            env = tasks.make_env(task.env_id, task.env_kwargs, settings["max_episode_steps"], settings["action_repeat"])
            arrays = pointmaze.generate(env, name.removeprefix("pointmaze-"), num_episodes, seed)
            env.close()
            with atomic_write(path) as temporary:
                write_d4rl(temporary, arrays, {"task": name, "seed": seed, "num_episodes": num_episodes})
    return path


# ----------------------------------------------------------------------------------------- from arrays to transitions


write_d4rl = d4rl.write


def read_d4rl(path: Path) -> Dataset:
    """Reads a file of D4RL's layout, as it is."""
    return from_d4rl_arrays(d4rl.read(path), str(path))


def from_d4rl_arrays(arrays: dict[str, np.ndarray], source: str, relabel: Relabel | None = None) -> Dataset:
    """A checked Dataset from D4RL's flat arrays (and the two keys of `utils.d4rl`).

    Without next_observations a row's successor is the next row, so that the last row of an episode (flagged timeout, or
    last in the file) has none: it is dropped, and never made terminal. A terminal row needs no successor and stays.

    Args:
        arrays: observations (n, O), actions (n, A), rewards, terminals and, where there are, timeouts,
            next_observations, infos/success, infos/goal_achieved, ends, fillers.
        source: names them in errors.
        relabel: a task's own rewards and ends: checked arrays -> arrays.

    Raises:
        InputError: with the source's name and what is wrong.
    """
    arrays = check_arrays(dict(arrays), source)
    if relabel is not None:
        arrays = relabel(arrays)
    n, ends, terminals = len(arrays["rewards"]), arrays["ends"], arrays["terminals"].astype(bool)
    obs = arrays.pop("observations").astype(np.float32, copy=False)
    fillers = arrays.get("fillers", np.zeros(n, bool)).astype(bool)
    keep = ~fillers if "next_observations" in arrays else ~fillers & (terminals | ~ends)
    if not keep.any():
        raise InputError(f"{source} has no complete transition: every row ends an episode without a successor")
    rows = np.flatnonzero(keep)
    if "next_observations" in arrays:
        next_obs = select(arrays.pop("next_observations").astype(np.float32, copy=False), keep)
    else:
        next_obs = obs[np.minimum(rows + 1, n - 1)]
    starts = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    bounds = np.stack([starts, np.flatnonzero(ends) + 1], axis=1)
    success = arrays.get("infos/success", arrays.get("infos/goal_achieved"))
    if success is not None:
        success = np.maximum.reduceat(success.astype(bool), starts)
    episodes = np.concatenate([[0], np.cumsum(keep)])[bounds]
    nonempty = episodes[:, 1] > episodes[:, 0]
    return Dataset(
        obs=select(obs, keep),
        actions=select(arrays.pop("actions").astype(np.float32, copy=False), keep),
        rewards=select(arrays["rewards"].astype(np.float32, copy=False), keep),
        next_obs=next_obs,
        terminations=terminals[keep].astype(np.float32),
        episodes=episodes[nonempty],
        success=None if success is None else success[nonempty],
        dropped=int((~keep & ~fillers).sum()),
    )


def select(array: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The rows to keep; the array itself, uncopied, where that is all of them."""
    return array if keep.all() else array[keep]


def check_arrays(arrays: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """D4RL's arrays with flags of shape (n,) and with `ends`; whatever is wrong with them is an InputError."""
    for key in d4rl.REQUIRED:
        if key not in arrays:
            raise InputError(f"{source} has no {key!r} (it has: {', '.join(list(arrays)[:12]) or 'nothing'})")
    observations = arrays["observations"]
    n = len(observations) if observations.ndim else 0
    if n == 0:
        raise InputError(f"{source} is empty: it has no rows")
    for key, value in arrays.items():
        if value.dtype.kind not in "fiub":
            raise InputError(f"{source}: {key!r} holds {value.dtype}, not numbers")
        if value.ndim == 0 or len(value) != n:
            rows = 0 if value.ndim == 0 else len(value)
            raise InputError(f"{source}: {key!r} has {rows:,} rows but 'observations' has {n:,}")
    for key in ("observations", "actions"):
        if arrays[key].ndim != 2 or arrays[key].shape[1] == 0:
            raise InputError(f"{source}: {key!r} has shape {arrays[key].shape}; (rows, width) is needed")
    if arrays.get("next_observations", observations).shape != observations.shape:
        shape = arrays["next_observations"].shape
        raise InputError(f"{source}: 'next_observations' has shape {shape}, 'observations' {observations.shape}")
    for key, value in arrays.items():
        check_finite(value, key, source)
    for key in FLAGS:
        if key in arrays:
            if arrays[key].size != n:
                raise InputError(f"{source}: {key!r} has shape {arrays[key].shape}; ({n},) or ({n}, 1) is needed")
            arrays[key] = arrays[key].reshape(n)
    if "ends" not in arrays:
        arrays["ends"] = arrays["terminals"].astype(bool) | arrays.get("timeouts", np.zeros(n)).astype(bool)
    arrays["ends"] = arrays["ends"].astype(bool)
    arrays["ends"][-1] = True
    return arrays


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


def inspect(file: Positional, task: str = "") -> None:
    """Prints shapes, episodes, success, returns and problems of a data set.

    Args:
        file: a path, or any word of --dataset.
        task: look at it as this task does, with its rewards and ends; without it the file alone is read.
    """
    env = None
    if task:
        from utils.tasks import TASKS, make_env

        if task not in TASKS:
            raise InputError(f"--task {task!r} is unknown (known: {', '.join(TASKS)})")
        env = make_env(TASKS[task].env_id, TASKS[task].env_kwargs)
    data = load_specs([file], env)
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


def thin(file: Positional, out: Annotated[Path, tyro.conf.Positional], episodes: int, seed: int = 0) -> None:
    """Writes whole episodes of a D4RL-layout file, drawn at random, to a new file: less data, hence a weaker prior.

    Args:
        file: a path, or a word of --dataset that names such a file.
        out: the new file.
        episodes: how many to keep, in the file's order.
        seed: of the draw.
    """
    if out.exists():
        raise InputError(f"{out} is there already; choose another name")
    path = resolve(file)
    ends = check_arrays(d4rl.read(path), str(path))["ends"]
    number = np.cumsum(ends) - ends  # of the episode that each row belongs to
    total = int(number[-1]) + 1
    if not 0 < episodes <= total:
        raise InputError(f"--episodes {episodes}: {path} has {total}")
    keep = np.isin(number, np.random.default_rng(seed).choice(total, episodes, replace=False))
    with atomic_write(out, "choose another name") as temporary:
        d4rl.copy_rows(path, temporary, keep, {"thinned": f"{episodes} of {total} episodes, seed {seed}"})
    print(f"{out}: {episodes} of {total} episodes, {int(keep.sum()):,} of {len(keep):,} rows")


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
    """Prints every task with its data, and whether that lies on this machine."""
    from utils.tasks import TASKS

    for name, task in TASKS.items():
        print(f"{name}: {task.about}  (settings: {task.source})")
        for spec in task.dataset:
            path, address = locate(spec)
            try:
                where = f"{human_size(path.stat().st_size)} at {path}"
            except OSError:
                where = ("not here; from " if address.startswith("http") else "") + address
            print(f"    {spec:<34} {where}")


def main() -> None:
    """`python -m utils.data`."""

    def replay(file: Positional, task: str, rows: int = 2_000, seed: int = 0) -> None:
        """Compares a D4RL-layout file with a task's simulator, one step from random rows (antmaze-*, adroit-*)."""
        from utils.replay import report

        report(file, task, rows, seed)

    def generate_(name: Positional, episodes: int = 0, seed: int = 0, processes: int = 0, steps: int = 0) -> None:
        """Writes a generated data set and prints its path.

        Args:
            name: pointmaze-umaze, -medium, -large, or ogbench-cube-single, -cube-double, -scene, -puzzle-3x3 (from the
                ogbench package's scripted oracles, in OGBench's layout).
            episodes: how many; 0 takes 60 (pointmaze) or 1000 (ogbench).
            seed: the same seed gives the same data.
            processes: side by side (ogbench); 0 takes one per CPU core.
            steps: of each episode (ogbench); 0 takes OGBench's 1000.
        """
        if episodes < 0 or processes < 0 or steps < 0 or seed < 0:
            raise InputError("--episodes, --processes, --steps and --seed cannot be negative")
        if name.startswith("ogbench-"):
            from utils import ogbench_oracle

            path = ogbench_oracle.generate(name.removeprefix("ogbench-"), episodes or 1000, seed, processes, steps)
        else:
            path = generate(name, episodes or 60, seed)
        print(path)

    def download_(name: Positional) -> None:
        """Downloads the data of a task, or one word of --dataset, and prints where it lies."""
        from utils.tasks import TASKS

        for spec in TASKS[name].dataset if name in TASKS else (name,):
            path = resolve(spec)
            if not path.exists():
                raise InputError(f"{name!r} is neither a task nor a word of --dataset; see `python -m utils.data list`")
            print(path)

    commands = {"list": list_tasks, "inspect": inspect, "replay": replay, "thin": thin}
    commands |= {"generate": generate_, "download": download_}
    try:
        with exit_on_input_error():
            tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
