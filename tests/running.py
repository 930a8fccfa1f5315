"""Whole runs: in this process, or in a fork (imports are paid once) that dies or is stopped at an event of its own."""

import csv
import functools
import io
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, flags_of
from gymnasium.wrappers import TimeLimit

from utils.tasks import parse_args

# Checkpoints, rows of the log, evaluations and episodes all fall on different steps.
SMALL = {"task": "pointmaze-umaze", "total_timesteps": 26, "offline_steps": 6, "pretrain_steps": 5, "device": "cpu"}
SMALL |= {"eval_every": 9, "eval_episodes": 1, "log_every": 6, "checkpoint_every": 4, "learning_starts": 3}
SMALL |= {"num_critics": 3, "base_hidden_dim": 8, "hidden_dim": 8, "hidden_layers": 2, "base_blocks": 1}
SMALL |= {"max_episode_steps": 7, "utd_ratio": 2, "batch_size": 4, "denoising_steps": 3, "threads": 1}
EVENTS = {"part": 7, "row": 90, "fsync": 14, "replace": 7, "step": 40, "draw": 60}  # about so many are in a small run

Trap = Callable[[dict[str, Any]], Any]  # is called in the fork, with what the script will find among its globals


def words_for(script: Any, run_dir: Path, **flags: Any) -> list[str]:
    """The command line of a small run."""
    return flags_of(script, {**SMALL, "run_dir": run_dir, **flags})


def small_args(script: Any, run_dir: Path, **flags: Any) -> Any:
    """The same, parsed."""
    return parse_args(script.Args, argv=words_for(script, run_dir, **flags))


def run_here(script: Any, args: Any) -> None:
    """The script's main in this process."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        script.main(args)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def run(script: Any, words: list[str], log: Path, trap: Trap = lambda _: None) -> int | None:
    """Exit code of `python script.py *words` in a fork, or minus the signal that killed it."""

    def main() -> None:
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        sys.argv, known = [str(ROOT / f"{script.__name__.replace('.', '/')}.py"), *words], {}
        trap(known)
        runpy.run_path(sys.argv[0], known, "__main__")

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join()
    return process.exitcode


def at(kind: str, number: int, act: Callable[[], None]) -> Trap:
    """A trap that calls `act` at an event: in the middle of a write to a file that will be renamed (`part`) or to
    metrics.csv (`row`), or before an fsync, a rename, an environment step or a draw of random rows."""
    counts = dict.fromkeys(EVENTS, 0)

    def happens(event: str) -> None:
        counts[event] += 1
        if event == kind and counts[event] == number:
            act()

    def trapped(event: str, function: Callable) -> Callable:
        return lambda *args, **kwargs: happens(event) or function(*args, **kwargs)

    class TornFile(io.FileIO):
        def write(self, content: Any) -> int:
            half = super().write(content[: len(content) // 2])
            happens("part" if str(self.name).endswith(".part") else "row")
            return half + super().write(content[half:])

    def lay(known: dict[str, Any]) -> None:
        known["open"] = lambda path, mode, **_: TornFile(path, mode)
        places = (("fsync", os, "fsync"), ("replace", os, "replace"), ("step", TimeLimit, "step"))
        for event, owner, name in (*places, ("draw", torch, "randint")):
            setattr(owner, name, trapped(event, getattr(owner, name)))

    return lay


def send(*numbers: int) -> Callable[[], None]:
    """Sends signals to its own process."""

    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


def read_metrics(run_dir: Path) -> list[tuple[int, str, str]]:
    """(step, key, value) of every row of metrics.csv."""
    with open(run_dir / "metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "seconds", "key", "value"]
    seconds = [float(row[1]) for row in rows]
    assert seconds == sorted(seconds)
    return [(int(step), key, value) for step, _, key, value in rows]


def values_of(rows: list[tuple[int, str, str]], key: str) -> dict[int, float]:
    """step -> value of one key."""
    return {step: float(value) for step, name, value in rows if name == key}


def read_state(run_dir: Path) -> dict[str, Any]:
    """The last checkpoint, without what depends on the clock."""
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    del state["log"]["seconds"], state["log"]["bytes"]
    return state


assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # bit for bit, through dicts and lists
