"""How well a data set's rows and a task's simulator agree: the one-step error of the positions."""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils import d4rl
from utils.data import check_arrays, resolve
from utils.envs import make_env
from utils.errors import InputError
from utils.tasks import TASKS


def replay(file: str, task: str, rows: int = 2_000, seed: int = 0) -> dict[str, np.ndarray]:
    """Sets the simulator to the state of random rows, applies the row's action, and compares with the next row.

    Args:
        file: a D4RL-layout file, or a word of `--dataset` that names one.
        task: a task whose simulator can be set to a row (`antmaze-*`, `adroit-*`).
        rows: how many rows to try.
        seed: of the choice of rows.

    Returns:
        error: (m,) largest error of a position coordinate (m and rad) one step later.
        contact: (m,) bool, whether anything touched anything in that step.
        success: (m,) bool, whether the simulator's success is the file's, of the rows where the file has one.
    """
    if task not in TASKS:
        raise InputError(f"--task {task!r} is unknown (known: {', '.join(TASKS)})")
    env: Any = make_env(TASKS[task].env_id, TASKS[task].env_kwargs)
    try:
        set_row = env.get_wrapper_attr("set_row")
    except AttributeError:
        raise InputError(f"{task} cannot be set to a row's state; antmaze-* and adroit-* can") from None
    path = resolve(file)
    names = ("qpos", "qvel", "desired_orien", "door_body_pos", "obj_pos", "target_pos", "board_pos")
    arrays = check_arrays(d4rl.read(path, tuple(f"infos/{name}" for name in names)), str(path))
    widths = {"observations": env.observation_space.shape[0], "actions": env.action_space.shape[0]}
    for key, width in widths.items():
        if arrays[key].shape[1] != width:
            raise InputError(f"{file}: {key} are {arrays[key].shape[1]} wide, those of {task} {width}")
    candidates = np.flatnonzero(~arrays["ends"])
    chosen = np.random.default_rng(seed).permutation(candidates)[:rows]
    if not len(chosen):
        raise InputError(f"{file}: no row has a successor")
    env.reset(seed=seed)
    simulator = env.unwrapped
    substeps, simulator.frame_skip = simulator.frame_skip, 1  # one by one, to see every contact
    result: dict[str, list[Any]] = {"error": [], "contact": [], "success": []}
    for i in tqdm(chosen, desc="replay", unit="row", disable=None):
        set_row(arrays, i + 1)
        expected = simulator.data.qpos.copy()
        set_row(arrays, i)
        contact, info = simulator.data.ncon > 0, {}
        for _ in range(substeps):
            *_, info = simulator.step(arrays["actions"][i])
            contact |= simulator.data.ncon > 0
        result["error"].append(np.abs(simulator.data.qpos - expected).max())
        result["contact"].append(contact)
        if "infos/success" in arrays:
            result["success"].append(bool(info["success"]) == bool(arrays["infos/success"][i]))
    env.close()
    return {key: np.array(values) for key, values in result.items()}


def report(file: str, task: str, rows: int, seed: int) -> None:
    """Prints the errors, for free motion, for contact, and for all rows."""
    import mujoco

    result = replay(file, task, rows, seed)
    error, contact = result["error"], result["contact"]
    name = Path(file).name if Path(file).exists() else file
    print(f"{name} on {task}, mujoco {mujoco.__version__}: largest position error one step later (m, rad)")
    print(f"  {'':<12} {'rows':>6}  {'median':>8}  {'90 %':>8}  {'worst':>8}")
    for label, mask in (("free motion", ~contact), ("contact", contact), ("all", np.ones(len(error), bool))):
        if mask.any():
            median, most, worst = np.quantile(error[mask], [0.5, 0.9, 1])
            print(f"  {label:<12} {mask.sum():>6}  {median:8.1e}  {most:8.1e}  {worst:8.1e}")
    if len(result["success"]):
        print(f"  success as in the file in {result['success'].sum()} of {len(error)} rows")
