"""Published data: where the words of --dataset lie on this machine, in the folders of the packages of the same name."""

import os
import re
from pathlib import Path

from utils import InputError
from utils.arrays import cache_dir

D4RL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
OGBENCH = "https://rail.eecs.berkeley.edu/datasets/ogbench/"
FOLDERS = {"d4rl": ("D4RL_DATASET_DIR", ".d4rl/datasets"), "ogbench": ("OGBENCH_DATA_DIR", ".ogbench/data")}
FOLDERS |= {"minari": ("MINARI_DATASETS_PATH", ".minari/datasets")}
ROBOMIMIC = "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/v1.5/"


def d4rl_files() -> dict[str, str]:
    """Name of a D4RL data set -> its path under the address."""
    files = {
        "kitchen-complete-v0": "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
        "kitchen-partial-v0": "kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5",
        "kitchen-mixed-v0": "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
    }
    for task in ("pen", "door", "relocate", "hammer"):
        for kind in ("human", "cloned", "expert"):
            files[f"{task}-{kind}-v1"] = f"hand_dapg_v1/{task}-{kind}-v1.hdf5"
    for task in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
            files[f"{task}-{kind}-v2"] = f"gym_mujoco_v2/{task}_{kind.replace('-', '_')}-v2.hdf5"
    for name in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
        maze = {"u": "u-maze", "m": "big-maze", "l": "hardest-maze"}[name[0]]
        flags = f"multistart_{name != 'umaze'}_multigoal_{'diverse' in name}"
        files[f"antmaze-{name}-v2"] = f"ant_maze_v2/Ant_maze_{maze}_noisy_{flags}_sparse_fixed.hdf5"
    return files


def locate(spec: str) -> tuple[Path, str]:
    """Where the data of one word lies (or would lie) on this machine, and its address. Minari's has no address."""
    kind, _, name = spec.partition(":")
    robomimic = [f"{task}/{data}" for task in ("lift", "can", "square") for data in ("ph", "mh")]
    files = d4rl_files() if kind == "d4rl" else {name: f"{name}/low_dim_v15.hdf5" for name in robomimic}
    if kind in ("d4rl", "robomimic") and name not in files:
        raise InputError(f"{spec} is unknown (known: {', '.join(files)})")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name.split("/"):
        raise InputError(f"{spec} is no name of a data set (as in minari:D4RL/door/human-v2)")
    if kind == "robomimic":
        return cache_dir() / "robomimic" / files[name], ROBOMIMIC + files[name]
    variable, usual = FOLDERS[kind]
    folder = Path(os.environ.get(variable) or Path.home() / usual).expanduser()
    if kind == "d4rl":
        return folder / Path(files[name]).name, D4RL + files[name]
    if kind == "ogbench":
        return folder / f"{name}.npz", f"{OGBENCH}{name}.npz"
    return folder / name / "data" / "main_data.hdf5", ""


def find(spec: str) -> Path:
    path, _ = locate(spec)
    if not path.exists():
        raise InputError(f"{spec} is not on this machine ({path}); run: python tools/data.py download {spec}")
    return path
