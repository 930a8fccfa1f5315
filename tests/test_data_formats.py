"""Every layout, from small files written here: right when they are right, one clear line when they are not."""

import json
import os
import zipfile
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils import data, minari_data
from utils.errors import InputError

OBS, ACT = 4, 2
SUPPRESS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
ROBOMIMIC_KEYS = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}


# --------------------------------------------------------------------------------------------------- good files


def episode_lengths(seed=0):
    return np.random.default_rng(seed).integers(1, 7, 5)


def d4rl_tree(seed=0):
    """Keys and arrays of a D4RL-layout file; the even episodes end by a terminal, the odd ones by time."""
    rng, lengths = np.random.default_rng(seed), episode_lengths(seed)
    n, last = lengths.sum(), np.cumsum(lengths) - 1
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    terminals[last[::2]], timeouts[last[1::2]] = True, True
    return {
        "observations": rng.normal(size=(n, OBS)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, ACT)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
        "infos/success": rng.random(n) < 0.3,
    }


def minari_tree(seed=0):
    """A Minari data set with Dict observations and eleven episodes, so that episode_10 sorts before episode_2."""
    rng, tree = np.random.default_rng(seed), {}
    for i in range(11):
        steps = 1 + i % 4
        group = f"episode_{i}"
        tree[f"{group}/observations/observation"] = rng.normal(size=(steps + 1, 3))
        tree[f"{group}/observations/achieved_goal"] = np.full((steps + 1, 1), float(i))
        tree[f"{group}/actions"] = rng.uniform(-1, 1, (steps, ACT))
        tree[f"{group}/rewards"] = rng.normal(size=steps)
        tree[f"{group}/terminations"] = np.arange(steps) == (steps - 1 if i % 2 else -1)
        tree[f"{group}/truncations"] = np.arange(steps) == (-1 if i % 2 else steps - 1)
        tree[f"{group}/infos/success"] = np.arange(steps + 1) == steps * (i % 2)
    return tree


def robomimic_tree(seed=0):
    """Twelve demonstrations; the even ones succeed in their last step, the odd ones run out of time."""
    rng, tree = np.random.default_rng(seed), {}
    for i in range(12):
        steps = 2 + i % 3
        for key, width in ROBOMIMIC_KEYS.items():
            states = rng.normal(size=(steps + 1, width))
            states[:, 0] = i
            tree[f"data/demo_{i}/obs/{key}"] = states[:-1]
            tree[f"data/demo_{i}/next_obs/{key}"] = states[1:]
        tree[f"data/demo_{i}/actions"] = rng.uniform(-1, 1, (steps, 7))
        tree[f"data/demo_{i}/rewards"] = (np.arange(steps) == (steps - 1 if i % 2 == 0 else -1)).astype(float)
        tree[f"data/demo_{i}/dones"] = (np.arange(steps) == steps - 1).astype(np.int64)
    return tree


def ogbench_tree(seed=0):
    rng, lengths = np.random.default_rng(seed), episode_lengths(seed) + 1
    n = lengths.sum()
    terminals = np.zeros(n, bool)
    terminals[np.cumsum(lengths) - 1] = True
    return {
        "observations": rng.normal(size=(n, OBS)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, ACT)).astype(np.float32),
        "terminals": terminals,
        "qpos": rng.normal(size=(n, 21)).astype(np.float32),
        "qvel": rng.normal(size=(n, 20)).astype(np.float32),
    }


def write_hdf5(path, tree, attributes=()):
    with h5py.File(path, "w") as file:
        for key, value in tree.items():
            if isinstance(value, dict):
                file.create_group(key)
            else:
                file[key] = value
        for key, name, value in attributes:
            if key in file:
                file[key].attrs[name] = value
    return path


def write_npz(path, tree):
    np.savez(path, **{key: value for key, value in tree.items() if not isinstance(value, dict)})
    return path


LAYOUTS = {
    "d4rl": (d4rl_tree, write_hdf5, "file.hdf5"),
    "minari": (minari_tree, write_hdf5, "main_data.hdf5"),
    "robomimic": (robomimic_tree, write_hdf5, "low_dim.hdf5"),
    "ogbench": (ogbench_tree, write_npz, "play.npz"),
}


def check_valid(rows):
    """What every data set must be, whatever its file looked like."""
    n = len(rows.rewards)
    assert n > 0
    assert rows.obs.shape == rows.next_obs.shape and rows.obs.ndim == 2 and len(rows.obs) == n
    assert rows.actions.ndim == 2 and len(rows.actions) == n and rows.terminations.shape == (n,)
    for array in (rows.obs, rows.next_obs, rows.actions, rows.rewards, rows.terminations):
        assert array.dtype == np.float32 and np.isfinite(array).all()
    assert set(np.unique(rows.terminations)) <= {0.0, 1.0}
    starts, stops = rows.episodes.T
    assert starts[0] == 0 and stops[-1] == n and (starts[1:] == stops[:-1]).all() and (stops > starts).all()
    assert rows.success is None or rows.success.shape == (len(rows.episodes),)


# ------------------------------------------------------------------------------------------------- right when right


def test_d4rl_layout(tmp_path):
    tree = d4rl_tree()
    rows = data.read(write_hdf5(tmp_path / "file.hdf5", tree))
    check_valid(rows)
    ends = tree["terminals"] | tree["timeouts"]
    ends[-1] = True
    kept = [i for i in range(len(ends)) if tree["terminals"][i] or not ends[i]]
    assert np.array_equal(rows.obs, tree["observations"][kept])
    assert np.array_equal(rows.actions, tree["actions"][kept])
    assert np.array_equal(rows.terminations, tree["terminals"][kept])
    for row, i in enumerate(kept):
        if not tree["terminals"][i]:
            assert np.array_equal(rows.next_obs[row], tree["observations"][i + 1])
    assert rows.dropped == len(ends) - len(kept)


def test_d4rl_layout_in_columns_and_doubles(tmp_path):
    """Rewards and terminals as (n, 1), float64 everywhere, as some of D4RL's files have them."""
    tree = d4rl_tree()
    other = {key: value[:, None] if value.ndim == 1 else value.astype(np.float64) for key, value in tree.items()}
    one, two = (data.read(write_hdf5(tmp_path / f"{i}.hdf5", t)) for i, t in enumerate((tree, other)))
    for name in ("obs", "actions", "rewards", "next_obs", "terminations", "episodes", "success"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


def test_d4rl_next_observations_keep_the_truncated_rows(tmp_path):
    tree = d4rl_tree()
    tree["next_observations"] = tree["observations"] + 1
    rows = data.read(write_hdf5(tmp_path / "file.hdf5", tree))
    assert len(rows) == len(tree["rewards"]) and rows.dropped == 0
    assert np.array_equal(rows.next_obs, tree["observations"] + 1)
    assert rows.terminations.sum() == tree["terminals"].sum(), "a truncated row is never terminal"


@pytest.mark.parametrize("flag", ["timeouts", "terminals"])
def test_flags_on_every_row(tmp_path, flag):
    tree = d4rl_tree()
    tree[flag] = np.ones(len(tree["rewards"]), bool)
    path = write_hdf5(tmp_path / "file.hdf5", tree)
    if flag == "terminals":
        assert data.read(path).terminations.all()
    else:  # what is left are the terminal rows
        tree["terminals"][:] = False
        with pytest.raises(InputError, match="no complete transition"):
            data.read(write_hdf5(tmp_path / "file.hdf5", tree))


def test_minari_layout(tmp_path):
    tree = minari_tree()
    rows = data.read(write_hdf5(tmp_path / "main_data.hdf5", tree))
    check_valid(rows)
    assert rows.dropped == 0 and len(rows.episodes) == 11
    for i, (start, stop) in enumerate(rows.episodes):  # by number: episode_10 is the last
        goal, observation = (tree[f"episode_{i}/observations/{k}"] for k in ("achieved_goal", "observation"))
        states = np.concatenate([goal, observation], axis=1).astype(np.float32)  # by name, as Gymnasium flattens
        assert np.array_equal(rows.obs[start:stop], states[:-1])
        assert np.array_equal(rows.next_obs[start:stop], states[1:])
        assert np.array_equal(rows.terminations[start:stop], tree[f"episode_{i}/terminations"])
        assert np.allclose(rows.rewards[start:stop], tree[f"episode_{i}/rewards"])
    assert rows.success is not None and rows.success.tolist() == [bool(i % 2) for i in range(11)]


def test_minari_by_its_name_and_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    folder = tmp_path / "D4RL" / "door" / "human-v2"
    (folder / "data").mkdir(parents=True)
    write_hdf5(folder / "data" / "main_data.hdf5", minari_tree())
    by_name, by_folder = data.load_specs(["minari:D4RL/door/human-v2"]), data.load_specs([str(folder)])
    assert np.array_equal(by_name.obs, by_folder.obs)


def test_minari_without_the_package_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    with pytest.raises(InputError, match="pip install"):
        data.load_specs(["minari:D4RL/door/human-v2"])
    for name in ("../../etc", "", "a//b", "/etc/passwd"):
        with pytest.raises(InputError, match="no Minari id"):
            minari_data.locate(name)


def test_minari_written_by_the_package(tmp_path, monkeypatch):
    """The package's own buffer of steps is written and read back (skipped where minari is not installed)."""
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import gymnasium as gym

    rng = np.random.default_rng(0)
    buffers = [
        minari.data_collector.EpisodeBuffer(
            id=i,
            observations=rng.normal(size=(4, 3)).astype(np.float32),
            actions=rng.uniform(-1, 1, (3, 2)).astype(np.float32),
            rewards=[0.0, 0.0, 1.0],
            terminations=[False, False, True],
            truncations=[False] * 3,
            infos={},
        )
        for i in range(2)
    ]
    minari.create_dataset_from_buffers(
        "test/own-v0",
        buffers,
        observation_space=gym.spaces.Box(-9, 9, (3,), np.float32),
        action_space=gym.spaces.Box(-1, 1, (2,), np.float32),
        data_format="hdf5",
    )
    rows = data.load_specs(["minari:test/own-v0"])
    assert len(rows) == 6 and rows.terminations.tolist() == [0, 0, 1] * 2
    assert np.array_equal(rows.obs[:3], buffers[0].observations[:-1])


def test_robomimic_layout(tmp_path):
    tree = robomimic_tree()
    rows = data.read(write_hdf5(tmp_path / "low_dim.hdf5", tree))
    check_valid(rows)
    assert rows.obs.shape[1] == 19 and rows.actions.shape[1] == 7 and rows.dropped == 0
    for i, (start, stop) in enumerate(rows.episodes):  # by number: demo_10 follows demo_9
        for name, states in (("obs", rows.obs), ("next_obs", rows.next_obs)):
            expected = np.concatenate([tree[f"data/demo_{i}/{name}/{key}"] for key in ROBOMIMIC_KEYS], axis=1)
            assert np.array_equal(states[start:stop], expected.astype(np.float32))
        assert rows.terminations[start:stop].sum() == (i % 2 == 0), "done without success is a time limit"
    assert rows.success is not None and rows.success.tolist() == [i % 2 == 0 for i in range(12)]


def test_robomimic_keys_and_their_order(tmp_path):
    path = write_hdf5(tmp_path / "low_dim.hdf5", robomimic_tree())
    rows = data.read(path, obs_keys=("object", "robot0_eef_pos"))
    both = data.read(path)
    assert np.array_equal(rows.obs, np.concatenate([both.obs[:, 9:19], both.obs[:, :3]], axis=1))
    with pytest.raises(InputError, match=r"no 'nothing'.*--obs-keys.*robot0_eef_pos"):
        data.read(path, obs_keys=("nothing",))


def test_robomimic_without_next_obs(tmp_path):
    """The last step of a demonstration has no successor then: it goes, unless it is terminal."""
    tree = {key: value for key, value in robomimic_tree().items() if "next_obs" not in key}
    rows, whole = (
        data.read(write_hdf5(tmp_path / "a.hdf5", tree)),
        data.read(write_hdf5(tmp_path / "b.hdf5", robomimic_tree())),
    )
    check_valid(rows)
    assert rows.dropped == 6 and len(rows) == len(whole) - 6
    assert rows.terminations.sum() == whole.terminations.sum() == 6
    alive = rows.terminations == 0
    kept = [i for i in range(len(whole)) if whole.terminations[i] or i + 1 not in whole.episodes[:, 1]]
    assert np.array_equal(rows.obs, whole.obs[kept])
    assert np.array_equal(rows.next_obs[alive], whole.next_obs[kept][alive])


def test_robomimic_file_of_another_task_is_refused(tmp_path):
    class Env:
        robosuite_name = "Lift"
        unwrapped = property(lambda self: self)

    recorded = [("data", "env_args", json.dumps({"env_name": "PickPlaceCan", "type": 1}))]
    path = write_hdf5(tmp_path / "low_dim.hdf5", robomimic_tree(), recorded)
    with pytest.raises(InputError, match=r"PickPlaceCan.*Lift"):
        data.read(path, env=Env())


def test_raw_robosuite_demonstrations_are_refused(tmp_path):
    tree = {"data/demo_1/states": np.zeros((3, 32)), "data/demo_1/actions": np.zeros((3, 7))}
    with pytest.raises(InputError, match="dataset_states_to_obs"):
        data.read(write_hdf5(tmp_path / "demo.hdf5", tree))


def test_ogbench_layout(tmp_path):
    tree = ogbench_tree()
    rows = data.read(write_npz(tmp_path / "play.npz", tree))
    check_valid(rows)
    last = tree["terminals"]
    assert np.array_equal(rows.obs, tree["observations"][~last])
    assert np.array_equal(rows.next_obs, tree["observations"][np.flatnonzero(~last) + 1])
    assert not rows.terminations.any() and len(rows.episodes) == last.sum()


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    tree = ogbench_tree()
    np.savez(tmp_path / "play.npz", **{**tree, "observations": np.array([Trap()] * len(tree["actions"]), object)})
    with pytest.raises(InputError):
        data.read(tmp_path / "play.npz")
    assert not (tmp_path / "sprung").exists()


def test_several_files_are_joined(tmp_path):
    paths = [str(write_hdf5(tmp_path / f"{i}.hdf5", d4rl_tree(i))) for i in range(3)]
    parts, rows = [data.load_specs([path]) for path in paths], data.load_specs(paths)
    check_valid(rows)
    for name in ("obs", "actions", "rewards", "next_obs", "terminations", "success"):
        assert np.array_equal(getattr(rows, name), np.concatenate([getattr(part, name) for part in parts])), name
    assert (
        rows.episodes[:, 1].tolist() == np.cumsum(np.concatenate([np.diff(p.episodes)[:, 0] for p in parts])).tolist()
    )


def test_thin_keeps_whole_episodes_and_every_array(tmp_path, capsys):
    tree = d4rl_tree(3)
    tree["infos/qpos"] = np.random.default_rng(0).normal(size=(len(tree["rewards"]), 3)).astype(np.float32)
    tree["infos/time"] = np.random.default_rng(0).normal(size=len(tree["rewards"]))  # float64 stays float64
    tree["infos/map"] = np.arange(6, dtype=np.float32).reshape(2, 3)  # nothing of a row
    tree["infos/version"] = 3.5
    tree["infos/name"] = "a text"
    write_hdf5(tmp_path / "all.hdf5", tree, [("/", "source", "here")])
    everything = data.read_d4rl(tmp_path / "all.hdf5")
    data.thin(str(tmp_path / "all.hdf5"), tmp_path / "few.hdf5", episodes=3, seed=1)
    few = data.read_d4rl(tmp_path / "few.hdf5")
    assert "3 of 5 episodes" in capsys.readouterr().out
    number = np.cumsum(tree["terminals"] | tree["timeouts"]) - (tree["terminals"] | tree["timeouts"])
    drawn = np.random.default_rng(1).choice(5, 3, replace=False)
    with h5py.File(tmp_path / "few.hdf5") as file:
        for key, value in tree.items():
            stored: Any = file[key]
            if key == "infos/name":
                assert stored.asstr()[()] == value
                continue
            kept = value[np.isin(number, drawn)] if np.shape(value)[:1] == number.shape else value
            assert np.array_equal(stored[()], kept) and stored.dtype == np.asarray(value).dtype, key
        assert file.attrs["source"] == "here" and "3 of 5" in str(file.attrs["thinned"])
    rows = {tuple(row) for row in everything.obs}
    assert 0 < len(few) < len(everything) and all(tuple(row) in rows for row in few.obs)


@pytest.mark.parametrize(("episodes", "out", "words"), [(0, "new", "has 5"), (6, "new", "has 5"), (2, "all", "there")])
def test_thin_refuses(tmp_path, episodes, out, words):
    write_hdf5(tmp_path / "all.hdf5", d4rl_tree())
    before = (tmp_path / "all.hdf5").read_bytes()
    with pytest.raises(InputError, match=words):
        data.thin(str(tmp_path / "all.hdf5"), tmp_path / f"{out}.hdf5", episodes)
    assert (tmp_path / "all.hdf5").read_bytes() == before and not (tmp_path / "new.hdf5").exists()


def test_no_data_at_all():
    with pytest.raises(InputError, match="--dataset"):
        data.load_specs([])


@pytest.mark.parametrize("word", ["d4rl:door-superhuman-v1", "ogbench:../up", "robomimic:fly/ph", "generated:maze"])
def test_unknown_names(word):
    with pytest.raises(InputError):
        data.locate(word)


def test_where_published_data_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path, address = data.locate("d4rl:antmaze-large-diverse-v2")
    assert path == tmp_path / "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5"
    assert address.endswith(f"offline_rl/ant_maze_v2/{path.name}")
    assert data.locate("d4rl:door-human-v1")[1].endswith("offline_rl/hand_dapg_v1/door-human-v1.hdf5")
    assert data.locate("d4rl:hopper-medium-replay-v2")[1].endswith("gym_mujoco_v2/hopper_medium_replay-v2.hdf5")
    write_hdf5(tmp_path / "door-human-v1.hdf5", d4rl_tree())
    assert len(data.load_specs(["d4rl:door-human-v1"])) > 0, "a file that is there is not downloaded"


def test_folder_without_data(tmp_path):
    with pytest.raises(InputError, match="folder"):
        data.load_specs([str(tmp_path)])


def test_array_larger_than_memory(tmp_path):
    """A file of a few kB can declare an array of terabytes."""
    tree = d4rl_tree()
    path = write_hdf5(tmp_path / "file.hdf5", {key: tree[key] for key in tree if key != "observations"})
    with h5py.File(path, "a") as file:
        file.create_dataset("observations", (10**9, 10**4), np.float32, chunks=(1, 10**4))
    with pytest.raises(InputError, match="memory"):
        data.read(path)


# --------------------------------------------------------------------------------------------- and wrong when wrong


def mutate(tree, key, draw):
    """One random thing that can be wrong with one of a file's arrays."""
    value = tree[key]
    kind = draw(
        st.sampled_from(
            [
                "drop",
                "shape",
                "rows",
                "empty",
                "scalar",
                "type",
                "text",
                "nan",
                "inf",
                "huge",
                "ones",
                "group",
                "complex",
                "extra",
            ]
        )
    )
    if kind == "drop":
        del tree[key]
    elif kind == "shape":
        tree[key] = value[..., None] if draw(st.booleans()) else value.reshape(-1)
    elif kind == "rows":
        tree[key] = value[: draw(st.integers(0, len(value)))] if draw(st.booleans()) else np.concatenate([value, value])
    elif kind == "empty":
        tree[key] = np.zeros((0, *value.shape[1:]), value.dtype)
    elif kind == "scalar":
        tree[key] = np.array(1.0)
    elif kind == "type":
        tree[key] = value.astype(draw(st.sampled_from([np.float16, np.float64, np.int8, np.uint64, np.bool_])))
    elif kind == "text":
        tree[key] = np.full(value.shape, b"text")
    elif kind in ("nan", "inf", "huge"):
        changed = value.astype(np.float64)
        changed.flat[draw(st.integers(0, value.size - 1)) if value.size else slice(0)] = {
            "nan": np.nan,
            "inf": -np.inf,
            "huge": 1e300,
        }[kind]
        tree[key] = changed
    elif kind == "ones":
        tree[key] = np.ones_like(value)
    elif kind == "group":
        tree[key] = {}
    elif kind == "complex":
        tree[key] = value.astype(complex)
    else:
        tree[draw(st.sampled_from(["data", "episode_3", "episode_x", "demo_1", "data/demo_5", "mask"]))] = draw(
            st.sampled_from([np.zeros(3), np.array(b"text"), {}])
        )


def damage(path, draw):
    """Cuts the file off, or overwrites a few of its bytes."""
    content = bytearray(path.read_bytes())
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(draw(st.integers(1, 8))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    path.write_bytes(bytes(content))


def slow_d4rl(tree):
    """Transitions of D4RL's arrays, one row at a time: (obs, action, reward, next_obs, terminal)."""
    n = len(tree["observations"])
    flag = {k: np.ravel(tree[k]) if k in tree else np.zeros(n) for k in ("terminals", "timeouts")}
    for i in range(n):
        last = bool(flag["timeouts"][i]) or i == n - 1
        if "next_observations" not in tree and last and not flag["terminals"][i]:
            continue
        following = tree["observations"][min(i + 1, n - 1)]
        yield (
            tree["observations"][i],
            tree["actions"][i],
            np.ravel(tree["rewards"])[i],
            following,
            bool(flag["terminals"][i]),
        )


def check_malformed(layout, tmp_path, choice):
    """A random malformed file ends in one line, or in a valid data set that says what the file says."""
    make, write, name = LAYOUTS[layout]
    tree = make(choice.draw(st.integers(0, 3)))
    attributes = []
    for key in choice.draw(st.lists(st.sampled_from(sorted(tree)), max_size=3, unique=True)):
        mutate(tree, key, choice.draw)
    if choice.draw(st.booleans()):
        text = choice.draw(st.sampled_from(["{", "[1]", '{"env_name": 3}', "{" * 5000, "x" * 60_000]))
        attributes = [(key, "env_args", text) for key in ("/", "data", "observations")]
    path = tmp_path / name
    try:
        write(path, tree, attributes) if write is write_hdf5 else write(path, tree)
    except (ValueError, OSError, TypeError, KeyError):
        return  # the mutations do not go together
    damaged = choice.draw(st.booleans())
    if damaged:
        damage(path, choice.draw)
    try:
        rows = data.read(path)
    except InputError as error:
        assert str(error).strip() and "\n" not in str(error)
        return
    check_valid(rows)
    if layout == "d4rl" and not damaged and not any(k.startswith(("data", "episode_")) for k in tree):
        expected = list(slow_d4rl(tree))
        assert len(expected) == len(rows)
        for i, (obs, action, reward, next_obs, terminal) in enumerate(expected):
            assert np.array_equal(rows.obs[i], np.float32(obs)) and np.array_equal(rows.actions[i], np.float32(action))
            assert rows.rewards[i] == np.float32(reward) and rows.terminations[i] == terminal
            assert terminal or np.array_equal(rows.next_obs[i], np.float32(next_obs))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, deadline=None, suppress_health_check=SUPPRESS)
@given(choice=st.data())
def test_malformed_files(layout, tmp_path, choice):
    check_malformed(layout, tmp_path, choice)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=1500, deadline=None, suppress_health_check=SUPPRESS)
@given(choice=st.data())
def test_very_many_malformed_files(layout, tmp_path, choice):
    check_malformed(layout, tmp_path, choice)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"PK\x05\x06" + b"\0" * 18, os.urandom(5000)]
)
def test_files_that_are_nothing(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError):
        data.read(tmp_path / "file")


def test_npz_with_a_wrong_size_in_its_directory(tmp_path):
    path = write_npz(tmp_path / "play.npz", ogbench_tree())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(
            "button_states.npy",
            b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999,), }",
        )
    with pytest.raises(InputError):
        data.read(path)
