"""Whole runs: what lands on disk, reproducibility, data flow of main, saved agents, Ctrl-C, and a maze learned."""

import csv
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, flags_of, run_script, same, snapshot, tiny_run_args

from utils import cli, data, evaluate
from utils.buffer import ReplayBuffer
from utils.tasks import make_task_env

# Log keys of the design notes; charts/SPS depends on the clock and is in TensorBoard only.
EVALUATION = {f"eval/{base}{key}" for base in ("", "base_") for key in ("return", "length", "success_rate")}
TRAINING = {"losses/critic", "losses/edit_policy", "losses/base_policy", "critic/q_mean"}
TRAINING |= {"edit/abs_mean", "edit/alpha", "edit/entropy", "edit/selected_share"}


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def column(rows: list[dict[str, str]], key: str) -> dict[int, float]:
    return {int(row["step"]): float(row[key]) for row in rows if row.get(key)}


# ------------------------------------------------------------------------------------------- a few hundred steps


@pytest.fixture(scope="module", params=["expo_diffusion", "expo_flow", "expo_finetune"])
def finished(request, tmp_path_factory):
    """(script, run folder, output) of a run of 200 tiny steps in a process of its own."""
    script = __import__(request.param)
    run_dir = tmp_path_factory.mktemp("runs") / request.param
    settings = {**TINY_RUN, "total_timesteps": 200, "eval_every": 100, "pretrain_steps": 20, "run_dir": run_dir}
    done = run_script(script, *flags_of(script, settings), "--save-model", timeout=400)
    assert done.returncode == 0, done.stderr
    return script, run_dir, done


def test_run_metrics(finished):
    script, run_dir, done = finished
    rows = read_metrics(run_dir)
    extra = {"losses/base_policy_heldout"} if script.__name__ == "expo_finetune" else set()
    assert set(rows[0]) == {"step", "seconds", "charts/episodic_return"} | EVALUATION | TRAINING | extra
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps) and steps[0] < 0 and steps[-1] == 200
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    values = [float(value) for row in rows for value in row.values() if value]
    assert len(values) > 200 and all(math.isfinite(value) for value in values)
    evaluated = [0, 100, 200] if not extra else [-20, 0, 100, 200]
    for key in EVALUATION:
        assert list(column(rows, key)) == evaluated, key
    for key in TRAINING:
        online = [step for step in column(rows, key) if step > 0]
        assert online == list(range(10, 201, 10)), key
    assert all(0 <= row <= 1 for row in column(rows, "eval/success_rate").values())
    assert all(0 <= row <= 20 for row in column(rows, "eval/return").values() if row)
    assert all(0 < row <= 0.2 for row in column(rows, "edit/abs_mean").values())  # edit_scale of the task
    assert all(0 <= row <= 1 for row in column(rows, "edit/selected_share").values())
    losses = list(column(rows, "losses/base_policy").values())
    assert np.mean(losses[-5:]) < np.mean(losses[:2])  # the imitation has begun to work
    assert "success" in done.stdout + done.stderr


def test_run_folder(finished):
    script, run_dir, _ = finished
    names = {path.name for path in run_dir.iterdir()}
    assert {"args.json", "metrics.csv", "agent.pt"} <= names and any(name.startswith("events.out") for name in names)
    assert not any(name.endswith((".tmp", ".part")) for name in names)
    record = json.loads((run_dir / "args.json").read_text())
    assert record["script"] == script.__name__ and record["args"]["total_timesteps"] == 200
    assert record["command"][0] == f"{script.__name__}.py" and "--save-model" in record["command"]


def test_same_seed_same_metrics(finished, tmp_path):
    """Bit for bit but for the seconds: in this process, where other tests have used torch and numpy before."""
    script, run_dir, _ = finished
    settings = {"total_timesteps": 100, "eval_every": 100}
    script.main(tiny_run_args(script, tmp_path / "again", **settings))
    first = [row for row in without_seconds(read_metrics(run_dir)) if int(row["step"]) <= 100]
    assert without_seconds(read_metrics(tmp_path / "again")) == first
    script.main(tiny_run_args(script, tmp_path / "other", **{**settings, "total_timesteps": 20, "seed": 2}))
    other = without_seconds(read_metrics(tmp_path / "other"))
    assert other[0]["step"] == first[0]["step"] and other[0] != first[0]


def test_evaluation_does_not_disturb_training(finished, tmp_path):
    """Ten times as many evaluations, and longer ones: the same training rows."""
    script, run_dir, _ = finished
    script.main(tiny_run_args(script, tmp_path / "run", total_timesteps=40, eval_every=10, eval_episodes=3))
    keys = sorted(TRAINING | {"charts/episodic_return"})
    expected = [row for row in read_metrics(run_dir) if row["losses/critic"] and int(row["step"]) <= 40]
    rows = [row for row in read_metrics(tmp_path / "run") if row["losses/critic"]]
    assert len(rows) == len(expected) >= 6
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in expected]


def assert_evaluated(output: str) -> None:
    """What `python -m utils.evaluate RUN_DIR --episodes 3` prints adds up."""
    assert "3 episodes" in output
    returned, length = (re.search(rf"{key}\s+(-?\d+\.\d+)", output) for key in ("return", "length"))
    share = re.search(r"success\s+(\d\.\d+) \((\d) of 3\)", output)
    assert returned and length and share
    assert float(share.group(1)) == pytest.approx(int(share.group(2)) / 3, abs=1e-3)
    assert 1 <= float(length.group(1)) <= 20 and 0 <= float(returned.group(1)) <= 20


def test_saved_agent_is_evaluated_again(finished, capsys):
    _, run_dir, _ = finished
    evaluate.main(run_dir, episodes=3)
    assert_evaluated(capsys.readouterr().out)


@pytest.mark.parametrize("finished", ["expo_diffusion"], indirect=True)
def test_saved_agent_is_evaluated_in_its_own_process(finished):
    _, run_dir, _ = finished
    command = [sys.executable, "-m", "utils.evaluate", str(run_dir), "--episodes", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ.copy())
    assert (done.returncode, done.stderr) == (0, "")
    assert_evaluated(done.stdout)


# ------------------------------------------------------------------------------------------------ inside of main


class RecordingBuffer(ReplayBuffer):
    """Keeps every `add` as it came."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.added: list[tuple] = []
        RecordingBuffer.last = self

    def add(self, obs, action, reward, next_obs, terminated):
        self.added.append((np.array(obs), np.array(action), reward, np.array(next_obs), terminated))
        super().add(obs, action, reward, next_obs, terminated)


def test_online_rows_are_what_happened(script, monkeypatch, tmp_path):
    """Replayed in a fresh environment: same observations, successors and rewards; a time limit is never terminal, and
    its successor is the last state, not the first of the next episode."""

    def make_env(args, render=False):
        return gym.wrappers.TransformReward(make_task_env(args, render), lambda reward: float(reward) + 2.0)

    monkeypatch.setattr(script, "make_task_env", make_env)  # the maze's own rewards are 0 on the way
    monkeypatch.setattr(script, "ReplayBuffer", RecordingBuffer)
    flags = {"learning_starts": 100, "total_timesteps": 50, "offline_steps": 0, "eval_every": 1000}
    args = tiny_run_args(script, tmp_path / "run", **flags, pretrain_steps=1, reward_scale=3.0, reward_shift=-0.5)
    script.main(args)
    added = RecordingBuffer.last.added
    assert len(added) == 50
    env, seeds = make_env(args), [np.random.SeedSequence([args.seed, i]).generate_state(1)[0] for i in range(3)]
    obs, _ = env.reset(seed=int(seeds[0]))
    for t, (stored_obs, action, reward, next_obs, terminated) in enumerate(added):
        np.testing.assert_array_equal(stored_obs, obs)
        obs, raw_reward, really_terminated, truncated, _ = env.step(action)
        np.testing.assert_array_equal(next_obs, obs)
        assert reward == pytest.approx(3 * float(raw_reward) - 0.5)
        assert terminated == really_terminated
        if t % 20 == 19:  # max_episode_steps
            assert truncated and not terminated
            obs, _ = env.reset(seed=int(seeds[t // 20 + 1]))
            assert not np.array_equal(next_obs, obs)
    actions = np.array([action for _, action, *_ in added])  # uniform before learning starts
    assert np.abs(actions).max() <= 1 and 0.45 < actions.std() < 0.7  # .577
    assert abs(actions.mean()) < 0.2


def test_offline_rows_get_the_same_reward_scale_and_shift(script, monkeypatch, tmp_path):
    made = []

    class Recorded(ReplayBuffer):
        @classmethod
        def from_dataset(cls, *args):
            made.append(super().from_dataset(*args))
            return made[-1]

    monkeypatch.setattr(script, "ReplayBuffer", Recorded)
    flags = {"total_timesteps": 1, "offline_steps": 0, "pretrain_steps": 1, "reward_scale": 3.0, "reward_shift": -0.5}
    args = tiny_run_args(script, tmp_path / "run", **flags)
    script.main(args)
    rows = data.load_specs(args.dataset, make_task_env(args))
    (offline,) = made
    np.testing.assert_allclose(offline.data.rewards.numpy(), 3 * rows.rewards - 0.5, rtol=1e-6)
    for stored, array in zip(offline.data, (rows.obs, rows.actions), strict=False):
        np.testing.assert_array_equal(stored.numpy(), array)
    np.testing.assert_array_equal(offline.data.next_obs.numpy(), rows.next_obs)
    np.testing.assert_array_equal(offline.data.terminations.numpy(), rows.terminations)


def test_updates_per_step(script, monkeypatch, tmp_path):
    """Offline: one slice of offline rows each. Then nothing before learning starts, and U half/half slices a step."""
    shapes, online_rows, update = [], [], script.update
    draw_batch = script.draw_batch

    def draw(offline, online, offline_ratio, slices, rows):
        online_rows.append(online.size)
        assert offline_ratio == (0.5 if online.size else 1.0)
        return draw_batch(offline, online, offline_ratio, slices, rows)

    def count(agent, optimizers, batch):
        shapes.append(tuple(batch.rewards.shape))
        return update(agent, optimizers, batch)

    monkeypatch.setattr(script, "update", count)
    monkeypatch.setattr(script, "draw_batch", draw)
    flags = {"offline_steps": 7, "learning_starts": 12, "total_timesteps": 30, "utd_ratio": 3, "batch_size": 10}
    script.main(tiny_run_args(script, tmp_path / "run", **flags))
    assert shapes == [(1, 10)] * 7 + [(3, 10)] * 18
    assert online_rows == [0] * 7 + list(range(13, 31))  # step's own transition included


def test_acting_uses_the_on_the_fly_policy_after_learning_starts(script, monkeypatch, tmp_path):
    calls, act = Counter(), script.Agent.on_the_fly_actions

    def spy(agent, obs):
        calls[tuple(obs.shape)] += 1
        return 0 * act(agent, obs) + 0.125

    monkeypatch.setattr(script, "ReplayBuffer", RecordingBuffer)
    monkeypatch.setattr(script.Agent, "on_the_fly_actions", spy)
    flags = {"offline_steps": 0, "learning_starts": 5, "total_timesteps": 12, "pretrain_steps": 1, "eval_episodes": 2}
    script.main(tiny_run_args(script, tmp_path / "run", **flags))
    assert calls[1, 8] == 7  # one state at a time; evaluation asks for two
    chosen = [(action == 0.125).all() for _, action, *_ in RecordingBuffer.last.added]
    assert chosen == [False] * 5 + [True] * 7


def test_runs_with_every_switch_thrown(script, tmp_path):
    """Entropy backup, published entropy, no edits, one base sample, one denoising step, ratios 0 and 1."""
    switches = [
        {"backup": "entropy", "edit_entropy": "published", "num_base_samples": 1, "num_edit_samples": 3},
        {"num_edit_samples": 0, "denoising_steps": 1, "offline_ratio": 0.0, "num_min_critics": 1, "base_blocks": 0},
        {"offline_ratio": 1.0, "edit_dropout": 0.1, "num_base_samples": 3, "num_edit_samples": 2, "utd_ratio": 1},
        {"total_timesteps": 0, "offline_steps": 0},
    ]
    for i, flags in enumerate(switches):
        run_dir = tmp_path / str(i)
        small = {"total_timesteps": 12, "offline_steps": 2, "pretrain_steps": 2, "log_every": 4}
        script.main(tiny_run_args(script, run_dir, **{**small, **flags}))
        rows = read_metrics(run_dir)
        assert int(rows[-1]["step"]) == flags.get("total_timesteps", 12)
        assert rows[-1]["eval/success_rate"]
        if flags.get("num_edit_samples") == 0:
            assert "losses/edit_policy" not in rows[0]
            assert set(column(rows, "edit/selected_share").values()) == {0.0}


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(script, monkeypatch, tmp_path, capsys):
    settings = {
        **TINY_RUN,
        "total_timesteps": 30,
        "reward_scale": 1e38,
        "reward_shift": -3e38,
        "run_dir": tmp_path / "run",
    }
    words = flags_of(script, {**settings, "pretrain_steps": 1})
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    with pytest.raises(SystemExit) as stop:
        cli.run(script.main, script.Args)
    assert stop.value.code == 2
    assert re.search(r"(?m)^error: step -?\d+: .*losses/critic.* is not finite[^\n]*\n\Z", capsys.readouterr().err)
    assert read_metrics(tmp_path / "run")


# --------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("script", ["expo_finetune"], indirect=True)
def test_pretraining_is_imitation_alone(script, monkeypatch, tmp_path):
    """Only the base policy learns, from the rows of the training episodes; held-out ones are only measured."""
    seen, trained, agents = [], [], []
    update_base_policy = script.update_base_policy

    def spy(agent, optimizers, obs, actions):
        if not agents:
            agents.append((agent, {name: snapshot(getattr(agent, name)) for name in ("critic", "edit_policy")}))
        trained.append(obs)
        return update_base_policy(agent, optimizers, obs, actions)

    def stop(agent, optimizers, batch):
        assert agent is agents[0][0]
        assert all(same(getattr(agent, name), before) for name, before in agents[0][1].items())
        seen.append(len(trained))
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "update_base_policy", spy)
    monkeypatch.setattr(script, "update", stop)
    args = tiny_run_args(script, tmp_path / "run", pretrain_steps=60, offline_steps=5, heldout_share=0.5)
    with pytest.raises(KeyboardInterrupt):
        script.main(args)
    assert seen == [60]
    rows = data.load_specs(args.dataset, make_task_env(args))
    train_rows, heldout_rows = rows.split(0.5, args.seed)
    train = {tuple(row) for row in rows.obs[train_rows].tolist()}
    held_out = {tuple(row) for row in rows.obs[heldout_rows].tolist()}
    drawn = {tuple(row) for row in torch.cat(trained).tolist()}
    assert drawn <= train and not drawn & held_out and len(drawn) > 300
    metrics = read_metrics(tmp_path / "run")
    assert len(column(metrics, "losses/base_policy_heldout")) == 6
    assert [int(row["step"]) for row in metrics if row["eval/base_success_rate"]] == [-5]


@pytest.mark.parametrize("script", ["expo_finetune"], indirect=True)
def test_finetuning_starts_from_a_saved_base_policy(script, monkeypatch, tmp_path):
    flags = {"pretrain_steps": 10, "offline_steps": 2, "total_timesteps": 2}
    script.main(tiny_run_args(script, tmp_path / "first", **flags, save_model=True))
    saved = torch.load(tmp_path / "first" / "agent.pt", weights_only=True)["agent"]
    started = []

    def stop(agent, optimizers, batch):
        started.append(agent.state_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "update", stop)
    for source in (tmp_path / "first", tmp_path / "first" / "agent.pt"):
        run_dir = tmp_path / f"from-{source.name}"
        with pytest.raises(KeyboardInterrupt):
            script.main(tiny_run_args(script, run_dir, **flags, seed=5, pretrained=source))
        state = started.pop()
        for key, value in saved.items():
            from_saved = key.startswith(("base_policy.", "target_base_policy."))
            assert torch.equal(state[key], value) or not from_saved, key
        assert not torch.equal(state["critic.layers.0.weight"], saved["critic.layers.0.weight"])
        assert not column(read_metrics(run_dir), "losses/base_policy")  # no imitation steps on top


# -------------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_ends_cleanly_and_leaves_the_metrics(tmp_path):
    import expo_diffusion

    run_dir = tmp_path / "run"
    settings = {**TINY_RUN, "total_timesteps": 10**6, "log_every": 5, "run_dir": run_dir}
    command = [sys.executable, str(ROOT / "expo_diffusion.py"), *flags_of(expo_diffusion, settings)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            if (run_dir / "metrics.csv").exists() and any(int(row["step"]) > 20 for row in read_metrics(run_dir)):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors and errors.rstrip().splitlines()[-1].startswith("stopped by Ctrl-C")
    rows = read_metrics(run_dir)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps) and steps[-1] > 20
    assert all(None not in row and None not in row.values() for row in rows)  # no half-written line
    assert (run_dir / "args.json").exists()


# ------------------------------------------------------------------------------------------------------- the maze


@pytest.mark.slow
def test_default_run_learns_the_maze(script, tmp_path):
    """The quickstart, one seed, nothing but defaults."""
    done = run_script(script, "--run-dir", str(tmp_path / "run"), timeout=3000)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run")
    success, alone = column(rows, "eval/success_rate"), column(rows, "eval/base_success_rate")
    assert max(success.values()) >= 0.9
    assert np.mean(list(success.values())[-3:]) >= 0.85  # and it stays there
    assert np.mean(list(alone.values())[:2]) < 0.7  # which imitation alone does not reach
    assert all(a < b for a, b in itertools.pairwise(success))
