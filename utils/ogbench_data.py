"""OGBench's layout (npz), its published files, and its single-task environments; only the latter need the package.

A file has no rewards: the environment's task gives them (`relabel`), with the package's own rule. The last row of every
trajectory is there for its observation only.
"""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator

from utils.errors import InputError
from utils.files import check_finite, check_size, reason

BASE = "https://rail.eecs.berkeley.edu/datasets/ogbench/"
REQUIRED = ("observations", "actions", "terminals")
STATE_KEYS = ("qpos", "qvel", "button_states")


def locate(name: str) -> tuple[Path, str]:
    """Where `ogbench:NAME` lies (or would lie) on this machine, as the ogbench package has it, and its address."""
    if not name or not all(c.isalnum() or c in "-_." for c in name):
        raise InputError(f"ogbench:{name} is no name of an OGBench data set (as in ogbench:cube-single-play-v0)")
    folder = Path(os.environ.get("OGBENCH_DATA_DIR") or Path.home() / ".ogbench" / "data").expanduser()
    return folder / f"{name}.npz", f"{BASE}{name}.npz"


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file in D4RL's form (see `utils.d4rl`), rewards 0 until a task relabels them."""
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        with np.load(path, allow_pickle=False) as file:
            for key in REQUIRED:
                if key not in file:
                    raise InputError(f"{path} has no {key!r} (it has: {', '.join(file.files[:12]) or 'nothing'})")
            for key in (*REQUIRED, *STATE_KEYS):
                if key in file:
                    check_size((sizes.get(key, 0),), np.dtype(np.uint8), key, str(path))
                    array = file[key]
                    with np.errstate(over="ignore"):  # an infinity, which the next check names
                        arrays[key] = array.astype(np.float32) if array.dtype == np.float64 else array
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, SyntaxError) as error:
        raise InputError(f"{path} is not a complete npz file of plain arrays ({reason(error)})") from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise InputError(f"{path} is a damaged npz file ({reason(error)})") from None
    flags = arrays.pop("terminals")
    if flags.ndim == 0 or flags.size != len(flags) or flags.dtype.kind not in "fiub":
        raise InputError(f"{path}: 'terminals' is {flags.dtype} of shape {flags.shape}; one number a row is needed")
    check_finite(flags, "terminals", str(path))
    ends = flags.reshape(-1) != 0
    zeros = np.zeros(len(ends), np.float32)
    return arrays | {"rewards": zeros, "terminals": zeros.astype(bool), "ends": ends, "fillers": ends}


class SingleTask(gym.Wrapper):
    """An OGBench single-task environment that relabels OGBench's play data for itself."""

    def __init__(self, env: gym.Env, name: str):
        super().__init__(env)
        self.name = name
        # The package makes its spaces anew whenever they are asked for: here that would be at every step.
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def close(self) -> None:
        """Frees the renderer too, which the package leaves to the end of the process, when it is too late."""
        renderer = getattr(self.env.unwrapped, "_renderer", None)
        if renderer is not None:
            renderer.close()
        super().close()

    def relabel(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rewards, terminals and success of this task, from the states in the file, by the package's own rule."""
        from ogbench.relabel_utils import relabel_dataset  # pyright: ignore[reportMissingImports]

        data: dict[str, Any] = {key: arrays[key] for key in STATE_KEYS if key in arrays}
        needed = ("qpos",) if "cube" in self.name else STATE_KEYS[::2]
        missing = [key for key in needed if key not in data]
        if missing:
            raise InputError(f"the data has no {missing[0]!r}, which the rewards of {self.name} are made from")
        nq = self.env.unwrapped.model.nq  # pyright: ignore[reportAttributeAccessIssue]
        if data["qpos"].ndim != 2 or data["qpos"].shape[1] != nq:
            raise InputError(f"'qpos' has shape {data['qpos'].shape}; {self.name} has {nq} coordinates: another task?")
        try:
            relabel_dataset(self.name, self.env, data)
        except (ValueError, IndexError) as error:
            raise InputError(f"the data does not fit {self.name} ({reason(error)})") from None
        solved = data["masks"] == 0
        return arrays | {"rewards": data["rewards"], "terminals": solved, "infos/success": solved}


def make(name: str, render_mode: str | None = None) -> gym.Env:
    """The single-task environment `name`; gymnasium registers this function as expo/OGBenchCubeSingle-v0 and so on."""
    import ogbench  # noqa: F401  # pyright: ignore[reportMissingImports]

    spec = gym.spec(name)
    entry = load_env_creator(str(spec.entry_point))
    return SingleTask(entry(**spec.kwargs, render_mode=render_mode), name)  # pyright: ignore[reportArgumentType]
