"""Pictures without a display."""

import atexit
import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym

from utils import InputError, reason


def try_out(create: Callable[..., gym.Env], env_id: str, kwargs: dict[str, Any]) -> gym.Env:
    """create(env_id, kwargs, None), after a first picture, so that a run fails at its start if it cannot draw."""
    if sys.platform.startswith("linux") and not (os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY")):
        os.environ["MUJOCO_GL"] = "egl"
        for name in ("mujoco.rendering.classic.gl_context", "mujoco.gl_context"):
            if name in sys.modules:  # it was imported before the choice, and would look for a display
                with contextlib.suppress(Exception):  # without EGL the first picture fails, in its own words
                    importlib.reload(sys.modules[name])
    try:
        env = create(env_id, kwargs, None)
        env.reset(seed=0)
        env.render()
    except (gym.error.Error, ModuleNotFoundError):
        raise
    except Exception as error:  # OpenGL's loaders raise whatever they like
        chosen = os.environ.get("MUJOCO_GL", "")
        advice = "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri" if chosen == "egl" else "try MUJOCO_GL=egl"
        raise InputError(f"no pictures with MUJOCO_GL={chosen!r}: {reason(error)}; {advice}") from error
    atexit.register(env.close)  # while the graphics library is still there
    return env
