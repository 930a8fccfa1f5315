"""How well the rows of a D4RL file and a task's simulator agree: `python tools/data.py replay FILE --task NAME`."""

from typing import Any

import h5py
import mujoco
import numpy as np
from tqdm import tqdm

from utils import InputError
from utils.arrays import Arrays, check, numbers
from utils.data import find_ends, read
from utils.envs import make_env
from utils.sources import find_file, split_count
from utils.tasks import TASKS

# What a file must have, beside the observations, to put a task's simulator into the state of a row.
STATES = {
    "antmaze": (),  # its observation is its state
    "pen": ("qpos", "qvel", "desired_orien"),
    "door": ("qpos", "qvel", "door_body_pos"),
    "relocate": ("qpos", "qvel", "obj_pos", "target_pos"),
    "hammer": ("qpos", "qvel", "board_pos"),
}


def replay(file: str, task: str, count: int = 2_000, seed: int = 0) -> dict[str, np.ndarray]:
    """Sets the simulator to the states of random rows, applies each row's action, and compares with the next row.

    Args:
        file: a D4RL-layout file, or a word of --dataset that names one.
        task: a task whose simulator can be set to a row (`antmaze-*`, `adroit-*`).
        count: how many rows to try.
        seed: of the choice of rows.

    Returns:
        error: (m,) largest error of a position coordinate (m and rad) one step later.
        contact: (m,) bool, whether anything touched anything in that step.
        success: (m,) bool, whether the simulator's success is that of the file; empty where the file has none.
    """
    kind = next((kind for kind in STATES if kind in task.split("-")), "")
    if task not in TASKS or not kind:
        known = ", ".join(name for name in TASKS if name.startswith(("antmaze", "adroit")))
        raise InputError(f"--task {task!r}: only these can be set to the state of a row: {known}")
    rows = read_rows(file, STATES[kind])
    env = make_env(TASKS[task].env_id, task)
    for key, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if rows[key].shape[1:] != space.shape:
            raise InputError(f"{file}: {key} are {rows[key].shape[1]} wide, those of {task} {(space.shape or (0,))[0]}")
    candidates = np.flatnonzero(~rows["ends"])
    if not len(candidates):
        raise InputError(f"{file}: no row has a successor")
    env.reset(seed=seed)
    simulator: Any = env.unwrapped
    substeps, simulator.frame_skip = simulator.frame_skip, 1  # one by one, to see every contact
    result: dict[str, list[Any]] = {"error": [], "contact": [], "success": []}
    for i in tqdm(np.random.default_rng(seed).permutation(candidates)[:count], desc="replay", unit="row", disable=None):
        set_row(simulator, kind, rows, i + 1)
        expected = simulator.data.qpos.copy()
        set_row(simulator, kind, rows, i)
        contact, info = simulator.data.ncon > 0, {}
        for _ in range(substeps):
            *_, info = simulator.step(rows["actions"][i])
            contact |= simulator.data.ncon > 0
        result["error"].append(np.abs(simulator.data.qpos - expected).max())
        result["contact"].append(contact)
        if "infos/success" in rows:
            result["success"].append(bool(info["success"]) == bool(rows["infos/success"][i]))
    env.close()
    return {key: np.array(values) for key, values in result.items()}


def read_rows(name: str, state: tuple[str, ...]) -> Arrays:
    """Checked flat arrays of a whole file, its `state` arrays, and the first row of the episode of every row."""
    path = find_file(name)
    if split_count(name)[1]:
        raise InputError(f"{name}: give the file without a count; all of its episodes are read")
    try:
        rows = read(path)
        if state:
            with h5py.File(path, "r") as file:
                rows |= {f"infos/{key}": numbers(file, f"infos/{key}") for key in state}
        check(rows)
    except (InputError, OSError) as error:
        raise InputError(f"{path}: {error}") from None
    find_ends(rows)
    starts = np.concatenate([[0], np.flatnonzero(rows["ends"])[:-1] + 1])
    rows["first"] = starts[np.cumsum(rows["ends"]) - rows["ends"]]
    return rows


def set_row(simulator: Any, kind: str, rows: Arrays, i: int) -> None:
    """Puts the simulator into the state of row `i`."""
    if kind == "antmaze":
        obs = rows["observations"][i].astype(float)
        mujoco.mj_resetData(simulator.model, simulator.data)  # pyright: ignore[reportAttributeAccessIssue]
        simulator.set_state(obs[:15], obs[15:])
        return
    state = {key: rows[f"infos/{key}"][i].astype(float) for key in STATES[kind]}
    if kind == "relocate":  # the simulator wants the ball's first position, and adds the movement that is in qpos
        state["obj_pos"] = rows["infos/obj_pos"][rows["first"][i]].astype(float)
    simulator.set_env_state(state)


def report(file: str, task: str, count: int, seed: int) -> None:
    """Prints the errors, for free motion, for contact, and for all rows."""
    result = replay(file, task, count, seed)
    error, contact = result["error"], result["contact"]
    print(f"{file} on {task}, mujoco {mujoco.__version__}: largest position error one step later (m, rad)")
    print(f"  {'':<12} {'rows':>6}  {'median':>8}  {'90 %':>8}  {'worst':>8}")
    for label, mask in (("free motion", ~contact), ("contact", contact), ("all", np.ones(len(error), bool))):
        if mask.any():
            median, most, worst = np.quantile(error[mask], [0.5, 0.9, 1])
            print(f"  {label:<12} {mask.sum():>6}  {median:8.1e}  {most:8.1e}  {worst:8.1e}")
    if len(result["success"]):
        print(f"  success as in the file in {result['success'].sum()} of {len(error)} rows")
