"""OGBench's play data made at home: `python tools/data.py generate ogbench-cube-single`.

As in OGBench's play data sets, a trajectory has no task. The package's own planning oracle, with temporally correlated
noise, carries out one random target after the other. The file has OGBench's npz layout, with the states that a task's
rewards are made from.
"""

import io
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from tools.files import own_folder, write_whole
from utils import InputError

KINDS = {  # the package's env id, and the oracles for the targets that occur in it
    "cube-single": ("cube-single-v0", ("cube",)),
    "cube-double": ("cube-double-v0", ("cube",)),
    "scene": ("scene-v0", ("cube", "button", "drawer", "window")),
    "puzzle-3x3": ("puzzle-3x3-v0", ("button",)),
}
_worker: dict[str, Any] = {}  # a process's own environment and oracles


def generate(name: str, episodes: int, seed: int = 0, processes: int = 0, steps: int = 1_000) -> Path:
    """Path of the generated data; made if it is not there, the same for any number of processes.

    Args:
        name: cube-single, cube-double, scene or puzzle-3x3.
        episodes: how many trajectories.
        seed: of environment and oracles.
        processes: side by side; 0 takes one per CPU core.
        steps: transitions of each trajectory; OGBench has 1000.
    """
    if name not in KINDS:
        raise InputError(f"ogbench-{name} is unknown (known: {', '.join(f'ogbench-{kind}' for kind in KINDS)})")
    try:
        import ogbench  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("OGBench's oracles need its package: pip install -r requirements-ogbench.txt") from None
    path = own_folder() / "ogbench" / f"{name}-play-{episodes}x{steps}-seed{seed}.npz"
    if path.exists():
        return path
    processes = min(processes or os.cpu_count() or 1, episodes)
    jobs = [(seed * 1_000_003 + episode, steps) for episode in range(episodes)]
    context = multiprocessing.get_context("spawn")
    label = f"{name}, {processes} processes"
    try:
        with ProcessPoolExecutor(processes, context, _start, (name,)) as pool:
            parts = list(tqdm(pool.map(_episode, jobs), total=episodes, desc=label, unit="episode", disable=None))
    except BrokenProcessPool:  # a process that cannot make its environment has said why on stderr
        raise InputError(f"the processes that make ogbench-{name} ended before they were done") from None
    arrays: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    np.savez_compressed(content := io.BytesIO(), **arrays)
    write_whole(path, content)
    return path


def _start(name: str) -> None:
    """Makes a process's environment and oracles."""
    import ogbench  # noqa: F401  # pyright: ignore[reportMissingImports]
    from ogbench.manipspace.oracles.plan import (  # pyright: ignore[reportMissingImports]
        button_plan,
        cube_plan,
        drawer_plan,
        window_plan,
    )

    warnings.simplefilter("ignore")  # of float64 bounds cast to float32
    gym.logger.min_level = gym.logger.ERROR
    env_id, targets = KINDS[name]
    env = gym.make(env_id, terminate_at_goal=False, mode="data_collection", max_episode_steps=-1, visualize_info=False)
    classes = {
        "cube": cube_plan.CubePlanOracle,
        "button": button_plan.ButtonPlanOracle,
        "drawer": drawer_plan.DrawerPlanOracle,
        "window": window_plan.WindowPlanOracle,
    }
    options = {"button": {"gripper_always_closed": True}} if name.startswith("puzzle") else {}
    _worker["env"] = env
    _worker["oracles"] = {key: classes[key](env=env, **options.get(key, {})) for key in targets}


def _episode(job: tuple[int, int]) -> dict[str, np.ndarray]:
    """One trajectory; one in which a thing flies off the table (it happens) is made again with another seed."""
    seed, steps = job
    for attempt in range(100):
        rows = _attempt((seed + attempt * 7_919_000_003) % 2**32, steps)
        if rows is not None:
            return rows
    raise RuntimeError(f"no healthy trajectory in 100 attempts from seed {seed}")


def _attempt(seed: int, steps: int) -> dict[str, np.ndarray] | None:
    env, oracles = _worker["env"], _worker["oracles"]
    np.random.seed(seed)  # noqa: NPY002 - the oracles draw from numpy's global generator
    obs, info = env.reset(seed=seed)
    oracle = _next_oracle(oracles, obs, info)
    keys = ("observations", "actions", "terminals", "qpos", "qvel")
    rows: dict[str, list[Any]] = {key: [] for key in (*keys, *(["button_states"] if "button_states" in info else []))}
    for step in range(steps + 1):  # the last row is there for its observation
        action = np.clip(oracle.select_action(obs, info), -1, 1)
        next_obs, _, _, _, next_info = env.step(action)
        rows["observations"].append(obs)
        rows["actions"].append(action)
        rows["terminals"].append(step == steps)
        for key in list(rows)[3:]:
            rows[key].append(next_info[f"prev_{key}"])
        obs, info = next_obs, next_info
        blocks = [info[key] for key in info if key.startswith("privileged/block_") and key.endswith("_pos")]
        if any(not (np.abs(block) < 1).all() or block[2] < -0.1 for block in blocks):
            return None
        if oracle.done:
            obs, info = env.unwrapped.set_new_target()
            oracle = _next_oracle(oracles, obs, info)
    types = {"terminals": bool, "button_states": np.int64}
    return {key: np.array(values, types.get(key, np.float32)) for key, values in rows.items()}


def _next_oracle(oracles: dict[str, Any], obs: np.ndarray, info: dict[str, Any]) -> Any:
    """The oracle for the present target, ready to go."""
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(obs, info)
    return oracle
