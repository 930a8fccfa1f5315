"""The programs around the scripts measure and change what they say, and leave the training alone."""

import importlib
import inspect
import json
import runpy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_agent, make_args, make_batch
from running import small_args

from benchmark import ablation, overestimation, throughput
from utils import InputError


def test_throughput_measures_rows(tmp_path, monkeypatch, capsys):
    def measured(*words: str) -> dict:
        small = "--task pointmaze-umaze --hidden-dim 8 --batch-size 8 --utd-ratio 2 --repeats 1"
        monkeypatch.setattr(sys, "argv", ["throughput.py", *small.split(), "--json", str(tmp_path / "a.json"), *words])
        throughput.main()
        return json.loads((tmp_path / "a.json").read_text())

    found = measured()
    assert min(map(min, found["seconds"].values())) > 0 and "| expo_diffusion |" in capsys.readouterr().out
    found = measured("--rows", "expo_flow", "expo_flow --num-target-samples 4")  # the same number
    assert len(set(found["gflop"].values())) == 1
    rows = ["expo_flow --utd-ratio 4", "expo_flow --utd-ratio 4 --num-target-samples 1"]
    found = measured("--rows", *rows, "variants.expo_faster", "baselines.rlpd", "variants.expo_chunks")
    assert min(map(min, found["seconds"].values())) > 0
    whole, fewer, faster, rlpd, _ = found["gflop"].values()
    assert whole > fewer > faster > rlpd > 0 and "| baselines.rlpd |" in capsys.readouterr().out


def test_throughput_compiles_what_a_run_compiles(each, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: seen.append(function.__name__) or function)
    monkeypatch.setattr("utils.tasks.check_flags", lambda _: None)  # whether there is a compiler
    side = throughput.Side(each.__name__, ["--task", "pointmaze-umaze", "--compile"], 100)
    source = inspect.getsource(each.main).partition("if args.compile")[2].partition("setattr")[0]
    assert len(seen) >= 4 and all(f'"{name}"' in source for name in seen) and source.count('"') == 2 * len(seen)
    assert type(side.agent).forward.__name__ in seen  # which is measured as the choice of an action


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        (
            "ablation",
            "--change gaussian_base --script baselines.rlpd",
            "is for --script expo_diffusion or expo_flow or",
        ),
        (
            "ablation",
            "--change imitate_half --script expo_flow",
            "--change imitate_half is for --script baselines.rlpd",
        ),
        ("overestimation", "--script expo_flo", "No module named 'expo_flo'"),
    ],
)
def test_a_change_that_does_not_fit_is_one_line(program, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *words.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "benchmark" / f"{program}.py"), run_name="__main__")
    line = capsys.readouterr().err
    assert line.startswith("error: ") and said in line and line.count("\n") == 1


def test_a_graph_without_a_gpu_is_one_clear_error():
    with pytest.raises(InputError, match="needs a GPU; run the script itself"):
        throughput.Side("cuda_graph expo_flow", ["--task", "pointmaze-umaze"]).update()


@pytest.fixture
def changed(monkeypatch):
    """changed(name, *changes): a fresh import of a script with the changes made; the others' import stays as it is."""

    def fresh(name: str, *changes: str) -> Any:
        monkeypatch.setitem(sys.modules, name, None)  # puts the old one back at the end
        del sys.modules[name]
        script = importlib.import_module(name)
        for change in changes:
            getattr(ablation, change)(script)
        return script

    return fresh


def test_changes_leave_one_candidate(changed):
    script = changed("expo_flow", "acting_only", "edit_without_choice")
    agent = make_agent(script)
    assert agent.with_edits(torch.randn(5, 3), torch.zeros(5, 4, 2)).abs().min() > 0  # an edit, not a base action
    assert script.next_candidates(agent, torch.randn(2, 5, 3)).shape == (2, 5, 1, 2)
    assert agent(torch.randn(5, 3)).shape == (5, 2)


def test_former_starts_are_those_of_evaluations_alone(changed):
    seed = changed("expo_flow").episode_seed(3, 0, 9)
    script = changed("expo_flow", "former_starts")
    assert [script.episode_seed(3, 1, i) for i in (0, 9)] == [1_000_003, 1_000_012]
    assert script.episode_seed(3, 0, 9) == seed


@pytest.mark.parametrize("change, updates", [("imitate_first", 4), ("imitate_half", 2)])
def test_rlpd_imitates_in_the_offline_updates(change, updates, changed):
    script = changed("baselines.rlpd", change)
    agent, batch = make_agent(script, offline_steps=4), make_batch(script, 1, 6)
    optimizers, alpha = script.Optimizers(agent, agent.args), agent.log_alpha.item()
    mean, log_std = agent.actor.gaussian(batch.obs[0])
    z = (batch.actions[0] - mean.tanh()) / log_std.exp()
    likelihood = (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1).mean()
    for update in range(updates):
        assert agent.log_alpha.item() == alpha
        loss = script.update(agent, optimizers, batch)["losses/imitation"]
        assert update or torch.isclose(loss, -likelihood)
    assert "losses/actor" in script.update(agent, optimizers, batch) and agent.log_alpha.item() != alpha


def test_a_gaussian_base_policy_imitates(changed):
    """It learns mean and noise of the actions, and clips its samples."""
    script = changed("expo_diffusion", "gaussian_base")
    agent = script.Agent(1, 2, make_args(script, base_lr=1e-2, ema_rate=0.1))
    optimizers, means = script.Optimizers(agent, agent.args), torch.tensor([0.4, 1.0])
    for _ in range(300):
        obs = torch.randint(2, (64, 1)) * 2.0 - 1
        actions = (obs * means + 0.1 * torch.randn(64, 2)).clamp(-1, 1)
        script.update_base_policy(agent, optimizers, obs, actions)
    samples = agent.target_base_policy.sample(-torch.ones(2000, 1))
    assert samples.shape == (2000, 2) and samples.min() == -1 and not samples.requires_grad
    assert samples.mean(0).tolist() == pytest.approx([-0.4, -0.95], abs=0.05)
    assert samples[:, 0].std().item() == pytest.approx(0.1, abs=0.03)


def test_cures_rank_and_value_as_they_say(changed):
    obs, candidates = torch.randn(5, 3), torch.randn(5, 4, 2)
    pairs = obs[:, None].expand(5, 4, 3), candidates
    agent = make_agent(changed("expo_diffusion", "online_mean"), num_critics=4)
    assert torch.allclose(agent.rank(obs, candidates), agent.critic(*pairs).mean(0))
    agent = make_agent(changed("expo_diffusion", "lower_bound"), num_critics=4)
    q = agent.target_critic(*pairs)
    assert torch.allclose(agent.rank(obs, candidates), q.mean(0) - q.std(0) / 2)
    agent, asked = make_agent(changed("expo_diffusion", "other_heads"), num_critics=4), []
    agent.target_critic.forward = lambda obs, actions, heads: asked.append(heads) or torch.zeros(2, *actions.shape[:-1])
    for _ in range(9):
        agent.td_target(make_batch(sys.modules["expo_diffusion"], 5), candidates)
    assert {int(head) for heads in asked[::2] for head in heads} == {2, 3}  # they rank
    assert {int(head) for heads in asked[1::2] for head in heads} == {0, 1}  # they value


def test_cures_change_how_edits_begin(changed):
    script = changed("expo_diffusion", "small_first_edits", "fresh_actions", "base_acts_first")
    agent = script.Agent(3, 2, make_args(script, num_base_samples=2, num_edit_samples=2, offline_steps=1, utd_ratio=1))
    agent.args.total_timesteps, obs, batch = 10, torch.randn(5, 3), make_batch(script, 1, 5)
    assert agent.log_alpha.exp().item() == pytest.approx(0.01, rel=0.01)
    x, edits = torch.randn(8, 16), agent.edit_policy
    assert not edits.mean(x).any() and (edits.log_std(x) == -3).all()
    seen, sampled = [], torch.full((5, 1, 2), 0.5)
    agent.base_actions, edit = (lambda obs, policy, num: sampled[: len(obs)].expand(-1, num, -1)), agent.edit_policy
    edit.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    agent.edit_policy_loss(script.Batch(*(field[0] for field in batch)))
    assert (seen[0] == 0.5).all()  # a sample of the base policy, not an action of the batch
    agent.with_edits = lambda obs, base_actions: base_actions + 1
    optimizers = script.Optimizers(agent, agent.args)
    acts = []
    for _ in range(5):  # the first update is offline; a quarter of ten environment steps is two
        acts.append(tuple(agent.on_the_fly_actions(part).mean().item() for part in (obs[:1], obs)))
        script.update(agent, optimizers, batch)
    assert acts == [(0.5, 1.5)] * 4 + [(1.5, 1.5)]
    script.Optimizers(agent, agent.args).critic.load_state_dict(optimizers.critic.state_dict())  # a resumed run
    assert agent.on_the_fly_actions(obs[:1]).mean().item() == 1.5


def test_overestimation_is_q_less_the_discounted_return(tmp_path, monkeypatch):
    script = importlib.import_module("baselines.rlpd")
    # Cut by time: of six rewards the first two returns lack less than .05 of their weights.
    assert overestimation.discounted_returns(np.ones(6), 0.5, False).tolist() == [63 / 32, 31 / 16]
    agent = make_agent(script, gamma=0.5, reward_scale=5.0, reward_shift=-1.0)
    agent.critic.forward = lambda obs, actions: torch.tensor([[1.0], [3.0]]) + 10 * obs[:, 0]
    episode = [(np.full(3, t), np.zeros(2), float(t == 1), t == 1) for t in range(2)]
    rows = overestimation.value_rows(agent, [episode, [(np.ones(3), np.ones(2), 1.0, False)]], agent.args)
    assert rows == {"value/q": 7, "value/return": (1 + 4) / 2, "value/overestimation": 4.5}
    # Measuring changes nothing of the training.
    rows = []
    for name in ("evaluate", "Agent"):
        monkeypatch.setattr(script, name, getattr(script, name))  # puts it back at the end
    for change in (lambda script: None, overestimation.overestimation):
        change(script)
        folder = tmp_path / str(len(rows))
        script.main(small_args(script, folder, total_timesteps=6, eval_every=3, gamma=0.5))
        rows.append([line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()])
    kept = [[(step, key, value) for step, _, key, value in run if not key.startswith("value/")] for run in rows]
    assert kept[0] == kept[1] and len(rows[1]) == len(kept[1]) + 3 * 3
    with pytest.raises(InputError, match="its critics judge chunks"):
        overestimation.overestimation(importlib.import_module("variants.expo_chunks"))
