"""Files that the tools make, written whole or not at all, and files that one process holds."""

import errno
import io
import os
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from utils import InputError, reason
from utils.arrays import Arrays
from utils.sources import SOURCES


def own_folder() -> Path:
    """Where data lies whose package has no folder of its own: `EXPO_CACHE_DIR`, else `~/.cache/expo`."""
    variable, usual, _ = SOURCES["robomimic"]
    return Path(os.path.expanduser(os.environ.get(variable) or f"~/{usual}"))


def write_d4rl(path: Path, arrays: Arrays, attributes: dict[str, Any]) -> None:
    """Writes an HDF5 file of D4RL's layout."""
    content = io.BytesIO()  # h5py itself crashes on a full disk
    with h5py.File(content, "w", track_order=True) as file:
        file.attrs.update(attributes)
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip" if np.ndim(value) else None, track_times=False)
    write_whole(path, content)


def write_whole(path: Path, content: io.BytesIO) -> None:
    """Writes a file, or leaves nothing. Two processes may do it at once: each puts a whole file there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.getbuffer())
        os.replace(temporary, path)
    except OSError as error:
        advice = "; EXPO_CACHE_DIR names another folder" if path.is_relative_to(own_folder()) else ""
        raise InputError(f"{path} cannot be written ({reason(error)}){advice}") from None
    finally:
        if temporary.exists():
            temporary.unlink()


def hold(file: IO[bytes]) -> bool:
    """Whether no other process holds this open file. Then this one holds it, with its children, until they close it."""
    import fcntl  # not on Windows, where benchmark/plot.py works

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # else this disk has no locks, and nobody can know
