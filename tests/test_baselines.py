"""The baselines: what they share with EXPO, their losses against slower cases, their choice of actions, a short run."""

import ast
import csv
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from baselines import diffusion_ql, idql, rlpd
from utils.buffer import Batch
from utils.evaluate import load_agent

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"rlpd": rlpd, "idql": idql, "diffusion_ql": diffusion_ql}
OBS_DIM, ACTION_DIM, GAMMA = 5, 2, 0.9
TINY = {
    "gamma": GAMMA,
    "hidden_dim": 16,
    "hidden_layers": 2,
    "num_critics": 3,
    "base_hidden_dim": 16,
    "base_blocks": 1,
    "base_expansion": 2,
    "denoising_steps": 4,
    "num_action_samples": 6,
}


def make_agent(module, **flags):
    """A tiny agent with three critics; by default the minimum is over all three, so that nothing in it is random."""
    torch.manual_seed(0)
    flags = {"num_min_critics": 3, **TINY, **flags}
    known = {field.name for field in dataclasses.fields(module.Args)}
    args = module.Args(**{key: value for key, value in flags.items() if key in known})
    agent = module.Agent(OBS_DIM, ACTION_DIM, args)
    for parameter in agent.target_critic.parameters():  # so that the online and the target critic differ
        parameter.data += 0.05 * torch.randn_like(parameter)
    return agent


def make_batch(*shape):
    """Random transitions with the leading `shape`; about a third are terminal."""
    torch.manual_seed(1)
    return Batch(
        torch.randn(*shape, OBS_DIM),
        torch.rand(*shape, ACTION_DIM) * 2 - 1,
        torch.randn(*shape),
        torch.randn(*shape, OBS_DIM),
        (torch.rand(*shape) < 0.3).float(),
        torch.zeros(*shape, 0, ACTION_DIM),
    )


def snapshot(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def unchanged(module, before):
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))


# -------------------------------------------------------------------------------------------------------- sources


def definitions(path):
    """Name -> source of every function and class at module level, decorators included."""
    source = path.read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return found


def test_definitions_of_one_name_are_byte_identical():
    paths = [ROOT / "expo_diffusion.py", *(ROOT / "baselines" / f"{name}.py" for name in MODULES)]
    sources = [definitions(path) for path in paths]
    shared = set(sources[0]) & set(sources[2])
    assert {"BasePolicy", "DenoisingNetwork", "Critic", "EnsembleLinear", "take", "draw_batch"} <= shared
    for i, one in enumerate(sources):
        for j in range(i):
            for name in (set(one) & set(sources[j])) - {"Args", "Agent", "main"}:
                assert one[name] == sources[j][name], f"{name} differs between {paths[i].name} and {paths[j].name}"


@pytest.mark.parametrize("name", MODULES)
def test_file_keeps_the_limits_of_the_scripts(name):
    lines = (ROOT / "baselines" / f"{name}.py").read_text().splitlines()
    assert len(lines) < 550 and max(map(len, lines)) <= 120
    for function, source in definitions(ROOT / "baselines" / f"{name}.py").items():
        assert function in ("main", "Args") or source.count("\n") < 50 or source.startswith("class"), function


@pytest.mark.parametrize("name", MODULES)
def test_agent_acts_on_any_leading_shape_without_gradient(name):
    agent = make_agent(MODULES[name])
    for shape in ((), (7,), (2, 3)):
        actions = agent(torch.randn(*shape, OBS_DIM))
        assert actions.shape == (*shape, ACTION_DIM) and not actions.requires_grad
        assert actions.abs().max() <= 1


# ----------------------------------------------------------------------------------------------------------- RLPD


@pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (1.5, -0.5), (-0.7, 0.8)])
def test_rlpd_density_of_the_tanh_gaussian_integrates_to_one(monkeypatch, mean, log_std):
    agent = make_agent(rlpd)
    noise = torch.linspace(-9, 9, 20_001, dtype=torch.float64).unsqueeze(-1)
    monkeypatch.setattr(
        agent.actor, "gaussian", lambda obs: (torch.full_like(obs, mean), torch.full_like(obs, log_std))
    )
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    actions, log_prob = agent.actor(torch.zeros_like(noise))
    assert torch.trapezoid(log_prob.exp(), actions.squeeze(-1)).item() == pytest.approx(1, abs=1e-4)
    u = mean + math.exp(log_std) * noise.squeeze(-1)
    gaussian = torch.distributions.Normal(mean, math.exp(log_std)).log_prob(u)
    slow = gaussian - torch.log(1 - torch.tanh(u) ** 2)
    inside = u.abs() < 6  # beyond that, 1 - tanh^2 itself runs out of digits
    torch.testing.assert_close(log_prob[inside], slow[inside], atol=1e-6, rtol=1e-6)


def test_rlpd_density_sums_over_dimensions():
    agent, obs = make_agent(rlpd).double(), torch.randn(50, OBS_DIM, dtype=torch.float64)
    actions, log_prob = agent.actor(obs)
    mean, log_std = agent.actor.gaussian(obs)
    u = torch.atanh(actions)
    slow = torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - torch.log(1 - actions**2)
    torch.testing.assert_close(log_prob, slow.sum(-1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backup_entropy", [False, True])
def test_rlpd_target_row_by_row(backup_entropy):
    agent, batch = make_agent(rlpd, backup_entropy=backup_entropy, init_alpha=0.3), make_batch(12)
    torch.manual_seed(5)
    target_q = rlpd.soft_td_target(agent, batch)
    torch.manual_seed(5)
    next_actions, log_prob = agent.actor(batch.next_obs)
    assert not target_q.requires_grad and 0 < batch.terminations.sum() < 12
    for row in range(12):
        expected = batch.rewards[row].item()
        if not batch.terminations[row]:
            heads = agent.target_critic(batch.next_obs[row : row + 1], next_actions[row : row + 1])
            next_q = min(head.item() for head in heads)
            expected += GAMMA * (next_q - (0.3 * log_prob[row].item() if backup_entropy else 0))
        assert target_q[row].item() == pytest.approx(expected, abs=1e-5)


def test_rlpd_target_takes_the_minimum_over_a_random_pair():
    agent, batch = make_agent(rlpd, num_min_critics=2), make_batch(1)._replace(terminations=torch.zeros(1))
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        target_q = rlpd.soft_td_target(agent, batch).item()
        torch.manual_seed(seed)
        qs = agent.target_critic(batch.next_obs, agent.actor(batch.next_obs)[0]).squeeze(-1).tolist()
        pairs = [batch.rewards.item() + GAMMA * min(qs[i], qs[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        matches = [k for k, value in enumerate(pairs) if abs(value - target_q) < 1e-5]
        assert matches
        seen.update(matches)
    assert len(seen) == 3


def test_rlpd_actor_step_moves_the_actor_alone():
    agent, batch = make_agent(rlpd), make_batch(16)
    optimizers = rlpd.make_sac_optimizers(agent, agent.args)
    actor, critic, target = snapshot(agent.actor), snapshot(agent.critic), snapshot(agent.target_critic)
    loss, _ = rlpd.actor_loss(agent, batch)
    rlpd.gradient_step(optimizers.actor, loss)
    assert not unchanged(agent.actor, actor)
    assert unchanged(agent.critic, critic) and unchanged(agent.target_critic, target)
    assert all(parameter.grad is None for parameter in agent.critic.parameters())


def test_rlpd_actor_loss_is_sacs():
    agent, batch = make_agent(rlpd, init_alpha=0.3), make_batch(16)
    torch.manual_seed(3)
    loss, info = rlpd.actor_loss(agent, batch)
    torch.manual_seed(3)
    actions, log_prob = agent.actor(batch.obs)
    qs = agent.critic(batch.obs, actions)
    slow = sum(0.3 * log_prob[b].item() - sum(qs[e, b].item() for e in range(3)) / 3 for b in range(16)) / 16
    assert loss.item() == pytest.approx(slow, abs=1e-5)
    alpha_loss = rlpd.alpha_loss(agent, info["actor/entropy"]).item()
    assert alpha_loss == pytest.approx(0.3 * (-log_prob.mean().item() + ACTION_DIM / 2), abs=1e-5)
    assert info["actor/entropy"].item() == pytest.approx(-log_prob.mean().item(), abs=1e-5)


@pytest.mark.parametrize("log_std, rises", [(-4.0, True), (0.0, False)])
def test_rlpd_temperature_rises_where_the_entropy_is_too_low(monkeypatch, log_std, rises):
    agent, batch = make_agent(rlpd), make_batch(64)
    optimizers = rlpd.make_sac_optimizers(agent, agent.args)
    shape = (64, ACTION_DIM)
    monkeypatch.setattr(agent.actor, "gaussian", lambda _: (torch.zeros(shape), torch.full(shape, log_std)))
    entropy = rlpd.actor_loss(agent, batch)[1]["actor/entropy"]
    rlpd.gradient_step(optimizers.alpha, rlpd.alpha_loss(agent, entropy))
    assert (agent.log_alpha.item() > 0) == rises


def test_rlpd_evaluates_the_mode_and_trains_with_samples():
    agent, obs = make_agent(rlpd), torch.randn(4, OBS_DIM)
    assert torch.equal(agent(obs), agent(obs))
    assert torch.equal(agent(obs), agent.actor.gaussian(obs)[0].tanh())
    assert not torch.equal(agent.sample_actions(obs), agent.sample_actions(obs))


# ----------------------------------------------------------------------------------------------------------- IDQL


def test_expectile_loss_by_hand():
    loss = idql.expectile_loss(torch.tensor([2.0, -1.0]), 0.9)
    assert loss.item() == pytest.approx((0.9 * 4 + 0.1 * 1) / 2)
    assert idql.expectile_loss(torch.tensor([2.0, -1.0]), 0.5).item() == pytest.approx(5 / 4)


@pytest.mark.parametrize("expectile, expected", [(0.5, 0.5), (0.9, 0.9), (0.7, 0.7)])
def test_expectile_of_a_fair_coin(expectile, expected):
    q = torch.tensor([0.0, 1.0])  # balance: expectile (1 - v) = (1 - expectile) v, so v = expectile
    grid = torch.linspace(0, 1, 1001)
    losses = torch.stack([idql.expectile_loss(q - v, expectile) for v in grid])
    assert grid[losses.argmin()].item() == pytest.approx(expected, abs=2e-3)


def test_idql_value_loss_row_by_row():
    agent, batch = make_agent(idql, expectile=0.8), make_batch(12)
    loss, _ = idql.value_loss(agent, batch)
    v, slow = agent.value(batch.obs), 0.0
    for row in range(12):
        q = min(head.item() for head in agent.target_critic(batch.obs[row : row + 1], batch.actions[row : row + 1]))
        difference = q - v[row].item()
        slow += (0.8 if difference > 0 else 0.2) * difference**2 / 12
    assert loss.item() == pytest.approx(slow, abs=1e-5)


def test_idql_critic_loss_of_terminal_and_ordinary_rows(monkeypatch):
    agent, batch = make_agent(idql), make_batch(2)
    batch = batch._replace(rewards=torch.tensor([1.0, -1.0]), terminations=torch.tensor([1.0, 0.0]))
    monkeypatch.setattr(agent.value, "forward", lambda obs: torch.full(obs.shape[:-1], 10.0))
    targets = [1.0, -1.0 + GAMMA * 10]  # terminal: the reward alone
    qs = agent.critic(batch.obs, batch.actions)
    slow = sum((qs[e, row].item() - targets[row]) ** 2 for e in range(3) for row in range(2)) / 6
    assert idql.iql_critic_loss(agent, batch)[0].item() == pytest.approx(slow, rel=1e-5)


def test_idql_losses_reach_only_their_own_networks():
    agent, batch = make_agent(idql), make_batch(8)
    idql.value_loss(agent, batch)[0].backward()
    assert all(parameter.grad is None for parameter in agent.critic.parameters())
    assert all(parameter.grad is None for parameter in agent.target_critic.parameters())
    assert all(parameter.grad is not None for parameter in agent.value.parameters())
    agent.zero_grad()
    idql.iql_critic_loss(agent, batch)[0].backward()
    assert all(parameter.grad is None for parameter in agent.value.parameters())
    assert all(parameter.grad is None for parameter in agent.base_policy.parameters())


def test_idql_takes_the_best_candidate():
    agent, obs = make_agent(idql), torch.randn(9, OBS_DIM)
    torch.manual_seed(4)
    actions = agent(obs)
    torch.manual_seed(4)
    candidates = agent.target_base_policy.sample(obs.unsqueeze(1).expand(9, 6, OBS_DIM))
    for row in range(9):
        qs = [agent.target_critic(obs[row : row + 1], candidates[row, n : n + 1]).min().item() for n in range(6)]
        assert torch.equal(actions[row], candidates[row, int(np.argmax(qs))])


def test_idql_expectile_selection_weighs_both_sides_of_v(monkeypatch):
    agent, rows = make_agent(idql, selection="expectile", expectile=0.9, num_action_samples=3), 20_000
    candidates = torch.tensor([[-1.0, 0.0], [0.5, 0.0], [1.0, 0.0]]).expand(rows, 3, 2)
    q = torch.tensor([-1.0, -2.0, 3.0]).expand(rows, 3)  # V is 0: one candidate is better, two are worse
    monkeypatch.setattr(agent, "candidates_and_q", lambda _: (candidates, q))
    monkeypatch.setattr(agent.value, "forward", lambda obs: torch.zeros(obs.shape[:-1]))
    actions = agent.training_actions(torch.zeros(rows, OBS_DIM))[:, 0]
    for value, weight in ((-1.0, 0.1), (0.5, 0.1), (1.0, 0.9)):
        assert (actions == value).float().mean().item() == pytest.approx(weight / 1.1, abs=0.02)


# --------------------------------------------------------------------------------------------------- Diffusion-QL


def test_dql_chain_with_gradient_is_the_same_chain():
    agent, obs = make_agent(diffusion_ql), torch.randn(32, OBS_DIM)
    torch.manual_seed(6)
    plain = agent.actor.sample(obs)
    torch.manual_seed(6)
    actions = agent.actor.sample_with_gradient(obs)
    assert torch.equal(plain, actions)
    assert actions.requires_grad and not plain.requires_grad


def test_dql_gradient_reaches_the_network_at_every_denoising_step():
    agent, outputs = make_agent(diffusion_ql), []
    agent.actor.network.register_forward_hook(lambda *call: call[2].retain_grad() or outputs.append(call[2]))
    agent.actor.sample_with_gradient(torch.randn(256, OBS_DIM)).sum().backward()
    assert len(outputs) == TINY["denoising_steps"]
    assert all(output.grad.abs().sum() > 0 for output in outputs)


def test_dql_gradient_through_the_chain_by_finite_differences():
    agent, obs = make_agent(diffusion_ql).double(), torch.randn(64, OBS_DIM, dtype=torch.float64)
    agent.actor.alpha_bars = agent.actor.alpha_bars.double()
    torch.set_default_dtype(torch.float64)
    try:
        bias = agent.actor.network.output.bias

        def mean_q() -> torch.Tensor:
            torch.manual_seed(7)
            return agent.critic(obs, agent.actor.sample_with_gradient(obs)).mean()

        (gradient,) = torch.autograd.grad(mean_q(), bias)
        for i in range(ACTION_DIM):
            values = []
            for sign in (1, -1):
                bias.data[i] += sign * 1e-6
                values.append(mean_q().item())
                bias.data[i] -= sign * 1e-6
            assert gradient[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3, abs=1e-7)
    finally:
        torch.set_default_dtype(torch.float32)


def test_dql_actor_loss_by_parts():
    agent, batch = make_agent(diffusion_ql, eta=2.0), make_batch(16)
    torch.manual_seed(8)
    loss, info = diffusion_ql.diffusion_actor_loss(agent, batch)
    torch.manual_seed(8)
    imitation = agent.actor.loss(batch.obs, batch.actions).item() / ACTION_DIM
    q = agent.critic(batch.obs, agent.actor.sample(batch.obs)).flatten().tolist()
    expected = imitation - 2 * (sum(q) / len(q)) / (sum(map(abs, q)) / len(q))
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert info["losses/imitation"].item() == pytest.approx(imitation, abs=1e-6)


def test_dql_q_term_is_free_of_the_scale_of_rewards():
    agent, batch = make_agent(diffusion_ql), make_batch(16)
    gradients = []
    for scale in (1, 100):
        agent.critic.output.weight.data *= scale
        torch.manual_seed(8)
        loss, _ = diffusion_ql.diffusion_actor_loss(agent, batch)
        gradients.append(torch.autograd.grad(loss, agent.actor.network.output.weight)[0])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_dql_actor_step_raises_q_and_leaves_the_critic():
    agent, batch = make_agent(diffusion_ql, eta=100.0, actor_lr=1e-3), make_batch(256)
    optimizers = diffusion_ql.make_dql_optimizers(agent, agent.args)
    critic, target = snapshot(agent.critic), snapshot(agent.target_critic)

    def mean_q() -> float:
        torch.manual_seed(9)
        return agent.critic(batch.obs, agent.actor.sample(batch.obs)).mean().item()

    before = mean_q()
    for _ in range(10):
        loss, _ = diffusion_ql.diffusion_actor_loss(agent, batch)
        diffusion_ql.clipped_gradient_step(optimizers.actor, loss, 5.0)
    assert mean_q() > before
    assert unchanged(agent.critic, critic) and unchanged(agent.target_critic, target)
    assert all(parameter.grad is None for parameter in agent.critic.parameters())


@pytest.mark.parametrize("max_q_backup, samples", [(False, 1), (True, 10)])
def test_dql_target_row_by_row(max_q_backup, samples):
    agent, batch = make_agent(diffusion_ql, max_q_backup=max_q_backup), make_batch(8)
    next_actions = diffusion_ql.next_action_samples(agent, batch.next_obs)
    assert next_actions.shape == (8, samples, ACTION_DIM)
    target_q = diffusion_ql.double_q_target(agent, batch, next_actions)
    for row in range(8):
        best = [-math.inf] * 3  # each head's own best of the samples, then the lowest head
        for action in next_actions[row]:
            q = agent.target_critic(batch.next_obs[row : row + 1], action.unsqueeze(0)).flatten().tolist()
            best = [max(pair) for pair in zip(best, q, strict=True)]
        expected = batch.rewards[row].item() + GAMMA * (1 - batch.terminations[row].item()) * min(best)
        assert target_q[row].item() == pytest.approx(expected, abs=1e-5)


def test_dql_draws_an_action_with_softmax_of_q(monkeypatch):
    agent, rows = make_agent(diffusion_ql, kappa=2.0, num_action_samples=2), 20_000
    candidates = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).expand(rows, 2, 2)
    q = torch.tensor([0.0, 0.5]).expand(rows, 2)
    monkeypatch.setattr(agent.actor, "sample", lambda _: candidates)
    monkeypatch.setattr(agent.target_critic, "random_min", lambda *_: q)
    share = (agent(torch.zeros(rows, OBS_DIM))[:, 0] == 1).float().mean().item()
    assert share == pytest.approx(math.e / (1 + math.e), abs=0.02)


def test_dql_cuts_the_gradient_to_its_norm():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    diffusion_ql.clipped_gradient_step(optimizer, (parameter * torch.tensor([30.0, 40.0])).sum(), 5.0)
    torch.testing.assert_close(parameter.data, torch.tensor([-3.0, -4.0]), atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------- whole updates


@pytest.mark.parametrize(
    "module, make, step",
    [
        (rlpd, rlpd.make_sac_optimizers, rlpd.sac_update),
        (idql, idql.make_idql_optimizers, idql.idql_update),
        (diffusion_ql, diffusion_ql.make_dql_optimizers, diffusion_ql.dql_update),
    ],
)
def test_update_steps_every_network_and_its_average(module, make, step):
    agent, batch = make_agent(module, tau=0.5, ema_rate=0.5), make_batch(4, 8)
    before = {name: snapshot(child) for name, child in agent.named_children()}
    info = step(agent, make(agent, agent.args), batch)
    assert all(torch.isfinite(value) and not value.requires_grad for value in info.values())
    assert {"losses/critic", "critic/q_mean"} <= set(info)
    for name, child in agent.named_children():
        assert not unchanged(child, before[name]), f"{name} did not move"
    for target, online in (("target_base_policy", "base_policy"), ("target_actor", "actor")):
        if hasattr(agent, target):  # one policy step: the average is half way between the old and the new
            for a, b, old in zip(
                getattr(agent, target).parameters(), getattr(agent, online).parameters(), before[target], strict=True
            ):
                torch.testing.assert_close(a, (b + old) / 2)


@pytest.mark.parametrize("name", MODULES)
def test_short_run(name, tmp_path):
    flags = "--threads 1 --total-timesteps 60 --offline-steps 20 --learning-starts 20 --eval-every 30 --eval-episodes 2"
    flags += " --log-every 10 --utd-ratio 2 --batch-size 16 --hidden-dim 16 --num-critics 2 --save-model"
    if name != "rlpd":
        flags += " --base-hidden-dim 16 --base-blocks 1 --denoising-steps 2 --num-action-samples 4"
    command = [sys.executable, f"baselines/{name}.py", "--run-dir", str(tmp_path / "run"), *flags.split()]
    environment = os.environ | {"EXPO_CACHE_DIR": os.environ.get("EXPO_CACHE_DIR", str(tmp_path / "cache"))}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    evaluations = [row for row in rows if row["eval/success_rate"]]
    assert [int(row["step"]) for row in evaluations] == [0, 30, 60]
    assert ("eval/base_success_rate" in rows[0]) == (name == "idql")
    trained = [int(row["step"]) for row in rows if row["losses/critic"]]
    assert trained == [-20, -10, 0, 30, 40, 50, 60]  # none while the actions are random
    policy_loss = "losses/base_policy" if name == "idql" else "losses/actor"
    assert all(math.isfinite(float(row[policy_loss])) for row in rows if row["losses/critic"])
    agent, args = load_agent(tmp_path / "run")
    assert args.total_timesteps == 60
    assert agent(torch.zeros(3, agent.critic.layers[0].weight.shape[1] - 2)).shape == (3, 2)
