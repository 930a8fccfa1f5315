"""Whole runs in a toy environment: evaluation, what reaches buffer, log and disk, and every switch thrown."""

import importlib
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from running import SMALL, assert_same, read_metrics, read_state, run, run_here, values_of, words_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import expo_diffusion
import expo_finetune
from expo_diffusion import Args, Log, episode_seed, evaluate

LIMIT = 5  # steps of an episode
ACTING = ("on_the_fly_actions", "sample_actions", "training_actions", "drawn_actions")  # in training, of any script
EVALUATION = {f"eval/{key}" for key in ("return", "length", "success_rate", "solved_share")}
EVALUATION |= {key.replace("/", "/base_") for key in EVALUATION}
TRAINING = {"losses/critic", "losses/edit_policy", "losses/base_policy", "critic/q_mean", "charts/episodic_return"}
TRAINING |= {"edit/abs_mean", "edit/alpha", "edit/entropy", "edit/selected_share"}


class Walk(gym.Env):
    """Starts where its seed says, moves by the action, ends beyond 1, and is cut off at the limit."""

    observation_space = gym.spaces.Box(-100, 100, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(self, tells: Callable[[float], Any] = lambda start: True):
        self.tells = tells  # whether an episode with this start mentions success
        self.seeds, self.steps, self.closed = [], [], False  # of all resets; of all episodes

    def obs(self) -> np.ndarray:
        return np.array([self.place, self.time / LIMIT], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.start = self.place = self.np_random.uniform(-0.8, 0.8)
        self.time = 0
        return self.obs(), {}

    def step(self, action):
        before, self.place, self.time = self.obs(), self.place + float(action[0]), self.time + 1
        terminated, truncated = abs(self.place) > 1, self.time >= LIMIT
        # Success is a place on the way, not the last one.
        info = {"success": abs(self.place) < 0.3} if self.tells(self.start) else {}
        self.steps.append((before, action, self.place, self.obs(), terminated, truncated))
        return self.obs(), self.place, terminated, truncated, info

    def render(self):
        return np.full((32, 32, 3), 20 * self.time, np.uint8)

    def close(self):
        self.closed = True


def random_rows() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    rows = [*(rng.uniform(-1, 1, shape) for shape in ((40, 2), (40, 1), 40, (40, 2))), rng.random(40) < 0.2]
    return tuple(array.astype(np.float32) for array in rows)


TOY: dict[str, Any] = SMALL | {"task": "", "env_id": "Walk-v0", "dataset": ("rows",), "pretrain_steps": 6}
TOY |= {"total_timesteps": 20, "offline_steps": 4, "eval_every": 10, "eval_episodes": 3, "log_every": 5}
TOY |= {"checkpoint_every": 1000, "edit_scale": 0.3, "heldout_share": 0.25}


@pytest.fixture
def walks(monkeypatch):
    """Runs a script in the toy environment; returns the environments that it made: training first."""

    def start(script: Any, run_dir: Path, **flags: Any) -> list[Walk]:
        made: list[Walk] = []
        monkeypatch.setattr(script, "make_env", lambda *_, **__: made.append(Walk()) or made[-1])
        monkeypatch.setattr(script, "load_dataset", lambda *_: random_rows())
        monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 1)  # a card that torch cannot use is left alone
        known = {key: value for key, value in {**TOY, **flags}.items() if hasattr(script.Args, key)}
        run_here(script, script.Args(run_dir=str(run_dir), **known))
        return made

    return start


def evaluated(act: Any, envs: list[Walk], episodes: int, seed: int) -> dict[str, float]:
    args = Args(eval_episodes=episodes, seed=seed)
    return evaluate({"eval/": act, "eval/base_": act}, list(envs), args, torch.device("cpu"))


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_evaluation_is_one_episode_at_a_time(num_envs):
    def act(obs: torch.Tensor) -> torch.Tensor:
        return torch.where(obs[:, :1] > -0.4, 0.3, -0.05)

    expected = []
    for i in range(8):
        env = Walk()
        obs, done, total, solved = env.reset(seed=episode_seed(50, 1, i))[0], False, 0.0, 0
        while not done:
            obs, reward, terminated, truncated, info = env.step(act(torch.tensor(obs[None])).numpy()[0])
            total, solved, done = total + reward, solved + info["success"], terminated or truncated
        expected.append((total, len(env.steps), solved > 0, solved / len(env.steps)))
    assert any(length < LIMIT and solved for _, length, solved, _ in expected) and not all(row[2] for row in expected)
    metrics = evaluated(act, [Walk() for _ in range(num_envs)], 8, 50)
    for prefix in ("eval/", "eval/base_"):
        values = [metrics[f"{prefix}{key}"] for key in ("return", "length", "success_rate", "solved_share")]
        np.testing.assert_allclose(values, np.mean(expected, axis=0))


def test_evaluation_leaves_the_random_state_alone_and_repeats_itself():
    def act(obs: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(obs), 1) * 2 - 1

    before, envs = torch.get_rng_state(), [Walk() for _ in range(3)]
    first = evaluated(act, envs, 7, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(17)  # wherever training has got to
    assert evaluated(act, [Walk() for _ in range(3)], 7, 5) == first != evaluated(act, envs, 7, 6)
    for values in ([seed for env in envs for seed in env.seeds], [float(s[1][0]) for env in envs for s in env.steps]):
        assert len(set(values)) == len(values) / 2  # an episode has its own start and noise, the same for both policies
    assert not {episode_seed(5, 0, i) for i in range(99)} & {episode_seed(5, 1, i) for i in range(99)}
    assert max(episode_seed(5, 1, i) for i in range(99)) < 2**31


@pytest.mark.parametrize("tells", [abs, lambda start: start > 0, lambda start: start < 0, lambda start: False])
def test_success_is_counted_among_all_episodes_or_not_at_all(tells):
    """Where only some episodes mention it, the others have failed. Where none does, there is no such key."""
    envs = [Walk(tells) for _ in range(8)]
    metrics = evaluated(lambda obs: -obs[:, :1], envs, 8, 1)  # all go to 0, which is success
    assert metrics["eval/length"] == LIMIT and {env.start > 0 for env in envs} == {False, True}
    assert metrics.get("eval/success_rate") == (sum(bool(tells(env.start)) for env in envs) / 8 or None)


def test_the_base_policy_is_evaluated_by_its_moving_average(each, walks, monkeypatch, tmp_path):
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(each, "evaluate", lambda policies, *_: seen.append(policies) or {})
    walks(each, tmp_path / "run")
    average = getattr(seen[-1]["eval/"].__self__, "target_base_policy", None)
    assert seen[-1].get("eval/base_") == (average.sample if average else None)


def test_the_folder_of_a_run(each, walks, tmp_path):
    """Keys and steps of metrics.csv, the same numbers in TensorBoard, args.json, the networks, and nothing else."""
    run_dir = tmp_path / "run"
    walks(each, run_dir, save_model=True)
    rows = read_metrics(run_dir)
    keys, heldout = {key for _, key, _ in rows}, {"losses/base_policy_heldout"} if each is expo_finetune else set()
    if each.__name__ in SCRIPTS:
        assert keys == EVALUATION | TRAINING | heldout
    assert keys >= {"eval/success_rate", "losses/critic", "critic/q_mean", "charts/episodic_return"}
    assert list(values_of(rows, "eval/return")) == ([-5, 0, 10, 20] if heldout else [0, 10, 20])
    assert [step for step in values_of(rows, "losses/critic") if step > 0] == [5, 10, 15, 20]
    events = EventAccumulator(str(run_dir)).Reload()
    assert set(events.Tags()["scalars"]) == keys | {"charts/SPS"}
    for key in keys:
        assert {e.step: e.value for e in events.Scalars(key)} == pytest.approx(values_of(rows, key), rel=1e-6)
    record = json.loads((run_dir / "args.json").read_text())
    assert each.__name__.endswith(record["script"]) and record["args"]["env_id"] == "Walk-v0"
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith("events.out.")}
    assert names == {"args.json", "metrics.csv", "checkpoint.pt", "agent.pt"}
    saved = {"agent": read_state(run_dir)["agent"], "obs_dim": 2, "action_dim": 1}
    assert_same(torch.load(run_dir / "agent.pt", weights_only=True), saved)


def test_the_log_writes_means_into_a_folder_of_its_own(tmp_path):
    folder, state = tmp_path / "runs" / "one", {"bytes": 0, "seconds": 0.0, "sums": {}}
    log = Log(folder, Args(), 0, state, 0)
    for step, values in ((10, [1, 2, torch.tensor(6.0)]), (20, [123456789])):
        for value in values:
            log.add({"key": value})
        log.write(step)
    assert read_metrics(folder) == [(10, "key", "3"), (20, "key", "1.2345679e+08")]
    with pytest.raises(FileExistsError):  # two runs that start in the same second
        Log(folder, Args(), 0, state, 0)


def test_track_mirrors_tensorboard_to_wandb(walks, monkeypatch, tmp_path):
    (tmp_path / "wandb.py").write_text("calls = []\ndef init(**words):\n    calls.append(words)\n")
    monkeypatch.syspath_prepend(tmp_path)
    walks(expo_diffusion, tmp_path / "run", track=True)
    (words,) = sys.modules.pop("wandb").calls
    assert words["name"] == "run" and words["sync_tensorboard"] and words["config"]["env_id"] == "Walk-v0"


@pytest.mark.parametrize("episodes, rounds", [(2, 1), (22, 2)])  # there are at most 20 environments
def test_capture_video_writes_one_video_for_each_policy_and_evaluation(episodes, rounds, walks, tmp_path):
    pytest.importorskip("moviepy")
    walks(expo_diffusion, tmp_path / "run", capture_video=True, eval_episodes=episodes)
    names = {path.name for path in (tmp_path / "run" / "videos").glob("*.mp4")}
    assert names == {f"step{10 * i}-episode-{(2 * i + base) * rounds}.mp4" for i in range(3) for base in (0, 1)}


def test_a_stopped_run_completes_its_last_video(walks, monkeypatch, tmp_path):
    pytest.importorskip("moviepy")
    numbers = iter([signal.SIGINT])  # one in the first update, and then none (0)
    monkeypatch.setattr(expo_diffusion, "update", lambda *_: os.kill(os.getpid(), next(numbers, 0)) or {})
    with pytest.raises(SystemExit):
        walks(expo_diffusion, tmp_path / "run", capture_video=True, offline_steps=0)
    names = {path.name for path in (tmp_path / "run" / "videos").glob("*.mp4")}
    assert names == {"step0-episode-0.mp4", "step0-episode-1.mp4"}


def test_every_step_acts_is_stored_and_updates(each, walks, monkeypatch, tmp_path):
    """Offline: one slice of offline rows each. Then uniform actions and no update, then U mixed slices a step.

    Stored: scaled rewards, the last state of an episode as a successor, a time limit that is no end. Logged: returns.
    """
    drawn, draw, buffers = [], each.ReplayBuffer.draw, []

    def spy(buffer: Any, offline_ratio: float, slices: int, rows: int) -> Any:
        buffers[:] = [buffer]
        drawn.append((buffer.size - buffer.num_offline, offline_ratio, slices, rows))
        return draw(buffer, offline_ratio, slices, rows)

    monkeypatch.setattr(each.ReplayBuffer, "draw", spy)
    (acting,) = (name for name in ACTING if hasattr(each.Agent, name))
    monkeypatch.setattr(each.Agent, acting, lambda agent, obs, *_: torch.full((len(obs), 1), 0.125))
    flags: dict[str, Any] = {"reward_scale": 3.0, "reward_shift": -0.5, "learning_starts": 50, "total_timesteps": 60}
    flags |= {"utd_ratio": 3, "batch_size": 10, "offline_ratio": 0.3, "log_every": 1, "eval_every": 100}
    env, *_ = walks(each, tmp_path / "run", **flags)
    assert drawn == [(0, 1.0, 1, 10)] * 4 + [(step, 0.3, 3, 10) for step in range(51, 61)]  # with the step's own row
    obs, actions, rewards, next_obs, ends, cuts = (np.array(column) for column in zip(*env.steps, strict=True))
    assert ends.any() and (cuts & ~ends).any() and len(obs) == 60
    assert (actions[50:] == 0.125).all() and not (actions[:50] == 0.125).any()
    assert np.abs(actions).max() <= 1 and 0.4 < actions[:50].std() < 0.75  # uniform: .577
    online, offline = (obs, actions, rewards, next_obs, ends), random_rows()
    for stored, before, after in zip(buffers[0].fields, offline, online, strict=True):
        expected = np.concatenate([before, after])
        expected = 3 * expected - 0.5 if before is offline[2] else expected
        np.testing.assert_allclose(stored[: buffers[0].size].numpy(), expected, rtol=1e-6, atol=1e-6)
    last = np.flatnonzero(ends | cuts)
    assert env.seeds == [episode_seed(1, 0, i) for i in range(len(last) + 1)]
    returns = {int(i) + 1: float(part.sum()) for i, part in zip(last, np.split(rewards, last + 1), strict=False)}
    assert values_of(read_metrics(tmp_path / "run"), "charts/episodic_return") == pytest.approx(returns, rel=1e-5)


def test_the_same_seed_gives_the_same_run_however_often_it_is_evaluated(each, walks, tmp_path):
    for name, seed, every in (("one", 1, 100), ("two", 1, 5), ("other", 2, 100)):
        torch.rand(10 + seed)  # whatever happened before
        walks(each, tmp_path / name, seed=seed, eval_every=every, eval_episodes=every % 7, total_timesteps=10)
    one, two, other = ([r for r in read_metrics(tmp_path / n) if "eval" not in r[1]] for n in ("one", "two", "other"))
    assert one == two and values_of(one, "losses/critic")[0] != values_of(other, "losses/critic")[0]
    assert_same(read_state(tmp_path / "one"), read_state(tmp_path / "two"))


SWITCHES: list[dict[str, Any]] = [
    {"backup": "entropy", "edit_entropy": "published", "num_base_samples": 1, "num_edit_samples": 3, "gamma": 1.0}
    | {"backup_entropy": True, "max_q_backup": True, "utd_ratio": 1, "tau": 1.0, "edit_dropout": 0.5},
    {"num_edit_samples": 0, "denoising_steps": 1, "offline_ratio": 0.0, "num_min_critics": 1, "base_blocks": 0}
    | {"num_target_samples": 1, "precision": "bfloat16", "matmul_precision": "medium", "gamma": 0.0, "ema_rate": 1.0},
    {"offline_ratio": 1.0, "num_base_samples": 3, "num_edit_samples": 2, "num_target_samples": 5, "hidden_layers": 3}
    | {"selection": "expectile", "expectile": 0.0, "num_action_samples": 1},
    {"offline_steps": 0, "pretrain_steps": 0, "learning_starts": 0, "heldout_share": 0.0, "lr_decay_steps": 1}
    | {"eval_episodes": 0},
    {"total_timesteps": 0, "learning_starts": 0, "eval_episodes": 1},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=range(len(SWITCHES)))
def test_runs_with_every_switch_thrown(switches, each, walks, tmp_path):
    envs = walks(each, tmp_path / "run", **{"total_timesteps": 8} | switches)
    episodes = switches.get("eval_episodes", 3)
    assert len(envs) == 1 + episodes and all(env.closed for env in envs)
    assert torch.get_float32_matmul_precision() == switches.get("matmul_precision", "highest")
    rows = read_metrics(tmp_path / "run")
    assert rows[-1][0] == read_state(tmp_path / "run")["step"] == switches.get("total_timesteps", 8)
    if each.__name__ in SCRIPTS:
        assert bool(values_of(rows, "losses/edit_policy")) == (switches.get("num_edit_samples") != 0)


TOO_LARGE = [{"reward_scale": 1e30}, {"backup": "entropy", "critic_lr": 1e20}]


@pytest.mark.parametrize("flags", TOO_LARGE)
def test_a_loss_that_is_not_finite_ends_the_run_with_its_step_and_key(flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log of its own there
    log = tmp_path / "log"
    words = words_for(expo_diffusion, tmp_path / "run", log_every=50, checkpoint_every=1000, **flags)
    assert run(expo_diffusion, words, log) == 2
    last = log.read_text().splitlines()[-1]
    assert re.match(r"error: step -?\d+: losses/critic is (inf|nan); ", last), last
    assert read_metrics(tmp_path / "run")[-1][1:] in (("losses/critic", "inf"), ("losses/critic", "nan"))


def test_an_action_that_is_not_finite_never_reaches_the_environment(tmp_path):
    script, log = importlib.import_module("baselines.diffusion_ql"), tmp_path / "log"
    words = words_for(script, tmp_path / "run", log_every=50, checkpoint_every=1000, critic_lr=1e20)
    assert run(script, words, log) == 2
    last = "error: environment 'PointMaze_UMaze-v3', step 1 of an episode: the action is not finite, so the networks"
    assert log.read_text().splitlines()[-1].startswith(last)


@pytest.mark.parametrize("network", ["target_critic.weights.0", "edit_policy.mean.bias", "log_alpha"])
def test_networks_that_are_not_finite_never_reach_the_checkpoint(network, walks, monkeypatch, tmp_path):
    update, calls = expo_diffusion.update, []

    def spoil(agent: Any, *rest: Any) -> Any:
        calls.append(update(agent, *rest))
        if len(calls) == 8:  # with one of the first online updates
            agent.get_parameter(network).data.view(-1)[0] = math.nan
        return {key: value.nan_to_num() for key, value in calls[-1].items()}

    monkeypatch.setattr(expo_diffusion, "update", spoil)
    with pytest.raises(FloatingPointError, match=r"^step \d+: the networks are not finite"):
        walks(expo_diffusion, tmp_path / "run", log_every=100, eval_every=100, checkpoint_every=1)
    state = read_state(tmp_path / "run")
    assert 0 < state["step"] < 10 and all(value.isfinite().all() for value in state["agent"].values())


def test_pretraining_is_imitation_alone(walks, monkeypatch, tmp_path):
    """It changes the base policy and nothing else. It sees the first rows; the last ones are held out, and measured."""
    loss, seen = expo_finetune.BasePolicy.loss, []
    number = {value: i for i, value in enumerate(random_rows()[0][:, 0].tolist())}

    def spy(base_policy: Any, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        seen.append({number[value] >= 30 for value in obs[:, 0].tolist()})
        return loss(base_policy, obs, actions)

    monkeypatch.setattr(expo_finetune.BasePolicy, "loss", spy)
    for steps in (60, 0):
        walks(expo_finetune, tmp_path / str(steps), pretrain_steps=steps, offline_steps=0, total_timesteps=0)
    assert seen.count({False}) == 60 and seen.count({True}) == len(seen) - 60 == 12
    assert list(values_of(read_metrics(tmp_path / "60"), "losses/base_policy_heldout")) == list(range(-60, 0, 5))
    trained, fresh = (read_state(tmp_path / name)["agent"] for name in ("60", "0"))
    for key in fresh:
        learns = "base_policy" in key and not key.endswith(("alpha_bars", "times"))
        assert torch.equal(trained[key], fresh[key]) != learns, key


def test_finetuning_starts_from_the_base_policy_of_another_run(walks, tmp_path):
    first, flags = tmp_path / "first", {"seed": 5, "offline_steps": 0, "total_timesteps": 0}
    walks(expo_diffusion, first, save_model=True)
    saved = torch.load(first / "agent.pt", weights_only=True)["agent"]
    walks(expo_finetune, tmp_path / "second", pretrained=str(first), **flags)
    started = read_state(tmp_path / "second")["agent"]
    assert all(torch.equal(started[key], saved[key]) for key in saved if "base_policy" in key)
    assert not torch.equal(started["critic.weights.0"], saved["critic.weights.0"])
    assert not values_of(read_metrics(tmp_path / "second"), "losses/base_policy")  # no imitation on top
    (first / "agent.pt").write_bytes((first / "agent.pt").read_bytes()[:1000])
    for folder in (first, tmp_path / "nowhere"):
        with pytest.raises(OSError, match=rf"^--pretrained {folder}/agent.pt: [^\n]+$"):
            walks(expo_finetune, tmp_path / "third", pretrained=str(folder), **flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_quickstart_learns_the_maze(name, tmp_path):
    """One seed, nothing but defaults."""
    log = tmp_path / "log"
    assert run(importlib.import_module(name), ["--run-dir", str(tmp_path / "run")], log) == 0, log.read_text()
    rows = read_metrics(tmp_path / "run")
    success = list(values_of(rows, "eval/success_rate").values())
    assert max(success) >= 0.9 and np.mean(success[-3:]) >= 0.85  # and it stays there
    assert np.mean(list(values_of(rows, "eval/base_success_rate").values())[:2]) < 0.7  # imitation alone
