"""Offline data in memory, and its arrays in files, read and checked with one-line errors."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import h5py
import numpy as np

from utils import InputError, reason

Arrays = dict[str, np.ndarray]
FLAGS = ("rewards", "terminals", "timeouts", "masks", "infos/success", "infos/goal_achieved", "ends")


class Transitions(NamedTuple):
    """n steps as float32 arrays. Actions lie in [-1, 1]. A time limit is never a termination."""

    obs: np.ndarray  # (n, O)
    actions: np.ndarray  # (n, A)
    rewards: np.ndarray  # (n,) as in the file: scale and shift are the script's business
    next_obs: np.ndarray  # (n, O)
    terminations: np.ndarray  # (n,) 1 where the task itself ended the episode


@dataclass
class Dataset:
    rows: Transitions
    episodes: np.ndarray  # (m, 2) the first row of each episode, and one past its last
    success: np.ndarray | None  # (m,) bool, or None where the file does not say
    dropped: int  # rows of the file that were left out because their successor is not in it


@np.errstate(over="ignore")  # too large for float32: `check` finds the infinity
def numbers(group: Any, key: str, rows: int | None = None) -> np.ndarray:
    """The array `key` of an HDF5 group or npz file, with so many `rows`; floats become float32 while they are read."""
    name = f"{getattr(group, 'name', '')}/{key}".strip("/")
    if key not in group:
        raise InputError(f"has no {name!r} (it has: {', '.join(list(group)[:12]) or 'nothing'})")
    try:
        item = group[key]
        if isinstance(item, h5py.Group) or getattr(item, "is_virtual", False):  # HDF5 reads zeros where a part is gone
            raise TypeError("it is a group, or virtual; a plain array is needed there")
        array = np.asarray(item.astype(np.float32)[()] if item.dtype.kind == "f" else item[()])
    except Exception as error:  # h5py and numpy raise many kinds for a damaged array
        raise InputError(f"{name!r} cannot be read ({reason(error)})") from error
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name!r} holds {array.dtype}, not numbers")
    if rows is not None and array.shape[:1] != (rows,):
        raise InputError(f"{name!r} has shape {array.shape}; {rows} rows are needed beside the actions")
    return array


def check(arrays: Arrays) -> None:
    """Raises InputError for flat arrays that cannot be right; gives flags of shape (n, 1) the shape (n,)."""
    wide = arrays["observations"].shape
    n = max(wide[:1], default=0)
    if n == 0:
        raise InputError("is empty: it has no rows")
    for key, value in arrays.items():
        fits = value.size == n if key in FLAGS else value.ndim == 2 and value.size > 0
        if value.shape[:1] != (n,) or not fits or (key == "next_observations" and value.shape != wide):
            wanted = f"({n},) or ({n}, 1)" if key in FLAGS else f"({n}, width)"
            raise InputError(f"{key!r} has shape {value.shape}; {wanted} is needed, as 'observations' has {wide}")
        bad = ~np.isfinite(value.reshape(n, -1))
        if bad.any():
            row, first = bad.any(axis=1).argmax(), value.reshape(n, -1)[bad][0]
            raise InputError(f"{key!r} has {bad.sum():,} values that are not finite, the first {first} in row {row:,}")
        arrays[key] = value.reshape(n) if key in FLAGS else value
