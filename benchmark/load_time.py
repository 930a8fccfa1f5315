"""Seconds and peak memory of loading a data set of 1,000,000 rows, for every layout.

    python -m benchmark.load_time [--rows 1000000]

Random numbers in the shapes of D4RL's large AntMaze (29 + 8) are written to a temporary folder and loaded in a process
of its own. "arrays" is the size of what comes out (observations, actions, rewards, next observations, terminations);
"peak" is what the process grew by while it loaded.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import tyro

from utils import data

WIDTHS, EPISODE = (29, 8), 1000


def columns(rows: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(rows, WIDTHS[0])).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, WIDTHS[1])).astype(np.float32),
        "rewards": np.zeros(rows, np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % EPISODE == EPISODE - 1,
    }


def write(layout: str, path: Path, rows: int) -> None:
    """A file of the layout with `rows` rows in episodes of 1000."""
    if layout == "d4rl":
        data.write_d4rl(path, columns(rows, 0), {})
    elif layout == "ogbench":
        arrays = columns(rows, 0)
        np.savez_compressed(
            path, observations=arrays["observations"], actions=arrays["actions"], terminals=arrays["timeouts"]
        )
    else:
        with h5py.File(path, "w") as file:
            for i in range(rows // EPISODE):
                part = columns(EPISODE + 1, i)
                group = file.create_group(f"episode_{i}" if layout == "minari" else f"data/demo_{i}")
                group["actions"], group["rewards"] = part["actions"][1:], part["rewards"][1:]
                if layout == "minari":
                    group["observations"] = part["observations"].astype(np.float64)
                    group["terminations"], group["truncations"] = part["terminals"][1:], part["timeouts"][1:]
                else:
                    group["obs/object"], group["next_obs/object"] = part["observations"][:-1], part["observations"][1:]
                    group["dones"] = part["timeouts"][1:]


def memory(field: str) -> int:
    """This process's memory in bytes, now ("VmRSS") or at most so far ("VmHWM"); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def load(path: Path, queue) -> None:
    """Loads and reports (rows, bytes of the arrays, seconds, growth of the process's peak memory in bytes)."""
    before, start = memory("VmRSS"), time.perf_counter()
    rows = data.read(path, obs_keys=("object",))
    seconds = time.perf_counter() - start
    peak = memory("VmHWM") - before
    arrays = (rows.obs, rows.actions, rows.rewards, rows.next_obs, rows.terminations)
    queue.put((len(rows), sum(array.nbytes for array in arrays), seconds, peak))


def measure(layout: str, rows: int, folder: Path) -> tuple[int, int, float, int]:
    """What `load` reports, from a fresh process."""
    path = folder / ("play.npz" if layout == "ogbench" else f"{layout}.hdf5")
    write(layout, path, rows)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=load, args=(path, queue))
    process.start()
    result = queue.get()
    process.join()
    path.unlink()
    return result


def main(rows: int = 1_000_000) -> None:
    """Prints a table."""
    print(f"{'layout':<10} {'rows':>9} {'seconds':>8} {'arrays':>9} {'peak':>9} {'peak/arrays':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for layout in ("d4rl", "ogbench", "minari", "robomimic"):
            count, size, seconds, peak = measure(layout, rows, Path(folder))
            sizes = f"{size / 1e6:>6.0f} MB {peak / 1e6:>6.0f} MB {peak / size:>12.2f}"
            print(f"{layout:<10} {count:>9,} {seconds:>8.2f} {sizes}")


if __name__ == "__main__":
    tyro.cli(main)
