"""Environments: flat float32 observations, actions in [-1, 1], a time limit, and success in `info`."""

import atexit
import contextlib
import importlib
import math
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from utils.errors import InputError
from utils.files import reason

SUCCESS_KEYS = ("success", "is_success", "goal_achieved")

# This project's own environments: Gymnasium id -> (entry point, its arguments, time limit in actions).
OWN: dict[str, tuple[str, dict[str, Any], int]] = {
    "expo/AntMazeUMaze-v2": ("utils.antmaze:AntMaze", {"maze": "umaze"}, 700),
    "expo/AntMazeMedium-v2": ("utils.antmaze:AntMaze", {"maze": "medium"}, 1000),
    "expo/AntMazeLarge-v2": ("utils.antmaze:AntMaze", {"maze": "large"}, 1000),
    "expo/AdroitPenBinary-v1": ("utils.adroit:make", {"name": "pen"}, 100),
    "expo/AdroitDoorBinary-v1": ("utils.adroit:make", {"name": "door"}, 200),
    "expo/AdroitRelocateBinary-v1": ("utils.adroit:make", {"name": "relocate"}, 200),
    "expo/AdroitHammerBinary-v1": ("utils.adroit:make", {"name": "hammer"}, 200),
    "expo/OGBenchCubeSingle-v0": ("utils.ogbench_data:make", {"name": "cube-single-singletask-v0"}, 200),
    "expo/OGBenchCubeDouble-v0": ("utils.ogbench_data:make", {"name": "cube-double-singletask-v0"}, 500),
    "expo/OGBenchScene-v0": ("utils.ogbench_data:make", {"name": "scene-singletask-v0"}, 750),
    "expo/OGBenchPuzzle3x3-v0": ("utils.ogbench_data:make", {"name": "puzzle-3x3-singletask-v0"}, 500),
    "expo/RobomimicLift-v1": ("utils.robosuite_env:Robosuite", {"name": "Lift"}, 400),
    "expo/RobomimicCan-v1": ("utils.robosuite_env:Robosuite", {"name": "PickPlaceCan"}, 400),
    "expo/RobomimicSquare-v1": ("utils.robosuite_env:Robosuite", {"name": "NutAssemblySquare"}, 400),
}
INSTALL = {
    "ogbench": "pip install -r requirements-ogbench.txt",
    "robosuite": "install requirements-robomimic.txt into an environment of its own, see docs/data.md",
    "gymnasium_robotics": "pip install -r requirements.txt",
}
# float64 bounds become float32 on purpose. OGBench makes its spaces anew, and would warn, whenever they are asked for.
warnings.filterwarnings("ignore", ".*precision lowered by casting", UserWarning)
EGL = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"


class ActionRepeat(gym.Wrapper):
    """Applies each action `repeat` times, sums the rewards, and stops at the end of an episode."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class Guard(gym.Wrapper):
    """Names what goes wrong in an environment: an exception, a wrong shape, a value that is not finite.

    Raises:
        InputError: with the environment, the step of the episode, the quantity, and the line that raised.
    """

    steps = 0  # of the episode

    def reset(self, **kwargs):
        self.steps = 0
        with self.named("reset"):
            obs, info = self.env.reset(**kwargs)
            self.check(obs, 0.0)
        return obs, info

    def step(self, action):
        self.steps += 1
        with self.named(f"step {self.steps} of an episode"):
            obs, reward, terminated, truncated, info = self.env.step(action)
            self.check(obs, float(reward))
        return obs, reward, terminated, truncated, info

    def check(self, obs: np.ndarray, reward: float) -> None:
        shape = self.observation_space.shape
        if np.shape(obs) != shape:
            raise InputError(f"the observation has shape {np.shape(obs)}, its space {shape}")
        if not np.isfinite(obs).all():
            place = int(np.flatnonzero(~np.isfinite(obs))[0])
            raise InputError(f"the observation is not finite ({obs[place]} in dimension {place})")
        if not math.isfinite(reward):
            raise InputError(f"the reward is {reward}")

    @contextlib.contextmanager
    def named(self, moment: str) -> Iterator[None]:
        name = self.spec.id if self.spec else type(self.unwrapped).__name__
        try:
            yield
        except InputError as error:
            raise InputError(f"environment {name!r}, {moment}: {error}") from None
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            raise InputError(
                f"environment {name!r}, {moment}: {type(error).__name__}: {reason(error)} ({where})"
            ) from error


@contextlib.contextmanager
def maze_files(env_id: str) -> Iterator[None]:
    """A temporary folder of its own for the model file of a gymnasium-robotics maze, read once and never removed.

    In the common folder the file is named by the clock: many runs at a time could read each other's.
    """
    entry = gym.registry[env_id].entry_point if env_id in gym.registry else None
    if not str(entry).startswith("gymnasium_robotics.envs.maze"):
        yield
        return
    usual = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="expo-maze-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = usual


def make_env(
    env_id: str,
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int = 0,
    action_repeat: int = 1,
    render: bool = False,
) -> gym.Env:
    """One environment with observations (O,) float32 and actions (A,) in [-1, 1].

    Args:
        env_id: a registered Gymnasium id; gymnasium-robotics' ids are registered if it is installed.
        env_kwargs: handed to `gymnasium.make`.
        max_episode_steps: time limit in actions; 0 keeps the environment's own.
        action_repeat: simulator steps per action.
        render: make it with `render_mode="rgb_array"`.

    Raises:
        InputError: unknown id, no continuous Box action space, an observation that cannot be flattened.
    """
    kwargs = dict(env_kwargs or {})
    if render:
        kwargs["render_mode"] = "rgb_array"
    if max_episode_steps:
        kwargs["max_episode_steps"] = -1  # ours goes outside of the action repeat
    try:
        prepare_rendering(render)
        register_envs()
        with warnings.catch_warnings(), maze_files(env_id):
            warnings.simplefilter("ignore")
            env = gym.make(env_id, disable_env_checker=True, **kwargs)
        if render:
            env.reset(seed=0)
            env.render()
            atexit.register(env.close)  # while the graphics library is still there
    except gym.error.Error as error:
        raise InputError(f"--env-id {env_id!r}: {' '.join(str(error).split())}") from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        how = f" ({INSTALL[package]})" if package in INSTALL else ""
        raise InputError(f"--env-id {env_id!r} needs a package that is not installed: {package}{how}") from None
    except InputError:
        raise
    except Exception as error:  # of rendering: OpenGL's loaders raise whatever they like
        if not render:
            raise
        raise InputError(f"--capture-video: {rendering_problem(error)}") from None
    if not isinstance(env.action_space, spaces.Box):
        kind = type(env.action_space).__name__
        raise InputError(f"--env-id {env_id!r} has a {kind} action space; EXPO needs a continuous Box one")
    if not (np.isfinite(env.action_space.low).all() and np.isfinite(env.action_space.high).all()):
        raise InputError(f"--env-id {env_id!r} has unbounded actions; wrap it so that its Box has finite bounds")
    if not env.observation_space.is_np_flattenable:
        raise InputError(f"--env-id {env_id!r} has observations that cannot be flattened: {env.observation_space}")
    if action_repeat > 1:
        env = ActionRepeat(env, action_repeat)
    if max_episode_steps:
        env = gym.wrappers.TimeLimit(env, max_episode_steps)
    shape = env.action_space.shape
    if shape is not None and len(shape) != 1:
        env = gym.wrappers.TransformAction(env, lambda a: np.reshape(a, shape), spaces.flatten_space(env.action_space))
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    env = gym.wrappers.FlattenObservation(env)
    return Guard(gym.wrappers.DtypeObservation(env, np.float32))


def register_envs() -> None:
    """Registers this project's environments, and gymnasium-robotics' where it is installed; again does nothing."""
    for env_id, (entry_point, kwargs, limit) in OWN.items():
        if env_id not in gym.registry:
            gym.register(env_id, entry_point, kwargs=kwargs, max_episode_steps=limit)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as devnull, contextlib.redirect_stderr(devnull):
            warnings.simplefilter("ignore")  # of Adroit's dense rewards, which no task here uses
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
    except ImportError:
        pass


def prepare_rendering(render: bool) -> None:
    """Lets MuJoCo render without a display: with EGL, unless the user has chosen (MUJOCO_GL) or has a display.

    PyOpenGL chooses when it is first imported, which an environment that does not render may do: so it is told always.
    MuJoCo is told only if there is something to render, as it opens the graphics device at once.
    """
    if os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY") or not sys.platform.startswith("linux"):
        return
    os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
    if render:
        os.environ["MUJOCO_GL"] = "egl"
        for name in ("mujoco.rendering.classic.gl_context", "mujoco.gl_context"):
            if name in sys.modules:  # imported before the choice: it would look for a display
                with contextlib.suppress(Exception):  # without EGL; the first picture says so in its own words
                    importlib.reload(sys.modules[name])


def rendering_problem(error: Exception) -> str:
    """What to do about an exception while rendering."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    if os.environ.get("MUJOCO_GL") == "egl":
        return f"rendering without a display needs EGL (Debian: {EGL}); {text}"
    return f"rendering failed with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} ({text}); try MUJOCO_GL=egl"


def native_action_bounds(env: gym.Env) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound (A,) of the environment's own actions, the ones its data sets are written in."""
    space = env.unwrapped.action_space
    assert isinstance(space, spaces.Box)
    return space.low.reshape(-1), space.high.reshape(-1)


def success_of(info: dict[str, Any]) -> bool | None:
    """Whether the step reports success; None where the environment does not say."""
    for key in SUCCESS_KEYS:
        if key in info:
            return bool(info[key])
    return None
