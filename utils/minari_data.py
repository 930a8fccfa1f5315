"""Minari's layout: one HDF5 group per episode. h5py reads a local data set; the minari package is needed to download.

An episode of T steps has T + 1 observations: the last one becomes a filler row, so that every step has its successor.
"""

import os
import re
from pathlib import Path

import h5py
import numpy as np

from utils.errors import InputError
from utils.files import check_size, dataset, numbered_groups, open_hdf5, read_array

SUCCESS_KEYS = ("success", "is_success", "goal_achieved")


def locate(name: str) -> tuple[Path, str]:
    """Where `minari:ID` lies (or would lie) on this machine, as the minari package has it, and its source."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name.split("/"):
        raise InputError(f"minari:{name} is no Minari id (as in minari:D4RL/door/human-v2)")
    root = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets").expanduser()
    return root / name / "data" / "main_data.hdf5", f"Minari's remote, as {name}"


def download(name: str, path: Path) -> None:
    """Downloads a data set with the minari package."""
    try:
        import minari  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"minari:{name} is not at {path}; to download it, pip install 'minari[hf,hdf5]', or copy the data set there"
        ) from None
    try:
        minari.download_dataset(name)
    except Exception as error:  # the package raises many kinds, those of its network client among them
        raise InputError(
            f"minari:{name} could not be downloaded ({type(error).__name__}: {str(error).strip().splitlines()[:1]}); "
            f"copy the data set's folder to {path.parent.parent}"
        ) from None
    if not path.exists():
        raise InputError(f"minari:{name} is not stored as HDF5; only Minari's HDF5 data sets are read")


def main_file(folder: Path) -> Path:
    """The HDF5 file of a Minari data set's folder."""
    for path in (folder / "data" / "main_data.hdf5", folder / "main_data.hdf5"):
        if path.exists():
            return path
    raise InputError(f"{folder} is a folder without a Minari data set (data/main_data.hdf5)")


def read(path: Path) -> dict[str, np.ndarray]:
    """All episodes as D4RL's arrays (see `utils.d4rl`), in the order of their numbers."""
    with open_hdf5(path) as file:
        groups = numbered_groups(file, "episode_", str(path))
        lengths = []
        for source, group in groups:
            actions = dataset(group, "actions", source)
            if len(actions.shape) != 2:
                raise InputError(f"{source}: 'actions' has shape {actions.shape}; (steps, width) is needed")
            lengths.append(actions.shape[0])
        rows = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)])  # first row of each episode, filler included
        arrays: dict[str, np.ndarray] = {}
        for i, (source, group) in enumerate(groups):
            steps = lengths[i]
            if steps == 0:
                raise InputError(f"{source} is empty: it has no steps")
            parts = {"observations": _observations(group, source, steps)}
            parts |= {key: read_array(group, key, source) for key in ("actions", "rewards", "terminations")}
            success = _success(group, source, steps)
            if success is not None:
                parts["infos/success"] = success
            if i == 0:
                for key, part in parts.items():
                    shape = (int(rows[-1]), *part.shape[1:])
                    check_size(shape, np.dtype(np.float32), key, str(path))
                    arrays[key] = np.zeros(shape, np.float32)
            if parts.keys() != arrays.keys():
                raise InputError(f"{source} has other keys than the first episode ({', '.join(sorted(parts))})")
            for key, part in parts.items():
                if len(part) not in (steps, steps + (key == "observations")) or part.shape[1:] != arrays[key].shape[1:]:
                    raise InputError(f"{source}: {key!r} has shape {part.shape}, which does not fit {steps} actions")
                arrays[key][rows[i] : rows[i] + len(part)] = part
    arrays["terminals"] = arrays.pop("terminations")
    for key in ("ends", "fillers"):
        arrays[key] = np.zeros(rows[-1], bool)
        arrays[key][rows[1:] - 1] = True
    return arrays


def _observations(group: h5py.Group, source: str, steps: int) -> np.ndarray:
    """Observations (T + 1, O); those of a Dict space are joined in the order of their names, as Gymnasium flattens."""
    item = group.get("observations")
    if not isinstance(item, h5py.Group):
        parts = [read_array(group, "observations", source)]
    else:
        names: list[str] = []
        item.visititems(lambda name, child: names.append(name) if isinstance(child, h5py.Dataset) else None)
        parts = [read_array(item, name, f"{source}/observations") for name in sorted(names, key=lambda n: n.split("/"))]
    for part in parts:
        if part.ndim == 0 or len(part) != steps + 1:
            raise InputError(f"{source}: 'observations' has shape {part.shape}; {steps + 1} rows are needed")
    if not parts:
        raise InputError(f"{source}: 'observations' is an empty group")
    return np.concatenate([part.reshape(steps + 1, -1) for part in parts], axis=1)


def _success(group: h5py.Group, source: str, steps: int) -> np.ndarray | None:
    """Success after every step (T,), from the infos; None where they do not say."""
    infos = group.get("infos")
    for key in SUCCESS_KEYS:
        if isinstance(infos, h5py.Group) and isinstance(infos.get(key), h5py.Dataset):
            values = read_array(infos, key, f"{source}/infos")
            if values.size not in (steps, steps + 1):
                raise InputError(f"{source}: 'infos/{key}' has shape {values.shape}; {steps} values are needed")
            return values.reshape(-1)[-steps:].astype(np.float32)  # of T + 1, the first is the reset's
    return None
