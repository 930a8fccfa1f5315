"""Published data: where the words of --dataset lie on this machine: in the folder of their package, or in ours."""

import os
import re
from pathlib import Path

from utils import InputError

# Kind of data -> the variable that names its folder, the usual folder, and the address (not for Minari's own package).
# Those of Hugging Face name the revision that was the newest in November 2026.
RAIL, HUGGING_FACE = "https://rail.eecs.berkeley.edu/datasets/", "https://huggingface.co/datasets/"
ROBOMIMIC = "robomimic/robomimic_datasets/resolve/74fa018461f479cd9fd15b924a16103012096203/v1.5/"
MIMICGEN = "amandlek/mimicgen_datasets/resolve/33016f8a62c02334f929f2913af8fdd2a8a129e1/core/"
SOURCES = {
    "d4rl": ("D4RL_DATASET_DIR", ".d4rl/datasets", RAIL + "offline_rl/"),
    "minari": ("MINARI_DATASETS_PATH", ".minari/datasets", ""),
    "ogbench": ("OGBENCH_DATA_DIR", ".ogbench/data", RAIL + "ogbench/"),
    "robomimic": ("EXPO_CACHE_DIR", ".cache/expo", HUGGING_FACE + ROBOMIMIC),
    "mimicgen": ("EXPO_CACHE_DIR", ".cache/expo", HUGGING_FACE + MIMICGEN),
}
# Name of a data set -> its path under the address. Of D4RL's only those that an environment here fits.
HANDS = ("pen", "door", "relocate", "hammer")
KNOWN = {
    "robomimic": {f"{t}/{d}": f"{t}/{d}/low_dim_v15.hdf5" for t in ("lift", "can", "square") for d in ("ph", "mh")},
    "mimicgen": {name: f"{name}.hdf5" for name in ("stack_d0", "stack_d1", "threading_d0", "threading_d1")},
    "d4rl": {f"{t}-{d}-v1": f"hand_dapg_v1/{t}-{d}-v1.hdf5" for t in HANDS for d in ("human", "cloned", "expert")},
}
for _name in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
    _maze = {"u": "u-maze", "m": "big-maze", "l": "hardest-maze"}[_name[0]]
    _flags = f"multistart_{_name != 'umaze'}_multigoal_{'diverse' in _name}"
    KNOWN["d4rl"][f"antmaze-{_name}-v2"] = f"ant_maze_v2/Ant_maze_{_maze}_noisy_{_flags}_sparse_fixed.hdf5"


def locate(spec: str) -> tuple[Path, str]:
    """Where the data of one word lies (or would lie) on this machine, and its address."""
    kind, _, name = spec.partition(":")
    variable, usual, address = SOURCES[kind]
    files = KNOWN.get(kind, {})
    if files and name not in files:
        raise InputError(f"{spec} is unknown (known: {', '.join(files)})")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name.split("/"):
        raise InputError(f"{spec} is no name of a data set (as in minari:D4RL/door/human-v2)")
    path = files.get(name, f"{name}.npz" if kind == "ogbench" else f"{name}/data/main_data.hdf5")
    here = Path(path).name if kind == "d4rl" else f"{kind}/{path}" if variable == "EXPO_CACHE_DIR" else path
    return Path(os.path.expanduser(os.environ.get(variable) or f"~/{usual}"), here), address and address + path


def split_count(spec: str) -> tuple[str, int]:
    """FILE:10 means the first 10 episodes of FILE, and FILE alone means all of them, which is 0 here."""
    name, _, count = spec.rpartition(":")
    return (name, int(count)) if name and count.isdecimal() and int(count) and not Path(spec).exists() else (spec, 0)


def find_file(spec: str) -> Path:
    """The file behind a path or a word of --dataset, with or without a count. Nothing is downloaded."""
    name, _ = split_count(spec)
    kind, path, missing = name.partition(":")[0], Path(os.path.expanduser(name)), "no such file"
    if kind in SOURCES:
        path = locate(name)[0]
        missing = f"it is not on this machine ({path}); run: python tools/data.py download {name}"
    elif kind == "generated":
        missing = f"it is made in memory; to get a file: python tools/data.py generate {name.partition(':')[2]}"
    elif path.is_dir():
        path, missing = path / "data" / "main_data.hdf5", "is a folder without a Minari data set in HDF5 format"
    if not path.exists():
        raise InputError(f"{name}: {missing}")
    return path
