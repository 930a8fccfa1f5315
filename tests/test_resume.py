"""A run is never lost: killed, stopped, out of disk, damaged, resumed. Compared bit by bit with a run left alone."""

import errno
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from conftest import EVERY_SCRIPT
from running import EVENTS, Trap, assert_same, at, read_metrics, read_state, run, run_here, send, small_args, words_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import expo_diffusion
from utils.tasks import parse_args

KILL = send(signal.SIGKILL)


@pytest.fixture(scope="module")
def untouched(cache, tmp_path_factory):
    """script -> the folder of a run that nothing happened to. It is made once, in this process: forks find it warm."""
    made: dict[str, Path] = {}

    def get(script: Any) -> Path:
        if script.__name__ not in made:
            made[script.__name__] = tmp_path_factory.mktemp("untouched") / "run"
            run_here(script, small_args(script, made[script.__name__]))
        return made[script.__name__]

    get(expo_diffusion)
    return get


def assert_untouched(run_dir: Path, expected: Path) -> None:
    """The same rows, the same last checkpoint; TensorBoard has every row once; nothing half-written is left."""
    rows = read_metrics(run_dir)
    assert rows == read_metrics(expected)
    assert_same(read_state(run_dir), read_state(expected))
    assert not list(run_dir.glob("*.part"))
    events = EventAccumulator(str(run_dir)).Reload()
    for key in {key for _, key, _ in rows}:
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(step, pytest.approx(float(value), rel=1e-6)) for step, name, value in rows if name == key]


def die_and_resume(script: Any, run_dir: Path, deaths: list[Trap]) -> int:
    """Starts the run, kills it in each of these ways in turn, and resumes it until it is done. How often it died."""
    log = run_dir.with_suffix(".log")
    for died, trap in enumerate([*deaths, lambda _: None]):
        begun = (run_dir / "args.json").exists()
        code = run(script, ["--resume", str(run_dir)] if begun else words_for(script, run_dir), log, trap)
        if code == 0:
            return died
        assert code == -signal.SIGKILL, log.read_text()
    raise AssertionError("it did not end")


# Before it has args.json, in its first checkpoint, in a row, before the next row, in args.json, before a rename.
MOMENTS = [("replace", 1), ("part", 2), ("row", 40), ("step", 1), ("part", 1), ("replace", 3)]


@pytest.mark.parametrize(
    "name, moments",
    [("expo_diffusion", MOMENTS), *((n, [("part", 4)]) for n in EVERY_SCRIPT[1:])],
)
def test_a_run_killed_again_and_again_is_the_same_run(name, moments, untouched, tmp_path):
    script = importlib.import_module(name)
    deaths = [at(kind, number, KILL) for kind, number in moments]
    assert die_and_resume(script, tmp_path / "run", deaths) == len(deaths)
    assert_untouched(tmp_path / "run", untouched(script))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_SCRIPT)
def test_a_run_killed_at_random_moments_is_the_same_run(name, untouched, tmp_path):
    """By events of all kinds, and by the clock."""
    script, chance, died = importlib.import_module(name), random.Random(name), 0
    untouched(script)
    while died < 12:
        run_dir, deaths = tmp_path / str(died), list[Trap]()
        for kind in chance.choices([*EVENTS, "clock"], k=6):
            alarm = threading.Timer(chance.uniform(0.2, 2), KILL)
            moment = at(kind, chance.randint(1, EVENTS.get(kind, 1)), KILL)
            deaths.append(moment if kind in EVENTS else lambda _, alarm=alarm: alarm.start())
        died += die_and_resume(script, run_dir, deaths)
        assert_untouched(run_dir, untouched(script))
        shutil.rmtree(run_dir)


# In the fifth step of the first episode, after 14 of an evaluation; in this evaluation; in an imitation update.
SIGNALS = [("expo_diffusion", "step", 19, 143, 7), ("expo_diffusion", "step", 8, 130, 0)]
SIGNALS += [("expo_finetune", "draw", 2, 143, -11)]


@pytest.mark.parametrize("name, kind, number, code, step", SIGNALS)
def test_the_first_signal_ends_the_episode_and_saves(name, kind, number, code, step, untouched, tmp_path):
    script, run_dir, log = importlib.import_module(name), tmp_path / "a run", tmp_path / "log"
    words = words_for(script, run_dir, checkpoint_every=1000)
    assert run(script, words, log, at(kind, number, send(code - 128))) == code, log.read_text()
    assert read_state(run_dir)["step"] == step and log.read_text().endswith(f"--resume {run_dir}\n")
    assert run(script, ["--resume", str(run_dir)], log) == 0
    assert_untouched(run_dir, untouched(script))
    starts = json.loads((run_dir / "args.json").read_text())["starts"]
    assert [start["command"][1] for start in starts] == [words[0], "--resume"]
    assert all(start["versions"]["torch"] == torch.__version__ for start in starts)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_larger_files() -> None:
    """The kernel lets no file grow beyond 10 kB: the log still fits, a checkpoint does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


NO_SPACE = "error: [Errno 28] No space left on device"
ENDS = [("part", 4, full_disk, 2, NO_SPACE), ("row", 60, full_disk, 2, NO_SPACE)]
ENDS += [("part", 7, full_disk, 2, NO_SPACE)]  # of agent.pt
ENDS += [("draw", 20, no_larger_files, 2, "error: [Errno 27] File too large")]
ENDS += [("step", 19, send(signal.SIGINT, signal.SIGINT), 130, "step 0, ")]  # a second signal does not wait


@pytest.mark.parametrize("kind, number, act, code, last_line", ENDS)
def test_an_end_at_once_leaves_the_last_checkpoint(kind, number, act, code, last_line, untouched, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert run(expo_diffusion, words_for(expo_diffusion, run_dir, save_model=True), log, at(kind, number, act)) == code
    output = log.read_text()
    assert output.splitlines()[-1].startswith(last_line) and "Traceback" not in output
    assert run(expo_diffusion, ["--resume", str(run_dir)], log) == 0
    assert_untouched(run_dir, untouched(expo_diffusion))


@pytest.fixture
def copied(untouched, tmp_path):
    """The folder of a complete run, to be spoiled."""
    return Path(shutil.copytree(untouched(expo_diffusion), tmp_path / "copied"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def resume(run_dir: Path, *words: str, script: Any = expo_diffusion) -> None:
    run_here(script, parse_args(script.Args, argv=["--resume", str(run_dir), *words]))


def refused(run_dir: Path, *words: str, script: Any = expo_diffusion) -> str:
    """The one line of a resume that is refused, and that leaves the folder as it is."""
    before, line = contents(run_dir), conftest.refused(resume, run_dir, *words, kind=OSError, script=script)
    assert contents(run_dir) == before
    return line


def test_damaged_and_lost_files_are_refused_and_nothing_in_them_is_run(copied, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run by a file"),)

    whole, weight = contents(copied), read_state(copied)["agent"]["critic.weights.0"].numpy().tobytes()
    checkpoint = whole["checkpoint.pt"]
    place = checkpoint.index(weight) + 5
    damages = [b"", checkpoint[:9000], checkpoint[:place] + bytes([checkpoint[place] ^ 1]) + checkpoint[place + 1 :]]
    for state in ({"agent": Payload()}, {"model": torch.zeros(3)}):
        torch.save(state, tmp_path / "damaged.pt")
        damages.append((tmp_path / "damaged.pt").read_bytes())
    named = [("checkpoint.pt", content) for content in damages] + [("metrics.csv", whole["metrics.csv"][:700])]
    for name, content in [*named, *(("args.json", content) for content in (b"", b"{", b"[]", b'{"args": 3}'))]:
        (copied / name).write_bytes(content)
        assert name in refused(copied)
        (copied / name).write_bytes(whole[name])
    (copied / "checkpoint.pt").unlink()
    assert "missing" in refused(copied)  # else it would start again, and empty metrics.csv
    assert not (tmp_path / "run by a file").exists()


def test_another_run_is_refused(copied, monkeypatch):
    message = refused(copied, "--gamma", "0.5", "--seed", "7", "--log-every", "3", "--task", "pointmaze-large")
    assert all(flag in message for flag in ("--gamma", "--seed", "--task")) and "--log-every" not in message
    assert "expo_diffusion" in refused(copied, script=importlib.import_module("expo_flow"))
    with pytest.raises(OSError, match=f"--run-dir {copied}.* holds a run"):
        small_args(expo_diffusion, copied)
    load_dataset, record = expo_diffusion.load_dataset, json.loads((copied / "args.json").read_text())
    monkeypatch.setattr(expo_diffusion, "load_dataset", lambda *args: [2 * rows for rows in load_dataset(*args)])
    assert "data" in refused(copied)
    with subprocess.Popen([sys.executable, "-c", "input()", "my_own.py"], stdin=subprocess.PIPE) as living:
        for program, sees in ("my_own.py", True), ("another_program.py", False):  # then its number was given away
            record["starts"][-1]["command"] = [program]
            (copied / "args.json").write_text(json.dumps(record | {"pid": living.pid}))
            assert f"{program} started this run of expo_diffusion;" in refused(copied)  # and not by this one
            monkeypatch.setattr(sys, "argv", [program])
            assert (f"process {living.pid} is still writing" in refused(copied)) == sees
        living.kill()
    record["starts"][-1]["command"] = ["ablation.py", "--change=one"]
    (copied / "args.json").write_text(json.dumps(record))
    for change, sees in ("one", False), ("other", True):
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--change", change])
        assert ("ablation.py one started" in refused(copied)) == sees


def test_a_complete_run_is_resumed_to_nothing_or_to_a_longer_one(copied, untouched):
    before, state = contents(copied), read_state(copied)
    resume(copied, "--dataset", "generated:pointmaze-umaze:60")  # the same rows from another place
    assert_untouched(copied, untouched(expo_diffusion))
    assert "the data" in refused(copied, "--dataset", "generated:pointmaze-umaze:59")
    with pytest.raises(OSError, match="beyond --total-timesteps"):
        resume(copied, "--total-timesteps", "20")
    resume(copied, "--total-timesteps", "40", "--eval-every", "15", "--checkpoint-every", "1000")
    longer = read_state(copied)
    assert longer["step"] == len(longer["rows"][0]) == 40
    assert all(torch.equal(new[:26], old) for new, old in zip(longer["rows"], state["rows"], strict=True))
    assert not torch.equal(longer["rows"][0][26], state["rows"][0][21])  # the episode after the one that was cut
    assert (copied / "metrics.csv").read_bytes().startswith(before["metrics.csv"])
    evaluated = [step for step, key, _ in read_metrics(copied) if key == "eval/return"]
    assert evaluated == [0, 9, 18, 26, 30, 40]
    record = json.loads((copied / "args.json").read_text())
    assert record["args"]["total_timesteps"] == 40 and len(record["starts"]) == 3
