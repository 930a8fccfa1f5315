"""The binary Adroit tasks: rewards, ends, horizons, and success recomputed from observations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils import adroit, d4rl, data
from utils.envs import make_env
from utils.errors import InputError
from utils.replay import replay
from utils.tasks import TASKS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = list(adroit.WIDTHS)


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def task_env(name) -> Any:
    return make_env(TASKS[f"adroit-{name}-binary"].env_id)


@pytest.mark.parametrize("name", NAMES)
def test_an_episode(name):
    env = task_env(name)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (adroit.WIDTHS[name],)
    rng, steps, done = np.random.default_rng(0), 0, False
    while not done:
        obs, reward, terminated, truncated, info = env.step(
            rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        )
        steps, done = steps + 1, terminated or truncated
        assert reward == float(info["success"]) and not terminated
        assert adroit.success_after(name, obs[None])[0] == info["success"]
    assert steps == (100 if name == "pen" else 200)


@pytest.mark.parametrize("name", NAMES)
def test_success_is_read_off_the_observation_as_the_simulator_sees_it(name):
    """States around the goal, where success is now true and now false."""
    env = task_env(name)
    env.reset(seed=1)
    simulator, rng, seen = env.unwrapped, np.random.default_rng(0), []
    for _ in range(60):
        simulator.reset()
        whole: Any = simulator.get_env_state()  # pyright: ignore
        state = {key: whole[key] for key in ("qpos", "qvel", *adroit.STATE_KEYS[name])}
        if name == "door":
            state["qpos"][28] = rng.uniform(1.2, 1.5)
        elif name == "hammer":
            state["qpos"][26] = rng.uniform(0.07, 0.09)
        elif name == "relocate":
            offset = rng.normal(0, 0.07, 3)
            state["obj_pos"] = np.array([0.0, 0.0, 0.035])
            state["target_pos"] = state["obj_pos"] + offset
            state["qpos"][30:33] = 0
        else:
            state["desired_orien"] = state["desired_orien"] * 0 + [1, *rng.normal(0, 0.1, 3)]
        state["qvel"][:] = 0
        simulator.set_env_state(state)  # pyright: ignore
        obs, reward, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
        assert adroit.success_after(name, obs[None])[0] == bool(reward)
        seen.append(bool(reward))
    if name != "pen":
        assert 0 < sum(seen) < len(seen), "the test must see both"


def rows_of(name, n=12, **more):
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(n, adroit.WIDTHS[name])).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 4)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.arange(n) == 5,
        "timeouts": np.arange(n) == n - 1,
    }
    return arrays | more


def test_relabelled_rows():
    """Dense rewards become success; a dropped pen ends nothing, and as nothing follows it in the file, its row goes."""
    success = np.arange(12) % 3 == 0
    rows = data.from_d4rl_arrays(
        rows_of("pen", **{"infos/success": success}), "file", task_env("pen").get_wrapper_attr("relabel")
    )
    kept = [i for i in range(12) if i not in (5, 11)]
    assert np.array_equal(rows.rewards, success[kept]) and not rows.terminations.any() and rows.dropped == 2
    assert len(rows.episodes) == 2


def test_success_is_recomputed_where_the_file_lacks_it():
    """By hand: hinge angles before and after; the success of a row is that of the state after it."""
    obs = np.zeros((6, 39), np.float32)
    obs[:, 28] = [0.0, 1.4, 1.4, 0.0, 0.0, 1.4]  # two episodes of three rows
    arrays = rows_of("door", 6, observations=obs, terminals=np.zeros(6, bool), timeouts=np.arange(6) % 3 == 2)
    relabel = task_env("door").get_wrapper_attr("relabel")
    rows = data.from_d4rl_arrays(arrays, "file", relabel)
    assert rows.rewards.tolist() == [1, 1, 0, 1]
    assert rows.success is not None and rows.success.tolist() == [True, True]
    arrays["next_observations"] = np.roll(obs, -1, axis=0)
    rows = data.from_d4rl_arrays(arrays, "file", relabel)
    assert rows.rewards.tolist() == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_another_task_are_refused(tmp_path, name):
    other = "door" if name != "door" else "pen"
    if adroit.WIDTHS[other] == adroit.WIDTHS[name]:
        other = "pen"
    data.write_d4rl(tmp_path / "file.hdf5", rows_of(other), {})
    with pytest.raises(InputError, match=f"{adroit.WIDTHS[other]} wide"):
        data.load_specs([str(tmp_path / "file.hdf5")], task_env(name))


# ------------------------------------------------------------------------------------------------- with the real rows


@pytest.mark.parametrize(
    ("files", "name", "episodes", "successes", "transitions"),
    [
        (("door-human",), "door", 25, 8, 6_729 - 25),
        (("door-human", "door-dapg-expert"), "door", 75, 8 + 49, 6_729 - 25 + 10_000 - 50),
        (("pen-dapg-expert",), "pen", 100, 79, 9_925 - 100),
    ],
)
def test_the_real_files(files, name, episodes, successes, transitions):
    rows = data.load_specs([str(shared(f"{file}.hdf5")) for file in files], task_env(name))
    assert rows.success is not None and rows.success.sum() == successes
    assert len(rows.episodes) == episodes and len(rows) == transitions
    assert not rows.terminations.any() and set(np.unique(rows.rewards)) == {0, 1}


def test_pens_two_true_terminals():
    """Without the task D4RL's own ends stand: two dropped pens."""
    rows = data.read_d4rl(shared("pen-dapg-expert.hdf5"))
    assert rows.terminations.sum() == 2 and rows.dropped == 98


@pytest.mark.parametrize(
    ("file", "name"), [("door-human", "door"), ("door-dapg-expert", "door"), ("pen-dapg-expert", "pen")]
)
def test_recomputed_success_is_the_recorded_one(file, name):
    arrays = d4rl.read(shared(f"{file}.hdf5"))
    recorded, ends = arrays["infos/success"], arrays["terminals"] | arrays["timeouts"]
    after = adroit.success_after(name, arrays["observations"])[1:]
    assert np.array_equal(after[~ends[:-1]], recorded[:-1][~ends[:-1]]) and recorded.any()


@pytest.mark.parametrize(("file", "name"), [("door-human", "door"), ("pen-dapg-expert", "pen")])
def test_rows_and_simulator_agree(file, name):
    result = replay(str(shared(f"{file}.hdf5")), f"adroit-{name}-binary", rows=100)
    assert np.median(result["error"]) < 1e-2 and result["success"].mean() >= 0.99


def test_replay_needs_the_state(tmp_path):
    data.write_d4rl(tmp_path / "file.hdf5", rows_of("door", actions=np.zeros((12, 28), np.float32)), {})
    with pytest.raises(InputError, match="infos/qpos"):
        replay(str(tmp_path / "file.hdf5"), "adroit-door-binary")
    with pytest.raises(InputError, match="cannot be set"):
        replay(str(tmp_path / "file.hdf5"), "pointmaze-umaze")
