"""Environments: what make_env promises and refuses, and the rules of AntMaze, Adroit, PointMaze and the others."""

import inspect
import itertools
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Text

from expo_diffusion import Args
from expo_finetune import Args as FinetuneArgs
from tools.replay import replay
from utils import InputError, adroit, antmaze, pointmaze
from utils.arrays import Dataset, write_d4rl
from utils.data import read_dataset, to_dataset
from utils.envs import make_env
from utils.tasks import TASKS, parse_args

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SUCCESS = {False: {"success": False}, True: {"success": True}}
UNIT, ONE = Box(-1, 1, (1,), np.float32), np.zeros(1, np.float32)


class Scripted(gym.Env):
    """Returns what it was told to: one (reward, info, observation) per step, or an exception to raise."""

    def __init__(self, steps: Any = (), actions: Any = UNIT, observations: Any = UNIT, render_mode: str | None = None):
        if steps == "broken":
            raise RuntimeError("no such robot")
        self.steps, self.action_space, self.observation_space = list(steps), actions, observations

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.todo = iter(self.steps)
        return self.observation_space.sample() * 0, {}

    def step(self, action):
        reward, info, obs = next(self.todo, (0.0, {}, ONE))
        if isinstance(obs, Exception):
            raise obs
        return obs, reward, False, False, info


gym.register("Scripted-v0", Scripted)
RAISES = next(i for i, line in enumerate(inspect.getsourcelines(Scripted.step)[0]) if "raise" in line)
RAISES += inspect.getsourcelines(Scripted.step)[1]


def scripted(*steps: Any, limit: int = 10, repeat: int = 1, **spaces: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gym.registry["Scripted-v0"].kwargs, "steps", steps)
        for key, value in spaces.items():
            patch.setitem(gym.registry["Scripted-v0"].kwargs, key, value)
        return make_env("Scripted-v0", max_episode_steps=limit, action_repeat=repeat)


def shared(name: str) -> str:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    return str(SHARED / name)


def task_env(task: str) -> Any:
    return make_env(TASKS[task].env_id, task)


# ------------------------------------------------------------------------------------------------------------ make_env


def test_wrappers_against_the_plain_environment():
    """float32, native bounds of +-2 behind [-1, 1], a limit in actions, and the same seed gives the same start."""
    env, plain = make_env("Pendulum-v1", max_episode_steps=4, action_repeat=3), gym.make("Pendulum-v1").unwrapped
    assert env.action_space == UNIT and env.get_wrapper_attr("native_spaces")[1].high == 2
    obs, expected = env.reset(seed=3)[0], plain.reset(seed=3)[0]
    assert obs.dtype == np.float32 and np.array_equal(obs, expected)
    for t in range(4):
        obs, reward, terminated, truncated, info = env.step(np.float32([0.25]))
        total = 0.0
        for _ in range(3):
            expected, r, *_ = plain.step(np.float32([0.5]))
            total += float(r)
        assert obs == pytest.approx(expected, rel=1e-5) and reward == pytest.approx(total)
        assert (terminated, truncated) == (False, t == 3) and "success" not in info


def test_spaces_become_flat():
    parts = Dict([("z", Box(0, 255, (2, 2), np.uint8)), ("a", Box(-9, 9, (1,), np.float64))])
    obs = {"z": np.array([[1, 2], [3, 4]], np.uint8), "a": np.array([5.0])}
    env = scripted((0, {}, obs), actions=Box(-3, 5, (2, 1), np.float64))
    env.reset(seed=0)
    assert env.action_space.shape == (2,) and env.get_wrapper_attr("native_spaces")[1].shape == (2, 1)
    env = scripted((0, {}, obs), observations=parts, limit=1)
    env.get_wrapper_attr("native_spaces")[0].spaces["z"].sample()
    env.unwrapped.reset = lambda **_: (obs, {})  # pyright: ignore
    assert env.reset()[0].tolist() == [1, 2, 3, 4, 5] and env.observation_space == Box(-np.inf, np.inf, (5,))


@pytest.mark.parametrize(
    ("infos", "repeat", "expected"),
    [
        ([{}, {}], 1, [None, None]),  # an environment that never speaks of success has none
        ([{}, SUCCESS[True], {}], 1, [None, True, False]),  # A8: from then on, silence means no
        ([SUCCESS[True], SUCCESS[False]] * 2, 2, [True, True]),  # A9: any of the inner steps
        ([{"is_success": 0.0}, {"goal_achieved": np.array([True])}], 1, [False, True]),
    ],
)
def test_success(infos, repeat, expected):
    env = scripted(*((1.0, info, ONE) for info in infos), repeat=repeat)
    env.reset()
    answers = [env.step(ONE) for _ in expected]
    assert [answer[4].get("success") for answer in answers] == expected
    assert [answer[1] for answer in answers] == [float(repeat)] * len(expected)


@pytest.mark.parametrize(
    ("spaces", "words"),
    [
        ({"actions": Discrete(3)}, "Discrete actions"),
        ({"actions": Box(-np.inf, np.inf, (2,))}, "action dimension 0 goes from -inf to inf"),
        ({"actions": Box(np.float32([-1, 1]), np.float32([1, 1]))}, "action dimension 1 goes from 1.0 to 1.0"),
        ({"observations": Text(5)}, "cannot be flattened"),
        ({"limit": 0}, "no time limit; give --max-episode-steps"),
        ({"steps": "broken"}, f"RuntimeError: no such robot ({__file__}:"),
    ],
)
def test_environments_that_are_refused(monkeypatch, spaces, words):
    for key, value in spaces.items():
        monkeypatch.setitem(gym.registry["Scripted-v0"].kwargs, key, value)
    kwargs = gym.registry["Scripted-v0"].kwargs
    with pytest.raises(InputError) as error:
        make_env("Scripted-v0", max_episode_steps=kwargs.pop("limit", 5))
    assert str(error.value).startswith("--env-id 'Scripted-v0': ") and words in str(error.value)


@pytest.mark.parametrize(
    ("env_id", "words"), [("Pendulun-v1", "Pendulum"), ("no_such_module:Env-v0", "no_such_module")]
)
def test_unknown_environments(env_id, words):
    with pytest.raises(InputError, match=words):
        make_env(env_id)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ((np.zeros(2), {}, ONE), "the reward has shape (2,)"),
        ((np.nan, {}, ONE), "the reward is nan"),
        ((0.0, {}, ONE * np.nan), "the observation is not finite in dimension 0"),
        ((0.0, {}, np.zeros(2)), "the observation has shape (2,), its space (1,)"),
        ((0.0, {}, KeyError("torque")), f"KeyError: 'torque' ({__file__}:{RAISES})"),  # the user's own line
    ],
)
def test_what_goes_wrong_in_a_step(step, words):
    env = scripted((np.ones(1), {}, ONE), step)
    env.reset()
    assert env.step(ONE)[1] == 1.0  # a reward of shape (1,) is one number
    with pytest.raises(InputError) as error:
        env.step(ONE)
    assert str(error.value) == f"environment 'Scripted-v0', step 2 of an episode: {words}"


def test_pictures_that_cannot_be_drawn(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setattr(Scripted, "render", lambda self: 1 / 0, raising=False)
    monkeypatch.setattr(Scripted, "metadata", {"render_modes": ["rgb_array"]})
    with pytest.raises(InputError, match=r"no pictures with MUJOCO_GL='glfw': division by zero; try MUJOCO_GL=egl"):
        make_env("Scripted-v0", max_episode_steps=3, render_mode="rgb_array")


# ----------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", TASKS)
def test_a_row_of_the_table(name):
    """Its environment is made, or one line says what to install."""
    try:
        env = task_env(name)
    except InputError as error:
        assert name.startswith(("ogbench", "robomimic")) and "(pip install -r requirements-" in str(error)
        return
    assert env.reset(seed=1)[0].tolist() == env.reset(seed=1)[0].tolist() != env.reset(seed=2)[0].tolist()
    limits = {"antmaze-umaze": 700, "antmaze": 1000, "adroit-pen": 100, "adroit": 200, "robomimic": 400}
    limit = next((limit for prefix, limit in limits.items() if name.startswith(prefix)), None)
    assert limit in (None, env.spec.max_episode_steps)


def test_published_settings():
    """docs/data.md's table, where tasks differ, and what no task changes."""
    names = ("edit_scale", "num_min_critics", "reward_shift", "learning_starts", "edit_dropout", "total_timesteps")
    published = {"antmaze": (0.05, 1, -1, 5000, 0, 300_000), "adroit": (0.7, 2, -1, 0, 0.1, 300_000)}
    published |= {"robomimic-lift": (0.05, 2, 0, 5000, 0, 120_000), "robomimic-can": (0.05, 2, 0, 5000, 0, 120_000)}
    published |= {"robomimic-square": (0.1, 2, 0, 5000, 0, 150_000), "ogbench": (0.1, 2, 0, 5000, 0, 500_000)}
    everywhere = dict(utd_ratio=20, batch_size=256, num_critics=10, gamma=0.99, tau=0.005, num_base_samples=8)
    everywhere |= dict(num_edit_samples=8, denoising_steps=10, offline_steps=0, reward_scale=1, hidden_dim=256)
    for name in (name for name in TASKS if not name.startswith("pointmaze")):
        args = vars(parse_args(Args, argv=["--task", name]))
        expected = next(values for prefix, values in published.items() if name.startswith(prefix))
        assert tuple(args[key] for key in names) == expected and args.items() >= everywhere.items(), name
    for name, pretrain in (
        ("antmaze-large-play", 500_000),
        ("robomimic-square", 200_000),
        ("adroit-pen-binary", 20_000),
    ):
        args = parse_args(FinetuneArgs, argv=["--task", name])
        assert args.pretrain_steps == pretrain and args.learning_starts == 0
        assert (args.edit_scale, args.offline_steps) == ((0.05, 2000) if "adroit" in name else (args.edit_scale, 0))


# ------------------------------------------------------------------------------------------------------------- AntMaze


def test_the_ant_is_gymnasiums_but_for_what_d4rl_changed():
    theirs: Any = gym.make("Ant-v5").unwrapped
    env = antmaze.AntMaze("umaze")
    ours, theirs = env.model, theirs.model
    for name in ("body_mass", "body_inertia", "body_pos", "dof_damping", "dof_armature", "jnt_range", "qpos0"):
        assert np.allclose(getattr(ours, name)[: len(getattr(theirs, name))], getattr(theirs, name)), name
    assert ours.opt.timestep == 0.02 and env.dt == pytest.approx(0.1)
    assert np.allclose(ours.geom_solref, [0.02, 1]) and np.allclose(ours.geom_solimp[:, :3], [0.8, 0.8, 0.01])
    assert np.allclose(ours.actuator_gear[:, 0], 1) and np.allclose(ours.actuator_ctrlrange, [-30, 30])


@pytest.mark.parametrize(("maze", "corner"), [("umaze", (0, 8)), ("medium", (20, 20)), ("large", (32, 24))])
def test_antmaze_walls_resets_and_goals(maze, corner):
    env = antmaze.AntMaze(maze)
    boxes = np.flatnonzero(env.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)  # pyright: ignore
    rows, start = antmaze.MAZES[maze].split(), (1, 1)
    expected = {
        (4.0 * (c - start[1]), 4.0 * (r - start[0]))
        for r, row in enumerate(rows)
        for c in range(len(row))
        if row[c] == "1"
    }
    assert {(x, y) for x, y, _ in env.model.geom_pos[boxes]} == expected and len(boxes) == len(expected)
    states = np.array([np.concatenate([env.reset(seed=seed)[0], env.goal]) for seed in range(40)])
    moved, goals = states[:, :29] - np.concatenate([env.init_qpos, np.zeros(14)]), states[:, 29:] - corner
    assert 0.05 < np.abs(moved[:, :15]).max() <= 0.1 and 0.08 < moved[:, 15:].std() < 0.12
    assert goals.min() >= 0 and goals.max() <= 1.5 and 0.6 < goals.mean() < 0.9 and len(np.unique(goals)) == 80


def test_the_goal_ends_an_episode_and_a_fall_does_not():
    env = make_env("expo/AntMazeUMaze-v2", max_episode_steps=9)
    ant: Any = env.unwrapped
    for distance, expected in ((0.3, True), (0.8, False)):
        env.reset(seed=0)
        ant.set_state(np.array([*(ant.goal + [distance, 0]), *ant.init_qpos[2:]]), np.zeros(14))
        _, reward, terminated, truncated, info = env.step(np.zeros(8, np.float32))
        assert (reward, terminated, truncated, info["success"]) == (float(expected), expected, False, expected)
    env.reset(seed=0)
    ant.set_state(np.array([0, 0, 0.75, 0, 1, 0, 0, *ant.init_qpos[7:]]), np.zeros(14))  # on its back
    assert [env.step(np.zeros(8, np.float32))[2:4] for _ in range(9)] == [(False, False)] * 8 + [(False, True)]
    rows = {"rewards": np.float32([0, 1]), "terminals": np.array([0, 1])}
    assert ant.relabel(rows)["infos/success"].tolist() == [False, True]
    with pytest.raises(InputError, match="shifts them"):
        ant.relabel({**rows, "rewards": np.float32([-1, 0])})


# -------------------------------------------------------------------------------------------------------------- Adroit


def near_the_goal(name: str, state: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Changes a state so that success is now true and now false."""
    state["qvel"][:] = 0
    if name in ("door", "hammer"):
        state["qpos"][28 if name == "door" else 26] = (
            rng.uniform(1.2, 1.5) if name == "door" else rng.uniform(0.07, 0.09)
        )
    elif name == "relocate":
        state["obj_pos"], state["qpos"][30:33] = np.array([0.0, 0.0, 0.035]), 0
        state["target_pos"] = state["obj_pos"] + rng.normal(0, 0.07, 3)
    else:
        state["desired_orien"] = np.array([1, *rng.normal(0, 0.1, 3)])


@pytest.mark.parametrize("name", adroit.WIDTHS)
def test_success_in_the_simulator_is_read_off_its_observation(name):
    env, rng, seen = task_env(f"adroit-{name}-binary"), np.random.default_rng(0), set()
    simulator: Any = env.unwrapped
    keys = {"pen": "desired_orien", "door": "door_body_pos", "hammer": "board_pos"}.get(name, "obj_pos target_pos")
    for seed in range(40):
        env.reset(seed=seed)
        whole = simulator.get_env_state()
        state = {key: whole[key] for key in ("qpos", "qvel", *keys.split())}
        near_the_goal(name, state, rng)
        simulator.set_env_state(state)
        obs, reward, terminated, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
        assert reward == info["success"] == adroit.success_after(name, obs[None])[0] and not terminated
        seen.add(bool(reward))
    assert name == "pen" or seen == {False, True}


def door_rows(angles: list[float], **more: Any) -> Dataset:
    """Two episodes of three rows, relabelled by the door's task."""
    obs = np.zeros((6, 39), np.float32)
    obs[:, 28] = angles
    arrays = {"observations": obs, "actions": np.zeros((6, 28), np.float32), "rewards": np.arange(6.0)}
    arrays |= {"terminals": np.arange(6) == 2, "timeouts": np.arange(6) == 5, **more}
    return to_dataset(arrays, task_env("adroit-door-binary").get_wrapper_attr("relabel"))


def test_adroit_rows_are_relabelled():
    """By hand: hinge angles. The success of a row is that of the state after it. A terminal row ends by time."""
    data = door_rows([0.0, 1.4, 1.4, 0.0, 0.0, 1.4])
    assert data.rows.rewards.tolist() == [1, 1, 0, 1] and data.success is not None and data.success.all()
    assert not data.rows.terminations.any() and data.dropped == 2  # nothing follows the terminal row in the file
    following = np.zeros((6, 39), np.float32)
    following[:, 28] = [1.4, 1.4, 0.0, 0.0, 1.4, 0.0]
    assert door_rows([0.0] * 6, next_observations=following).rows.rewards.tolist() == [1, 1, 0, 0, 1, 0]
    assert door_rows([0.0] * 6, **{"infos/success": np.arange(6) % 3 == 0}).rows.rewards.tolist() == [1, 0, 1, 0]


def test_rows_of_another_adroit_task_are_refused(tmp_path):
    arrays = {"observations": np.zeros((6, 45)), "actions": np.zeros((6, 24)), "rewards": np.zeros(6)}
    write_d4rl(tmp_path / "pen.hdf5", arrays | {"terminals": np.zeros(6)}, {})
    with pytest.raises(InputError, match="observations are 45 wide, the environment's 39"):
        read_dataset([str(tmp_path / "pen.hdf5")], task_env("adroit-door-binary"))


# ----------------------------------------------------------------------------------------------------------- PointMaze


@pytest.mark.parametrize("name", ["umaze", "medium", "large"])
def test_walls_and_shortest_paths(name):
    """Walls are the simulator's. Every path is as long as Floyd and Warshall say, and crosses no wall."""
    maze: Any = task_env(f"pointmaze-{name}").get_wrapper_attr("maze")
    grid = np.array([list(row) for row in pointmaze.MAZES[name].split()])
    assert [[cell == 1 for cell in row] for row in maze.maze_map] == (grid == "1").tolist()
    for row, col in np.argwhere(grid != "1"):  # the centre, as `generate` computes it
        expected = [col + 0.5 - grid.shape[1] / 2, grid.shape[0] / 2 - row - 0.5]
        assert maze.cell_rowcol_to_xy(np.array([row, col])) == pytest.approx(expected)
    cells = [(int(row), int(col)) for row, col in np.argwhere(grid != "1")]
    far = np.abs(np.array(cells)[:, None] - np.array(cells)).sum(axis=2)
    far = np.where(far > 1, 10**6, far)
    for k in range(len(cells)):
        far = np.minimum(far, far[:, [k]] + far[[k], :])
    rng = np.random.default_rng(0)
    for i in rng.choice(len(cells), 5, replace=False):
        for j in set(range(len(cells))) - {i}:
            path = [cells[i], *pointmaze.shortest_path(grid, cells[i], cells[j], rng)]
            assert path[-1] == cells[j] and len(path) == far[i, j] + 1 and set(path) <= set(cells)
            assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in itertools.pairwise(path))
    paths = {tuple(pointmaze.shortest_path(grid, cells[0], cells[-1], rng)) for _ in range(50)}
    assert len(paths) > 1 or name == "umaze"  # ties are broken at random


# ------------------------------------------------------------------------------------------------ with real rows


@pytest.mark.parametrize(
    ("files", "task", "rows", "dropped", "episodes", "successes", "terminal"),
    [
        (("antmaze-umaze",), "antmaze-umaze", 30_585, 29, 79, 50, 50),
        (("antmaze-umaze-diverse",), "antmaze-umaze-diverse", None, 200, 199, 11, 11),
        (("door-human",), "adroit-door-binary", 6_704, 25, 25, 8, 0),
        (("door-human", "door-dapg-expert"), "adroit-door-binary", 16_654, 75, 75, 57, 0),
        (("pen-dapg-expert",), "adroit-pen-binary", 9_825, 100, 100, 79, 0),
        (("pen-dapg-expert",), "", 9_827, 98, 100, 79, 2),  # without the task, two pens fall
    ],
)
def test_real_files(files, task, rows, dropped, episodes, successes, terminal):
    data = read_dataset([shared(f"{file}.hdf5") for file in files], task_env(task) if task else None)
    assert rows in (None, len(data.rows.obs)) and data.dropped == dropped and len(data.episodes) == episodes
    assert data.success is not None and data.success.sum() == successes and data.rows.terminations.sum() == terminal


@pytest.mark.parametrize(
    ("file", "task", "median"),
    [
        ("antmaze-umaze", "antmaze-umaze", 1e-4),
        ("door-human", "adroit-door-binary", 1e-2),
        ("pen-dapg-expert", "adroit-pen-binary", 1e-2),
    ],
)
def test_rows_and_simulator_agree(file, task, median):
    result = replay(shared(f"{file}.hdf5"), task, 100)
    assert np.median(result["error"]) < median and ("ant" in task or result["success"].mean() >= 0.99)


def test_the_wrong_ant_would_be_noticed(monkeypatch):
    """The comparison has teeth: with motors 5 % stronger, the rows are off."""
    path = shared("antmaze-umaze.hdf5")
    right = np.median(replay(path, "antmaze-umaze", 50)["error"])
    monkeypatch.setattr(antmaze, "MAX_TORQUE", 31.5)
    assert np.median(replay(path, "antmaze-umaze", 50)["error"]) > 20 * right


# --------------------------------------------------------------------------------------------- packages not needed here


def test_robosuite():
    pytest.importorskip("robosuite")
    for name, width in (("lift", 19), ("can", 23), ("square", 23)):
        env = task_env(f"robomimic-{name}")
        first, other, again = (env.reset(seed=seed)[0] for seed in (1, None, 1))
        assert first.shape == (width,) and np.array_equal(first, again) and not np.allclose(first, other)
        _, reward, terminated, _, info = env.step(env.action_space.sample())
        assert reward == info["success"] == terminated
    env = make_env("expo/RobomimicLift-v1", "robomimic-lift", obs_keys=("object", "robot0_eef_pos"))
    assert env.reset(seed=0)[0].shape == (13,)
    with pytest.raises(InputError, match="robot0_eef_pos"):
        make_env("expo/RobomimicLift-v1", "robomimic-lift", obs_keys=("nothing",))


def test_ogbench():
    """Home-made rows as the package's own loader reads them."""
    pytest.importorskip("ogbench")
    from ogbench.relabel_utils import relabel_dataset  # pyright: ignore[reportMissingImports]
    from ogbench.utils import load_dataset  # pyright: ignore[reportMissingImports]

    from tools import ogbench_oracle

    for name in ("cube-single", "scene"):
        path = ogbench_oracle.generate(name, episodes=2, seed=3, processes=2, steps=100)
        env, theirs = task_env(f"ogbench-{name}"), load_dataset(str(path), add_info=True)
        relabel_dataset(env.get_wrapper_attr("name"), env, theirs)
        data = read_dataset([str(path)], env)
        for ours, key in ((data.rows.obs, "observations"), (data.rows.rewards, "rewards")):
            assert np.array_equal(ours, theirs[key])
        assert np.array_equal(data.rows.terminations, 1 - theirs["masks"]) and len(data.episodes) == 2
        assert np.abs(data.rows.actions - theirs["actions"]).max() < 2e-5
        with pytest.raises(InputError, match=r"qpos|button_states"):
            read_dataset([str(path)], task_env("ogbench-cube-double" if name != "scene" else "ogbench-puzzle-3x3"))
