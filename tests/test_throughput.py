"""The programs around the scripts measure and change what they say, and leave the training alone."""

import csv
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_agent, make_args, make_batch, tiny_run_args

from benchmark import ablation, overestimation, throughput
from benchmark.naive import NaiveExpo

SMALL = "--task pointmaze-umaze --hidden-dim 8 --base-hidden-dim 8 --batch-size 8 --utd-ratio 2 --repeats 2".split()


def measured(monkeypatch, file: Path, *words: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["throughput.py", *SMALL, "--json", str(file), *words])
    throughput.main()
    return json.loads(file.read_text())


def test_throughput_measures_parts_sides_and_differences(tmp_path, monkeypatch, capsys):
    found = measured(monkeypatch, tmp_path / "a.json", "--naive")
    assert list(found["parts_s"]) == ["chain", "edits", "ranking", "base", "edit", "critic"]
    assert all(value > 0 for value in [found["update_s"], found["action_s"], *found["parts_s"].values()])
    assert "| **update** |" in (out := capsys.readouterr().out) and "the obvious way" in out
    found = measured(monkeypatch, tmp_path / "b.json", "--differences", "--against-flags", "--num-target-samples 4")
    assert found["differences"] == {"losses": 0, "gradients": 0} and len(found["seconds"]["action there"]) == 2
    found = measured(monkeypatch, tmp_path / "b.json", "--differences", "--against-flags", "--num-target-samples 1")
    assert found["differences"]["gradients"] > 1e-3
    program = tmp_path / "benchmark" / "throughput.py"  # of another checkout
    program.parent.mkdir()
    text = "import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write('{\"update_s\": 1e4, \"action_s\": 1}')"
    program.write_text(text)
    assert (
        measured(monkeypatch, tmp_path / "c.json", "--against", str(tmp_path))["seconds"]["update there"] == [1e4] * 2
    )
    assert "here / there 0.000" in capsys.readouterr().out


def test_the_naive_update_asks_for_the_lowest_q_and_trains_everything(script):
    naive = NaiveExpo(script, 3, 2, args := make_args(script, num_min_critics=5, utd_ratio=2), torch.device("cpu"))
    obs, actions = torch.randn(7, 3), torch.randn(7, 2)
    qs = torch.stack([critic(torch.cat([obs, actions], 1))[:, 0] for critic in naive.target_critic])
    torch.testing.assert_close(naive.minimum(obs, actions), qs.amin(0))
    assert naive.best_actions(obs, naive.base_policy).shape == (7, 2)
    parts = [naive.base_policy, naive.edit_policy, naive.critic, naive.target_critic, naive.target_base_policy]
    before = [next(part.parameters()).clone() for part in parts]
    assert np.isfinite(list(naive.update(make_batch(script, args.utd_ratio, 8)).values())).all()
    assert not any(torch.equal(next(part.parameters()), old) for part, old in zip(parts, before, strict=True))


def test_changes_change_what_they_say():
    def fresh(change):
        spec = importlib.util.find_spec("expo_diffusion")
        module = importlib.util.module_from_spec(spec)
        sys.modules["changed"] = module
        spec.loader.exec_module(module)
        change(module)
        return module, make_agent(module)

    obs = torch.randn(2, 5, 3)
    for change, shape in ((ablation.acting_only, (2, 5, 1, 2)), (ablation.edit_without_choice, (2, 5, 1, 2))):
        module, agent = fresh(change)
        assert module.next_candidates(agent, obs).shape == shape
    assert agent.with_edits(obs, torch.zeros(2, 5, 4, 2)).abs().max() > 0  # an edit, not a base action
    module, agent = fresh(ablation.online_base)
    agent.target_base_policy.sample = None  # is not asked
    assert agent(obs).shape == (2, 5, 2)
    assert type(fresh(ablation.flow_base)[1].base_policy) is importlib.import_module("expo_flow").BasePolicy


def test_discounted_returns_and_q_of_visited_pairs(script):
    assert overestimation.discounted_returns(np.array([1.0, 2, 4]), 0.5, True).tolist() == [3, 4, 4]
    # Cut by time: of six rewards the first two returns lack less than .05 of their weights.
    assert overestimation.discounted_returns(np.ones(6), 0.5, False).tolist() == [63 / 32, 31 / 16]
    agent = make_agent(script, gamma=0.5, reward_scale=5.0, reward_shift=-1.0)
    agent.critic.forward = lambda obs, actions: torch.tensor([[1.0], [3.0]]) + 10 * obs[:, 0]
    episode = [(np.full(3, t), np.zeros(2), float(t == 1), t == 1) for t in range(2)]
    rows = overestimation.value_rows(agent, [episode, [(np.ones(3), np.ones(2), 1.0, False)]], agent.args)
    assert rows == {"value/q": 7, "value/return": (1 + 4) / 2, "value/overestimation": 4.5}


@pytest.mark.parametrize("name", ["expo_diffusion", "baselines.rlpd"])
def test_measuring_overestimation_changes_nothing_of_the_training(name, tmp_path, monkeypatch):
    script, rows = importlib.import_module(name), []
    for place in ("alone", "measured"):
        if place == "measured":
            monkeypatch.setattr(script, "evaluate", script.evaluate)  # puts it back at the end
            overestimation.overestimation(script)
        flags = {"total_timesteps": 6, "offline_steps": 2, "eval_every": 3, "log_every": 2, "gamma": 0.5}
        script.main(tiny_run_args(script, tmp_path / place, **flags))
        with open(tmp_path / place / "metrics.csv") as file:
            rows.append([(row["step"], row["key"], row["value"]) for row in csv.DictReader(file)])
    values = [row for row in rows[1] if row[1].startswith("value/")]
    assert [row for row in rows[1] if row not in values] == rows[0] and len(values) == 3 * 3
