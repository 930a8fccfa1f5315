"""Never lose a run: killed, stopped, resumed, refused, damaged; compared bit by bit with a run that nothing happened to.

A run is started in a forked process (imports are paid once) and dies there by SIGKILL, at an event that is counted: an
environment step, an update, a write, a rename. So every test can be repeated, and the moment of death is known.
"""

import csv
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY_RUN, flags_of
from gymnasium.wrappers import TimeLimit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import expo_diffusion
from utils import checkpoint, cli

ALL = [*SCRIPTS, "baselines.rlpd", "baselines.idql", "baselines.diffusion_ql"]
# Checkpoints, rows, evaluations and episodes all fall on different steps.
SMALL = {**TINY_RUN, "total_timesteps": 26, "offline_steps": 6, "pretrain_steps": 5, "max_episode_steps": 7}
SMALL |= {"eval_every": 9, "log_every": 4, "checkpoint_every": 5, "learning_starts": 3, "num_critics": 3}


def words_for(module: Any, run_dir: Path, **flags: Any) -> list[str]:
    return flags_of(module, {**SMALL, "run_dir": run_dir, **flags})


def child(function: Callable[[], None], log: Path) -> int:
    """Exit code of `function` in a forked process (minus the signal that killed it); its output is added to `log`."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(module: Any, words: list[str], log: Path, before: Callable[[Any], None] = lambda module: None) -> int:
    """Exit code of the script with these flags; `before` may lay traps in its process."""

    def main() -> None:
        sys.argv = [f"{module.__name__}.py", *words]
        before(module)
        cli.run(module.main, module.Args)

    return child(main, log)


def at_event(number: int, act: Callable[[], None]) -> Callable[[Any], None]:
    """Traps that call `act` just before the event of that number: environment steps, updates, writes, renames."""
    count = 0

    def trap(function: Callable) -> Callable:
        def trapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                act()
            return function(*args, **kwargs)

        return trapped

    def torn_save(state: Any, file: Any, save: Callable = torch.save) -> None:
        """In two halves, so that one can die between them."""
        path = Path(file.name)
        save(state, file)
        file.flush()
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        os.stat(path)
        path.write_bytes(whole)

    def lay(module: Any) -> None:
        torch.save = torn_save
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "stat"), (TimeLimit, "step"), (module, "draw_batch")):
            setattr(owner, name, trap(getattr(owner, name)))

    return lay


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def result(run_dir: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Rows of metrics.csv without their seconds, and the state after the last step."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    state = checkpoint.load_tensors(run_dir / "checkpoint.pt")
    state["log"].pop("seconds")
    return rows, state


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, through dicts and lists."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif torch.is_tensor(one):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """module name -> (rows, last state, replay.bin) of a run that nothing happened to; made once each."""
    made = {}

    def get(module: Any) -> tuple[Any, Any, bytes]:
        if module.__name__ not in made:
            run_dir = tmp_path_factory.mktemp("untouched") / "run"
            module.main(cli.parse_args(module.Args, words_for(module, run_dir)))  # in this process: children find it warm
            made[module.__name__] = *result(run_dir), (run_dir / "replay.bin").read_bytes()
        return made[module.__name__]

    return get


def assert_untouched(module: Any, run_dir: Path, untouched: Any) -> None:
    rows, state, replay = untouched(module)
    assert_same(result(run_dir), (rows, state))
    assert (run_dir / "replay.bin").read_bytes() == replay
    assert not list(run_dir.glob("*.part"))
    events = EventAccumulator(str(run_dir)).Reload()
    assert len(list(run_dir.glob("events.out.*"))) == 1
    for key in ("losses/critic", "eval/return"):
        expected = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


def die_and_resume(module: Any, run_dir: Path, deaths: list[int]) -> int:
    """Starts the run, kills it at each of the events in turn, resumes it until it is done. How often it died."""
    log, died = run_dir.with_name(f"{run_dir.name}.log"), 0
    words = words_for(module, run_dir)
    for event in [*deaths, 10**9]:
        code = run(module, words, log, at_event(event, kill))
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()
        died += 1
        if (run_dir / "checkpoint.pt").exists() or (run_dir / "checkpoint.previous.pt").exists():
            words = ["--resume", str(run_dir)]
        else:
            assert words[0] != "--resume"  # once there is a checkpoint, there always is one
            if run_dir.exists():
                run_dir.rename(run_dir.with_name(f"{run_dir.name}-{died}"))
    return died


@pytest.mark.parametrize("name", ALL)
def test_a_run_killed_again_and_again_is_the_same_run(name, untouched, tmp_path):
    module = importlib.import_module(name)
    untouched(module)
    assert die_and_resume(module, tmp_path / "run", [38, 77]) == 2
    assert_untouched(module, tmp_path / "run", untouched)
