"""What a user reads when an environment fails: one line, with the place in their own code."""

import sysconfig
import traceback
from pathlib import Path

import gymnasium as gym

from utils import InputError, reason

INSTALL = {
    "ogbench": "pip install -r requirements-ogbench.txt",
    "robosuite": "install requirements-robomimic.txt into an environment of its own, see docs/data.md",
    "gymnasium_robotics": "pip install -r requirements.txt",
}


def failure(error: Exception, where: str) -> InputError:
    """The exception to raise instead of `error`; `where` is the environment, and what it was asked to do."""
    if isinstance(error, InputError):
        return InputError(f"{where}: {error}")
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in INSTALL:
        package = str(error.name).partition(".")[0]
        return InputError(f"{where} needs a package that is not installed: {package} ({INSTALL[package]})")
    if isinstance(error, gym.error.Error | ModuleNotFoundError):
        return InputError(f"{where}: {' '.join(str(error).split())}")
    return InputError(f"{where}: {type(error).__name__}: {reason(error)} ({place(error)})")


def place(error: Exception) -> str:
    """file:line of the last frame in the user's own code; without one, of the last frame at all."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    library = (sysconfig.get_path("stdlib"), str(Path(__file__).parent), "<")
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(library) and "-packages" not in f.filename]
    return f"{(own or frames)[-1].filename}:{(own or frames)[-1].lineno}"
