"""Files: the cache folder, writing all or nothing, and reading HDF5 arrays with one-line errors."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from utils.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None


def cache_dir() -> Path:
    """Where generated and downloaded data lies: `EXPO_CACHE_DIR`, else `~/.cache/expo`."""
    return Path(os.environ.get("EXPO_CACHE_DIR") or Path.home() / ".cache" / "expo")


@contextlib.contextmanager
def atomic_write(path: Path, advice: str = "set EXPO_CACHE_DIR") -> Iterator[Path]:
    """Yields a temporary path, put on the disk and renamed to `path` if the block succeeds: readers see all or nothing.

    Raises:
        InputError: the folder cannot be written; it ends with `advice`.
        OSError: the disk is full, or fails; `path` is as before.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written ({error.strerror}); {advice}") from None
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds the lock of an existing file or folder; it falls with the process, `kill -9` included.

    Where the system or the file system knows no locks, there is none.

    Raises:
        BlockingIOError: another process holds it and `wait` is False.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def making(path: Path) -> Iterator[bool]:
    """Yields whether `path` has to be made; one process a folder at a time: who waits finds it made."""
    if path.exists():
        yield False
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written ({error.strerror}); set EXPO_CACHE_DIR") from None
    with locked(path.parent):
        yield not path.exists()


def reason(error: BaseException) -> str:
    """The first line of an exception's text, cut to 100 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


def human_size(count: float) -> str:
    """Bytes for people: 812 B, 1.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The open file; anything that h5py finds wrong with it, then or while it is read, is an InputError."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give an HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise InputError(f"{path} is not a complete HDF5 file ({reason(error)})") from None


def read_array(group: h5py.Group, key: str, source: str) -> np.ndarray:
    """The numeric array `key` of a group; float64 comes back as float32, so that it is never held twice.

    Raises:
        InputError: it is absent, a group, not numbers, larger than memory, or cannot be read.
    """
    item = dataset(group, key, source)
    kind = np.dtype(np.float32) if item.dtype.kind == "f" else item.dtype
    check_size(item.shape, kind, key, source)
    try:
        array = np.empty(item.shape, kind)
        if item.shape == ():
            array[()] = item[()]
        elif array.size:
            item.read_direct(array)
        return array
    except (OSError, ValueError, TypeError, MemoryError) as error:
        raise InputError(f"{source}: {key!r} cannot be read ({reason(error)})") from None


def dataset(group: h5py.Group, key: str, source: str) -> h5py.Dataset:
    """The HDF5 dataset `key` of a group, checked to hold numbers."""
    if key not in group:
        raise InputError(f"{source} has no {key!r} (it has: {', '.join(list(group)[:12]) or 'nothing'})")
    item = group[key]
    if not isinstance(item, h5py.Dataset):
        raise InputError(f"{source}: {key!r} is a group; an array is needed there")
    if item.shape is None or item.dtype.kind not in "fiub":
        raise InputError(f"{source}: {key!r} holds {item.dtype if item.shape is not None else 'nothing'}, not numbers")
    return item


def numbered_groups(parent: Any, prefix: str, source: str) -> list[tuple[str, h5py.Group]]:
    """The groups `prefix`0, 1, 2, ... of a file, in the order of their numbers, each with its name for errors."""
    found = {}
    for key in parent:
        if key.startswith(prefix) and key[len(prefix) :].isdecimal() and len(key) < len(prefix) + 16:
            found[int(key[len(prefix) :])] = key
    groups = []
    for number in sorted(found):
        group = parent[found[number]]
        if not isinstance(group, h5py.Group):
            raise InputError(f"{source}: {found[number]!r} is an array; this layout has a group there")
        groups.append((f"{source}, {found[number]}", group))
    if not groups:
        raise InputError(f"{source} has no {prefix}0, {prefix}1, ...")
    return groups


def check_size(shape: tuple[int, ...], kind: np.dtype, key: str, source: str) -> None:
    """Raises InputError for an array that cannot fit into this machine's memory."""
    size = kind.itemsize * int(np.prod([int(length) for length in shape], dtype=object))
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return
    if size > memory:
        raise InputError(f"{source}: {key!r} is {human_size(size)}; this machine has {human_size(memory)} of memory")


def check_finite(array: np.ndarray, key: str, source: str) -> None:
    """Raises InputError that names the first row with NaN, an infinite value, or one too large for float32."""
    if array.dtype.kind != "f":
        return
    limit, first, count = np.finfo(np.float32).max, -1, 0
    for start in range(0, len(array), 65_536):  # in blocks, so that no copy of the whole is made
        bad = ~(np.abs(array[start : start + 65_536]) <= limit)
        if bad.any() and first < 0:
            first = start + int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
            value = array[first].reshape(-1)[bad[first - start].reshape(-1)][0]
        count += int(bad.sum())
    if count:
        raise InputError(
            f"{source}: {key!r} has {count:,} values that are not finite, the first {value} in row {first:,}"
        )


def json_attribute(attributes: Any, key: str) -> dict[str, Any]:
    """The JSON object stored as text in an HDF5 attribute; {} where there is none or it is not JSON."""
    try:
        value = attributes.get(key, "{}")
        result = json.loads(value.decode() if isinstance(value, bytes) else value)
    except (ValueError, TypeError, AttributeError, OSError, RecursionError):
        return {}
    return result if isinstance(result, dict) else {}
