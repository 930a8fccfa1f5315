"""Environments: what make_env promises and refuses, the table of tasks, and the rules of the simulators."""

import inspect
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, Sequence

from expo_diffusion import Args
from expo_finetune import Args as FinetuneArgs
from tools.replay import replay
from utils import InputError, adroit, antmaze
from utils.data import read_dataset, to_dataset
from utils.envs import make_env
from utils.tasks import MAZES, TASKS

DATA = Path(__file__).parent / "data"  # a few real rows: its README.md
PICTURE = np.zeros((2, 2, 3), np.uint8)
UNIT, ONE, YES, NO = Box(-1, 1, (1,), np.float32), np.zeros(1, np.float32), {"success": True}, {"success": False}


class Scripted(gym.Env):
    """Each step is a tuple (reward, info, observation) that was given; an exception is raised instead."""

    def __init__(self, steps: Any = (), actions: Any = UNIT, observations: Any = UNIT, start: Any = ONE):
        if isinstance(actions, Exception):
            raise actions
        self.action_space, self.observation_space, self.start, self.todo = actions, observations, start, iter(steps)
        self.taken: list[Any] = []  # the actions of all steps that did not raise

    def reset(self, *, seed=None, options=None):
        return self.start, {}

    def step(self, action):
        reward, info, obs = next(self.todo)
        if isinstance(obs, Exception):
            raise obs
        self.taken.append(action)
        return obs, reward, False, False, info

    def render(self):
        pass


gym.register("Scripted-v0", Scripted)  # pyright: ignore


def scripted(*steps: Any, limit: int = 10, repeat: int = 1, **changes: Any) -> Any:
    gym.registry["Scripted-v0"].kwargs = {"steps": steps} | changes
    return make_env("Scripted-v0", max_episode_steps=limit, action_repeat=repeat)


def task_env(task: str) -> Any:
    return make_env(TASKS[task].env_id, task) if task else None


def test_wrappers_against_the_plain_environment():
    """float32, native bounds of +-2 behind [-1, 1], a limit in actions, and the same seed gives the same start."""
    env, plain = make_env("Pendulum-v1", max_episode_steps=4, action_repeat=3), gym.make("Pendulum-v1").unwrapped
    assert env.action_space == UNIT and env.get_wrapper_attr("native").action_space.high == 2
    obs, expected = env.reset(seed=3)[0], plain.reset(seed=3)[0]
    assert obs.dtype == np.float32 and np.array_equal(obs, expected)
    for t in range(4):
        obs, reward, terminated, truncated, info = env.step(np.array([0.25], np.float32))
        *states, total = zip(*[plain.step(np.array([0.5], np.float32))[:2] for _ in range(3)], strict=True)
        assert obs == pytest.approx(states[0][-1], rel=1e-5) and reward == pytest.approx(sum(map(float, total)))
        assert (terminated, truncated) == (False, t == 3) and "success" not in info


def test_observations_are_copies_and_never_rounded():
    """Whatever type the space has, and although the environment changes its own array later."""
    env = scripted(observations=Box(0, 255, (1, 2), np.uint8), start=np.array([[0.5, 200.25]]))
    start = env.reset()[0]
    env.unwrapped.start += 1
    assert start.tolist() == [0.5, 200.25] and env.reset()[0].tolist() == [1.5, 201.25]


def test_success():
    """Under any of its names. Each case is what the environment says, the action repeat, and success per action."""
    for infos, repeat, expected in (
        ([{}, {}], 1, [None, None]),  # an environment that never speaks of success has none
        ([{}, YES], 1, [None, True]),  # A8: evaluation takes the silence of other episodes for no
        ([YES, NO, NO, NO], 2, [True, False]),  # A9: any of the inner steps
        ([{"success": np.nan}, {"success": -1}], 1, [False, False]),
        ([{"is_success": 0.0}, {"goal_achieved": np.array([True])}], 1, [False, True]),
    ):
        env = scripted(*((np.ones(1), info, ONE) for info in infos), repeat=repeat)  # a reward (1,) is a number
        env.reset()
        answers = [env.step(ONE) for _ in expected]
        assert [answer[4].get("success") for answer in answers] == expected and answers[0][1] == repeat


REFUSED = [
    ({"actions": Discrete(3)}, "Discrete actions"),
    ({"actions": Box(-5, 5, (2,), np.int64)}, "Box actions of int64; they must be a continuous Box"),
    ({"actions": Box(-np.inf, np.inf, (2,))}, "action dimension 0 goes from -inf to inf"),
    ({"actions": Box(*(np.finfo(np.float32).max * UNIT.high * [[-1], [1]]))}, "action dimension 0 goes from -3.4"),
    (
        {"actions": Box(np.array([-1.0, 1.0]), np.ones(2), dtype=np.float64)},
        "action dimension 1 goes from 1.0 to 1.0",
    ),
    ({"observations": Sequence(UNIT)}, "cannot be flattened"),
    ({"limit": 0}, "no time limit; give --max-episode-steps"),
    ({"actions": RuntimeError("no such robot")}, f"RuntimeError: no such robot ({__file__}:"),
]
STEPS = [
    ((np.zeros(2), {}, ONE), "the reward is [0. 0.]; one finite number is needed"),
    ((np.nan, {}, ONE), "the reward is nan; one finite number is needed"),
    ((0.0, {}, ONE * np.nan), "the observation is not finite in dimension 0"),
    ((0.0, {}, np.zeros(2)), "the observation has shape (2,), its space (1,)"),
    ((0.0, {}, KeyError("torque")), f"KeyError: 'torque' ({__file__}:{inspect.getsourcelines(Scripted.step)[1] + 3})"),
]


def test_bad_environments():
    """One line, with the step and the line of the user's own code."""
    for env_id, known in (("Pendulun-v1", "Pendulum"), ("no_such_module:Env-v0", "no_such_module")):
        with pytest.raises(InputError, match=known):
            make_env(env_id)
    for changes, words in REFUSED:
        with pytest.raises(InputError) as error:
            scripted(**changes)
        assert str(error.value).startswith("--env-id 'Scripted-v0': ") and words in str(error.value)
    for step, words in STEPS:
        env = scripted((1.0, {}, ONE), step)
        env.reset()
        env.step(ONE)
        with pytest.raises(InputError) as error:
            env.step(ONE)
        assert str(error.value) == f"environment 'Scripted-v0', step 2 of an episode: {words}"
    shown = {"render_mode": "rgb_array"}
    blind = type("Blind", (Scripted,), shown | {"render": gym.Env.render})
    floats, grey = (type("Odd", (Scripted,), shown | {"render": lambda _, x=x: x}) for x in (PICTURE / 2, PICTURE[0]))
    for env_id, make in (("Dark-v0", Scripted), ("Blind-v0", blind), ("Floats-v0", floats), ("Grey-v0", grey)):
        gym.register(env_id, lambda render_mode, make=make: make(), max_episode_steps=5)  # pyright: ignore
        with pytest.raises(InputError, match="no pictures: its `render_mode` must be 'rgb_array'"):
            make_env(env_id, render_mode="rgb_array")
    for i, answer in enumerate((ONE, (ONE, {}, 0))):
        old: Any = type("Old", (Scripted,), {"reset": lambda *_, answer=answer, **__: answer})
        gym.register(f"Old-v{i}", old, max_episode_steps=5)
        with pytest.raises(InputError, match=r"reset: Gymnasium's reset returns \(obs, info\)"):
            make_env(f"Old-v{i}").reset()
    # A wrapper may draw. A close that fails, as when two share a robot, ends no run.
    draws = type("Draws", (gym.Wrapper,), {"render": lambda _: PICTURE, "close": lambda _: 1 / 0})
    gym.register("Draws-v0", lambda render_mode: draws(blind()), max_episode_steps=5)  # pyright: ignore
    make_env("Draws-v0", render_mode="rgb_array").close()


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64])
def test_an_action_is_always_one_of_the_environments_space(number):
    """Of its type and shape, and never outside, as 14.999999 would be for a bound of 15."""
    for low, high in ((15, 30), (0.26, 2.61), (-0.1, 0.7), (-7.3, -1e-3)):
        for shape in ((), (1,), (2, 3)):
            space = Box(low, high, shape, number)
            env = scripted(*3 * [(0, {}, ONE)], actions=space)
            env.reset()
            for value in (-1, 1, 0.3):
                env.step(np.full(env.action_space.shape, value, np.float32))
            taken = env.unwrapped.taken
            assert all(type(action) is np.ndarray and space.contains(action) for action in taken), (space, taken)
            assert [float(action.mean()) for action in taken[:2]] == pytest.approx([low, high], rel=1e-2)


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].env_id])
def test_a_row_of_the_table(name):
    """Its environment is made, or one line says what to install."""
    try:
        env = task_env(name)
    except InputError as error:
        advice = "NVlabs/mimicgen" if name.startswith("mimicgen") else "pip install -r requirements-"
        assert name.startswith(("ogbench", "robomimic", "mimicgen")) and advice in str(error)
        return
    limits = {"antmaze-umaze": 700, "antmaze": 1000, "adroit-pen": 100, "adroit": 200, "robomimic": 400}
    limits |= {"mimicgen-stack": 200, "mimicgen": 400}
    limit = next((limit for prefix, limit in limits.items() if name.startswith(prefix)), env.spec.max_episode_steps)
    assert env.spec.max_episode_steps == limit
    assert env.reset(seed=1)[0].tolist() == env.reset(seed=1)[0].tolist() != env.reset(seed=2)[0].tolist()


def test_published_settings():
    """Where tasks differ, and what no task changes."""
    names = ("edit_scale", "num_min_critics", "reward_shift", "learning_starts", "edit_dropout", "total_timesteps")
    published = {"antmaze": (0.05, 1, -1, 5000, 0, 300_000), "adroit": (0.7, 2, -1, 0, 0.1, 300_000)}
    published |= {"robomimic-square": (0.05, 2, 0, 5000, 0, 150_000), "robomimic": (0.05, 2, 0, 5000, 0, 120_000)}
    published |= {"ogbench": (0.1, 2, 0, 5000, 0, 500_000), "mimicgen": (0.05, 2, 0, 5000, 0, 200_000)}
    everywhere = dict(utd_ratio=20, batch_size=256, num_critics=10, gamma=0.99, tau=0.005, num_base_samples=8)
    everywhere |= dict(num_edit_samples=8, denoising_steps=10, offline_steps=0, reward_scale=1, hidden_dim=256)
    finetune = {"antmaze": (500_000, 0.05, 0), "adroit": (20_000, 0.05, 2000), "robomimic": (200_000, 0.1, 0)}
    finetune |= {"mimicgen": (200_000, 0.05, 0)}
    data = {"robomimic-lift": ":10", "mimicgen-stack": ":200", "mimicgen-threading": ":50"}  # demonstrations
    assert all(TASKS[name].dataset[0].endswith(end) for name, end in data.items())
    for name in (name for name in TASKS if not name.startswith(("pointmaze", "fetch", "laptop"))):
        args = vars(Args()) | TASKS[name].settings
        expected = next(values for prefix, values in published.items() if name.startswith(prefix))
        assert tuple(args[key] for key in names) == expected and args.items() >= everywhere.items(), name
        args = vars(FinetuneArgs()) | TASKS[name].settings | TASKS[name].finetune
        expected = next((values for prefix, values in finetune.items() if name.startswith(prefix)), None)
        assert expected in (None, (args["pretrain_steps"], args["edit_scale"], args["offline_steps"])), name


@pytest.mark.parametrize(("maze", "corner"), [("umaze", (0, 8)), ("medium", (20, 20)), ("large", (32, 24))])
def test_antmaze_model_walls_and_goals(maze, corner):
    """The ant is Gymnasium's but for what D4RL changed. Walls stand where the map says, and goals vary by 1.5 m."""
    env, theirs = antmaze.AntMaze(maze), gym.make("Ant-v5").get_wrapper_attr("model")
    ours: Any = env.model
    for name in ("body_mass", "body_inertia", "body_pos", "dof_damping", "dof_armature", "jnt_range", "qpos0"):
        assert np.allclose(getattr(ours, name)[: len(getattr(theirs, name))], getattr(theirs, name)), name
    assert ours.opt.timestep == 0.02 and env.dt == pytest.approx(0.1)
    assert np.allclose(ours.geom_solref, [0.02, 1]) and np.allclose(ours.geom_solimp[:, :3], [0.8, 0.8, 0.01])
    assert np.allclose(ours.actuator_gear[:, 0], 1) and np.allclose(ours.actuator_ctrlrange, [-30, 30])
    boxes = ours.geom_pos[ours.geom_type == mujoco.mjtGeom.mjGEOM_BOX]  # pyright: ignore
    rows = MAZES[maze].split()  # the start, in row 1 and column 1, is the origin
    walls = {(4.0 * c - 4, 4.0 * r - 4) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == "1"}
    assert {(x, y) for x, y, _ in boxes} == walls and len(boxes) == len(walls)
    states = np.array([[*env.reset(seed=seed)[0], *env.goal] for seed in range(40)])
    moved, goals = states[:, :29] - [*env.init_qpos, *np.zeros(14)], states[:, 29:] - corner
    assert 0.05 < np.abs(moved[:, :15]).max() <= 0.1 and 0.08 < moved[:, 15:].std() < 0.12
    assert goals.min() >= 0 and goals.max() <= 1.5 and 0.6 < goals.mean() < 0.9 and len(np.unique(goals)) == 80


def test_antmaze_ends_at_the_goal_and_not_at_a_fall():
    env = make_env("expo/AntMazeUMaze-v2", max_episode_steps=9)
    ant: Any = env.unwrapped
    for distance, expected in ((0.3, True), (0.8, False)):
        env.reset(seed=0)
        ant.set_state(np.array([ant.goal[0] + distance, ant.goal[1], *ant.init_qpos[2:]]), np.zeros(14))
        _, reward, terminated, truncated, info = env.step(np.zeros(8, np.float32))
        assert (reward, terminated, truncated, info["success"]) == (float(expected), expected, False, expected)
    env.reset(seed=0)
    ant.set_state(np.array([0, 0, 0.75, 0, 1, 0, 0, *ant.init_qpos[7:]]), np.zeros(14))  # on its back
    assert [env.step(np.zeros(8, np.float32))[2:4] for _ in range(9)] == [(False, False)] * 8 + [(False, True)]
    rows = {"rewards": np.array([0, 1], np.float32), "terminals": np.array([0, 1])}
    assert ant.relabel_rows(rows)["infos/success"].tolist() == [False, True]
    with pytest.raises(InputError, match="shifts them"):
        ant.relabel_rows({**rows, "rewards": np.array([-1, 0], np.float32)})


@pytest.mark.parametrize("name", ["pen", "door", "relocate", "hammer"])
def test_adroit_success_is_read_off_the_observation(name):
    """States around the goal, where the simulator says now yes and now no."""
    env, rng, seen = task_env(f"adroit-{name}-binary"), np.random.default_rng(0), set()
    simulator: Any = env.unwrapped
    keys = {"pen": "desired_orien", "door": "door_body_pos", "hammer": "board_pos"}.get(name, "obj_pos target_pos")
    for seed in range(40):
        env.reset(seed=seed)
        state = {key: simulator.get_env_state()[key] for key in f"qpos qvel {keys}".split()}
        state["qvel"][:] = 0
        if name == "pen":
            state["desired_orien"] = np.array([1, *rng.normal([0, 1, 0], 0.3)])  # near where the pen points
        elif name == "relocate":
            state["qpos"][30:33], state["obj_pos"] = 0, np.array([0, 0, 0.035])
            state["target_pos"] = state["obj_pos"] + rng.normal(0, 0.07, 3)
        else:
            state["qpos"][[28, 26]] = rng.uniform([1.2, 0.07], [1.5, 0.09])  # hinge of the door, nail of the hammer
        simulator.set_env_state(state)
        obs, reward, terminated, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
        assert reward == info["success"] == adroit.success_after(name, obs[None])[0] and not terminated
        seen.add(bool(reward))
    assert seen == {False, True}


def test_adroit_rows_are_relabelled():
    """By hand: two episodes of three hinge angles. A row's success is that of the state after it."""
    obs, relabel = np.zeros((6, 39)), task_env("adroit-door-binary").get_wrapper_attr("relabel_rows")
    obs[:, 28] = [0.0, 1.4, 1.4, 0.0, 0.0, 1.4]
    arrays = {"observations": obs, "actions": np.zeros((6, 28)), "rewards": np.arange(6.0)}
    arrays |= {"terminals": np.arange(6) == 2, "timeouts": np.arange(6) == 5}
    data = to_dataset(dict(arrays), relabel)
    assert data.rows.rewards.tolist() == [1, 1, 0, 1] and data.success is not None and data.success.all()
    assert not data.rows.terminations.any() and data.dropped == 2  # the terminal row has no successor in the file
    following = {"next_observations": np.roll(obs, -1, axis=0)}
    assert to_dataset(arrays | following, relabel).rows.rewards.tolist() == [1, 1, 0, 0, 1, 0]
    recorded = {"infos/success": np.where(np.arange(6) % 3, -1, 1)}
    assert to_dataset(arrays | recorded, relabel).rows.rewards.tolist() == [1, 0, 1, 0]


REAL = [
    (["antmaze"], "antmaze-umaze", (99, 1, 2, 1, 1)),
    (["door"], "adroit-door-binary", (78, 2, 2, 1, 0)),
    (["pen"], "adroit-pen-binary", (68, 2, 2, 1, 0)),
    (["door", "door"], "", (156, 4, 4, 2, 0)),
]


def test_real_files():
    """Rows, dropped rows, episodes, successes and terminations."""
    for files, task, expected in REAL:
        data: Any = read_dataset([str(DATA / f"d4rl-{file}.hdf5") for file in files], task_env(task))
        counts = len(data.rows.obs), data.dropped, len(data.episodes), data.success.sum(), sum(data.rows.terminations)
        assert counts == expected, files


def test_real_rows_and_simulators_agree(monkeypatch):
    """D4RL's AntMaze moves as ours does, and success in Adroit is the flag that the file holds."""
    for file, task in (("d4rl-door", "adroit-door-binary"), ("d4rl-pen", "adroit-pen-binary")):
        result = replay(str(DATA / f"{file}.hdf5"), task, 60)
        assert np.median(result["error"]) < 1e-2 and result["success"].mean() >= 0.99
    ants = str(DATA / "d4rl-antmaze.hdf5")
    right, new = np.median(replay(ants, "antmaze-umaze", 60)["error"]), mujoco.mj_version() >= 3_011_000  # pyright: ignore
    assert right < (1e-4 if new else 2e-2)  # contacts were others before: docs/data.md
    monkeypatch.setattr(antmaze, "MAX_TORQUE", 31.5)  # motors that are 5 % stronger would be noticed
    assert not new or np.median(replay(ants, "antmaze-umaze", 60)["error"]) > 20 * right
