"""D4RL's layout (flat HDF5 arrays) and D4RL's published files; the d4rl package is not needed.

Every reader of this project ends in D4RL's arrays, which `utils.data.from_d4rl_arrays` checks and turns into
transitions. Two keys are added to D4RL's own: `ends`, the last row of every episode where that is not simply
terminals | timeouts, and `fillers`, rows that hold nothing but an episode's last observation.
"""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from utils.errors import InputError
from utils.files import open_hdf5, read_array

BASE = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations", "infos/success", "infos/goal_achieved")


def _files() -> dict[str, str]:
    """Data set name -> path under BASE."""
    files = {}
    for task in ("pen", "door", "relocate", "hammer"):
        for kind in ("human", "cloned", "expert"):
            files[f"{task}-{kind}-v1"] = f"hand_dapg_v1/{task}-{kind}-v1.hdf5"
    mazes = (("u-maze", "umaze", False, False), ("u-maze", "umaze-diverse", True, True))
    mazes += tuple(
        (file, f"{size}-{kind}", True, kind == "diverse")
        for file, size in (("big-maze", "medium"), ("hardest-maze", "large"))
        for kind in ("play", "diverse")
    )
    for file, name, starts, goals in mazes:
        files[f"antmaze-{name}-v2"] = (
            f"ant_maze_v2/Ant_maze_{file}_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
        )
    for task in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
            files[f"{task}-{kind}-v2"] = f"gym_mujoco_v2/{task}_{kind.replace('-', '_')}-v2.hdf5"
    kitchen = "kitchen/kitchen_microwave_kettle_"
    files["kitchen-complete-v0"] = "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5"
    files["kitchen-partial-v0"] = kitchen + "light_slider-v0.hdf5"
    files["kitchen-mixed-v0"] = kitchen + "bottomburner_light-v0.hdf5"
    return files


FILES = _files()


def locate(name: str) -> tuple[Path, str]:
    """Where `d4rl:NAME` lies (or would lie) on this machine, as the d4rl package has it, and its address."""
    if name not in FILES:
        raise InputError(f"d4rl:{name} is unknown (known: {', '.join(FILES)})")
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets").expanduser()
    return folder / Path(FILES[name]).name, BASE + FILES[name]


def read(path: Path, more: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays of a D4RL-layout file: those that are always needed, and optional ones and `more` where present."""
    with open_hdf5(path) as file:
        arrays = {key: read_array(file, key, str(path)) for key in REQUIRED}
        arrays |= {key: read_array(file, key, str(path)) for key in (*OPTIONAL, *more) if key in file}
    return arrays


def write(path: Path, arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
    """Writes a D4RL-layout HDF5 file; `arrays` maps a key such as "infos/success" to an array (n, ...)."""
    with h5py.File(path, "w", track_order=True) as file:
        file.attrs.update(attributes)
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip" if np.ndim(value) else None, track_times=False)


def copy_rows(path: Path, out: Path, keep: np.ndarray, attributes: dict[str, Any]) -> None:
    """Writes the rows `keep` (n,) bool of every array of a file to a new one; what has no n rows is copied whole."""
    arrays: dict[str, np.ndarray] = {}
    with open_hdf5(path) as file:

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                value = item[()]
                arrays[name] = value[keep] if item.shape[:1] == keep.shape else value

        file.visititems(visit)
        attributes = dict(file.attrs) | attributes
    write(out, arrays, attributes)
