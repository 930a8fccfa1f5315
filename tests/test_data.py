"""Offline data: every layout by values worked out by hand, and one line that names the place for every damage."""

import hashlib
import json
import multiprocessing
import os
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils import InputError, pointmaze
from utils.arrays import Dataset, Transitions, write_d4rl
from utils.data import find_file, load_dataset, read_dataset
from utils.envs import make_env
from utils.problems import find_problems
from utils.robosuite_env import Robosuite
from utils.tasks import OBS_KEYS, TASKS

Tree = dict[str, Any]  # what is in a file: path -> array
MAZES = ("umaze", "medium", "large")


class TwoParts(gym.Env):
    """Observations in two parts; the space names "z" first."""

    observation_space = gym.spaces.Dict([("z", gym.spaces.Box(-9, 9, (1,))), ("a", gym.spaces.Box(-9, 9, (2,)))])
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)


def rescaled(**_: Any) -> gym.Env:
    """Pendulum, whose torque goes to +-2, behind a wrapper of the user's own that takes +-1."""
    return gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-1), np.float32(1))


gym.register("TwoParts-v0", TwoParts, max_episode_steps=5)
gym.register("Rescaled-v0", rescaled, max_episode_steps=5)


@pytest.fixture(scope="module")
def pendulum():
    return make_env("Pendulum-v1")  # 3 observations, 1 action within +-2, a limit of 200


def write(path: Path, tree: Tree, **attributes: Any) -> Path:
    """An HDF5 file, or npz if the name says so; an empty dict is an empty group."""
    if path.suffix == ".npz":
        np.savez(path, **{key: value for key, value in tree.items() if not isinstance(value, dict)})
        return path
    with h5py.File(path, "w") as file:
        for key, value in tree.items():
            if isinstance(value, dict):
                file.create_group(key)
            else:
                file[key] = value
        if "data" in file:
            file["data"].attrs.update(attributes)
    return path


def read(*paths: Path, env: Any = None, obs_keys: tuple[str, ...] = ()) -> Dataset:
    data = read_dataset([str(path) for path in paths], env, obs_keys)
    check_whole(data)
    return data


def check_whole(data: Dataset) -> None:
    """What every data set must be, whatever its file looked like."""
    n, rows = len(data.rows.obs), data.rows
    assert n > 0 and rows.obs.shape == rows.next_obs.shape and rows.obs.ndim == rows.actions.ndim == 2
    assert len(rows.actions) == n and rows.rewards.shape == rows.terminations.shape == (n,)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in rows)
    assert set(np.unique(rows.terminations)) <= {0, 1}
    starts, stops = data.episodes.T
    assert starts[0] == 0 and stops[-1] == n and (starts[1:] == stops[:-1]).all() and (stops > starts).all()
    assert data.success is None or data.success.shape == (len(data.episodes),)


def refused(*specs: object, env: Any = None, obs_keys: tuple[str, ...] = ()) -> str:
    """The one line that a user reads."""
    with pytest.raises(InputError) as caught:
        read_dataset([str(spec) for spec in specs], env, obs_keys)
    assert str(caught.value).strip() and "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- the layouts


def d4rl() -> Tree:
    """Four episodes: rows 0-2 end at a terminal, 3-4 and 5 by time, and 6-7 because the file ends."""
    return {
        "observations": np.arange(8, dtype=np.float32)[:, None] * np.float32([1, 10]),
        "actions": np.linspace(-0.7, 0.7, 8, dtype=np.float32)[:, None],
        "rewards": np.arange(8, dtype=np.float32) * 2,
        "terminals": np.arange(8) == 2,
        "timeouts": np.isin(np.arange(8), [4, 5]),
        "infos/success": np.isin(np.arange(8), [1, 5]),
    }


def minari() -> Tree:
    """Eleven episodes, so that episode_10 comes before episode_2 in the file; the odd ones end at a terminal."""
    tree: Tree = {}
    for i in range(11):
        steps, group = 1 + i % 3, f"episode_{i}"
        tree[f"{group}/observations/a"] = np.stack([np.full(steps + 1, i), np.arange(steps + 1)], axis=1)
        tree[f"{group}/observations/z"] = np.full((steps + 1, 1), -i)
        tree[f"{group}/actions"], tree[f"{group}/rewards"] = np.full((steps, 1), i / 20), np.full(steps, float(i))
        tree[f"{group}/terminations"] = np.arange(steps) == (steps - 1 if i % 2 else -1)
        tree[f"{group}/infos/success"] = np.arange(steps + 1) == steps * (i % 2)  # T + 1 values: the first is at reset
    return tree


def robomimic() -> Tree:
    """Twelve demonstrations of two steps; the even ones succeed in their last step, the others run out of time."""
    tree: Tree = {}
    for i in range(12):
        for key, width in zip(OBS_KEYS, (3, 4, 2, 10), strict=True):
            tree[f"data/demo_{i}/obs/{key}"] = np.stack([np.full(width, i), np.full(width, i + 0.25)])
            tree[f"data/demo_{i}/next_obs/{key}"] = np.stack([np.full(width, i + 0.25), np.full(width, i + 0.5)])
        tree[f"data/demo_{i}/actions"] = np.full((2, 7), i / 20)
        tree[f"data/demo_{i}/rewards"], tree[f"data/demo_{i}/dones"] = np.array([0, 1.0 - i % 2]), np.array([0, 1])
    return tree


def ogbench() -> Tree:
    """Two trajectories of 3 and 2 rows; the last row of each is there for its observation only."""
    return {
        "observations": np.arange(5, dtype=np.float32)[:, None] * np.float32([1, 2]),
        "actions": np.linspace(-1, 1, 5, dtype=np.float32)[:, None],
        "terminals": np.isin(np.arange(5), [2, 4]),
        "qpos": np.ones((5, 21), np.float32),
    }


LAYOUTS: dict[str, tuple[Callable[[], Tree], str]] = {
    "d4rl": (d4rl, "a.hdf5"),
    "npz": (d4rl, "a.npz"),
    "minari": (minari, "main_data.hdf5"),
    "robomimic": (robomimic, "low_dim.hdf5"),
    "ogbench": (ogbench, "play.npz"),
}


@pytest.mark.parametrize("kind", ["hdf5", "npz", "columns"])
def test_flat_arrays(tmp_path, kind):
    """A1: an npz of D4RL's keys means what HDF5 of these keys means. Flags may be columns, and numbers doubles."""
    tree = d4rl()
    if kind == "columns":
        tree = {key: value[:, None] if value.ndim == 1 else value.astype(float) for key, value in tree.items()}
    data = read(write(tmp_path / f"a.{kind.replace('columns', 'hdf5')}", tree))
    assert data.rows.obs.tolist() == [[0, 0], [1, 10], [2, 20], [3, 30], [6, 60]]
    assert data.rows.next_obs[[0, 1, 3, 4], 0].tolist() == [1, 2, 4, 7]  # row 2 is terminal: its successor is unused
    assert data.rows.actions[:, 0] == pytest.approx([-0.7, -0.5, -0.3, -0.1, 0.5])
    assert data.rows.rewards.tolist() == [0, 2, 4, 6, 12] and data.rows.terminations.tolist() == [0, 0, 1, 0, 0]
    assert data.episodes.tolist() == [[0, 3], [3, 4], [4, 5]] and data.dropped == 3
    assert data.success is not None and data.success.tolist() == [True, False, False]


@pytest.mark.parametrize("suffix", ["hdf5", "npz"])
def test_next_observations_keep_the_rows_that_end_by_time(tmp_path, suffix):
    tree = d4rl()
    tree["next_observations"] = tree["observations"] + 0.5
    data = read(write(tmp_path / f"a.{suffix}", tree))
    assert np.array_equal(data.rows.next_obs, tree["next_observations"]) and data.dropped == 0
    assert data.rows.terminations.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]  # a time limit is never terminal
    assert data.episodes.tolist() == [[0, 3], [3, 5], [5, 6], [6, 8]]


def test_masks_say_which_ends_are_terminal(tmp_path):
    """OGBench's word: `terminals` end a trajectory for any reason, and masks of 0 are terminal."""
    tree = d4rl() | {"masks": (np.arange(8) != 4).astype(float), "terminals": np.isin(np.arange(8), [2, 4])}
    data = read(write(tmp_path / "a.npz", tree))
    assert data.rows.terminations.tolist() == [0, 0, 0, 1, 0] and data.rows.rewards.tolist() == [0, 2, 6, 8, 12]


@pytest.mark.parametrize("own", [False, True], ids=["next row", "next_observations"])
def test_a_terminal_row_with_its_true_successor_ends_no_episode(tmp_path, own):
    """A6: D4RL's AntMaze stays at the goal, rewarded and terminal, until its time is over."""
    walk = np.concatenate([np.arange(8), np.arange(100, 108)])[:, None].astype(np.float32)
    tree = {"observations": walk, "actions": walk * 0, "rewards": np.isin(np.arange(16), [4, 5, 6]) * 1.0}
    tree |= {"terminals": tree["rewards"] > 0, "timeouts": np.isin(np.arange(16), [7, 15])}
    tree |= {"next_observations": walk + 1} if own else {}
    data = read(write(tmp_path / "a.hdf5", tree))
    assert data.episodes.tolist() == ([[0, 8], [8, 16]] if own else [[0, 7], [7, 14]])
    assert np.flatnonzero(data.rows.terminations).tolist() == [4, 5, 6]


def test_minari(tmp_path):
    path = tmp_path / "data" / "main_data.hdf5"
    path.parent.mkdir()
    write(path, minari())
    for env, columns in ((None, [0, 1, 2]), (make_env("TwoParts-v0"), [2, 0, 1])):  # A2: by name, or as the space says
        data = read(tmp_path, env=env)
        assert len(data.episodes) == 11 and data.dropped == 0 and len(data.rows.obs) == 21
        for i, (start, stop) in enumerate(data.episodes):  # by number: episode_10 is the last one
            expected = np.array([[i, t, -i] for t in range(stop - start + 1)])[:, columns]
            assert np.array_equal(data.rows.obs[start:stop], expected[:-1])
            assert np.array_equal(data.rows.next_obs[start:stop], expected[1:])
            assert (data.rows.rewards[start:stop] == i).all() and data.rows.terminations[start:stop].sum() == i % 2
        assert data.success is not None and data.success.tolist() == [i % 2 == 1 for i in range(11)]


def test_minari_numbered_parts_go_by_number(tmp_path):
    tree = {f"episode_0/observations/{i}": np.full((3, 1), i) for i in range(12)}
    tree |= {"episode_0/actions": np.zeros((2, 1)), "episode_0/rewards": np.zeros(2), "episode_0/terminations": [0, 0]}
    assert read(write(tmp_path / "main_data.hdf5", tree)).rows.obs[0].tolist() == list(range(12))


def test_robomimic(tmp_path):
    tree = robomimic()
    whole = read(write(tmp_path / "a.hdf5", tree))
    assert whole.rows.obs[:, 0].tolist() == [i + part for i in range(12) for part in (0, 0.25)]  # demo_10 after demo_9
    assert whole.rows.next_obs[:, 18].tolist() == [i + part for i in range(12) for part in (0.25, 0.5)]
    assert whole.rows.obs.shape == (24, 19) and whole.rows.actions.shape == (24, 7) and whole.dropped == 0
    assert whole.rows.terminations.tolist() == [0, 1, 0, 0] * 6  # done without success is a time limit
    assert whole.success is not None and whole.success.tolist() == [True, False] * 6
    less = {key: value for key, value in tree.items() if "next_obs" not in key}
    data = read(write(tmp_path / "b.hdf5", less))  # a last row has no successor now: it stays only if it is terminal
    assert data.dropped == 6 and data.rows.terminations.tolist() == [0, 1, 0] * 6
    other = read(write(tmp_path / "c.hdf5", tree), obs_keys=("object", "robot0_eef_pos"))
    assert np.array_equal(other.rows.obs, np.concatenate([whole.rows.obs[:, 9:], whole.rows.obs[:, :3]], axis=1))


def test_ogbench(tmp_path):
    data = read(write(tmp_path / "play.npz", ogbench()))
    assert data.rows.obs[:, 0].tolist() == [0, 1, 3] and data.rows.next_obs[:, 0].tolist() == [1, 2, 4]
    assert data.episodes.tolist() == [[0, 2], [2, 3]] and not data.rows.terminations.any()


def test_several_files_are_joined(tmp_path):
    paths = [write(tmp_path / f"{i}.hdf5", {**d4rl(), "rewards": np.full(8, i)}) for i in range(3)]
    parts, data = [read(path) for path in paths], read(*paths)
    assert data.rows.rewards.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and data.dropped == 9
    assert data.episodes.tolist() == [[a + 5 * i, b + 5 * i] for i in range(3) for a, b in parts[0].episodes]
    silent = write(tmp_path / "silent.hdf5", {key: value for key, value in d4rl().items() if "success" not in key})
    assert read(*paths, silent).success is None  # one file does not say, so nobody knows the share


def test_goal_achieved_is_success(tmp_path):
    tree = d4rl()
    tree["infos/goal_achieved"] = tree.pop("infos/success")
    assert read(write(tmp_path / "a.hdf5", tree)).success is not None


def test_a_task_relabels_before_rows_are_chosen(tmp_path):
    class Task(gym.Wrapper):
        def relabel(self, arrays):
            return arrays | {"rewards": -arrays["rewards"], "terminals": np.arange(8) == 4}

    env = Task(make_env("Pendulum-v1"))
    env.observation_space = gym.spaces.Box(-1, 1, (2,))
    data = read(write(tmp_path / "a.hdf5", d4rl()), env=env)
    assert data.rows.rewards.tolist() == [0, -2, -6, -8, -12]  # row 2 ended an episode, and is not terminal any more
    assert data.rows.terminations.tolist() == [0, 0, 0, 1, 0]


def test_actions_are_rescaled_from_the_bounds_that_the_user_sees(tmp_path, pendulum):
    """A5: the bounds are those of `gymnasium.make`, not those of the innermost simulator."""
    tree = pendulum_arrays() | {"actions": np.linspace(-1, 1, 20)[:, None]}
    tree["next_observations"] = tree["observations"]
    inner, outer = (read(write(tmp_path / "a.hdf5", tree), env=env) for env in (pendulum, make_env("Rescaled-v0")))
    assert inner.rows.actions == pytest.approx(tree["actions"] / 2, abs=1e-6)
    assert outer.rows.actions == pytest.approx(tree["actions"], abs=2e-5)
    assert outer.rows.actions.max() == -outer.rows.actions.min() == np.float32(1 - 1e-5)


def test_printed_lines(tmp_path, capsys, pendulum):
    path = write(tmp_path / "a.hdf5", {**pendulum_arrays(), "infos/success": np.arange(20) < 5, "rewards": np.ones(20)})
    obs, actions, rewards, next_obs, terminations = load_dataset([str(path)], pendulum)
    assert [array.shape for array in (obs, actions, next_obs)] == [(18, 3), (18, 1), (18, 3)]
    assert rewards.shape == terminations.shape == (18,)
    assert capsys.readouterr().out.splitlines() == [
        f"data: 18 transitions in 2 episodes, 50.0% of them successful ({path})",
        "data: warning: every reward is 1",
    ]


def some_rows(n: int = 40, **changes: np.ndarray) -> Dataset:
    obs = np.random.default_rng(0).normal(size=(n + 1, 2)).cumsum(axis=0).astype(np.float32)
    columns = dict(obs=obs[:-1], actions=obs[1:, :1] * 0.01, rewards=obs[1:, 0], next_obs=obs[1:])
    rows = Transitions(**(columns | {"terminations": np.zeros(n, np.float32)} | changes))
    return Dataset(rows, np.array([[0, n // 2], [n // 2, n]]), None, 0)


def test_problems():
    """A7: what a run prints at its start, and `inspect` too."""
    good, env = some_rows(), types.SimpleNamespace(spec=types.SimpleNamespace(max_episode_steps=20))
    assert find_problems(good, env) == []  # pyright: ignore
    env.spec.max_episode_steps = 15
    assert find_problems(good, env) == ["2 episodes exceed the limit of 15, up to 20"]  # pyright: ignore
    one = Dataset(good.rows, np.array([[0, 40]]), np.array([False]), 0)
    assert find_problems(one) == ["one single episode: are the 'timeouts' missing?", "no successful episode"]
    assert find_problems(Dataset(good.rows, np.array([[0, 1], [1, 40]]), None, 0)) == ["1 episodes of one transition"]
    jump = good.rows.next_obs.copy()
    jump[7, 1] += 500
    assert "1 transitions jump, up to" in find_problems(some_rows(next_obs=jump))[0]
    assert find_problems(some_rows(next_obs=jump, terminations=np.float32(np.arange(40) == 7))) == []
    still = np.where(np.arange(40)[:, None] < 3, good.rows.obs, good.rows.next_obs)
    assert find_problems(some_rows(next_obs=still)) == ["3 transitions do not change the observation"]
    assert find_problems(some_rows(actions=np.zeros((40, 2)))) == ["constant action dimensions: 0, 1"]


# --------------------------------------------------------------------------------------------------------- bad files


def pendulum_arrays(rows: int = 20) -> Tree:
    """Good data of two episodes for Pendulum-v1."""
    rng = np.random.default_rng(0)
    tree = {"observations": rng.normal(size=(rows, 3)), "actions": rng.uniform(-2, 2, (rows, 1))}
    tree |= {"rewards": rng.normal(size=rows), "terminals": np.zeros(rows, bool)}
    return tree | {"timeouts": np.isin(np.arange(rows), [rows // 2 - 1, rows - 1])}


def wrong(key: str, value: Any, rows: slice) -> Callable[[Tree], Tree]:
    """Puts a value into some rows of one array. No row is dropped, so that row numbers are those of the file."""

    def change(tree: Tree) -> Tree:
        tree["next_observations"] = tree["observations"].copy()
        tree[key][rows] = value
        return tree

    return change


def with_(**arrays: Any) -> Callable[[Tree], Tree]:
    return lambda tree: tree | arrays


def without(key: str) -> Callable[[Tree], Tree]:
    return lambda tree: {name: value for name, value in tree.items() if name != key}


BROKEN: list[tuple[Callable[[Tree], Tree], tuple[str, ...]]] = [
    *((without(key), (f"has no {key!r}", "it has: ")) for key in ("observations", "actions", "rewards", "terminals")),
    (with_(actions=np.zeros((19, 1))), ("'actions'", "(19, 1)", "(20, 3)")),
    (with_(rewards=np.zeros(21)), ("'rewards'", "(21,)", "(20,) or (20, 1)")),
    (with_(terminals=np.zeros(19)), ("'terminals'", "(19,)")),
    (with_(timeouts=np.zeros(21)), ("'timeouts'", "(21,)")),
    (with_(next_observations=np.zeros((20, 2))), ("'next_observations'", "(20, 2)")),
    *((wrong("observations", x, slice(13, 15)), ("'observations'", "6 values", str(x), "row 13")) for x in (np.nan,)),
    (wrong("actions", -np.inf, slice(13, 15)), ("'actions'", "2 values", "-inf", "row 13")),
    (wrong("rewards", 1e300, slice(4, 5)), ("'rewards'", "1 values", "inf", "row 4")),  # too large for float32
    (wrong("next_observations", np.inf, slice(19, 20)), ("'next_observations'", "inf", "row 19")),
    (wrong("actions", 2.1, slice(17, 20)), ("3 rows", "2.1", "transition 17", "dimension 0", "-2 to 2")),
    (with_(observations=np.zeros((20, 4))), ("observations are 4 wide, the environment's 3",)),
    (with_(actions=np.zeros((20, 2))), ("actions are 2 wide, the environment's 1",)),
    (with_(observations=np.zeros(20)), ("'observations'", "(20,)")),
    (with_(actions=np.zeros((20, 1, 1))), ("'actions'", "(20, 1, 1)")),
    (with_(rewards=np.zeros((20, 2))), ("'rewards'", "(20, 2)")),
    (with_(rewards=np.array(1.0)), ("'rewards'", "()")),
    (lambda tree: {key: value[:0] for key, value in tree.items()}, ("is empty",)),
    (with_(timeouts=np.ones(20, bool)), ("no complete transition",)),
    (lambda tree: {key: value[:1] for key, value in tree.items()}, ("no complete transition",)),
    (with_(rewards=np.array([b"much"] * 20)), ("'rewards'", "not numbers")),
    (lambda tree: without("actions")(tree) | {"actions/inner": np.zeros(3)}, ("'actions'", "group")),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=[words[0] for _, words in BROKEN])
def test_broken_arrays(tmp_path, pendulum, change, words):
    """The second of two files is the bad one, and the line names it."""
    good, bad = (
        write(tmp_path / "good.hdf5", pendulum_arrays()),
        write(tmp_path / "bad.hdf5", change(pendulum_arrays())),
    )
    line = refused(good, bad, env=pendulum)
    assert line.startswith(f"{bad}: ") and all(word in line for word in words), line


def test_broken_files(tmp_path, pendulum):
    path = write(tmp_path / "cut.hdf5", pendulum_arrays(2000))
    content = path.read_bytes()
    for share in (0, 0.1, 0.6, 0.95):
        path.write_bytes(content[: int(share * len(content))])
        assert "not a complete HDF5 file" in refused(path, env=pendulum)
    for wrong_content in (b"observations,actions\n1,2\n" * 500, b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", os.urandom(5000)):
        path.write_bytes(wrong_content)
        assert "not a complete" in refused(path, env=pendulum)
    path = write(tmp_path / "cut.npz", pendulum_arrays(2000))
    path.write_bytes(path.read_bytes()[:-400])
    assert "not a complete" in refused(path)


def test_damaged_chunk(tmp_path):
    """The file opens, but the numbers cannot be read."""
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, value in pendulum_arrays(2000).items():
            file.create_dataset(key, data=value, compression="gzip")
        offset = file["observations"].id.get_chunk_info(0).byte_offset  # pyright: ignore
    content = bytearray((tmp_path / "a.hdf5").read_bytes())
    content[offset + 10 : offset + 60] = bytes(50)
    (tmp_path / "a.hdf5").write_bytes(content)
    assert "'observations' cannot be read" in refused(tmp_path / "a.hdf5")


def test_arrays_larger_than_memory(tmp_path):
    """A file of a few kB can declare an array of terabytes."""
    path = write(tmp_path / "a.hdf5", without("observations")(d4rl()))
    with h5py.File(path, "a") as file:
        file.create_dataset("observations", (10**9, 10**4), np.float32, chunks=(1, 10**4))
    assert "'observations' cannot be read" in refused(path)
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999,), }"
    path = write(tmp_path / "a.npz", without("rewards")(d4rl()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("rewards.npy", header.ljust(128) + b"\n")
    assert "'rewards' cannot be read" in refused(path)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    for tree in (d4rl(), ogbench()):
        np.savez(tmp_path / "a.npz", **tree | {"observations": np.array([Trap()] * len(tree["actions"]), object)})
        assert "'observations'" in refused(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.hdf5", "no such file"),
        ("", "folder"),
        ("generated:pointmaze-huge", "generated:pointmaze-medium"),
        ("d4rl:door-superhuman-v1", "door-human-v1"),
        ("robomimic:fly/ph", "lift/ph"),
        *((f"minari:{name}", "no name of a data set") for name in ("../../etc", "a//b", "/etc/passwd", "")),
        ("ogbench:../up", "no name of a data set"),
        ("minari:D4RL/door/human-v2", "run: python tools/data.py download minari:D4RL/door/human-v2"),
        ("d4rl:door-human-v1", "door-human-v1.hdf5); run: python tools/data.py download d4rl:door-human-v1"),
        ("ogbench:scene-play-v0", "scene-play-v0.npz); run: python tools/data.py download"),
        ("robomimic:can/ph", "low_dim_v15.hdf5); run: python tools/data.py download"),
    ],
)
def test_words_and_paths_that_lead_nowhere(tmp_path, monkeypatch, spec, words):
    for name in ("D4RL_DATASET_DIR", "MINARI_DATASETS_PATH", "OGBENCH_DATA_DIR", "EXPO_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    assert words in refused(spec or tmp_path) and not list(tmp_path.iterdir())


def test_no_data_at_all():
    with pytest.raises(InputError, match="--dataset"):
        read_dataset([])


def test_published_words_find_their_files(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write(tmp_path / "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5", d4rl())
    assert len(read_dataset(["d4rl:antmaze-large-diverse-v2"]).rows.obs) == 5
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "D4RL/x/y-v0/data").mkdir(parents=True)
    write(tmp_path / "D4RL/x/y-v0/data/main_data.hdf5", minari())
    assert len(read_dataset(["minari:D4RL/x/y-v0"]).episodes) == 11


def test_minari_in_the_arrow_format_is_refused(tmp_path):
    (tmp_path / "data" / "0").mkdir(parents=True)
    (tmp_path / "data" / "0" / "data-0.arrow").write_bytes(b"ARROW1")
    assert "without a Minari data set in HDF5 format" in refused(tmp_path)


def test_group_layouts_that_do_not_fit(tmp_path):
    tree, rows = minari(), {"episode_1/rewards": np.zeros(5)}
    assert "'episode_1/rewards' has shape (5,)" in refused(write(tmp_path / "a.hdf5", tree | rows))
    assert "episode 2" in refused(write(tmp_path / "a.hdf5", tree | {"episode_2/observations/a": np.zeros((4, 5))}))
    assert "no 'nothing'; choose --obs-keys from: object" in refused(
        write(tmp_path / "b.hdf5", robomimic()), obs_keys=("nothing",)
    )
    raw = {"data/demo_1/states": np.zeros((3, 32)), "data/demo_1/actions": np.zeros((3, 7))}
    assert "dataset_states_to_obs.py" in refused(write(tmp_path / "c.hdf5", raw))
    assert "has no groups demo_0" in refused(write(tmp_path / "d.hdf5", {"data": {}}))


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ({"env_name": "PickPlaceCan"}, ("env_name PickPlaceCan", "Lift")),
        ({"env_kwargs": {"control_freq": 10}}, ("control_freq 10", "20")),
        ({"env_kwargs": {"reward_shaping": True}}, ("reward_shaping True", "False")),
        ({"env_kwargs": {"controller_configs": {"control_delta": False}}}, ("control_delta False",)),
        ({"env_kwargs": {"controller_configs": {"body_parts": {"right": {"kp": 300}}}}}, ("kp 300", "150")),
    ],
)
def test_robomimic_data_of_another_task_or_controller(tmp_path, recorded, words):
    """A4, without the simulator: only its name and its controller matter here."""
    env = Robosuite.__new__(Robosuite)
    env.name, env.arm, env.observation_space = "Lift", {"kp": 150, "output_max": 1}, gym.spaces.Box(-1, 1, (19,))
    env.action_space = gym.spaces.Box(-1, 1, (7,))
    path = write(tmp_path / "a.hdf5", robomimic(), env_args=json.dumps({"env_name": "Lift"} | recorded))
    assert all(word in refused(path, env=env) for word in words)
    path = write(tmp_path / "a.hdf5", robomimic(), env_args=json.dumps({"env_name": "Lift"}))
    data = read(path, env=env)  # every demonstration ends at its first success
    assert data.rows.rewards.tolist() == data.rows.terminations.tolist() == [0, 1, 0, 0] * 6


def mutate(tree: Tree, key: str, draw: Callable) -> None:
    """One thing that can be wrong with one array of a file."""
    value = np.asarray(tree[key])
    special = value.astype(float)
    special.flat[draw(st.integers(0, max(value.size - 1, 0)))] = draw(st.sampled_from([np.nan, -np.inf, 1e300]))
    kinds = (value[..., None], value.reshape(-1), value[: len(value) // 2], value[:0], np.array(1.0), special, {})
    kinds += (np.concatenate([value, value]), value.astype(complex), np.full(value.shape, b"text"), value.astype("i1"))
    choice = draw(st.integers(-2, len(kinds) - 1))
    if choice == -1:
        del tree[key]
    elif choice == -2:
        more = draw(st.sampled_from(["data", "episode_3", "episode_x", "data/demo_5", "mask"]))
        tree[more] = draw(st.sampled_from([np.zeros(3), {}]))
    else:
        tree[key] = kinds[choice]


def check_malformed(layout: str, folder: Path, draw: Callable) -> None:
    """A malformed file gives one line, or whole rows."""
    tree, path = LAYOUTS[layout][0](), folder / LAYOUTS[layout][1]
    for key in draw(st.lists(st.sampled_from(sorted(tree)), max_size=3, unique=True)):
        mutate(tree, key, draw)
    try:
        write(path, tree, env_args=draw(st.sampled_from(["{", "[1]", '{"env_name": 3}', "x" * 60_000])))
    except (ValueError, OSError, TypeError, KeyError):
        return  # these mutations do not go together
    content = bytearray(path.read_bytes())
    for _ in range(draw(st.sampled_from([0, 0, 1, 8]))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    path.write_bytes(content[: draw(st.sampled_from([len(content), len(content), len(content) // 2]))])
    try:
        read(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


OPTIONS: dict[str, Any] = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, derandomize=True, **OPTIONS)
@given(choice=st.data())
def test_malformed_files(layout, tmp_path, choice):
    check_malformed(layout, tmp_path, choice.draw)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=1500, **OPTIONS)
@given(choice=st.data())
def test_very_many_malformed_files(layout, tmp_path, choice):
    check_malformed(layout, tmp_path, choice.draw)


# ---------------------------------------------------------------------------------------------------- generated data

HASHES = {"umaze": "9c1d7ee74a724863", "medium": "fe9acd47cca756f0", "large": "c6df1e6bfc9abe17"}


@pytest.mark.parametrize("maze", MAZES)
def test_generated_data(maze):
    """Every number of the quickstart's data is pinned; it fits its environment, and its flags fit each other."""
    name, digest = f"pointmaze-{maze}", hashlib.sha256()
    task, path = TASKS[name], find_file(f"generated:{name}")
    arrays: Tree = {}
    with h5py.File(path) as file:
        file.visititems(lambda key, item: arrays.update({key: item[()]}) if isinstance(item, h5py.Dataset) else None)
    for key in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts", "infos/success"):
        digest.update(arrays[key].tobytes())
    if mujoco.__version__ == "3.11.0":  # another version may round otherwise
        assert digest.hexdigest()[:16] == HASHES[maze]
    ends, limit = arrays["terminals"] | arrays["timeouts"], task.settings["max_episode_steps"]
    assert np.array_equal(arrays["terminals"], arrays["infos/success"]) and ends.sum() == 60 and ends[-1]
    assert np.array_equal(arrays["next_observations"][:-1][~ends[:-1]], arrays["observations"][1:][~ends[:-1]])
    lengths = np.diff(np.flatnonzero(ends), prepend=-1)
    assert lengths.max() == limit and (lengths[arrays["timeouts"][ends]] == limit).all()
    env = make_env(task.env_id, name, limit, task.settings["action_repeat"])
    data = read_dataset([f"generated:{name}"], env)
    check_whole(data)
    assert data.dropped == 0 and data.success is not None and 0.1 < data.success.mean() < 0.6
    rng = np.random.default_rng(0)
    for i in rng.choice(np.flatnonzero(np.roll(ends, 1)), 2):  # first rows: a replay from the reset gives the same
        env.reset(seed=int(ends[:i].sum()))
        for row in range(i, i + 3):
            np.testing.assert_array_equal(env.step(arrays["actions"][row])[0], arrays["next_observations"][row])


def test_generated_data_is_made_once_and_by_two_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPO_CACHE_DIR", str(tmp_path))
    context = multiprocessing.get_context("fork")
    both, generate = context.Barrier(2), pointmaze.generate

    def at_once(*args: Any) -> Tree:
        arrays = generate(*args)
        both.wait(60)
        return arrays

    monkeypatch.setattr(pointmaze, "generate", at_once)
    processes = [context.Process(target=pointmaze.demonstrations, args=("pointmaze-umaze", None, 2)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (path,) = tmp_path.iterdir()  # one whole file, and no leftover
    monkeypatch.setattr(pointmaze, "generate", lambda *_: pytest.fail("made again"))
    assert pointmaze.demonstrations("pointmaze-umaze", None, 2) == path and len(read_dataset([str(path)]).episodes) == 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.hdf5"
    with pytest.raises(TypeError):
        write_d4rl(path, {"observations": np.zeros(3), "bad": np.array([object()])}, {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EXPO_CACHE_DIR", str(tmp_path / "file" / "cache"))
    line = refused("generated:pointmaze-umaze")
    assert "cannot be written" in line and "EXPO_CACHE_DIR" in line


def test_generated_data_for_actions_of_another_length():
    task = TASKS["pointmaze-umaze"]
    line = refused("generated:pointmaze-umaze", env=make_env(task.env_id, "pointmaze-umaze", 24, 5))
    assert "--action-repeat 5: generated:pointmaze-umaze was made with 10" in line
