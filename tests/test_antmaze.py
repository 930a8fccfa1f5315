"""D4RL's AntMaze rebuilt: the model, the goals, the ends, and the rows of real files."""

from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from utils import antmaze, data
from utils.envs import make_env
from utils.errors import InputError
from utils.replay import replay
from utils.tasks import TASKS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture(scope="module")
def env():
    return antmaze.AntMaze("umaze")


def test_the_ant_is_gyms_but_for_what_d4rl_changed(env):
    theirs: mujoco.MjModel = gym.make("Ant-v5").unwrapped.model  # pyright: ignore
    ours = env.model
    assert ours.nq == theirs.nq == 15 and ours.nv == theirs.nv == 14 and ours.nu == theirs.nu == 8
    for name in (
        "body_mass",
        "body_inertia",
        "body_pos",
        "dof_damping",
        "dof_armature",
        "jnt_range",
        "jnt_axis",
        "qpos0",
    ):
        mine = getattr(ours, name)
        assert np.allclose(mine[: len(getattr(theirs, name))], getattr(theirs, name)), name
    assert ours.opt.timestep == 0.02 and env.frame_skip == 5 and env.dt == pytest.approx(0.1)
    assert int(ours.opt.integrator) == int(theirs.opt.integrator)
    assert np.allclose(ours.geom_solref, [0.02, 1]) and np.allclose(ours.geom_solimp[:, :3], [0.8, 0.8, 0.01])
    assert np.allclose(ours.actuator_gear[:, 0], 1) and np.allclose(ours.actuator_ctrlrange, [-30, 30])
    assert np.array_equal(ours.actuator_trnid[:, 0], theirs.actuator_trnid[:, 0])


@pytest.mark.parametrize("maze", antmaze.MAPS)
def test_walls_and_origin(maze):
    model, rows = antmaze.make_model(maze), antmaze.MAPS[maze]
    assert len({len(row) for row in rows}) == 1 and "".join(rows).count("r") == "".join(rows).count("g") == 1
    start = antmaze.find_cell(maze, "r")
    walls = [i for i in range(model.ngeom) if (model.geom(i).name or "").startswith("wall")]
    assert len(walls) == "".join(rows).count("1")
    for i in walls:
        _, row, col = model.geom(i).name.split("_")
        assert rows[int(row)][int(col)] == "1"
        assert np.allclose(model.geom_pos[i], [4 * (int(col) - start[1]), 4 * (int(row) - start[0]), 1])
        assert np.allclose(model.geom_size[i], [2, 2, 1])
        assert model.geom_contype[i] == model.geom_conaffinity[i] == 1


@pytest.mark.parametrize(("maze", "corner"), [("umaze", (0, 8)), ("medium", (20, 20)), ("large", (32, 24))])
def test_resets_and_goals(maze, corner):
    env = antmaze.AntMaze(maze)
    states, goals = [], []
    for seed in range(40):
        states.append(env.reset(seed=seed)[0])
        goals.append(env.goal)
        assert np.allclose(env.data.site("goal").xpos[:2], env.goal)
    moved, goals = np.array(states) - np.concatenate([env.init_qpos, np.zeros(14)]), np.array(goals) - corner
    assert np.abs(moved[:, :15]).max() <= 0.1 and np.abs(moved[:, :15]).max(axis=0).min() > 0.05
    assert 0.08 < moved[:, 15:].std() < 0.12
    assert goals.min() >= 0 and goals.max() <= 1.5 and 0.6 < goals.mean() < 0.9
    assert len(np.unique(goals[:, 0])) == 40


def test_the_goal_ends_the_episode_and_falling_does_not(env):
    env.reset(seed=0)
    for distance, expected in ((0.3, True), (0.8, False)):
        qpos = env.init_qpos.copy()
        qpos[:2] = env.goal + np.array([distance, 0])
        env.set_state(qpos, np.zeros(14))
        _, reward, terminated, truncated, info = env.step(np.zeros(8))
        assert (reward, terminated, truncated, info["success"]) == (float(expected), expected, False, expected)
    qpos = env.init_qpos.copy()
    qpos[3:7] = [0, 1, 0, 0]  # on its back
    env.set_state(qpos, np.zeros(14))
    assert not any(env.step(np.zeros(8))[2] for _ in range(5))


@pytest.mark.parametrize(("task", "limit"), [("umaze", 700), ("medium-play", 1000), ("large-diverse", 1000)])
def test_time_limit(task, limit):
    env = make_env(TASKS[f"antmaze-{task}"].env_id)
    env.reset(seed=0)
    for step in range(1, limit + 1):
        *_, terminated, truncated, _ = env.step(np.zeros(8, np.float32))
        assert not terminated and truncated == (step == limit)


def test_same_seed_same_episode():
    runs = []
    for _ in range(2):
        env = make_env("expo/AntMazeMedium-v2")
        obs, _ = env.reset(seed=5)
        actions = np.random.default_rng(0).uniform(-1, 1, (30, 8)).astype(np.float32)
        runs.append([obs] + [env.step(action)[0] for action in actions])
    assert np.array_equal(*runs) and runs[0][0].dtype == np.float32 and runs[0][0].shape == (29,)


def test_rewards_that_were_shifted_already_are_refused(env):
    rows = {"rewards": np.array([-1.0, 0.0]), "terminals": np.array([False, True])}
    with pytest.raises(InputError, match="shifts them"):
        env.relabel(rows)


# ------------------------------------------------------------------------------------------------- with the real rows


@pytest.mark.parametrize("name", ["antmaze-umaze", "antmaze-umaze-diverse"])
def test_rows_and_simulator_agree(name):
    """One step from 300 rows of a file made on another MuJoCo: off by rounding, and by contacts in a few rows."""
    result = replay(str(shared(f"{name}.hdf5")), name, rows=300)
    assert np.median(result["error"]) < 1e-4 and np.quantile(result["error"], 0.9) < 1e-3
    assert result["error"].max() < 0.1 and np.median(result["error"][~result["contact"]]) < 1e-4


@pytest.mark.parametrize(
    ("field", "value"), [("geom_solimp", [0.9, 0.95, 0.001, 0.5, 2]), ("actuator_gear", [1.05] + [0] * 5)]
)
def test_the_wrong_ant_would_be_noticed(monkeypatch, field, value):
    """The comparison has teeth: with Gymnasium's own contacts, or motors 5 % stronger, the rows are off."""
    path, make_model = str(shared("antmaze-umaze.hdf5")), antmaze.make_model

    def other(*args):
        model = make_model(*args)
        getattr(model, field)[:] = value
        return model

    right = np.median(replay(path, "antmaze-umaze", rows=50)["error"])
    monkeypatch.setattr(antmaze, "make_model", other)
    assert np.median(replay(path, "antmaze-umaze", rows=50)["error"]) > 20 * right


def test_episodes_of_the_real_files():
    env = make_env("expo/AntMazeUMaze-v2")
    rows = data.load_specs([str(shared("antmaze-umaze.hdf5"))], env)
    assert len(rows) == 30_585 and rows.dropped == 29 and len(rows.episodes) == 79
    assert rows.success is not None and rows.success.sum() == rows.terminations.sum() == 50
    rows = data.load_specs([str(shared("antmaze-umaze-diverse.hdf5"))], env)
    assert len(rows.episodes) == 199, "12 of the 211 episodes have one row, which has no successor"
    assert rows.dropped == 200 and rows.terminations.sum() == rows.rewards.sum() == 11
    assert np.abs(rows.actions).max() <= 1 - 1e-5
