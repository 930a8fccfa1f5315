"""The programs around the scripts measure and change what they say, and leave the training alone."""

import importlib
import json
import sys

import numpy as np
import torch
from conftest import make_agent, tiny_run_args

from benchmark import ablation, overestimation, throughput


def test_throughput_measures_parts_sides_and_differences(tmp_path, monkeypatch, capsys):
    def measured(*words: str) -> dict:
        small = "--task pointmaze-umaze --hidden-dim 8 --batch-size 8 --utd-ratio 2 --repeats 1"
        monkeypatch.setattr(sys, "argv", ["throughput.py", *small.split(), "--json", str(tmp_path / "a.json"), *words])
        throughput.main()
        return json.loads((tmp_path / "a.json").read_text())

    found = measured("--naive")
    assert min(found["update_s"], found["action_s"], *found["parts_s"].values()) > 0 and len(found["parts_s"]) == 6
    assert "| chain |" in (out := capsys.readouterr().out) and "| naive |" in out
    found = measured("--differences", "--rows", "expo_flow", "expo_flow --num-target-samples 4")  # the same number
    assert found["differences"] == {"losses": 0, "gradients": 0} and len(set(found["gflop"].values())) == 1
    rows = ["expo_flow --utd-ratio 4", "expo_flow --utd-ratio 4 --num-target-samples 1"]
    found = measured("--differences", "--rows", *rows, "variants.expo_faster", "baselines.rlpd")
    assert found["differences"]["gradients"] > 1e-3 and min(found["update_s"], found["action_s"]) > 0
    whole, fewer, faster, rlpd = found["gflop"].values()
    assert whole > fewer > faster > rlpd > 0 and "| baselines.rlpd |" in capsys.readouterr().out
    (tmp_path / "benchmark").mkdir()  # of another checkout
    text = "import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write('{\"update_s\": 1e4, \"action_s\": 1}')"
    (tmp_path / "benchmark" / "throughput.py").write_text(text)
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    assert measured("--against", str(tmp_path))["seconds"]["update there"] == [1e4]


def test_changes_leave_one_candidate_and_ask_the_online_base_policy(script, monkeypatch):
    monkeypatch.setattr(script, "next_candidates", script.next_candidates)  # puts it back at the end
    for name in ("with_edits", "base_actions"):
        monkeypatch.setattr(script.Agent, name, getattr(script.Agent, name))
    for change in (ablation.acting_only, ablation.edit_without_choice, ablation.online_base):
        change(script)
    agent = make_agent(script)
    agent.target_base_policy.sample = None
    assert agent.with_edits(torch.randn(5, 3), torch.zeros(5, 4, 2)).abs().min() > 0  # an edit, not a base action
    assert script.next_candidates(agent, torch.randn(2, 5, 3)).shape == (2, 5, 1, 2)
    assert agent(torch.randn(5, 3)).shape == (5, 2)


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
    monkeypatch.setattr(script, "evaluate", script.evaluate)  # puts it back at the end
    for change in (lambda script: None, overestimation.overestimation):
        change(script)
        folder = tmp_path / str(len(rows))
        script.main(tiny_run_args(script, folder, total_timesteps=6, eval_every=3, gamma=0.5))
        rows.append([line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()])
    kept = [[(step, key, value) for step, _, key, value in run if not key.startswith("value/")] for run in rows]
    assert kept[0] == kept[1] and len(rows[1]) == len(kept[1]) + 3 * 3
