"""robomimic's layout (`data/demo_i/...`) and its published files; MimicGen's files have the same layout.

The robomimic package is not needed: h5py reads the low-dimensional observations.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from utils.errors import InputError
from utils.files import (
    cache_dir,
    check_finite,
    check_size,
    dataset,
    json_attribute,
    numbered_groups,
    open_hdf5,
    read_array,
)

BASE = "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/v1.5/"
FILES = {
    f"{task}/{kind}": f"{task}/{kind}/low_dim_v15.hdf5" for task in ("lift", "can", "square") for kind in ("ph", "mh")
}
OBS_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")


def locate(name: str) -> tuple[Path, str]:
    """Where `robomimic:TASK/TYPE` lies (or would lie) on this machine, and its address."""
    if name not in FILES:
        raise InputError(f"robomimic:{name} is unknown (known: {', '.join(FILES)})")
    return cache_dir() / "robomimic" / FILES[name], BASE + FILES[name]


def read(path: Path, obs_keys: Sequence[str] = (), env: Any = None) -> dict[str, np.ndarray]:
    """All demonstrations as D4RL's arrays (see `utils.d4rl`), in the order of their numbers.

    A demonstration's last observation comes from its next_obs and becomes a filler row. The reward is sparse: a row is
    terminal where it is done *and* successful; done alone is a time limit.

    Args:
        path: the HDF5 file.
        obs_keys: low-dimensional observations to join, in this order; () takes OBS_KEYS.
        env: where it is a robosuite task, the file's `env_args` must name the same one.
    """
    obs_keys = tuple(obs_keys) or OBS_KEYS
    with open_hdf5(path) as file:
        data = file["data"]
        if not isinstance(data, h5py.Group):
            raise InputError(f"{path}: 'data' is an array; robomimic's layout has a group there")
        _check_env(json_attribute(data.attrs, "env_args"), env, path)
        demos = numbered_groups(data, "demo_", str(path))
        lengths = []
        for source, demo in demos:
            if "obs" not in demo and "states" in demo:
                raise InputError(
                    f"{source} holds simulator states but no observations: run robomimic's dataset_states_to_obs.py"
                )
            actions = dataset(demo, "actions", source)
            if len(actions.shape) != 2 or actions.shape[0] == 0:
                raise InputError(f"{source}: 'actions' has shape {actions.shape}; (steps, width) is needed")
            lengths.append(actions.shape[0])
        rows = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)])  # first row of each demo, filler included
        ends, fillers = np.zeros(rows[-1], bool), np.zeros(rows[-1], bool)
        arrays: dict[str, np.ndarray] = {}
        for i, (source, demo) in enumerate(demos):
            steps = lengths[i]
            parts = {"observations": _join(demo, "obs", obs_keys, source, steps)}
            parts |= {key: read_array(demo, key, source) for key in ("actions", "rewards", "dones")}
            if i == 0:
                for key, part in parts.items():
                    shape = (int(rows[-1]), *part.shape[1:])
                    check_size(shape, np.dtype(np.float32), key, str(path))
                    arrays[key] = np.zeros(shape, np.float32)
            for key, part in parts.items():
                if len(part.shape) == 0 or len(part) != steps or part.shape[1:] != arrays[key].shape[1:]:
                    raise InputError(f"{source}: {key!r} has shape {part.shape}, which does not fit {steps} actions")
                arrays[key][rows[i] : rows[i] + steps] = part
            ends[rows[i + 1] - 1] = fillers[rows[i + 1] - 1] = True
            if "next_obs" in demo:
                arrays["observations"][rows[i + 1] - 1] = _join(demo, "next_obs", obs_keys, source, steps)[-1]
            else:  # the last step has no successor in the file: the episode ends one row earlier
                ends[rows[i + 1] - 2] = True
    check_finite(arrays["dones"], "dones", str(path))
    success = arrays["rewards"].reshape(rows[-1], -1).max(axis=1) > 0
    done = arrays.pop("dones").reshape(rows[-1], -1).any(axis=1)
    return arrays | {"terminals": success & done, "infos/success": success, "ends": ends, "fillers": fillers}


def _join(demo: h5py.Group, name: str, obs_keys: Sequence[str], source: str, steps: int) -> np.ndarray:
    """Observations (T, O): the keys' arrays side by side."""
    group = demo.get(name)
    if not isinstance(group, h5py.Group):
        raise InputError(f"{source} has no group {name!r}")
    parts = []
    for key in obs_keys:
        if key not in group:
            raise InputError(
                f"{source}/{name} has no {key!r}; choose --obs-keys from: {', '.join(sorted(group))[:300]}"
            )
        part = read_array(group, key, f"{source}/{name}")
        if part.ndim == 0 or len(part) != steps:
            raise InputError(f"{source}/{name}: {key!r} has shape {part.shape}, but there are {steps} actions")
        parts.append(part.reshape(steps, -1))
    return np.concatenate(parts, axis=1)


def _check_env(env_args: dict[str, Any], env: Any, path: Path) -> None:
    """The task, and what its actions mean, must be the environment's where the file records them."""
    here = getattr(env, "unwrapped", None)
    name, recorded = env_args.get("env_name"), getattr(here, "robosuite_name", None)
    if name and recorded and name != recorded:
        raise InputError(f"{path} is of robosuite's {name}; the task is {recorded}")
    settings = _dict(env_args.get("env_kwargs"))
    controller = _dict(settings.get("controller_configs"))
    arm = _dict(_dict(controller.get("body_parts")).get("right")) or controller  # robosuite 1.5, or before
    for key, value in getattr(here, "recorded", {}).items():
        other = {**arm, **settings}.get(key, value)
        if other != value:
            raise InputError(
                f"{path} was recorded with {key} {other}; the task has {value}: its actions mean another thing"
            )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
