"""Offline data: every layout by values worked out by hand, and one line that names the place for every damage."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import conftest
import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest
from gymnasium.spaces import Box

import demonstrations
from tools.files import write_d4rl
from utils.arrays import Dataset, Transitions
from utils.data import load_dataset, read_dataset
from utils.envs import make_env
from utils.problems import find_problems
from utils.robosuite_env import Robosuite
from utils.tasks import OBS_KEYS, TASKS

FILES = Path(__file__).parent / "data"  # small real ones: its README.md
REACH_FILE = FILES / "minari" / "reach" / "dict-v0" / "data" / "main_data.hdf5"
Tree = dict[str, Any]  # what is in a file: path -> array


def write(path: Path, tree: Tree, **attributes: Any) -> Path:
    """An HDF5 file, or npz if the name says so. An empty dict is an empty group."""
    if path.suffix == ".npz":
        np.savez(path, **tree)
        return path
    with h5py.File(path, "w") as file:
        for key, value in tree.items():
            file.create_group(key) if isinstance(value, dict) else file.create_dataset(key, data=value)
        if "data" in file:
            file["data"].attrs.update(attributes)
    return path


def read(*paths: Path, env: Any = None, obs_keys: tuple[str, ...] = ()) -> Dataset:
    """The data set, with what every data set must be, whatever its file looked like."""
    data = read_dataset([str(path) for path in paths], env, obs_keys)
    n, rows = len(data.rows.obs), data.rows
    assert n > 0 and rows.obs.shape == rows.next_obs.shape and rows.obs.ndim == rows.actions.ndim == 2
    assert len(rows.actions) == n and rows.rewards.shape == rows.terminations.shape == (n,)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in rows)
    starts, stops = data.episodes.T
    assert starts[0] == 0 and stops[-1] == n and (starts[1:] == stops[:-1]).all() and (stops > starts).all()
    assert data.success is None or data.success.shape == (len(data.episodes),)
    return data


def refused(*specs: object, env: Any = None, obs_keys: tuple[str, ...] = ()) -> str:
    return conftest.refused(read_dataset, list(map(str, specs)), env, obs_keys)


def d4rl() -> Tree:
    """Four episodes: rows 0-2 end at a terminal, 3-4 and 5 by time, and 6-7 because the file ends."""
    tree: Tree = {"observations": np.arange(8, dtype=np.float32)[:, None] * np.array([1, 10], np.float32)}
    tree |= {"actions": np.linspace(-0.7, 0.7, 8, dtype=np.float32)[:, None], "rewards": np.arange(8) * 2.0}
    for key, rows in (("terminals", [2]), ("timeouts", [4, 5]), ("infos/success", [1, 5])):
        tree[key] = np.isin(np.arange(8), rows)
    return tree | {"infos/success": np.where(tree["infos/success"], 1, -1)}  # below 0 is no success


def robomimic() -> Tree:
    """Twelve demonstrations of two steps; the even ones succeed in their last step, the others run out of time."""
    tree: Tree = {}
    for i in range(12):
        for key, width in zip(OBS_KEYS, (3, 4, 2, 10), strict=True):
            states = np.repeat([[i], [i + 0.25], [i + 0.5]], width, axis=1)
            tree[f"data/demo_{i}/obs/{key}"], tree[f"data/demo_{i}/next_obs/{key}"] = states[:-1], states[1:]
        tree[f"data/demo_{i}/actions"], tree[f"data/demo_{i}/dones"] = np.full((2, 7), i / 20), np.array([0, 1])
        tree[f"data/demo_{i}/rewards"] = np.array([0, 1.0 - i % 2])
    return tree


def ogbench() -> Tree:
    """Two trajectories of 3 and 2 rows; the last row of each is there for its observation only."""
    obs, last = np.arange(5, dtype=np.float32)[:, None], np.isin(np.arange(5), [2, 4])
    return {"observations": obs, "actions": obs / 5, "terminals": last, "qpos": np.ones((5, 21), np.float32)}


@pytest.mark.parametrize("kind", ["hdf5", "npz", "columns"])
def test_flat_arrays(tmp_path, kind):
    """A1: an npz of D4RL's keys means what HDF5 of these keys means. Flags may be columns, and numbers doubles."""
    tree, path = d4rl(), tmp_path / ("a.npz" if kind == "npz" else "a.hdf5")
    if kind == "columns":
        tree = {key: value[:, None] if value.ndim == 1 else value.astype(float) for key, value in tree.items()}
    data = read(write(path, tree))
    assert data.rows.obs.tolist() == [[0, 0], [1, 10], [2, 20], [3, 30], [6, 60]]
    assert data.rows.next_obs[[0, 1, 3, 4], 0].tolist() == [1, 2, 4, 7]  # row 2 is terminal: its successor is unused
    assert data.rows.actions[:, 0] == pytest.approx([-0.7, -0.5, -0.3, -0.1, 0.5])
    assert data.rows.rewards.tolist() == [0, 2, 4, 6, 12] and data.rows.terminations.tolist() == [0, 0, 1, 0, 0]
    assert data.episodes.tolist() == [[0, 3], [3, 4], [4, 5]] and data.dropped == 3
    assert data.success is not None and data.success.tolist() == [True, False, False]
    tree |= {"next_observations": tree["observations"] + 0.5, "data": np.ones(3), "episode_1": np.ones(3)}
    data = read(write(path, tree))  # now every row has a successor, but a time limit is never terminal
    assert np.array_equal(data.rows.next_obs, tree["next_observations"]) and data.dropped == 0
    assert data.rows.terminations.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert data.episodes.tolist() == [[0, 3], [3, 5], [5, 6], [6, 8]]
    data = read(write(path, tree | {"masks": (np.arange(8) != 4) * 1.0, "terminals": tree["timeouts"]}))
    assert data.rows.terminations.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]  # with OGBench's masks, those of 0 are terminal


@pytest.mark.parametrize("own", [False, True], ids=["next row", "next_observations"])
def test_a_terminal_row_with_its_true_successor_ends_no_episode(tmp_path, own):
    """A6: D4RL's AntMaze stays at the goal, rewarded and terminal, until its time is over."""
    walk = np.concatenate([np.arange(8), np.arange(100, 108)])[:, None].astype(np.float32)
    tree = {"observations": walk, "actions": walk * 0, "rewards": np.isin(np.arange(16), [4, 5, 6]) * 1.0}
    tree |= {"terminals": tree["rewards"], "timeouts": np.isin(np.arange(16), [7, 15])}
    data = read(write(tmp_path / "a.hdf5", tree | ({"next_observations": walk + 1} if own else {})))
    assert data.episodes.tolist() == ([[0, 8], [8, 16]] if own else [[0, 7], [7, 14]])
    assert np.flatnonzero(data.rows.terminations).tolist() == [4, 5, 6]


def test_minari_by_number_and_by_name(tmp_path):
    """A2: episode_10 comes after episode_2, and without an environment the parts of an observation stand by name."""
    path = Path(shutil.copy(REACH_FILE, tmp_path))
    with h5py.File(path, "a") as file:
        file.move("episode_0", "episode_10")
        file.move("episode_1", "episode_2")
    data = read(path)
    assert data.episodes.tolist() == [[0, 8], [8, 10]]
    assert data.rows.obs[:, 3] == pytest.approx(np.abs(data.rows.obs[:, :2]).max(axis=1))  # z after a
    plain = Path(shutil.copy(FILES / "minari/reach/plain-v0/data/main_data.hdf5", tmp_path))
    flat = read(plain)
    with h5py.File(plain, "a") as file:  # as of spaces with more dimensions
        for key in [f"episode_{i}/{name}" for i in (0, 1) for name in ("observations", "actions")]:
            values: Any = file.pop(key)
            file[key] = values[()][:, None]
    assert all(np.array_equal(*arrays) for arrays in zip(read(plain).rows, flat.rows, strict=True))


# The observations of the recorded files (tests/data/README.md): a step moves by half of an action.
REACH = {"tuple": gym.spaces.Tuple([Box(-9, 9, (2,)), Box(-9, 9, (1,))]), "plain": Box(-9, 9, (2,))}
REACH["dict"] = gym.spaces.Dict([("z", Box(-9, 9, (1,))), ("a", REACH["tuple"])])


@pytest.mark.parametrize(("kind", "x"), [("dict", slice(1, 3)), ("tuple", slice(0, 2)), ("plain", slice(0, 2))])
def test_minaris_own_recorder(kind, x, monkeypatch):
    """A2, by folder and by ID: a row is a step of the environment, and columns stand as Gymnasium flattens them."""
    env: Any = gym.Wrapper(make_env("Pendulum-v1"))
    env.native, env.observation_space = gym.Wrapper(gym.make("Pendulum-v1")), gym.spaces.flatten_space(REACH[kind])
    env.native.observation_space, env.native.action_space = REACH[kind], Box(-2, 2, (2,))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(FILES / "minari"))
    data = read(FILES / f"minari/reach/{kind}-v0", env=env)
    rows = load_dataset([f"minari:reach/{kind}-v0"], env)
    assert all(np.array_equal(one, other) for one, other in zip(rows, data.rows, strict=True))
    assert rows.next_obs[:, x] == pytest.approx(rows.obs[:, x] + rows.actions, abs=1e-4)  # 2 / 2: [-1, 1] means +-2
    near = np.abs(rows.obs[:, x]).max(axis=1)
    assert kind == "plain" or rows.obs[:, 0 if kind == "dict" else 2] == pytest.approx(near)
    assert kind != "dict" or rows.obs[:, 3] == pytest.approx(-near)
    assert data.success is not None and data.success.tolist() == [True, False]
    assert rows.terminations.nonzero()[0].tolist() == [data.episodes[0, 1] - 1]


def test_data_of_another_environment(tmp_path):
    """A3: Minari says which environment it recorded. Here it is another maze, at one simulator step a row."""
    maze = make_env("PointMaze_UMaze-v3", "pointmaze-umaze", 24, 10)
    path, wanted = FILES / "minari/maze/large-v0", ("in PointMaze_Large-v3", "continuing_task", "maze_map", "lasts 10")
    notes, same = find_problems(read(path, env=maze), maze, [str(path)]), make_env("PointMaze_Large-v3")
    assert all(words in note for words, note in zip(wanted, notes, strict=False))
    assert find_problems(read(path, env=same), same, [str(path)]) == notes[4:]
    known: Any = same.spec
    known.kwargs["maze_map"] = tuple(map(tuple, known.kwargs["maze_map"]))  # JSON knows lists only
    assert find_problems(read(path, env=same), same, [str(path)]) == notes[4:]
    pendulum, path = make_env("Pendulum-v1"), write(tmp_path / "a.hdf5", pendulum_arrays())
    usual = find_problems(read(path), pendulum, [str(path)])
    for spec, high, said in (
        ({"kwargs": {"g": 10.0}, "additional_wrappers": [{"name": "FlattenObservation"}]}, 2, []),  # 10 is the default
        ({"kwargs": {"g": 1.0}}, 2, ["another g than the task's"]),
        ({"additional_wrappers": [{"name": "Rescale"}]}, 1, ["other bounds of actions", "the wrapper Rescale, which"]),
    ):
        with h5py.File(path, "a") as file:
            file.attrs["env_spec"] = json.dumps({"id": "Pendulum-v1"} | spec)
            file.attrs["action_space"] = json.dumps({"low": [-high], "high": [high]})
        problems = find_problems(read(path), pendulum, [str(path)])
        assert problems[len(said) :] == usual and len(problems) == len(said) + len(usual)
        assert all(problem.startswith(f"recorded with {words}") for problem, words in zip(problems, said, strict=False))
    odd: Any = make_env("Rescaled-v0")  # its own wrapper, and arguments that JSON cannot write
    odd.spec.kwargs["layout"] = {(0, 1): "wall"}
    path = write(tmp_path / "b.hdf5", pendulum_arrays() | {"actions": np.linspace(-0.5, 0.5, 20)[:, None]})
    assert find_problems(read(path, env=odd), odd, [str(path)]) == ["2 episodes exceed the limit of 5, up to 9"]
    with h5py.File(path, "a") as file:
        file.attrs["env_spec"] = json.dumps({"id": "Rescaled-v0", "additional_wrappers": [{"name": "RescaleAction"}]})
    assert find_problems(read(path, env=odd), odd, [str(path)])[0] == "recorded with another layout than the task's"
    order: Any = gym.Wrapper(make_env("PointMaze_Large-v3"))
    order.native = gym.Wrapper(order)
    order.native.observation_space = gym.spaces.Dict(position=Box(-9, 9, (8,)))
    assert "the environment's are position" in refused(FILES / "minari/maze/large-v0", env=order)


def test_the_first_episodes_of_a_file(tmp_path):
    path = write(tmp_path / "a.hdf5", d4rl())
    whole, two = read(path), read(Path(f"{path}:2"))
    assert two.episodes.tolist() == [[0, 3], [3, 4]] and np.array_equal(two.rows.obs, whole.rows.obs[:4])
    assert two.success is not None and two.success.tolist() == [True, False]
    assert "the first 4 episodes are asked for; it has 3" in refused(f"{path}:4")
    assert len(read(path.rename(tmp_path / "a:2")).episodes) == 3  # a file of this name


def test_robomimic(tmp_path):
    tree = robomimic()
    whole = read(write(tmp_path / "a.hdf5", tree))
    assert whole.rows.obs[:, 0].tolist() == [i + part for i in range(12) for part in (0, 0.25)]  # demo_10 after demo_9
    assert whole.rows.next_obs[:, 18].tolist() == [i + part for i in range(12) for part in (0.25, 0.5)]
    assert whole.rows.obs.shape == (24, 19) and whole.rows.actions.shape == (24, 7) and whole.dropped == 0
    assert whole.rows.terminations.tolist() == [0, 1, 0, 0] * 6  # done without success is a time limit
    assert whole.success is not None and whole.success.tolist() == [True, False] * 6
    data = read(write(tmp_path / "b.hdf5", {key: tree[key] for key in tree if "next_obs" not in key}))
    assert data.dropped == 6 and data.rows.terminations.tolist() == [0, 1, 0] * 6  # a last row needs a successor now
    other = read(tmp_path / "a.hdf5", obs_keys=("object", "robot0_eef_pos"))
    assert np.array_equal(other.rows.obs, np.concatenate([whole.rows.obs[:, 9:], whole.rows.obs[:, :3]], axis=1))


def test_ogbench(tmp_path):
    data = read(write(tmp_path / "play.npz", ogbench()))
    assert data.rows.obs[:, 0].tolist() == [0, 1, 3] and data.rows.next_obs[:, 0].tolist() == [1, 2, 4]
    assert data.episodes.tolist() == [[0, 2], [2, 3]] and not data.rows.terminations.any()
    path = write(tmp_path / "a.npz", {key: value for key, value in ogbench().items() if key != "qpos"})
    assert "has no 'rewards'" in refused(path)  # a file of one's own, and its rewards were forgotten
    assert "has no 'rewards'" in refused(tmp_path / "play.npz", env=make_env("Pendulum-v1"))  # nor has it a task


def test_several_files_are_joined(tmp_path):
    paths = [write(tmp_path / f"{i}.hdf5", {**d4rl(), "rewards": np.full(8, i)}) for i in range(3)]
    data = read(*paths)
    assert data.rows.rewards.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and data.dropped == 9
    assert data.episodes.tolist() == [[a + 5 * i, b + 5 * i] for i in range(3) for a, b in ([0, 3], [3, 4], [4, 5])]
    tree = d4rl()
    success = tree.pop("infos/success")
    assert read(*paths, write(tmp_path / "silent.hdf5", tree)).success is None  # one file does not say
    data = read(*paths, write(tmp_path / "goal.hdf5", tree | {"infos/goal_achieved": success}))
    assert data.success is not None and data.success.tolist() == [True, False, False] * 4


def rescaled(**_: Any) -> gym.Env:
    return gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-1), np.float32(1))


gym.register("Rescaled-v0", rescaled, max_episode_steps=5)


def pendulum_arrays(rows: int = 20) -> Tree:
    """Two episodes for Pendulum-v1: 3 observations, 1 action within +-2."""
    rng = np.random.default_rng(0)
    tree = {"observations": rng.normal(size=(rows, 3)), "actions": rng.uniform(-2, 2, (rows, 1))}
    tree |= {"rewards": rng.normal(size=rows), "terminals": np.zeros(rows, bool)}
    return tree | {"timeouts": np.isin(np.arange(rows), [rows // 2 - 1, rows - 1])}


def test_actions_are_rescaled_from_the_bounds_that_the_user_sees(tmp_path):
    """A5: the bounds are those of `gymnasium.make`, not those of the innermost simulator."""
    tree = pendulum_arrays() | {"actions": np.linspace(-1, 1, 20)[:, None]}
    path = write(tmp_path / "a.hdf5", tree | {"next_observations": tree["observations"]})
    inner, outer = (read(path, env=make_env(env_id)).rows.actions for env_id in ("Pendulum-v1", "Rescaled-v0"))
    assert inner == pytest.approx(tree["actions"] / 2, abs=1e-6) and outer == pytest.approx(tree["actions"], abs=2e-5)
    assert outer.max() == -outer.min() == np.float32(1 - 1e-5)


def test_printed_lines(tmp_path, capsys):
    tree = pendulum_arrays() | {"infos/success": np.arange(20) < 5, "rewards": np.ones(20)}
    path = write(tmp_path / "a.hdf5", tree)
    rows = load_dataset([str(path)], make_env("Pendulum-v1"))
    assert [array.shape for array in rows] == [(18, 3), (18, 1), (18,), (18, 3), (18,)]
    first = f"data: 18 transitions in 2 episodes, 50.0% of them successful ({path})"
    assert capsys.readouterr().out.splitlines() == [first, "data: warning: every reward is 1"]


def test_problems():
    """A7: what a run prints at its start, and `inspect` too."""
    obs, env = np.random.default_rng(0).normal(size=(41, 2)).cumsum(axis=0), make_env("Pendulum-v1", "", 15)
    following = obs[1:] + 0.01 * np.isin(np.arange(40), (14, 19, 29))[:, None]  # before the resets
    good = Transitions(obs[:-1], obs[1:, :1], obs[1:, 0], following, np.zeros(40))
    two, jump = [[0, 20], [20, 40]], following + 500 * (np.arange(80).reshape(40, 2) == 15)
    moved = obs + 6 * (np.arange(41) > 19)[:, None]  # by a reset after row 19
    after = good._replace(obs=moved[:-1], next_obs=moved[1:])
    positive = lambda **_: gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(0), np.float32(3))  # noqa: E731
    gym.register("Positive-v0", positive, max_episode_steps=15)
    cut, limited = good._replace(terminations=np.arange(40) % 15 == 14), [[0, 15], [15, 30], [30, 40]]
    for rows, episodes, there, words in (
        (good, two, None, []),
        (good, two, env, ["2 episodes exceed the limit of 15, up to 20"]),
        (cut, limited, env, ["every episode of 15 steps ends terminal"]),
        (good, [[0, 40]], None, ["one single episode: are the 'timeouts' missing?"]),
        (good._replace(next_obs=jump), two, None, ["1 transitions jump, up to"]),
        (good._replace(next_obs=jump, terminations=np.arange(40) == 7), two, None, []),  # it needs no successor
        (good._replace(next_obs=np.vstack([obs[:3], following[3:]])), two, None, ["3 transitions do not change"]),
        (good._replace(terminations=np.isin(np.arange(40), (19, 39))), two, env, ["2 episodes exceed"]),
        (after, two, None, ["episodes end with the observation after a reset"]),
        (after._replace(terminations=np.arange(40) == 19), two, None, []),  # it needs no successor
        (good._replace(next_obs=obs[1:]), two, None, []),  # nothing was reset, as where Minari's collector goes on
        (good._replace(next_obs=following.round(2)), two, None, []),
        (good._replace(terminations=np.isin(np.arange(40), (13, 27))), [[0, 14], [14, 28], [28, 40]], env, []),
        (good._replace(terminations=np.arange(40) % 20 < 11), two, None, ["most rows are terminal"]),
        (good._replace(actions=np.linspace(-0.4, 0.4, 40)[:, None]), limited, env, []),  # scaled from bounds of +-2
        (good._replace(actions=np.linspace(-0.5, 0.5, 40)[:, None]), limited, env, ["all actions are in [-1, 1]"]),
        (good._replace(actions=np.linspace(-1 / 3, 1 / 3, 40)[:, None]), limited, make_env("Positive-v0"), []),
        (good._replace(next_obs=following[::-1]), two, None, ["next_observations are not the rows that follow"]),
        (good._replace(actions=good.actions / 1e4), limited, env, ["(almost) constant action dimensions: 0"]),
        (good._replace(actions=np.zeros((40, 2))), two, None, ["(almost) constant action dimensions: 0, 1"]),
    ):
        for dropped in (0, 1):
            problems = find_problems(Dataset(rows, np.array(episodes), None, dropped), there)
            assert len(problems) == len(words) and all(map(str.startswith, problems, words)), problems


def at(row: int, value: float, *width: int) -> np.ndarray:
    """Zeros up to a row, and then the value."""
    return np.where(np.arange(20).reshape(-1, *(1 for _ in width)) < row, np.zeros((20, *width)), value)


SHAPES = [("observations", (20,)), ("actions", (20, 1, 1)), ("actions", (19, 1)), ("next_observations", (20, 2))]
SHAPES += [("rewards", (20, 2)), ("rewards", (21,)), ("rewards", ()), ("timeouts", (19,))]
BROKEN = [
    *((key, None, f"has no {key!r} (it has: ") for key in ("observations", "actions", "rewards", "terminals")),
    *((key, np.zeros(shape), f"{key!r} has shape {shape}") for key, shape in SHAPES),
    ("observations", at(13, np.nan, 3), "'observations' has 21 values that are not finite, the first nan in row 13"),
    ("actions", at(13, -np.inf, 1), "'actions' has 7 values that are not finite, the first -inf in row 13"),
    ("rewards", at(4, 1e300), "'rewards' has 16 values that are not finite, the first inf in row 4"),
    ("next_observations", at(19, np.nan, 3), "'next_observations' has 3 values that are not finite"),
    ("actions", at(7, 2.1, 1), "11 rows have actions outside the bounds, the first 2.1 in transition 7, dimension 0"),
    ("observations", np.zeros((20, 4)), "observations are 4 wide, the environment's 3"),
    ("actions", np.zeros((20, 2)), "actions are 2 wide, the environment's 1"),
    ("timeouts", np.ones(20), "no complete transition"),
    ("rewards", np.array([b"much"] * 20), "'rewards' holds |S4, not numbers"),
    ("actions", {}, "'actions' cannot be read (it is a group"),
    ("observations", np.zeros((0, 3)), "is empty"),
]


@pytest.mark.parametrize(("key", "value", "words"), BROKEN, ids=[words[:30] for _, _, words in BROKEN])
def test_broken_arrays(tmp_path, key, value, words):
    """The second of two files is the bad one, and the line names it."""
    tree = {name: array for name, array in pendulum_arrays().items() if name != key}
    good, bad = write(tmp_path / "good.hdf5", pendulum_arrays()), tmp_path / "bad.hdf5"
    write(bad, tree if value is None else tree | {key: value})
    line = refused(good, bad, env=make_env("Pendulum-v1"))
    assert line.startswith(f"{bad}: ") and words in line


def test_broken_files(tmp_path):
    path = tmp_path / "a.hdf5"
    write_d4rl(path, pendulum_arrays(2000), {})  # compressed
    with h5py.File(path) as file:
        offset = file["observations"].id.get_chunk_info(0).byte_offset  # pyright: ignore
    content = path.read_bytes()
    path.write_bytes(content[: offset + 10] + bytes(50) + content[offset + 60 :])
    assert "'observations' cannot be read" in refused(path)  # the file opens, but its numbers are damaged
    layout = h5py.VirtualLayout((20, 3), float)
    layout[:] = h5py.VirtualSource("gone.hdf5", "observations", (20, 3))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("observations", layout)
    assert "'observations' cannot be read (it is a group, or virtual" in refused(path)
    texts = b"observations,actions\n1,2\n" * 500, b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", os.urandom(5000)
    for wrong in (b"", content[: len(content) // 10], content[:-400], *texts):
        path.write_bytes(wrong)
        assert f"{path}: not a complete" in refused(path)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    for tree in (d4rl(), ogbench()):
        path = write(tmp_path / "a.npz", tree | {"observations": np.array([Trap()] * len(tree["actions"]), object)})
        assert "'observations' cannot be read" in refused(path)
    assert not (tmp_path / "sprung").exists()


NOWHERE = [
    ("nowhere.hdf5", "no such file"),
    ("arrow", "is a folder without a Minari data set in HDF5 format"),
    ("generated:pointmaze-huge", "generated:pointmaze-medium"),
    ("robomimic:fly/ph", "lift/ph"),
    ("robomimic:lift/ph:10", "run: python tools/data.py download robomimic:lift/ph"),
    ("mimicgen:stack", "stack_d0, stack_d1, threading_d0"),
    ("mimicgen:stack_d0", "run: python tools/data.py download mimicgen:stack_d0"),
    *((f"minari:{name}", "no name of a data set") for name in ("../../etc", "a//b", "/etc/passwd", "")),
    ("minari:D4RL/door/human-v2", "run: python tools/data.py download minari:D4RL/door/human-v2"),
    ("d4rl:door-human-v1", "door-human-v1.hdf5); run: python tools/data.py download d4rl:door-human-v1"),
]


def test_words_and_paths(tmp_path, monkeypatch):
    for name in ("D4RL_DATASET_DIR", "MINARI_DATASETS_PATH", "OGBENCH_DATA_DIR", "EXPO_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arrow" / "data" / "0").mkdir(parents=True)  # Minari's other format
    assert "--dataset" in refused() and all(words in refused(spec) for spec, words in NOWHERE)
    write(tmp_path / "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5", d4rl())
    assert len(read(Path("d4rl:antmaze-large-diverse-v2")).rows.obs) == 5
    shutil.copy(REACH_FILE, tmp_path / "arrow" / "data")
    assert len(read(Path("minari:arrow")).episodes) == 2


def test_group_layouts_that_do_not_fit(tmp_path):
    for key, shape, words in (("rewards", 5, "'episode_1/rewards' has shape (5,)"), ("actions", (8, 3), "episode 1")):
        path = Path(shutil.copy(REACH_FILE, tmp_path))
        with h5py.File(path, "a") as file:
            del file[f"episode_1/{key}"]
            file[f"episode_1/{key}"] = np.zeros(shape)
        assert words in refused(path)
    keys = refused(write(path, robomimic()), obs_keys=("nothing",))
    assert "no 'nothing'; choose --obs-keys from: object" in keys
    raw = {"data/demo_1/states": np.zeros((3, 32)), "data/demo_1/actions": np.zeros((3, 7))}  # robosuite's own
    assert "dataset_states_to_obs.py" in refused(write(path, raw))
    assert "has no groups demo_0" in refused(write(path, {"data": {}}))


def test_robomimic_data_of_another_task_or_controller(tmp_path):
    """A4, without the simulator: only its name and its controller matter here."""
    env: Any = Robosuite.__new__(Robosuite)
    with h5py.File(FILES / "robomimic-lift.hdf5") as file:
        recorded = json.loads(str(file["data"].attrs["env_args"]))
    arm = recorded["env_kwargs"]["controller_configs"]["body_parts"]["right"]
    env.name, env.arm, env.spec, env.observation_space = "Lift", arm, None, Box(-1, 1, (19,))
    env.action_space, path = Box(-1, 1, (7,)), tmp_path / "a.hdf5"
    data = read(FILES / "robomimic-lift.hdf5", env=env)
    assert data.rows.obs.shape == (96, 19) and data.rows.terminations.nonzero()[0].tolist() == [25]
    assert data.success is not None and data.success.tolist() == [True, False] and data.episodes[0].tolist() == [0, 26]
    changes = [{"control_freq": 10}, {"reward_shaping": True}, {"control_delta": False}, {"robots": ["Sawyer"]}]
    changes += [{"gripper_types": "WipingGripper"}, {"controller_configs": {"type": "JOINT_POSITION"}}]
    for part in ({"kp": 300}, {"input_type": "absolute"}):
        changes.append({"controller_configs": {"body_parts": {"right": arm | part}}})
    words = ["control_freq 10", "reward_shaping True", "control_delta False", "robots ['Sawyer']"]
    words += ["gripper_types Wiping", "type JOINT_POSITION", "kp 300", "input_type absolute"]
    for changed, said in zip(changes, words, strict=True):
        write(path, robomimic(), env_args=json.dumps({"env_kwargs": recorded["env_kwargs"] | changed}))
        assert f"it was recorded with {said}" in refused(path, env=env)
    assert "recorded with env_name Can" in refused(write(path, robomimic(), env_args='{"env_name": "Can"}'), env=env)
    for same in ({}, {"env_kwargs": {"robots": "Panda", "controller_configs": {"type": "OSC_POSE", "damping": 1}}}):
        data = read(write(path, robomimic(), env_args=json.dumps(same)), env=env)
        assert data.rows.rewards.tolist() == data.rows.terminations.tolist() == [0, 1, 0, 0] * 6


@pytest.mark.parametrize("maze, pinned", [("umaze", "9c1d7ee7"), ("medium", "fe9acd47"), ("large", "c6df1e6b")])
def test_generated_data(maze, pinned):
    """Every number of the quickstart's data is pinned; it fits its environment, and its flags fit each other."""
    name, digest = f"pointmaze-{maze}", hashlib.sha256()
    made = demonstrations.generate(name)
    for array in made.values():
        digest.update(array.tobytes())
    assert mujoco.__version__ != "3.11.0" or digest.hexdigest()[:8] == pinned  # another version may round otherwise
    limit = TASKS[name].settings["max_episode_steps"]
    env = make_env(TASKS[name].env_id, name, limit, TASKS[name].settings["action_repeat"])
    data = read(Path(f"generated:{name}"), env=env)
    assert data.dropped == 0 and data.success is not None and 0.1 < data.success.mean() < 0.6
    env.reset(seed=0)  # the first episode again
    assert all(np.array_equal(env.step(made["actions"][row])[0], made["next_observations"][row]) for row in range(5))
    other = make_env(TASKS[name].env_id, name, limit, 5)
    assert f"generated:{name}: --action-repeat 5: it is made with 10" in refused(f"generated:{name}", env=other)
