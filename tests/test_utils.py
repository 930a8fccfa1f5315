"""Storage, logging, command line, evaluation and the generated maze data."""

import csv
import dataclasses
import importlib
import itertools
import json
import math
import random
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import expo_diffusion
from utils import cli, data, pointmaze
from utils.buffer import ReplayBuffer
from utils.envs import make_env, native_action_bounds
from utils.errors import InputError
from utils.evaluate import evaluate, load_agent
from utils.logger import Logger
from utils.tasks import TASKS, make_task_env

# ------------------------------------------------------------------------------------------------------- buffer


def test_buffer_ring_wraps():
    """Against a list that forgets its oldest entry."""
    replay, memory = ReplayBuffer(5, 2, 1), []
    for i in range(13):
        replay.add([i, -i], np.array([i / 10]), float(i), torch.tensor([i + 1, 0]), terminated=i % 3 == 0)
        memory = [*memory, i][-5:]
        assert replay.size == len(memory)
        assert sorted(replay.data.rewards[: replay.size].tolist()) == memory
    for row, i in enumerate(replay.data.rewards.tolist()):
        assert replay.data.obs[row].tolist() == [i, -i] and replay.data.next_obs[row].tolist() == [i + 1, 0]
        assert replay.data.actions[row].tolist() == pytest.approx([i / 10])
        assert replay.data.terminations[row] == float(i % 3 == 0)


def test_buffer_samples_stored_rows_only_and_uniformly():
    replay = ReplayBuffer(100, 1, 1)
    for i in range(1, 11):
        replay.add([i], [i], i, [i], terminated=True)
    batch = replay.sample(100, 100)
    assert batch.obs.shape == (100, 100, 1) and batch.rewards.shape == (100, 100)
    values, counts = batch.rewards.unique(return_counts=True)
    assert values.tolist() == list(range(1, 11))
    assert counts.min() > 850 and counts.max() < 1150  # 1000 expected, standard deviation 30
    assert torch.equal(batch.obs.squeeze(-1), batch.rewards) and torch.equal(batch.next_obs, batch.actions)


def test_buffer_from_dataset_holds_it_all():
    rng = np.random.default_rng(0)
    arrays: list[Any] = [rng.normal(size=shape) for shape in ((7, 3), (7, 2), (7,), (7, 3), (7,))]
    replay = ReplayBuffer.from_dataset(data.Dataset(*arrays, episodes=np.array([[0, 7]])))
    assert replay.size == replay.capacity == 7
    for stored, array in zip(replay.rows, arrays, strict=True):
        assert stored.dtype == torch.float32
        np.testing.assert_array_equal(stored.numpy(), array.astype(np.float32))
    assert replay.data.next_base_actions.shape == (7, 0, 2) and len(replay.next_turns(5)) == 0


def test_buffer_kept_samples_take_turns():
    """Every row gets its first samples before it is drawn, and new ones at least once in size / count draws."""
    replay, drawn = ReplayBuffer(40, 1, 1, num_kept=2), {}
    for draw in range(100):
        added = {replay.position + i for i in range(draw % 3 if replay.size < 38 else 0)}
        for _ in added:
            replay.add([0], [0], 0.0, [0], terminated=False)
        turns = replay.next_turns(3).tolist()
        assert added <= set(turns) and len(turns) == len(set(turns)) <= 3 + len(added)
        drawn |= dict.fromkeys(turns, draw)
        assert set(drawn) == set(range(replay.size))
        if draw > 60:
            assert draw - min(drawn.values()) <= math.ceil(replay.size / 3)
    assert len(replay.next_turns(0)) == 0


def test_buffer_new_rows_do_not_use_up_the_turns_of_others():
    """One turn and one new row at every step: the old rows get theirs all the same."""
    replay, refreshed = ReplayBuffer(100, 1, 1, num_kept=2), set()
    for row in range(60):
        replay.add([0], [0], 0.0, [0], terminated=False)
        refreshed |= set(replay.next_turns(1).tolist()) - {row}
    assert refreshed == set(range(max(refreshed) + 1)) and max(refreshed) > 50


def test_buffer_saves_the_kept_samples_of_its_rows_only(tmp_path):
    replay = ReplayBuffer(100_000, 1, 1, num_kept=2)
    replay.add([0], [0], 0.0, [0], terminated=False)
    torch.save(replay.kept(), tmp_path / "kept.pt")
    assert (tmp_path / "kept.pt").stat().st_size < 10_000


def test_buffer_kept_samples_of_new_rows_come_first():
    obs, scalars = np.zeros((6, 1)), np.zeros(6)
    dataset = data.Dataset(obs, obs, scalars, obs, scalars, episodes=np.array([[0, 6]]))
    assert ReplayBuffer.from_dataset(dataset, num_kept=2).next_turns(2).tolist() == list(range(6))
    replay = ReplayBuffer(4, 1, 1, num_kept=2)
    for _ in range(4):
        replay.add([0], [0], 0.0, [0], terminated=False)
    assert replay.next_turns(1).tolist() == [0, 1, 2, 3] and replay.next_turns(3).tolist() == [1, 2, 3]
    replay.add([0], [0], 0.0, [0], terminated=False)  # overwrites row 0
    assert replay.next_turns(1).tolist() == [0] and replay.next_turns(2).tolist() == [1, 2]
    replay.add([0], [0], 0.0, [0], terminated=False)
    other = ReplayBuffer(4, 1, 1, num_kept=2)
    other.size = 4
    other.restore_kept(replay.kept())
    assert other.next_turns(2).tolist() == replay.next_turns(2).tolist() == [0, 1, 3]


# ------------------------------------------------------------------------------------------------------- logger


def logger_args(run_dir: Path | str, **flags) -> Any:
    return expo_diffusion.Args(env_id="Some-v0", dataset=("some.hdf5",), run_dir=str(run_dir), **flags)


def read_rows(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_logger_rewrites_rows_when_columns_are_new(tmp_path):
    logger = Logger(logger_args(tmp_path), script="expo_diffusion")
    logger.write(1, {"a": 0.125})
    logger.write(2, {"b": 2.0})
    logger.write(3, {"b": 3.0, "a": 4.0})
    logger.write(4)
    logger.write(5, {"c,d": 1e-9, "a": 123456789.0})
    rows = read_rows(tmp_path)  # on disk before close: nothing is lost when a run is killed
    logger.close()
    assert rows == read_rows(tmp_path)
    assert list(rows[0]) == ["step", "seconds", "a", "b", "c,d"]
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    values = [[float(row[key]) if row[key] else None for key in ("a", "b", "c,d")] for row in rows]
    nothing = [None, None, None]
    assert values == [[0.125, None, None], [None, 2, None], [4, 3, None], nothing, [123456790, None, 1e-9]]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds) and all(0 <= value < 60 for value in seconds)


def test_logger_writes_means_since_the_last_row(tmp_path):
    logger = Logger(logger_args(tmp_path), script="expo_diffusion")
    for value in (1.0, 2.0, 6.0):
        logger.add({"number": value, "tensor": torch.tensor(10 * value)})
    logger.add({"once": 5.0})
    assert logger.write(10, {"direct": -1.0}) == {"number": 3.0, "tensor": 30.0, "once": 5.0, "direct": -1.0}
    logger.add({"number": 8.0})
    assert logger.write(20) == {"number": 8.0}
    assert logger.write(30) == {}
    logger.close()
    assert [row["number"] for row in read_rows(tmp_path)] == ["3", "8", ""]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("-inf"))], ids=str)
def test_logger_stops_at_a_value_that_is_not_finite(tmp_path, value):
    logger = Logger(logger_args(tmp_path), script="expo_diffusion")
    logger.add({"losses/good": 1.0, "losses/bad": value})
    with pytest.raises(InputError, match=r"step 7.*losses/bad is not finite"):
        logger.write(7)
    logger.close()
    (row,) = read_rows(tmp_path)  # written first, so that one can see what happened
    assert row["step"] == "7" and row["losses/good"] == "1"


def test_args_json_tells_flags_versions_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/expo_diffusion.py", "--seed", "4"])
    args = logger_args(tmp_path / "deep" / "run", seed=4)
    Logger(args, script="expo_diffusion").close()
    record = json.loads((tmp_path / "deep" / "run" / "args.json").read_text())
    assert record["script"] == "expo_diffusion" and record["command"] == ["expo_diffusion.py", "--seed", "4"]
    assert record["args"] == json.loads(json.dumps(dataclasses.asdict(args))) and record["args"]["seed"] == 4
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["versions"]["mujoco"] and record["versions"]["gymnasium"] == gym.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", record["versions"]["commit"])


def test_logger_refuses_a_folder_with_a_run_and_leaves_it_alone(tmp_path):
    first = Logger(logger_args(tmp_path), script="expo_diffusion")
    first.write(1, {"a": 1.0})
    first.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="already holds a run"):
        Logger(logger_args(tmp_path, seed=9), script="expo_diffusion")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20250101-000000")
    loggers = [Logger(logger_args("", task="some-task", seed=3), script="expo_diffusion") for _ in range(3)]
    names = [logger.run_dir.name for logger in loggers]
    for logger in loggers:
        logger.close()
    first = "some-task__expo_diffusion__3__20250101-000000"
    assert names == [first, f"{first}-1", f"{first}-2"]
    assert all(logger.run_dir.parent.name == "runs" for logger in loggers)


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    logger = Logger(logger_args(tmp_path), script="expo_diffusion")
    path = logger.save("agent.pt", {"weights": torch.arange(5), "n": 5})
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    assert torch.equal(state["weights"], torch.arange(5)) and state["n"] == 5

    def full_disk(state, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        logger.save("agent.pt", {})
    logger.close()
    assert path.read_bytes() == whole


def test_tensorboard_has_every_scalar_and_steps_per_second(tmp_path):
    logger = Logger(logger_args(tmp_path), script="expo_diffusion")
    logger.start -= 10  # as if ten seconds had passed
    logger.write(-5, {"losses/critic": 9.0})
    logger.write(0, {"eval/return": 1.0})
    logger.start -= 10
    logger.write(100, {"losses/critic": 2.5})
    logger.close()
    logger.close()  # twice does no harm
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("losses/critic")] == [(-5, 9.0), (100, 2.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval/return")] == [(0, 1.0)]
    (sps,) = events.Scalars("charts/SPS")
    assert sps.step == 100 and sps.value == pytest.approx(10, rel=0.1)


def test_track_mirrors_rows_to_wandb(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda row: calls.append(row), finish=lambda: calls.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kw: calls.append(kw) or run))
    logger = Logger(logger_args(tmp_path / "run", track=True), script="expo_diffusion")
    logger.write(3, {"a": 1.0})
    logger.close()
    assert calls[0]["project"] == "expo" and calls[0]["name"] == "run" and calls[0]["config"]["env_id"] == "Some-v0"
    assert calls[1:] == [{"a": 1.0, "step": 3}, "finished"]


def test_track_without_wandb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        Logger(logger_args(tmp_path, track=True), script="expo_diffusion")


# ------------------------------------------------------------------------------------------------- command line


def fields_of(args: Any) -> dict[str, Any]:
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}


@pytest.mark.parametrize("task", TASKS)
def test_task_defaults(script, task):
    """A task's settings where it has them, the fields' own (published) values elsewhere."""
    values, published = fields_of(cli.parse_args(script.Args, ["--task", task])), fields_of(script.Args())
    settings = TASKS[task].settings | (TASKS[task].finetune if script.__name__ == "expo_finetune" else {})
    known = {key: value for key, value in settings.items() if key in published}
    assert known and values == published | known | {
        "task": task,
        "env_id": TASKS[task].env_id,
        "dataset": TASKS[task].dataset,
    }


def test_every_task_setting_is_a_flag_of_some_script():
    known = {name for cls in all_args() for name in fields_of(cls())}
    for name, task in TASKS.items():
        assert set(task.settings) | set(task.finetune) <= known, name


def test_default_task_is_the_quickstart(script):
    assert cli.parse_args(script.Args, []) == cli.parse_args(script.Args, ["--task", "pointmaze-medium"])


@pytest.mark.parametrize(
    "argv",
    [
        ["--task", "pointmaze-large", "--utd-ratio", "7"],
        ["--utd-ratio", "7", "--task", "pointmaze-large"],
        ["--utd-ratio=7", "--task=pointmaze-large"],
        ["--utd_ratio", "7", "--task", "pointmaze-large"],
    ],
)
def test_explicit_flags_win(script, argv):
    args = cli.parse_args(script.Args, argv)
    assert args.utd_ratio == 7 != TASKS["pointmaze-large"].settings["utd_ratio"]
    assert fields_of(args) == fields_of(cli.parse_args(script.Args, ["--task", "pointmaze-large"])) | {"utd_ratio": 7}


def test_explicit_flag_wins_even_with_the_published_value(script):
    published = str(script.Args().utd_ratio)
    assert cli.parse_args(script.Args, ["--task", "pointmaze-large", "--utd-ratio", published]).utd_ratio == 20


@pytest.mark.parametrize("word", [["--env-id", "Pendulum-v1"], ["--env-id=Pendulum-v1"], ["--env_id", "Pendulum-v1"]])
def test_env_id_alone_gets_the_published_defaults(script, word):
    values = fields_of(cli.parse_args(script.Args, [*word, "--dataset", "a.hdf5", "b.hdf5"]))
    expected = fields_of(script.Args()) | {"task": "", "env_id": "Pendulum-v1", "dataset": ("a.hdf5", "b.hdf5")}
    assert values == expected


def test_env_id_with_a_task_keeps_the_settings_but_not_the_maze():
    argv = ["--task", "pointmaze-umaze", "--env-id", "Pendulum-v1", "--dataset", "a.hdf5"]
    args = cli.parse_args(expo_diffusion.Args, argv)
    assert args.env_id == "Pendulum-v1" and args.utd_ratio == TASKS["pointmaze-umaze"].settings["utd_ratio"]
    env = make_task_env(args)  # Pendulum takes no maze_map
    assert env.observation_space.shape == (3,)


def test_unknown_task_lists_the_known_ones(script):
    with pytest.raises(InputError) as error:
        cli.parse_args(script.Args, ["--task", "pointmaze-medum"])
    assert all(name in str(error.value) for name in TASKS)
    assert "did you mean 'pointmaze-medium'?" in str(error.value)
    with pytest.raises(InputError, match=r"--task 'zzz' is unknown \(known"):
        cli.parse_args(script.Args, ["--task", "zzz"])


def test_help_shows_the_defaults_of_the_named_task(script, capsys):
    for task in ("pointmaze-umaze", "pointmaze-large"):
        with pytest.raises(SystemExit) as stop:
            cli.parse_args(script.Args, ["--task", task, "--help"], script.__doc__)
        assert stop.value.code == 0
        words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
        for name in ("max_episode_steps", "total_timesteps", "utd_ratio", "edit_scale"):
            match = re.search(rf"--{name.replace('_', '-')} .*?\(default: ([^)]*)\)", words)
            assert match and match.group(1) == str(TASKS[task].settings[name])
        assert "EXPO" in words


def test_every_flag_has_a_help_text(script, capsys):
    with pytest.raises(SystemExit):
        cli.parse_args(script.Args, ["--help"], script.__doc__)
    lines = [re.sub(r"[│╭╮╰╯─]", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
    text = " ".join(lines)
    names = [field.name for field in dataclasses.fields(script.Args)]
    assert len(names) > 40
    for name in names:
        match = re.search(rf"(?<!\S)--{name.replace('_', '-')}[ ,].*?\(default: ", text)
        assert match, name
        assert len(re.sub(r"--\S+|\b[A-Z{}|,\[\]]+\b", "", match.group(0)).split()) >= 3, f"--{name} has no help text"


def all_args() -> list[Any]:
    """Args of every script and baseline."""
    names = [*SCRIPTS, *(f"baselines.{path.stem}" for path in sorted((ROOT / "baselines").glob("[!_]*.py")))]
    return [importlib.import_module(name).Args for name in names]


@pytest.mark.parametrize("name", cli.RANGES)
def test_ranges(name):
    """Both ends are allowed, what lies beyond is not; every range belongs to a flag of some script."""
    having = [cls for cls in all_args() if hasattr(cls, name)]
    assert having
    args = cli.parse_args(having[0], [])
    low, high = cli.RANGES[name]
    kind = type(getattr(args, name))
    step = 1 if kind is int else 1e-7
    if name == "num_min_critics":
        args.num_critics = 10**9
    if name == "num_critics":
        args.num_min_critics = 1
    for value in (low, high):
        if np.isfinite(value):
            cli.check_ranges(dataclasses.replace(args, **{name: kind(value)}))
    wrong = [value for value in (low - step, high + step) if np.isfinite(value)]
    assert wrong
    for value in wrong:
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} .* must be at (least|most)"):
            cli.check_ranges(dataclasses.replace(args, **{name: kind(value)}))


def test_every_number_has_a_range(script):
    anything_goes = {"reward_scale", "reward_shift"}
    numbers = {field.name for field in dataclasses.fields(script.Args) if type(field.default) in (int, float)}
    assert numbers - set(cli.RANGES) == anything_goes


def test_more_heads_in_the_minimum_than_critics(script):
    with pytest.raises(InputError, match="--num-min-critics 3 exceeds --num-critics 2"):
        cli.parse_args(script.Args, ["--num-critics", "2", "--num-min-critics", "3"])


def test_threads_and_device():
    args = expo_diffusion.Args(device="cpu", threads=2)
    try:
        assert cli.setup_torch(args) == torch.device("cpu")
        assert torch.get_num_threads() == 2
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert cli.setup_torch(expo_diffusion.Args(device="auto", threads=1)) == torch.device(expected)
    finally:
        torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------------- evaluation


class Walk(gym.Env):
    """Starts at a number that its seed decides, moves by the action, ends beyond 3, and is cut off after ten steps."""

    observation_space = gym.spaces.Box(-100, 100, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    tells_success = True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets = [*getattr(self, "resets", []), seed]
        self.place, self.time = self.np_random.uniform(-1, 1), 0
        return np.array([self.place], np.float32), {}

    def step(self, action):
        self.place, self.time = self.place + float(action[0]), self.time + 1
        info = {"success": 1 < self.place < 2} if self.tells_success else {}  # on the way: not at the last step
        return np.array([self.place], np.float32), self.place, self.place > 3, self.time >= 10, info


def walks(num: int) -> list[gym.Env]:
    return [Walk() for _ in range(num)]


def test_evaluate_against_one_episode_at_a_time():
    def act(obs):
        return torch.where(obs > 0.2, 0.5, -0.3)

    for num_envs in (1, 3, 8):
        episodes = evaluate(act, walks(num_envs), 8, seed=50)
        for i in range(8):
            env = Walk()
            obs, _ = env.reset(seed=50 + i)
            total, length, reached, path, done = 0.0, 0, False, [], False
            while not done:
                path.append(obs)
                action = np.array([0.5 if obs[0] > 0.2 else -0.3], np.float32)
                obs, reward, terminated, truncated, info = env.step(action)
                total, length, done = total + reward, length + 1, terminated or truncated
                reached |= info["success"]
            assert episodes.returns[i] == pytest.approx(total)
            assert episodes.lengths[i] == length
            assert episodes.success is not None and episodes.success[i] == reached
            np.testing.assert_array_equal(episodes.paths[i], path)
        assert episodes.success is not None and 0 < episodes.success.sum() < 8
        assert episodes.metrics("eval/") == {
            "eval/success_rate": episodes.success.mean(),
            "eval/return": episodes.returns.mean(),
            "eval/length": episodes.lengths.mean(),
        }


def test_evaluate_leaves_the_random_state_untouched_and_repeats_itself():
    def act(obs):
        return torch.rand(len(obs), 1) * 2 - 1

    envs = walks(3)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    first = evaluate(act, envs, 7, seed=5)
    torch.testing.assert_close(torch.get_rng_state(), states[0], rtol=0, atol=0)
    assert (random.getstate(), str(np.random.get_state())) == states[1:]  # noqa: NPY002
    torch.rand(17)  # wherever training has got to
    second, other = evaluate(act, envs, 7, seed=5), evaluate(act, envs, 7, seed=6)
    np.testing.assert_array_equal(first.returns, second.returns)
    assert not np.array_equal(first.returns, other.returns)
    assert len(set(first.returns)) == 7  # every episode has its own start and noise


def test_evaluate_without_success_in_info():
    env = Walk()
    env.tells_success = False
    episodes = evaluate(lambda obs: torch.ones(len(obs), 1), [env], 3, seed=0)
    assert episodes.success is None
    assert set(episodes.metrics("eval/base_")) == {"eval/base_return", "eval/base_length"}
    assert env.resets == [0, 1, 2]


def test_evaluate_asks_for_no_gradients():
    weight = torch.ones(1, requires_grad=True)

    def act(obs):
        action = obs * weight
        assert not action.requires_grad
        return action

    assert evaluate(act, walks(1), 1, seed=0).lengths[0] > 0


def test_saved_agent_acts_as_the_one_that_was_saved(script, tmp_path):
    args = cli.parse_args(script.Args, ["--run-dir", str(tmp_path), "--hidden-dim", "16", "--base-hidden-dim", "16"])
    agent = script.Agent(8, 2, args)
    logger = Logger(args, script=script.__name__)
    logger.save("agent.pt", {"agent": agent.state_dict(), "obs_dim": 8, "action_dim": 2})
    logger.close()
    loaded, loaded_args = load_agent(tmp_path)
    assert type(loaded).__module__ == script.__name__
    assert loaded_args.hidden_dim == 16 and loaded_args.task == args.task
    obs = torch.randn(10, 8)
    torch.manual_seed(1)
    expected = agent(obs)
    torch.manual_seed(1)
    assert torch.equal(loaded(obs), expected)


# --------------------------------------------------------------------------------------------------- environments


def test_environment_wrappers():
    """float32 observations, actions in [-1, 1] for native bounds of +-2, repeat inside of our time limit."""
    env, plain = make_env("Pendulum-v1", max_episode_steps=4, action_repeat=3), gym.make("Pendulum-v1").unwrapped
    low, high = native_action_bounds(env)
    assert (low.tolist(), high.tolist()) == ([-2], [2])
    assert env.action_space == gym.spaces.Box(-1, 1, (1,), np.float32)
    obs, _ = env.reset(seed=3)
    expected, _ = plain.reset(seed=3)
    assert obs.dtype == np.float32 and obs.shape == (3,)
    for t in range(4):
        obs, reward, terminated, truncated, _ = env.step(np.array([0.25], np.float32))
        total = 0.0
        for _ in range(3):
            expected, r, *_ = plain.step(np.array([0.5], np.float32))
            total += float(r)
        np.testing.assert_allclose(obs, expected, rtol=1e-5)
        assert float(reward) == pytest.approx(total) and not terminated and truncated == (t == 3)


# ---------------------------------------------------------------------------------------------------- pointmaze


@pytest.fixture(scope="module")
def maze_env():
    settings = TASKS["pointmaze-medium"].settings
    task = TASKS["pointmaze-medium"]
    return make_env(task.env_id, task.env_kwargs, settings["max_episode_steps"], settings["action_repeat"])


@pytest.mark.parametrize("name", pointmaze.MAPS)
def test_shortest_paths_by_brute_force(name):
    """Every pair of free cells: as many steps as Floyd and Warshall say, one cell at a time, through no wall."""
    free = np.array([[cell != "1" for cell in row] for row in pointmaze.MAPS[name]])
    cells = [(int(r), int(c)) for r, c in np.argwhere(free)]
    index = {cell: i for i, cell in enumerate(cells)}
    far = np.full((len(cells), len(cells)), 10**6)
    np.fill_diagonal(far, 0)
    for (r, c), i in index.items():
        for neighbor in ((r + 1, c), (r, c + 1)):
            if neighbor in index:
                far[i, index[neighbor]] = far[index[neighbor], i] = 1
    for k in range(len(cells)):
        far = np.minimum(far, far[:, [k]] + far[[k], :])
    rng, paths = np.random.default_rng(0), {}
    for start, goal in itertools.permutations(cells, 2):
        path = pointmaze.shortest_path(free, start, goal, rng)
        assert path[-1] == goal and len(path) == far[index[start], index[goal]]
        for (r, c), (r2, c2) in itertools.pairwise([start, *path]):
            assert abs(r - r2) + abs(c - c2) == 1 and free[r2, c2]
        paths[start, goal] = path
    ends = cells[0], cells[-1]
    tries = {tuple(pointmaze.shortest_path(free, *ends, rng)) for _ in range(200)}
    assert len(tries) > 1 or name == "umaze"  # ties are broken at random


def test_generated_data_is_deterministic_and_consistent(maze_env):
    arrays, again = (pointmaze.generate(maze_env, "medium", 8, seed=3) for _ in range(2))
    other = pointmaze.generate(maze_env, "medium", 8, seed=4)
    assert list(arrays) == list(again)
    assert all(np.array_equal(arrays[key], again[key]) for key in arrays)
    assert not np.array_equal(arrays["observations"][0], other["observations"][0])

    ends = arrays["terminals"] | arrays["timeouts"]
    assert ends.sum() == 8 and ends[-1]
    assert not (arrays["terminals"] & arrays["timeouts"]).any()
    assert np.array_equal(arrays["terminals"], arrays["infos/success"])  # the task ends at the goal and nowhere else
    assert np.array_equal(arrays["next_observations"][:-1][~ends[:-1]], arrays["observations"][1:][~ends[:-1]])
    lengths = np.diff(np.flatnonzero(ends), prepend=-1)
    limit = TASKS["pointmaze-medium"].settings["max_episode_steps"]
    assert lengths.max() <= limit and (lengths[arrays["timeouts"][ends]] == limit).all()
    assert np.abs(arrays["actions"]).max() <= 1 and np.abs(arrays["actions"]).std() > 0.1
    shapes = {key: array.shape[1:] for key, array in arrays.items()}
    assert shapes["observations"] == shapes["next_observations"] == (8,) and shapes["actions"] == (2,)


def test_generated_rows_are_what_the_environment_does(maze_env):
    """Replaying the actions from the same reset gives the same rows."""
    arrays = pointmaze.generate(maze_env, "medium", 2, seed=5)
    row = 0
    for episode in range(2):
        obs, _ = maze_env.reset(seed=5 * 1_000_003 + episode)
        done = False
        while not done:
            np.testing.assert_array_equal(arrays["observations"][row], obs)
            obs, reward, terminated, truncated, _ = maze_env.step(arrays["actions"][row])
            np.testing.assert_array_equal(arrays["next_observations"][row], obs)
            assert arrays["rewards"][row] == reward and arrays["terminals"][row] == terminated
            row, done = row + 1, terminated or truncated
    assert row == len(arrays["rewards"])


def test_generated_file_is_made_once_and_the_same_again(tmp_path, monkeypatch):
    files = []
    for folder in ("a", "b"):
        monkeypatch.setenv("EXPO_CACHE_DIR", str(tmp_path / folder))
        path = data.generate("pointmaze-umaze", num_episodes=3, seed=7)
        assert path.parent == tmp_path / folder and [p.name for p in path.parent.iterdir()] == [path.name]
        files.append(path)
    assert files[0].read_bytes() == files[1].read_bytes()
    monkeypatch.setattr(pointmaze, "generate", lambda *_: pytest.fail("generated again"))
    assert data.generate("pointmaze-umaze", num_episodes=3, seed=7) == files[1]


def test_generated_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPO_CACHE_DIR", str(tmp_path))

    def fails_half_way(path, arrays, attributes):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_d4rl", fails_half_way)
        with pytest.raises(KeyboardInterrupt):
            data.generate("pointmaze-umaze", num_episodes=1)
    assert list(tmp_path.iterdir()) == []  # neither a data set nor a leftover
    assert data.generate("pointmaze-umaze", num_episodes=1).exists()


def test_quickstart_data_is_inspectable(capsys):
    """The numbers that `inspect` prints, from the arrays."""
    path = data.generate("pointmaze-medium")
    arrays = data.load_specs([str(path)])
    data.inspect(str(path))
    lines = {line[2:16].strip(): line[16:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert arrays.success is not None and len(arrays.success) == len(arrays.episodes) == 60
    assert lines["transitions"].startswith(f"{len(arrays):,} (0 rows dropped")
    assert lines["observations"].startswith("8 wide") and lines["actions"].startswith("2 wide")
    assert lines["episodes"].startswith("60, length ") and lines["terminations"] == str(int(arrays.terminations.sum()))
    assert lines["success"].startswith(f"{int(arrays.success.sum())} of 60 episodes")
    assert 0.1 < arrays.success.mean() < 0.5  # most demonstrators run out of time: that leaves something to learn
    assert lines["problems"]


def test_a_maze_leaves_no_file_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    env = make_task_env(cli.parse_args(expo_diffusion.Args, []))
    env.reset(seed=0)
    assert tempfile.gettempdir() == str(tmp_path) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("maze", pointmaze.MAPS)
def test_every_maze_generates_data_that_fits_its_environment(maze):
    name = f"pointmaze-{maze}"
    args = cli.parse_args(expo_diffusion.Args, ["--task", name])
    env = make_task_env(args)
    rows = data.load_specs([str(data.generate(name, num_episodes=12))], env)
    assert rows.obs.shape[1:] == env.observation_space.shape and np.abs(rows.actions).max() <= 1 - 1e-5
    assert len(rows.episodes) == 12 and rows.success is not None and rows.success.any()


def test_maze_walls_of_the_table_are_those_of_the_simulator(maze_env):
    """Cell centres as the controller computes them are gymnasium-robotics' own."""
    maze: Any = maze_env.unwrapped.maze
    shape = (len(pointmaze.MAPS["medium"]), len(pointmaze.MAPS["medium"][0]))
    for cell in itertools.product(range(shape[0]), range(shape[1])):
        np.testing.assert_allclose(pointmaze.cell_center(cell, shape), maze.cell_rowcol_to_xy(np.array(cell)))
