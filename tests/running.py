"""Whole runs for the tests: in this process, or in a forked one that dies or is stopped at a chosen event.

A fork pays for the imports once. Events are counted, so every death can be repeated, and its moment is known.
"""

import builtins
import contextlib
import csv
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, TINY_RUN, flags_of
from gymnasium.wrappers import TimeLimit

from utils.tasks import parse_args

# Checkpoints, rows of the log, evaluations and episodes all fall on different steps.
SMALL = {**TINY_RUN, "total_timesteps": 26, "offline_steps": 6, "pretrain_steps": 5, "max_episode_steps": 7}
SMALL |= {"eval_every": 9, "eval_episodes": 1, "log_every": 6, "checkpoint_every": 4, "learning_starts": 3}
SMALL |= {"num_critics": 3, "base_hidden_dim": 8, "hidden_dim": 8, "batch_size": 4}

Trap = Callable[[dict[str, Any]], None]  # is called in the forked process, with what the script will find as globals


def words_for(script: Any, run_dir: Path, **flags: Any) -> list[str]:
    """The command line of a small run."""
    return flags_of(script, {**SMALL, "run_dir": run_dir, **flags})


def run_here(script: Any, words: list[str], **changed: Any) -> None:
    """The script's main in this process. `changed` sets flags that the command line would refuse."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    args = parse_args(script.Args, argv=words)
    vars(args).update(changed)
    try:
        script.main(args)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def run(script: Any, words: list[str], log: Path, trap: Trap = lambda _: None) -> int:
    """Exit code of `python script.py *words` in a forked process, or minus the signal that killed it."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code: Any = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        path = str(ROOT / f"{script.__name__.replace('.', '/')}.py")
        sys.argv, known = [path, *words], {}
        trap(known)
        runpy.run_path(path, known, "__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


class TornFile:
    """A file whose every write has two halves, with a call of `between` between them."""

    def __init__(self, file: Any, between: Callable[[], None]):
        self.file, self.between = file, between

    def write(self, content: Any) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.between()
        self.file.write(content[len(content) // 2 :])

    def __enter__(self) -> "TornFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


EVENTS = {"part": 7, "row": 90, "fsync": 14, "replace": 7, "step": 40, "draw": 60}  # about so many are in a small run


def at(kind: str, number: int, act: Callable[[], None]) -> Trap:
    """A trap that calls `act` at an event: in the middle of a write to a file that will be renamed (`part`) or to
    metrics.csv (`row`), or before an fsync, a rename, an environment step or a draw of random rows."""
    counts = dict.fromkeys(EVENTS, 0)

    def happens(event: str) -> None:
        counts[event] += 1
        if event == kind and counts[event] == number:
            act()

    def trapped(event: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            happens(event)
            return function(*args, **kwargs)

        return call

    def torn_open(path: Any, mode: str = "r", **kwargs: Any) -> Any:
        file = builtins.open(path, mode, **kwargs)
        return TornFile(file, lambda: happens("part" if Path(path).suffix == ".part" else "row"))

    def lay(known: dict[str, Any]) -> None:
        known["open"] = torn_open
        owners = {"fsync": (os, "fsync"), "replace": (os, "replace"), "step": (TimeLimit, "step")}
        for event, (owner, name) in (owners | {"draw": (torch, "randint")}).items():
            setattr(owner, name, trapped(event, getattr(owner, name)))

    return lay


def send(*numbers: int) -> Callable[[], None]:
    """Sends signals to its own process."""

    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def read_metrics(run_dir: Path) -> list[tuple[int, str, str]]:
    """(step, key, value) of every row of metrics.csv, without the seconds."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert all(list(row) == ["step", "seconds", "key", "value"] for row in rows)
    return [(int(row["step"]), row["key"], row["value"]) for row in rows]


def values_of(rows: Iterable[tuple[int, str, str]], key: str) -> dict[int, float]:
    """step -> value of one key."""
    return {step: float(value) for step, name, value in rows if name == key}


def read_state(run_dir: Path) -> dict[str, Any]:
    """The last checkpoint, without what depends on the clock."""
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    del state["log"]["seconds"], state["log"]["bytes"]
    return state


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, through dicts, lists and tuples."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif torch.is_tensor(one):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other
