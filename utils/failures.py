"""When an environment fails, a user reads one line with the place in their own code; and pictures without a display."""

import contextlib
import importlib
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

import gymnasium as gym

from utils import InputError, reason

INSTALL = {  # what to do where a package is missing
    "ogbench": "pip install -r requirements-ogbench.txt",
    "gymnasium_robotics": "pip install -r requirements.txt",
    "robosuite": "pip install -r requirements-robomimic.txt, into a virtual environment of its own: docs/data.md",
    "mimicgen": "from github.com/NVlabs/mimicgen, because PyPI's is another package: docs/data.md",
}


def failure(error: Exception, where: str) -> InputError:
    """The exception to raise instead of `error`; `where` is the environment, and what it was asked to do."""
    package = str(getattr(error, "name", "")).partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in INSTALL:
        return InputError(f"{where} needs a package that is missing: {package} ({INSTALL[package]})")
    if isinstance(error, InputError | gym.error.Error | ModuleNotFoundError):
        return InputError(f"{where}: {' '.join(str(error).split())}")
    library = (sysconfig.get_path("stdlib"), str(Path(__file__).parent), "<")
    error = error.__cause__ if isinstance(error.__cause__, type(error)) else error  # gymnasium raises it twice
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [frame for frame in frames if not frame[0].startswith(library) and "-packages" not in frame[0]]
    place = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (own or frames)[-1]
    return InputError(f"{where}: {type(error).__name__}: {reason(error)} ({place[0]}:{place[1]})")


def with_pictures(create: Any, env_id: str, kwargs: dict[str, Any]) -> gym.Env:
    """An environment that draws, also without a display. Where it cannot, a run fails at its start."""
    if sys.platform.startswith("linux") and not (os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY")):
        os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = "egl"
        for name in ("mujoco.rendering.classic.gl_context", "mujoco.gl_context"):
            if name in sys.modules:  # it was imported before the choice, and would look for a display
                with contextlib.suppress(Exception):  # without EGL the first picture fails, in its own words
                    importlib.reload(sys.modules[name])
    env, picture = create(env_id, kwargs), None
    try:
        env.reset(seed=0)
        with contextlib.suppress(NotImplementedError):  # it draws nothing
            picture = env.render()
    except Exception as error:  # OpenGL's loaders raise whatever they like
        chosen = os.environ.get("MUJOCO_GL", "")
        advice = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri" if chosen == "egl" else "try MUJOCO_GL=egl"
        raise InputError(f"no pictures with MUJOCO_GL={chosen!r}: {reason(error)}; {advice}") from error
    if env.render_mode != "rgb_array" or (getattr(picture, "dtype", 0), getattr(picture, "ndim", 0)) != ("uint8", 3):
        raise InputError("no pictures: its `render_mode` must be 'rgb_array', and a picture (H, W, 3) of uint8")
    return env
