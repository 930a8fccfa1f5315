"""Files that the tools make: written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from utils import InputError, reason
from utils.arrays import Arrays
from utils.sources import SOURCES


def own_folder() -> Path:
    """Where data lies whose package has no folder of its own: `EXPO_CACHE_DIR`, else `~/.cache/expo`."""
    variable, usual, _ = SOURCES["robomimic"]
    return Path(os.environ.get(variable) or Path.home() / usual).expanduser()


def write_d4rl(path: Path, arrays: Arrays, attributes: dict[str, Any]) -> None:
    """Writes an HDF5 file of D4RL's layout. Two processes may do it at once: each puts a whole file there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w", track_order=True) as file:
            file.attrs.update(attributes)
            for key, value in arrays.items():
                file.create_dataset(key, data=value, compression="gzip" if np.ndim(value) else None, track_times=False)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written ({reason(error)}); EXPO_CACHE_DIR names another") from None
    finally:
        if temporary.exists():
            temporary.unlink()
