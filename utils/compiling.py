"""`@compilable`: torch.compile where `--compile` asks for it, the plain function everywhere else."""

import functools
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from utils.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])

_state = {"enabled": False, "told": True}


def enable(enabled: bool) -> None:
    """Whether `@compilable` functions are compiled from now on; random numbers stay those of eager torch.

    Raises:
        InputError: there is no C++ compiler.
    """
    if enabled:
        if not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise InputError(
                "--compile needs a C++ compiler (Debian: apt install g++ python3-dev); or use --no-compile"
            )
        import torch._inductor.config

        torch._inductor.config.fallback_random = True
        _state["told"] = False
    _state["enabled"] = enabled


def compilable(function: F) -> F:
    """`function`, compiled on its first call if compilation is enabled then.

    A plain `@torch.compile` would do the same and load the compiler, seconds, in every process that imports the script.
    """
    compiled = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling() or not _state["enabled"]:  # inside another compiled function: part of it
            return function(*args, **kwargs)
        if not _state["told"]:
            _state["told"] = True
            tqdm.write("compiling on first use: a minute or two, once; torch keeps the result for later runs")
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]
