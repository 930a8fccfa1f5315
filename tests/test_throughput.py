"""benchmark/throughput.py, its naive reference, benchmark/overestimation.py and benchmark/soak.py."""

import csv
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, make_agent, make_batch, tiny_run_args
from torch.utils.flop_counter import FlopCounterMode

import expo_diffusion
from benchmark import overestimation, roofline, soak, throughput
from benchmark.naive import STEPS, NaiveExpo
from utils.errors import InputError

TINY = "--task pointmaze-umaze --utd-ratio 2 --batch-size 8 --hidden-dim 16 --base-hidden-dim 16 --denoising-steps 2"


def counted(function) -> float:
    """FLOP of the products that torch sees while `function` runs."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flop_against_those_that_torch_counts(script):
    """Every part within 5 % (what is left out: the time code, which all rows share)."""
    agent = make_agent(script, obs_dim=6, utd_ratio=3, batch_size=32, hidden_dim=64, base_hidden_dim=64, num_critics=4)
    optimizers = script.make_optimizers(agent, agent.args)
    batch = make_batch(3, 32, obs_dim=6)
    last = type(batch)(*(field[-1] for field in batch))
    parts = throughput.flop(agent)
    candidates = script.next_candidates(agent, batch)
    found = counted(lambda: script.next_candidates(agent, batch))
    assert parts["chain"] + parts["edits"] == pytest.approx(found, rel=0.05)
    found = counted(lambda: script.td_target(agent, last, candidates[-1]))
    assert parts["ranking"] / 3 == pytest.approx(found, rel=0.05)
    found = counted(lambda: script.gradient_step(optimizers.critic, script.critic_loss(agent, last, candidates[-1])[0]))
    assert (parts["ranking"] + parts["critic"]) / 3 == pytest.approx(found, rel=0.1)  # none for the data's own gradient
    found = counted(lambda: script.update_base_policy(agent, optimizers, last.obs, last.actions))
    assert parts["base"] == pytest.approx(found, rel=0.35)  # here every row has a time code of its own
    found = counted(lambda: script.gradient_step(optimizers.edit, script.edit_policy_loss(agent, last)[0]))
    assert parts["edit"] == pytest.approx(found, rel=0.15)
    assert sum(parts.values()) == pytest.approx(counted(lambda: script.update(agent, optimizers, batch)), rel=0.05)


def test_cost_of_the_published_sizes():
    """AntMaze: 1.4 TFLOP per environment step, more than nine tenths of it in the chain."""
    parts = throughput.flop(expo_diffusion.Agent(29, 8, expo_diffusion.Args(num_min_critics=1)))
    assert sum(parts.values()) == pytest.approx(1.4e12, rel=0.08)
    assert 0.9 < parts["chain"] / sum(parts.values()) < 0.95


@pytest.mark.parametrize("steps", [(), tuple(STEPS)], ids=["naive", "all steps"])
@pytest.mark.parametrize("edits", [0, 4])
def test_naive_reference_is_the_same_algorithm(script, edits, steps):
    """With the same weights: the same Q, the same base actions from the same noise, and an update of everything."""
    agent = make_agent(script, num_edit_samples=edits, num_critics=3, num_min_critics=3, denoising_steps=4)
    naive = NaiveExpo(script, 3, 2, agent.args, steps=steps)
    naive.base_policy.load_state_dict(agent.base_policy.state_dict())
    with torch.no_grad():
        for e, critic in enumerate(naive.target_critic):
            linears = [layer for layer in critic.children() if isinstance(layer, torch.nn.Linear)]
            norms = [layer for layer in critic.children() if isinstance(layer, torch.nn.LayerNorm)]
            for mine, other in zip([*agent.target_critic.layers, agent.target_critic.output], linears, strict=True):
                other.weight.copy_(mine.weight[e].T)
                other.bias.copy_(mine.bias[e, 0])
            for mine, other in zip(agent.target_critic.norms, norms, strict=True):
                other.weight.copy_(mine.weight[e, 0])
                other.bias.copy_(mine.bias[e, 0])
    batch = make_batch(2, 8)
    obs, actions = batch.obs[0], batch.actions[0]
    assert torch.allclose(naive.minimum(obs, actions), agent.target_critic.random_min(obs, actions, 3), atol=1e-5)
    torch.manual_seed(3)
    expected = agent.base_policy.sample(obs)
    torch.manual_seed(3)
    assert torch.allclose(naive.sample(obs), expected, atol=1e-5)
    many = torch.randn(3000, 3)  # more than one part
    torch.manual_seed(3)
    expected = [agent.base_policy.sample(part) for part in (many.split(2048) if steps else [many])]
    torch.manual_seed(3)
    assert torch.allclose(naive.sample(many), torch.cat(expected), atol=1e-4)
    if not edits:  # the choice too: the same noise, no edits to draw
        agent.target_base_policy.load_state_dict(agent.base_policy.state_dict())
        torch.manual_seed(4)
        choice = agent.on_the_fly_actions(obs)
        torch.manual_seed(4)
        assert torch.allclose(naive.next_actions(obs), choice, atol=1e-5)
    parts = [naive.base_policy, naive.target_base_policy, naive.edit_policy, naive.critic, naive.target_critic]
    before = [[p.clone() for p in part.parameters()] for part in parts]
    assert set(naive.update(batch)) == {"critic", "base", *(["edit"] if edits else [])}
    for part, old in zip(parts, before, strict=True):
        assert (part is naive.edit_policy and not edits) or any(
            not torch.equal(p, q) for p, q in zip(part.parameters(), old, strict=True)
        )


def test_traffic_counts_what_operations_read_and_write():
    x, w = torch.randn(6, 4), torch.randn(4, 8)
    assert throughput.traffic(lambda: x @ w) == 4 * (24 + 32 + 48)
    assert throughput.traffic(lambda: x.T.contiguous()[0]) == 4 * (24 + 24)  # the copy; views move nothing
    assert throughput.traffic(lambda: x[:1].expand(1000, 4) + 1) == 4 * (24 + 4000)  # lies in memory once
    assert throughput.traffic(lambda: x.add_(1)) == 4 * (24 + 24)
    lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
    assert throughput.traffic(lambda: lerp([x], [x + 1], 0.5)) == 4 * (24 + 24) + 4 * (24 + 24 + 24)  # returns nothing
    assert throughput.traffic(lambda: w.index_select(0, torch.zeros(1, dtype=torch.long))) == 8 + 8 + 2 * 32
    calls = {"chain": 5.0, "edits": 1.0, "ranking": 2.0, "critic": 7.0, "base": 3.0}
    parts = throughput.per_environment_step({**calls, "edit": 4}, 10)
    assert parts == {"chain": 5, "edits": 1, "ranking": 20, "critic": 50, "base": 3, "edit": 4}
    parts = throughput.per_environment_step(calls, 1)
    assert parts["edits"] == parts["edit"] == 0  # best of N without edits


def test_roofline(tmp_path: Path):
    found = {"limits": {"float32": 1e11, "copy": 1e10}, "threads": 2, "update_s": 0.5}
    found |= {"parts_s": {"chain": 0.4, "edit": 0.0}, "parts_flop": {"chain": 2e9, "edit": 0.0}}
    found |= {"parts_bytes": {"chain": 1e8, "edit": 0.0}}
    assert roofline.points(found) == {"chain": (20.0, 5e9, 0.8)}  # a part that is not there has no point
    (tmp_path / "a.json").write_text(json.dumps(found))
    roofline.main((tmp_path / "a.json", tmp_path / "a.json"), tmp_path / "new" / "roof.png")
    assert (tmp_path / "new" / "roof.png").read_bytes().startswith(b"\x89PNG")
    for text, words in (("{}", "has no 'limits'"), ("[1", "cannot be read"), ("3", "cannot be read")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=words):
            roofline.read(tmp_path / "bad.json")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmark/throughput.py", "--repeats", "1", "--rows", "100", *TINY.split(), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_throughput_prints_and_writes(tmp_path: Path):
    done = run("--ladder", "--profile", "--json", str(tmp_path / "out.json"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["update_s"] == json.loads(done.stdout.splitlines()[-1])["update_s"] > 0
    assert found["naive_s"] > 0 and found["action_s"] > 0 and set(found["parts_s"]) == set(throughput.PARTS)
    assert all(f"| {part} |" in done.stdout for part in throughput.PARTS) and "naive update" in done.stdout
    assert min(found["limits"].values()) > 0 and min(found["parts_bytes"].values()) > 0
    assert found["block_flops"] > 0 and found["action_products_s"] > 0
    assert "--json" not in found["command"] and "--ladder" in found["command"]
    profile = found["operations"]
    assert sum(op["share"] for op in profile.values()) == pytest.approx(1)
    # Two critic updates, and one each of base policy, edit policy and temperature.
    assert profile["Optimizer.step#Adam.step"]["calls"] == 4 and profile["Optimizer.step#AdamW.step"]["calls"] == 1
    assert "| aten::addmm |" in done.stdout and re.search(r"^\| \d+ others \| ", done.stdout, re.M)
    assert [f"+ {step}" for step in STEPS] == list(found["ladder_s"]) and "| + drawn critics only |" in done.stdout


def test_throughput_against_another_command_and_bad_input():
    other = f"{sys.executable} -c \"print('noise'); print('{{\\\"update_s\\\": 1000}}')\""
    done = run("--against", other)
    assert done.returncode == 0 and "theirs 1000.0000 s per environment step: 0.000 of it" in done.stdout, done.stderr
    done = run("--against", "echo nothing")
    assert done.returncode == 1 and "printed no JSON with update_s last" in done.stderr
    done = run("--batch-size", "0")
    assert done.returncode == 2 and "--batch-size 0 must be at least 2" in done.stderr


def test_soak_tells_steady_from_unsteady(tmp_path: Path):
    def looks(memory=0, files=0.0, slower=0.0):
        return [
            soak.Look(10.0 * i, 9.0 * i, int(100 * i - slower * i**2), int(5e8 + memory * i), int(20 + files * i))
            for i in range(60)
        ]

    rows = soak.sixths(looks())
    assert len(rows) == 6 and soak.problems(rows) == []
    assert rows[2]["steps_per_s"] == pytest.approx(10) and rows[2]["steps_per_cpu_s"] == pytest.approx(100 / 9)
    assert rows[-1]["memory_mb"] == pytest.approx(500) and rows[-1]["step"] == 5900
    assert "memory grew" in soak.problems(soak.sixths(looks(memory=10**6)))[0]
    assert "open files grew" in soak.problems(soak.sixths(looks(files=0.1)))[0]
    assert "steps per CPU second fell" in soak.problems(soak.sixths(looks(slower=0.3)))[0]


# --------------------------------------------------------------------------------------------------- over-estimation


def test_discounted_returns_leave_out_what_is_not_complete():
    rewards, gamma = np.array([1.0, 2.0, 3.0, 4.0]), 0.5
    expected = [1 + 1 + 0.75 + 0.5, 2 + 1.5 + 1, 3 + 2, 4]
    assert overestimation.discounted_returns(rewards, gamma, terminated=True).tolist() == expected
    # Cut by time: of four rewards even the first return misses .5^4 = .0625; of six, the first two miss less than .05.
    assert len(overestimation.discounted_returns(rewards, gamma, terminated=False)) == 0
    assert overestimation.discounted_returns(np.ones(6), gamma, terminated=False) == pytest.approx([63 / 32, 31 / 16])


class Corridor(gym.Env):
    """Ten steps to the goal, one per action; reward 1 there."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, **kwargs):
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(3, self.t / 10, np.float32), float(self.t == 10), self.t == 10, False, {}


def test_overestimation_is_q_less_the_scaled_return(script, monkeypatch):
    agent = make_agent(script, gamma=0.9, reward_scale=5.0, reward_shift=-1.0, eval_episodes=3)
    qs = torch.tensor([1.0, 3.0])
    monkeypatch.setattr(agent.critic, "forward", lambda obs, actions: qs[:, None] + 10 * obs[:, 0])
    envs = [overestimation.Recorder(Corridor()) for _ in range(2)]
    found = overestimation.overestimation(agent, agent.on_the_fly_actions, envs, agent.args, 0)
    returns = [sum(-(0.9**i) for i in range(n)) + 5 * 0.9 ** (n - 1) for n in range(1, 11)]
    assert found["value/q"] == pytest.approx(2 + 4.5) and found["value/return"] == pytest.approx(np.mean(returns))
    assert found["value/overestimation"] == pytest.approx(found["value/q"] - found["value/return"])
    assert sum(len(env.episodes) for env in envs) == 3


@pytest.mark.parametrize("name", ["expo_diffusion", "baselines.rlpd"])
def test_measuring_changes_nothing_of_the_training(name, tmp_path):
    script = importlib.import_module(name)
    rows = []
    for place in ("alone", "measured"):
        flags = {"total_timesteps": 6, "offline_steps": 2, "eval_every": 3, "log_every": 2, "gamma": 0.5}
        args = tiny_run_args(script, tmp_path / place, **flags)
        with pytest.MonkeyPatch.context() as patch:
            if place == "measured":
                patch.setattr(script, "Evaluation", overestimation.MeasuringEvaluation)
            script.main(args)
        with open(tmp_path / place / "metrics.csv") as file:
            rows.append(list(csv.DictReader(file)))
    columns = [key for key in rows[0][0] if key != "seconds"]
    assert [[row[key] for key in columns] for row in rows[0]] == [[row[key] for key in columns] for row in rows[1]]
    evaluations = [row for row in rows[1] if row["eval/return"]]
    assert len(evaluations) == 3
    for row in evaluations:
        gap = float(row["value/q"]) - float(row["value/return"])
        assert float(row["value/overestimation"]) == pytest.approx(gap, abs=1e-5)
