"""Never lose a run: killed, stopped, resumed, refused, damaged; compared bit by bit with a run left alone.

A run is started in a forked process (imports are paid once) and dies there by SIGKILL, at an event that is counted: an
environment step, an update, a write, a rename. So every test can be repeated, and the moment of death is known.
"""

import contextlib
import csv
import errno
import importlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY_RUN, flags_of
from gymnasium.wrappers import TimeLimit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import expo_diffusion
from utils import checkpoint, cli, data, evaluate, pointmaze
from utils.envs import Guard, make_env
from utils.errors import InputError
from utils.files import atomic_write, locked, making
from utils.tasks import make_task_env

ALL = [*SCRIPTS, "baselines.rlpd", "baselines.idql", "baselines.diffusion_ql"]
# Checkpoints, rows, evaluations and episodes all fall on different steps.
SMALL = {**TINY_RUN, "total_timesteps": 26, "offline_steps": 6, "pretrain_steps": 5, "max_episode_steps": 7}
SMALL |= {
    "eval_every": 9,
    "eval_episodes": 1,
    "log_every": 4,
    "checkpoint_every": 5,
    "learning_starts": 3,
    "num_critics": 3,
}


def words_for(module: Any, run_dir: Path, **flags: Any) -> list[str]:
    kept = {"refresh_share": 0.3} if module.__name__ == "expo_flow" else {}  # one of them keeps its base samples
    return flags_of(module, {**SMALL, "run_dir": run_dir, **kept, **flags})


def start(function: Callable[[], None], log: Path) -> int:
    """Number of a forked process that runs `function`; its output is added to `log`."""
    pid = os.fork()
    if pid:
        return pid
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
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def exit_code(pid: int) -> int:
    """Of a process, when it has ended; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(module: Any, words: list[str], log: Path, before: Callable[[Any], None] = lambda module: None) -> int:
    """Exit code of the script with these flags; `before` may lay traps in its process."""

    def main() -> None:
        sys.argv = [f"{module.__name__}.py", *words]
        before(module)
        cli.run(module.main, module.Args)

    return exit_code(start(main, log))


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
        half_written()
        path.write_bytes(whole)

    half_written = trap(lambda: None)

    def lay(module: Any) -> None:
        torch.save = torn_save
        for owner, name in ((os, "replace"), (os, "fsync"), (TimeLimit, "step"), (module, "draw_batch")):
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


@pytest.fixture(scope="module", autouse=True)
def made(cache):
    """The data, so that making it is not among the events that are counted."""
    data.generate("pointmaze-umaze")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """module name -> (rows, last state, replay.bin) of a run that nothing happened to; made once each."""
    made = {}

    def get(module: Any) -> tuple[Any, Any, bytes]:
        if module.__name__ not in made:
            run_dir = tmp_path_factory.mktemp("untouched") / "run"
            module.main(
                cli.parse_args(module.Args, words_for(module, run_dir))
            )  # in this process: children find it warm
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
    deaths = [85, 30] if name == ALL[0] else [85]  # in the middle of writing a checkpoint, then soon after the resume
    assert die_and_resume(module, tmp_path / "run", deaths) == len(deaths)
    assert_untouched(module, tmp_path / "run", untouched)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_run_killed_at_random_moments_is_the_same_run(name, untouched, tmp_path):
    module, died, chance = importlib.import_module(name), 0, random.Random(name)
    untouched(module)
    for i in range(8):
        died += die_and_resume(module, tmp_path / str(i), [chance.randrange(1, 100) for _ in range(6)])
        assert_untouched(module, tmp_path / str(i), untouched)
    assert died >= 12


@pytest.mark.slow
def test_killed_at_every_event_of_a_checkpoint(untouched, tmp_path):
    """Every rename, fsync and half-written file from the start to the fifth checkpoint, but not every evaluation."""
    untouched(expo_diffusion)
    for event in (*range(1, 28), *range(40, 67), *range(80, 107)):
        assert die_and_resume(expo_diffusion, tmp_path / str(event), [event]) == 1
        assert_untouched(expo_diffusion, tmp_path / str(event), untouched)


# ------------------------------------------------------------------------------------------------------- signals


def send(number: int, times: int = 1) -> Callable[[], None]:
    def act() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return act


@pytest.mark.parametrize("number, code, how", [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_ends_the_step_and_saves_it(number, code, how, untouched, tmp_path):
    untouched(expo_diffusion)
    run_dir, log = tmp_path / "a run", tmp_path / "log"
    assert run(expo_diffusion, words_for(expo_diffusion, run_dir), log, at_event(106, send(number))) == code
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("stopped by")]
    state = checkpoint.load_tensors(run_dir / "checkpoint.pt")
    assert line == (
        f"stopped by {how} after step {state['step']}; go on with: python expo_diffusion.py --resume '{run_dir}'"
    )
    assert state["step"] % 5 and "Traceback" not in log.read_text()
    assert run(expo_diffusion, ["--resume", str(run_dir)], log) == 0
    assert_untouched(expo_diffusion, run_dir, untouched)
    (resume,) = json.loads((run_dir / "args.json").read_text())["resumes"]
    assert resume["step"] == state["step"] and resume["changed"] == {} and resume["versions"]["torch"]


def test_a_signal_saves_where_nobody_listens_any_more(untouched, tmp_path):
    """As in `... | tee log`: Ctrl-C ends tee as well, and there is no one to write to."""
    untouched(expo_diffusion)
    run_dir, log = tmp_path / "run", tmp_path / "log"

    def act() -> None:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 2)
        os.kill(os.getpid(), signal.SIGINT)

    assert run(expo_diffusion, words_for(expo_diffusion, run_dir), log, at_event(106, act)) == 130
    assert checkpoint.load_tensors(run_dir / "checkpoint.pt")["step"] % 5
    assert run(expo_diffusion, ["--resume", str(run_dir)], log) == 0
    assert_untouched(expo_diffusion, run_dir, untouched)


@pytest.mark.parametrize("name", ["expo_finetune"])
def test_a_signal_ends_an_evaluation_at_once_and_a_resume_repeats_it(name, untouched, tmp_path):
    module, run_dir, log = importlib.import_module(name), tmp_path / "run", tmp_path / "log"
    untouched(module)

    def in_evaluation(number: int) -> Callable[[Any], None]:
        count, success_of = 0, evaluate.success_of

        def trapped(info: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGTERM)
            assert count <= number + 1  # the second environment of the same step
            return success_of(info)

        return lambda _: setattr(evaluate, "success_of", trapped)

    words = words_for(module, run_dir)
    for _ in range(2):
        assert run(module, words, log, in_evaluation(10)) == 143, log.read_text()
        words = ["--resume", str(run_dir)]
    assert run(module, words, log) == 0
    assert_untouched(module, run_dir, untouched)


def test_a_second_signal_ends_the_run_at_once(untouched, tmp_path):
    untouched(expo_diffusion)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert run(expo_diffusion, words_for(expo_diffusion, run_dir), log, at_event(106, send(signal.SIGINT, 2))) == 130
    assert "Traceback" not in log.read_text()
    assert checkpoint.load_tensors(run_dir / "checkpoint.pt")["step"] % 5 == 0
    assert run(expo_diffusion, ["--resume", str(run_dir)], log) == 0
    assert_untouched(expo_diffusion, run_dir, untouched)


# --------------------------------------------------------------------------------------------------- a full disk


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_larger_files() -> None:
    """The kernel refuses to let any file grow beyond 1 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.parametrize(
    "event, act",
    [(85, full_disk), (88, full_disk), (90, no_larger_files)]
    + [pytest.param(event, full_disk, marks=pytest.mark.slow) for event in (64, 83, 84, 87, 173, 174)],
)
def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_last_checkpoint(event, act, untouched, tmp_path):
    untouched(expo_diffusion)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = words_for(expo_diffusion, run_dir)
    assert run(expo_diffusion, words, log, at_event(event, act)) == 2, log.read_text()
    output = log.read_text()
    assert "Traceback" not in output and len(re.findall("^error: ", output, re.M)) == 1
    assert re.search(r"error: .*(No space left|File too large).* make room, then python .* --resume", output), output
    assert run(expo_diffusion, ["--resume", str(run_dir)], log) == 0
    assert_untouched(expo_diffusion, run_dir, untouched)


# ------------------------------------------------------------------------------------- what a resume may not be


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run of expo_diffusion that SIGTERM has stopped."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    words = words_for(expo_diffusion, run_dir)
    assert run(expo_diffusion, words, run_dir.with_name("log"), at_event(106, send(signal.SIGTERM))) == 143
    return run_dir


@pytest.fixture
def copied(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def resume(run_dir: Path, *words: str, module: Any = expo_diffusion) -> None:
    module.main(cli.parse_args(module.Args, ["--resume", str(run_dir), *words]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(run_dir: Path, *words: str, module: Any = expo_diffusion) -> str:
    """The message of a resume that is refused, and that leaves the folder as it is."""
    before = contents(run_dir) if run_dir.is_dir() else {}
    with pytest.raises(InputError) as error:
        resume(run_dir, *words, module=module)
    assert "\n" not in str(error.value)
    assert (contents(run_dir) if run_dir.is_dir() else {}) == before
    return str(error.value)


def test_flags_that_cannot_change_are_named(copied):
    message = refused(copied, "--gamma", "0.5", "--seed", "7", "--log-every", "3")
    assert "--gamma 0.5 (was 0.96)" in message and "--seed 7 (was 1)" in message and "log-every" not in message
    assert "--task" in refused(copied, "--task", "pointmaze-large")
    assert "--run-dir" in refused(copied, "--run-dir", "elsewhere")
    assert "has done" in refused(copied, "--total-timesteps", "3")


def test_flags_that_can_change_do(copied):
    resume(copied, "--total-timesteps", "20", "--eval-every", "6", "--eval-episodes", "1", "--save-model")
    rows, state = result(copied)
    assert state["step"] == 20 and (copied / "agent.pt").exists()
    assert [int(row["step"]) for row in rows if row["eval/return"]][-2:] == [18, 20]
    record = json.loads((copied / "args.json").read_text())
    assert record["args"]["total_timesteps"] == 26 and record["resumes"][0]["changed"]["total_timesteps"] == 20
    assert "is complete" in refused(copied)  # with the flags of the last resume
    resume(copied, "--total-timesteps", "22")
    assert result(copied)[1]["step"] == 22


def test_a_longer_run_is_the_same_as_one_that_was_long_from_the_start(untouched, tmp_path):
    module = expo_diffusion
    module.main(cli.parse_args(module.Args, words_for(module, tmp_path / "run", total_timesteps=13)))
    resume(tmp_path / "run", "--total-timesteps", "26")
    assert_untouched(module, tmp_path / "run", untouched)


def test_folders_that_hold_nothing_to_resume(copied, tmp_path):
    assert "holds no run" in refused(tmp_path / "nowhere")
    other = importlib.import_module("baselines.rlpd")
    assert "is a run of expo_diffusion" in refused(copied, module=other)
    with locked(copied), pytest.raises(InputError, match="still being written by another process"):
        resume(copied)
    for content in (
        "",
        "{",
        "[]",
        '{"script": 1, "args": {}}',
        '{"script": "x", "args": {"seed": "one"}}',
        "[" * 10**5,
    ):
        (copied / "args.json").write_text(content)
        assert "args.json is damaged" in refused(copied)


def test_another_data_set_is_refused(copied, monkeypatch):
    load = expo_diffusion.data.load

    def changed(*args: Any) -> Any:
        rows = load(*args)
        rows.rewards[5] += 1e-3
        return rows

    monkeypatch.setattr(expo_diffusion.data, "load", changed)
    assert "the data set is not the one" in refused(copied)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied, untouched, capfd):
    untouched(expo_diffusion)
    content = bytearray((copied / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1  # one bit of a weight
    (copied / "checkpoint.pt").write_bytes(content)
    resume(copied)
    assert re.search("checkpoint.pt is damaged.*going on from checkpoint.previous.pt", capfd.readouterr().out)
    assert_untouched(expo_diffusion, copied, untouched)


def test_a_death_while_a_damaged_checkpoint_is_replaced(copied, untouched, tmp_path):
    """The one before is the only good one then, and must not be renamed away."""
    untouched(expo_diffusion)
    content = (copied / "checkpoint.pt").read_bytes()
    (copied / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    words, log, replace = ["--resume", str(copied)], tmp_path / "log", os.replace

    def lay(_: Any) -> None:
        def dying(source: Path, target: Path) -> None:
            if Path(target).name == "checkpoint.pt":
                kill()
            replace(source, target)

        os.replace = dying

    assert run(expo_diffusion, words, log, lay) == -signal.SIGKILL
    assert run(expo_diffusion, words, log) == 0, log.read_text()
    assert_untouched(expo_diffusion, copied, untouched)


def test_a_folder_may_be_written_in_any_way(copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    for folder in (f"{copied}/", f"./{copied.name}", f"{copied.name}/"):
        args = cli.parse_args(expo_diffusion.Args, ["--resume", folder])
        assert Path(args.resume).resolve() == Path(args.run_dir).resolve() == copied.resolve()


@pytest.mark.parametrize("damage", ["both cut", "both gone", "replay cut", "replay changed", "metrics cut", "foreign"])
def test_damage_that_nothing_is_left_to_go_on_from(damage, copied):
    for name in checkpoint.NAMES:
        if damage == "both cut":
            os.truncate(copied / name, 1000)
        elif damage == "both gone":
            (copied / name).unlink()
        elif damage == "foreign":
            torch.save({"model": torch.zeros(3)}, copied / name)
    if damage == "replay cut":
        os.truncate(copied / "replay.bin", 10)
    elif damage == "replay changed":
        (copied / "replay.bin").write_bytes(b"\1" * 10_000)
    elif damage == "metrics cut":
        os.truncate(copied / "metrics.csv", 700)
    message = refused(copied)
    assert (
        "metrics.csv has lost rows" in message if damage == "metrics cut" else "no checkpoint to go on from" in message
    )


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_run(copied, tmp_path):
    for name in checkpoint.NAMES:
        torch.save({"script": "expo_diffusion", "step": Payload(tmp_path / "run by a file")}, copied / name)
    assert "no checkpoint to go on from" in refused(copied)
    assert not (tmp_path / "run by a file").exists()


# ------------------------------------------------------------------------------------------- the environment


class Drifting(gym.Wrapper):
    """A simulator that does not repeat itself."""

    def step(self, action):
        obs, *rest = self.env.step(action)
        return obs + np.float32(np.frombuffer(os.urandom(1), np.uint8)[0] / 1000), *rest


def test_an_environment_that_does_not_repeat_itself_goes_on_with_the_next_episode(copied, monkeypatch, capfd):
    monkeypatch.setattr(expo_diffusion, "make_task_env", lambda args, render=False: Drifting(make_task_env(args)))
    before = checkpoint.load_tensors(copied / "checkpoint.pt")
    resume(copied)
    assert "warning: this environment does not repeat the episode that was cut" in capfd.readouterr().out
    after = checkpoint.load_tensors(copied / "checkpoint.pt")
    assert after["step"] == after["replay"]["rows"] == 26 and after["episode"] > before["episode"]


class Broken(gym.Wrapper):
    """Goes wrong in its own way at a certain action."""

    def __init__(self, env: gym.Env, way: str, number: int):
        super().__init__(env)
        self.way, self.left = way, number

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.left -= 1
        if self.left:
            return obs, reward, terminated, truncated, info
        if self.way == "raises":
            raise RuntimeError("the simulator\nis unstable")
        if self.way == "observation":
            obs = obs.copy()
            obs[2] = np.nan
        if self.way == "four":
            return obs, reward, terminated, info  # the old interface
        shapes = {"wide": np.concatenate([obs, obs]), "flat": obs[:0]}
        rewards = {"reward": math.inf, "none": None, "pair": np.zeros(2)}
        return shapes.get(self.way, obs), rewards.get(self.way, reward), terminated, truncated, info


@pytest.mark.parametrize(
    "way, words",
    [
        ("raises", "RuntimeError: the simulator .test_checkpoint.py:"),
        ("observation", "the observation is not finite .nan in dimension 2"),
        ("wide", r"the observation has shape .6,., its space .3,."),
        ("flat", r"the observation has shape .0,., its space .3,."),
        ("four", "ValueError: not enough values to unpack"),
        ("reward", "the reward is inf"),
        ("none", "TypeError"),
        ("pair", "TypeError"),
    ],
)
def test_what_goes_wrong_in_an_environment_is_named(way, words):
    env = Guard(Broken(make_env("Pendulum-v1"), way, 3))
    env.reset(seed=0)
    env.step(np.zeros(1, np.float32))
    env.step(np.zeros(1, np.float32))
    with pytest.raises(InputError, match=f"^environment 'Pendulum-v1', step 3 of an episode: .*{words}") as error:
        env.step(np.zeros(1, np.float32))
    assert "\n" not in str(error.value)


def test_an_environment_that_goes_wrong_ends_the_run_and_leaves_its_state(tmp_path, monkeypatch):
    broken = lambda args, render=False: Guard(Broken(make_task_env(args), "observation", 24))  # noqa: E731
    monkeypatch.setattr(expo_diffusion, "make_task_env", broken)
    words = words_for(expo_diffusion, tmp_path / "run", eval_every=10**6)
    with pytest.raises(InputError, match=r"^step 24: environment 'PointMaze.*, step 3 of an episode: .*failed.pt"):
        expo_diffusion.main(cli.parse_args(expo_diffusion.Args, words))
    assert checkpoint.load_tensors(tmp_path / "run" / "failed.pt")["step"] == 23
    assert checkpoint.load_tensors(tmp_path / "run" / "checkpoint.pt")["step"] == 20


# ---------------------------------------------------------------------------------------- numbers that go wrong


@pytest.mark.parametrize("name", [ALL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ALL[1:])])
def test_a_parameter_that_is_not_finite_ends_the_run_at_the_next_row(name, tmp_path, monkeypatch):
    module, calls = importlib.import_module(name), 0
    (update,) = [key for key in ("update", "sac_update", "idql_update", "dql_update") if hasattr(module, key)][-1:]
    function = getattr(module, update)

    def spoil(agent: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        info = function(agent, *rest)
        if calls == 11:
            with torch.no_grad():
                agent.target_critic.output.bias[0] = math.nan
        return {key: value.nan_to_num() for key, value in info.items()}

    monkeypatch.setattr(module, update, spoil)
    with pytest.raises(InputError, match=r"^step 8: parameters are not finite \(target_critic.output.bias\)"):
        module.main(cli.parse_args(module.Args, words_for(module, tmp_path / "run", checkpoint_every=0)))
    assert checkpoint.load_tensors(tmp_path / "run" / "checkpoint.pt")["step"] == -1


def test_a_loss_that_is_not_finite_ends_the_run_at_its_own_step(tmp_path, monkeypatch):
    calls, update = 0, expo_diffusion.update

    def spoil(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return update(*args) | ({"losses/critic": torch.tensor(math.nan)} if calls == 13 else {})

    monkeypatch.setattr(expo_diffusion, "update", spoil)
    with pytest.raises(InputError, match=r"^step 10: losses/critic is not finite.*failed.pt.*last good one: step 5"):
        expo_diffusion.main(cli.parse_args(expo_diffusion.Args, words_for(expo_diffusion, tmp_path / "run")))
    with open(tmp_path / "run" / "metrics.csv") as file:
        assert list(csv.DictReader(file))[-1]["losses/critic"] == "nan"


def test_diverging_values_are_warned_of_once(tmp_path, monkeypatch, capfd):
    update = expo_diffusion.update
    monkeypatch.setattr(expo_diffusion, "update", lambda *args: update(*args) | {"critic/q_mean": torch.tensor(900.0)})
    expo_diffusion.main(cli.parse_args(expo_diffusion.Args, words_for(expo_diffusion, tmp_path / "run")))
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning")]
    assert "critic/q_mean is 900, but rewards from 0 to 10 sum to 0 to 250 at --gamma 0.96" in line
    assert "--critic-lr" in line


# ----------------------------------------------------------------------------------------------- many runs at once


def test_what_many_need_is_made_once(tmp_path):
    def make() -> None:
        with making(tmp_path / "cache" / "data") as missing:
            if missing:
                time.sleep(0.2)
                with atomic_write(tmp_path / "cache" / "data") as path:
                    path.write_text(str(os.getpid()))
                with open(tmp_path / "made", "a") as file:
                    file.write("once\n")

    processes = [start(make, tmp_path / "log") for _ in range(8)]
    assert [exit_code(pid) for pid in processes] == [0] * 8, (tmp_path / "log").read_text()
    assert (tmp_path / "made").read_text() == "once\n"


@pytest.mark.slow
def test_sixteen_runs_at_once_share_cache_and_folder(tmp_path, monkeypatch):
    """All start with an empty cache, in one folder, in the same second: the data is made once, the runs are equal."""
    count = 16
    generate = pointmaze.generate

    def counted(*args: Any) -> Any:
        with open(tmp_path / "made", "a") as file:
            file.write("once\n")
        return generate(*args)

    def main() -> None:
        words = flags_of(expo_diffusion, {key: value for key, value in SMALL.items() if key != "run_dir"})
        expo_diffusion.main(cli.parse_args(expo_diffusion.Args, words))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(pointmaze, "generate", counted)
    monkeypatch.setattr("time.strftime", lambda *_: "20250101-000000")
    codes = [exit_code(pid) for pid in [start(main, tmp_path / "log") for _ in range(count)]]
    assert codes == [0] * count, (tmp_path / "log").read_text()
    assert (tmp_path / "made").read_text() == "once\n"
    runs = [result(run_dir) for run_dir in (tmp_path / "runs").iterdir()]
    assert len(runs) == count
    for other in runs[1:]:
        assert_same(other, runs[0])
