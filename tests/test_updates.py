"""Updates against hand-worked cases and explicit recursions: targets, losses, gradients, slices, averages, rates."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import candidate_actions, fork, make_agent, make_args, make_batch, same, snapshot, table_critic

from utils.buffer import Batch, ReplayBuffer
from utils.data import from_d4rl_arrays

# ----------------------------------------------------------------------------------------------------- TD target


def hand_worked_agent(script, **flags):
    """Two heads, Q_0 = 1 + 2 a and Q_1 = 3 - a + s: small enough for paper."""
    flags = {"num_critics": 2, "num_min_critics": 2, "num_base_samples": 2, "num_edit_samples": 1, **flags}
    agent = make_agent(script, obs_dim=1, action_dim=1, gamma=0.5, **flags)
    heads = [lambda obs, a: 1 + 2 * a, lambda obs, a: 3 - a + obs]
    agent.target_critic = table_critic(script, lambda e, obs, actions: heads[e](obs, actions).squeeze(-1), 2)
    return agent


def test_td_target_by_hand(script):
    """Row 0 ordinary, row 1 terminated, row 2 truncated (which bootstraps as an ordinary row does)."""
    replay = ReplayBuffer(3, 1, 1)
    replay.add([2.0], [0.0], 1.0, [0.0], terminated=False)
    replay.add([2.0], [0.0], 1.0, [0.0], terminated=True)
    replay.add([2.0], [0.0], 4.0, [-2.0], terminated=False)
    batch = Batch(*(field[:] for field in replay.data))
    candidates = torch.tensor([[[-1.0], [0.5], [1.0]]]).expand(3, 3, 1)
    target_q, choice = script.td_target(hand_worked_agent(script), batch, candidates)
    # s' = 0: minima -1, 2, 2 -> the first of the two; s' = -2: minima -1, .5, 0. (At s = 2 the third would win.)
    assert choice.tolist() == [1, 1, 1]
    assert target_q.tolist() == [1 + 0.5 * 2, 1, 4 + 0.5 * 0.5]
    assert not target_q.requires_grad


def test_td_target_of_offline_rows_by_hand(script):
    """From the file's flags: a timeout row never ends the return, a terminal row always does."""
    arrays = {
        "observations": np.full((4, 1), 2, np.float32),
        "next_observations": np.array([[0], [0], [-2], [0]], np.float32),
        "actions": np.zeros((4, 1), np.float32),
        "rewards": np.array([1, 1, 4, 1], np.float32),
        "terminals": np.array([0, 1, 0, 0]),
        "timeouts": np.array([0, 0, 1, 0]),
    }
    rows = from_d4rl_arrays(arrays, "hand-made")
    offline = ReplayBuffer.from_dataset(rows)
    candidates = torch.tensor([[[-1.0], [0.5], [1.0]]]).expand(4, 3, 1)
    target_q, _ = script.td_target(hand_worked_agent(script), offline.data, candidates)
    assert target_q.tolist() == [2, 1, 4.25, 2]


def test_td_target_uses_the_target_critic_only(script):
    agent, batch = make_agent(script), make_batch(30)
    candidates = torch.rand(30, 8, 2)

    def target(changed) -> torch.Tensor:
        torch.manual_seed(1)
        return script.td_target(changed, batch, candidates)[0]

    before = target(agent)
    changed = fork(agent)
    for parameter in changed.critic.parameters():
        parameter.data += 1
    assert torch.equal(target(changed), before)
    changed.target_critic.output.bias.data += 1
    torch.testing.assert_close(target(changed), before + 0.99 * (1 - batch.terminations))


def test_td_target_draws_a_fresh_subset_after_the_choice(script):
    """Head 0 says Q = a, head 1 says -a, the minimum is over one. With one subset for both uses, the target would
    always be +1, and with the minimum over both heads -1."""
    agent = make_agent(script, action_dim=1, num_critics=2, num_min_critics=1, gamma=1.0)
    signs = (1.0, -1.0)
    agent.target_critic = table_critic(script, lambda e, obs, actions: signs[e] * actions.squeeze(-1), 2)
    batch = make_batch(6, action_dim=1)
    batch = batch._replace(rewards=torch.zeros(6), terminations=torch.zeros(6))
    candidates = torch.tensor([[[1.0], [-1.0]]]).expand(6, 2, 1)
    targets = []
    for _ in range(400):
        target_q, choice = script.td_target(agent, batch, candidates)
        assert len(set(target_q.tolist())) == 1 and len(set(choice.tolist())) == 1  # one subset for all rows
        targets.append((target_q[0].item(), choice[0].item()))
    counts = Counter(targets)
    assert set(counts) == {(1.0, 0), (1.0, 1), (-1.0, 0), (-1.0, 1)}
    assert 60 < min(counts.values()) and max(counts.values()) < 140  # 100 expected, standard deviation 9


def test_entropy_backup_by_hand(script):
    """q = 0 and log(3)/2 at kappa 2: the choice has probabilities 1/4 and 3/4, its bonus is alpha log 4 or log 4/3."""
    agent = make_agent(script, action_dim=1, gamma=0.5, backup="entropy", backup_kappa=2.0, backup_alpha=0.1)
    agent.target_critic = table_critic(script, lambda e, obs, actions: math.log(3) / 2 * actions.squeeze(-1), 5)
    rows = 20_000
    batch = make_batch(rows, action_dim=1)._replace(rewards=torch.full((rows,), 2.0))
    candidates = torch.tensor([[[0.0], [1.0]]]).expand(rows, 2, 1)
    target_q, choice = script.td_target(agent, batch, candidates)
    assert choice.float().mean().item() == pytest.approx(0.75, abs=0.015)  # five standard deviations
    by_choice = {0: 2 + 0.5 * (0 + 0.1 * math.log(4)), 1: 2 + 0.5 * (math.log(3) / 2 + 0.1 * math.log(4 / 3))}
    for c, expected in by_choice.items():
        ongoing = (choice == c) & (batch.terminations == 0)
        assert ongoing.sum() > 1000
        torch.testing.assert_close(target_q[ongoing], torch.full_like(target_q[ongoing], expected))
    assert (target_q[batch.terminations == 1] == 2).all()  # nothing after the end, no bonus either


def test_hard_backup_is_the_default_and_has_no_bonus(script):
    assert script.Args().backup == "hard"
    agent = make_agent(script, action_dim=1, gamma=0.5, backup_kappa=2.0, backup_alpha=100.0)
    agent.target_critic = table_critic(script, lambda e, obs, actions: actions.squeeze(-1), 5)
    batch = make_batch(50, action_dim=1)._replace(rewards=torch.zeros(50), terminations=torch.zeros(50))
    target_q, choice = script.td_target(agent, batch, torch.tensor([[[0.0], [1.0]]]).expand(50, 2, 1))
    assert (choice == 1).all() and (target_q == 0.5).all()


# -------------------------------------------------------------------------------------------------------- losses


def test_critic_loss_is_the_mean_over_heads_and_rows(script, monkeypatch):
    agent, batch = make_agent(script, num_base_samples=3), make_batch(12)
    targets, choice = torch.randn(12), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 3, 2])
    monkeypatch.setattr(script, "td_target", lambda *_: (targets, choice))
    loss, info = script.critic_loss(agent, batch, torch.zeros(12, 7, 2))
    total = 0.0
    with torch.no_grad():
        for b in range(12):
            for q in agent.critic(batch.obs[b : b + 1], batch.actions[b : b + 1]):  # every head, the same target
                total += float(q - targets[b]) ** 2
        mean = agent.critic(batch.obs, batch.actions).mean()
    assert loss.item() == pytest.approx(total / (12 * 5), rel=1e-4)
    assert info["critic/q_mean"].item() == pytest.approx(mean.item(), rel=1e-4, abs=1e-6)
    assert info["edit/selected_share"].item() == pytest.approx(5 / 12)  # choices 3, 4, 5, 6, 3 are edited ones


def test_edit_policy_loss_by_hand(script):
    """mean[alpha log p(edit) - mean over all online heads of Q(s, a + edit)] on the batch's own actions."""
    agent, batch = make_agent(script, init_alpha=0.3, edit_scale=0.6), make_batch(12)
    torch.manual_seed(2)
    loss, info = script.edit_policy_loss(agent, batch)
    torch.manual_seed(2)  # the same random numbers
    alpha, total, entropy = agent.log_alpha.exp().item(), 0.0, 0.0
    with torch.no_grad():
        edits, log_prob = agent.edit_policy(batch.obs, batch.actions)
        for b in range(12):
            action = (batch.actions[b] + edits[b]).clip(-1, 1)
            qs = agent.critic(batch.obs[b : b + 1], action.unsqueeze(0)).squeeze(1).tolist()
            total += alpha * float(log_prob[b]) - sum(qs) / 5
            entropy -= float(log_prob[b])
    assert loss.item() == pytest.approx(total / 12, rel=1e-4)
    assert info["edit/entropy"].item() == pytest.approx(entropy / 12, rel=1e-4)
    assert info["edit/abs_mean"].item() == pytest.approx(edits.abs().mean().item(), rel=1e-5)
    assert info["edit/alpha"].item() == pytest.approx(alpha)


def test_edit_policy_learns_to_move_towards_higher_q(script):
    """Q = 3 a_0 - 2 a_1: after some steps edits go right and down, as far as their bound allows."""
    agent = make_agent(script, init_alpha=1e-3, edit_scale=0.2, edit_lr=1e-2, num_critics=2)
    weights = torch.tensor([3.0, -2.0])
    agent.critic = table_critic(script, lambda e, obs, actions: actions @ weights, 2)
    optimizer = torch.optim.Adam(agent.edit_policy.parameters(), 1e-2)
    batch = make_batch(64)
    batch = batch._replace(actions=0.5 * batch.actions)
    for _ in range(100):
        script.gradient_step(optimizer, script.edit_policy_loss(agent, batch)[0])
    edits, _ = agent.edit_policy(batch.obs, batch.actions)
    assert edits[:, 0].mean() > 0.18 and edits[:, 1].mean() < -0.18


def test_edit_policy_loss_trains_with_dropout(script):
    agent, batch = make_agent(script, edit_dropout=0.5), make_batch(64)
    seen, forward = [], agent.edit_policy.forward

    def spy(obs, base_actions, train=False):
        seen.append(train)
        return forward(obs, base_actions, train)

    agent.edit_policy.forward = spy
    script.edit_policy_loss(agent, batch)
    agent.on_the_fly_actions(batch.obs)
    candidate_actions(agent, batch.next_obs, agent.base_policy)
    assert seen == [True, False, False]


@pytest.mark.parametrize("edit_scale", [0.05, 0.2, 1.0])
def test_target_entropy(script, edit_scale):
    def of(**flags) -> float:
        return make_agent(script, action_dim=4, edit_scale=edit_scale, **flags).target_entropy

    assert of(edit_entropy="published") == pytest.approx(-2)
    assert of() == of(edit_entropy="scaled") == pytest.approx(-2 + 4 * math.log(edit_scale))
    most = 4 * math.log(2 * edit_scale)  # entropy of uniform edits: no edit policy has more
    assert of(edit_entropy="scaled") < most
    assert (of(edit_entropy="published") > most) == (edit_scale < 0.303)


@pytest.mark.parametrize("log_std, grows", [(-3.0, True), (0.0, False)])
def test_alpha_moves_towards_the_target_entropy(script, log_std, grows):
    """Narrow edits have too little entropy: alpha grows. Wide ones have enough: alpha shrinks. From 1 on, at 3e-4."""
    agent, batch = make_agent(script), make_batch(256)
    with torch.no_grad():
        for layer, bias in ((agent.edit_policy.mean, 0.0), (agent.edit_policy.log_std, log_std)):
            layer.weight.zero_()
            layer.bias.fill_(bias)
    agent.log_alpha.data.zero_()
    optimizers = script.make_optimizers(agent, agent.args)
    _, info = script.edit_policy_loss(agent, batch)
    assert (info["edit/entropy"] < agent.target_entropy) == grows
    edit_policy = snapshot(agent.edit_policy)
    script.gradient_step(optimizers.alpha, script.alpha_loss(agent, info["edit/entropy"]))
    assert agent.log_alpha.item() == pytest.approx(3e-4 if grows else -3e-4, rel=1e-3)
    assert same(agent.edit_policy, edit_policy)


def test_alpha_starts_at_init_alpha(script):
    assert script.Args().init_alpha == 1
    agent = script.Agent(3, 2, make_args(script, init_alpha=0.25))
    assert agent.log_alpha.exp().item() == pytest.approx(0.25)


# ------------------------------------------------------------------------------------------- averages and rates


def test_targets_start_equal_and_move_by_their_rate(script):
    agent = script.Agent(3, 2, make_args(script))
    pairs = [(agent.target_critic, agent.critic), (agent.target_base_policy, agent.base_policy)]
    for target, online in pairs:
        assert same(target, snapshot(online))
        with torch.no_grad():
            for parameter in online.parameters():
                parameter += torch.randn_like(parameter)
        before = [parameter.clone() for parameter in target.parameters()]
        online_before = snapshot(online)
        script.move_towards(target, online, 0.3)
        assert same(online, online_before)
        for now, old, new in zip(target.parameters(), before, online.parameters(), strict=True):
            torch.testing.assert_close(now, 0.7 * old + 0.3 * new)


def test_optimizers_are_the_published_ones(script):
    agent = make_agent(script)
    args = script.Args()
    optimizers = script.make_optimizers(agent, args)
    parts = {"base": agent.base_policy, "edit": agent.edit_policy, "critic": agent.critic}
    for name, part in parts.items():
        (group,) = getattr(optimizers, name).param_groups
        assert list(map(id, group["params"])) == list(map(id, part.parameters())), name
    assert optimizers.alpha.param_groups[0]["params"] == [agent.log_alpha]
    assert type(optimizers.base) is torch.optim.AdamW
    assert optimizers.base.param_groups[0]["weight_decay"] == 1e-4  # torch's own default is 1e-2
    for name in ("edit", "critic", "alpha"):
        assert type(getattr(optimizers, name)) is torch.optim.Adam
        assert getattr(optimizers, name).param_groups[0]["weight_decay"] == 0
    for name in ("base", "edit", "critic", "alpha"):
        group = getattr(optimizers, name).param_groups[0]
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.9, 0.999), 1e-8), name


def test_learning_rates_of_base_and_edit_policy_decay_as_a_cosine(script):
    rates: dict[str, Any] = {"base_lr": 1e-3, "edit_lr": 2e-3, "critic_lr": 3e-3, "alpha_lr": 4e-3}
    agent = make_agent(script, lr_decay_steps=10, **rates)
    optimizers = script.make_optimizers(agent, agent.args)
    for n in range(14):
        decay = 0.5 * (1 + math.cos(math.pi * min(n, 10) / 10))
        lr = {name: getattr(optimizers, name).param_groups[0]["lr"] for name in ("base", "edit", "critic", "alpha")}
        assert lr == pytest.approx({"base": 1e-3 * decay, "edit": 2e-3 * decay, "critic": 3e-3, "alpha": 4e-3}), n
        script.update(agent, optimizers, make_batch(3, 8))  # three critic steps, one step of decay


def test_base_update_is_one_adamw_step_and_one_step_of_the_average(script):
    agent, obs, actions = make_agent(script, ema_rate=0.2, base_lr=1e-2), torch.randn(16, 3), torch.rand(16, 2)
    reference = fork(agent)
    optimizers = script.make_optimizers(agent, agent.args)
    optimizer = torch.optim.AdamW(reference.base_policy.parameters(), 1e-2, weight_decay=1e-4)
    for seed in range(3):
        torch.manual_seed(seed)
        info = script.update_base_policy(agent, optimizers, obs, actions)
        torch.manual_seed(seed)
        loss = reference.base_policy.loss(obs, actions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average, online = reference.target_base_policy.parameters(), reference.base_policy.parameters()
        for old, new in zip(average, online, strict=True):
            old.data = old.data + 0.2 * (new.data - old.data)
        assert info["losses/base_policy"].item() == pytest.approx(loss.item(), rel=1e-4)
    for part in ("base_policy", "target_base_policy"):
        for value, expected in zip(
            getattr(agent, part).parameters(), getattr(reference, part).parameters(), strict=True
        ):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)
    assert same(agent.critic, snapshot(reference.critic)) and same(agent.edit_policy, snapshot(reference.edit_policy))


# ----------------------------------------------------------------------------------------------------- update()


def count_steps(optimizers) -> Counter:
    """Counts optimizer steps by name from now on."""
    counts = Counter()
    for name in ("base", "edit", "critic", "alpha"):
        getattr(optimizers, name).register_step_post_hook(lambda *_, name=name: counts.update([name]))
    return counts


@pytest.mark.parametrize("slices", [1, 4])
def test_update_makes_U_critic_steps_and_one_of_everything_else(script, slices):
    agent = make_agent(script)
    optimizers = script.make_optimizers(agent, agent.args)
    counts = count_steps(optimizers)
    parts = (agent.base_policy, agent.target_base_policy, agent.edit_policy, agent.critic, agent.target_critic)
    before = [snapshot(part) for part in parts]
    log_alpha = agent.log_alpha.item()
    info = script.update(agent, optimizers, make_batch(slices, 8))
    assert counts == {"critic": slices, "base": 1, "edit": 1, "alpha": 1}
    assert not any(same(part, old) for part, old in zip(parts, before, strict=True))
    assert agent.log_alpha.item() != log_alpha
    assert set(info) == {
        *("losses/critic", "losses/base_policy", "losses/edit_policy", "critic/q_mean"),
        *("edit/selected_share", "edit/alpha", "edit/entropy", "edit/abs_mean"),
    }
    assert all(value.ndim == 0 and value.isfinite() and not value.requires_grad for value in info.values())


def test_update_without_edits_leaves_the_edit_policy_alone(script):
    agent = make_agent(script, num_edit_samples=0)
    optimizers = script.make_optimizers(agent, agent.args)
    counts, edit_policy, alpha = count_steps(optimizers), snapshot(agent.edit_policy), agent.log_alpha.item()
    info = script.update(agent, optimizers, make_batch(3, 8))
    assert counts == {"critic": 3, "base": 1}
    assert same(agent.edit_policy, edit_policy) and agent.log_alpha.item() == alpha
    assert info["edit/selected_share"] == 0


def test_update_walks_through_the_slices_and_ends_with_the_policies_on_the_last(script, monkeypatch):
    agent, batch = make_agent(script), make_batch(3, 8)
    order = []
    for name in ("critic_loss", "edit_policy_loss"):
        original = getattr(script, name)

        def spy(agent, part, *rest, name=name, original=original):
            order.append(name)
            u = len(order) - 1 if name == "critic_loss" else 2
            assert all(torch.equal(field, whole[u]) for field, whole in zip(part, batch, strict=True))
            return original(agent, part, *rest)

        monkeypatch.setattr(script, name, spy)
    base_loss = agent.base_policy.loss

    def base_spy(obs, actions):
        order.append("base_loss")
        assert torch.equal(obs, batch.obs[2]) and torch.equal(actions, batch.actions[2])  # this slice's, not next_obs
        return base_loss(obs, actions)

    agent.base_policy.loss = base_spy
    script.update(agent, script.make_optimizers(agent, agent.args), batch)
    assert order[:3] == ["critic_loss"] * 3 and sorted(order[3:]) == ["base_loss", "edit_policy_loss"]


def test_update_backs_up_candidates_of_next_obs_from_the_online_base_policy(script, monkeypatch):
    agent, batch = make_agent(script), make_batch(3, 8)
    agent.base_policy.sample = lambda obs: obs[..., :2].tanh()  # an action that tells its observation
    agent.target_base_policy.sample = lambda obs: pytest.fail("the backup sampled from the moving average")
    seen, critic_loss = [], script.critic_loss

    def spy(agent, part, candidates):
        seen.append(candidates)
        return critic_loss(agent, part, candidates)

    monkeypatch.setattr(script, "critic_loss", spy)
    script.update(agent, script.make_optimizers(agent, agent.args), batch)
    assert len(seen) == 3
    for u, candidates in enumerate(seen):
        assert candidates.shape == (8, 8, 2)
        expected = batch.next_obs[u][:, :2].tanh().unsqueeze(1).expand(8, 4, 2)
        assert torch.equal(candidates[:, :4], expected)
        assert ((candidates[:, 4:] - expected).abs() <= agent.args.edit_scale + 1e-6).all()


def test_update_moves_the_target_critic_after_every_critic_step(script):
    agent, rate = make_agent(script, tau=0.1, critic_lr=1e-2), 0.1
    optimizers = script.make_optimizers(agent, agent.args)
    expected = [parameter.detach().clone() for parameter in agent.target_critic.parameters()]

    def follow(*_):
        for old, new in zip(expected, agent.critic.parameters(), strict=True):
            old += rate * (new.detach() - old)

    optimizers.critic.register_step_post_hook(follow)
    script.update(agent, optimizers, make_batch(4, 8))
    for value, old in zip(agent.target_critic.parameters(), expected, strict=True):
        torch.testing.assert_close(value, old, rtol=1e-5, atol=1e-6)


def test_critic_steps_equal_plain_adam(script):
    """Two slices by hand: td_target, squared error, zero_grad, backward, step, Polyak."""
    agent = make_agent(script, critic_lr=1e-2, num_min_critics=5, num_base_samples=1, num_edit_samples=0)
    batch = make_batch(2, 8)
    for policy in (agent.base_policy, agent.target_base_policy):
        policy.sample = lambda obs: obs[..., :2].tanh()
    reference = fork(agent)
    script.update(agent, script.make_optimizers(agent, agent.args), batch)
    optimizer = torch.optim.Adam(reference.critic.parameters(), 1e-2)
    for u in range(2):
        with torch.no_grad():
            next_q = reference.target_critic(batch.next_obs[u], batch.next_obs[u][:, :2].tanh()).amin(0)
        target_q = batch.rewards[u] + 0.99 * (1 - batch.terminations[u]) * next_q
        loss = sum((q - target_q).square().mean() for q in reference.critic(batch.obs[u], batch.actions[u])) / 5
        optimizer.zero_grad()
        loss.backward()  # pyright: ignore
        optimizer.step()
        for old, new in zip(reference.target_critic.parameters(), reference.critic.parameters(), strict=True):
            old.data = 0.995 * old.data + 0.005 * new.data
    for part in ("critic", "target_critic"):
        for value, expected in zip(
            getattr(agent, part).parameters(), getattr(reference, part).parameters(), strict=True
        ):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=2e-4)


# ----------------------------------------------------------------------------------------------------- gradients


def updated(script, agent, **flags):
    """A copy of the agent after two updates on fixed batches with fixed random numbers, `flags` changed."""
    agent = fork(agent)
    for name, value in flags.items():
        setattr(agent.args, name, value)
    optimizers = script.make_optimizers(agent, agent.args)
    for seed in range(2):
        torch.manual_seed(seed)
        script.update(agent, optimizers, make_batch(3, 8))
    return agent


def test_no_gradient_of_q_reaches_the_base_policy(script):
    """A critic a hundred times as steep, and one that is another altogether, leave the base policy bit for bit."""
    agent = make_agent(script, critic_lr=1e-2)
    other = fork(agent)
    for part in (other.critic, other.target_critic):
        for parameter in part.parameters():
            parameter.data = 100 * torch.randn_like(parameter)
    plain, steep = updated(script, agent), updated(script, other)
    assert not same(plain.base_policy, snapshot(agent.base_policy))  # it did learn
    assert same(steep.base_policy, snapshot(plain.base_policy))
    assert same(steep.target_base_policy, snapshot(plain.target_base_policy))


def test_critic_and_edit_steps_leave_the_base_policy_bit_for_bit(script):
    agent, batch = make_agent(script), make_batch(8)
    optimizers = script.make_optimizers(agent, agent.args)
    before = snapshot(agent.base_policy), snapshot(agent.target_base_policy)
    candidates = candidate_actions(agent, batch.next_obs, agent.base_policy)
    critic_loss, _ = script.critic_loss(agent, batch, candidates)
    edit_loss, info = script.edit_policy_loss(agent, batch)
    for loss in (critic_loss, edit_loss, script.alpha_loss(agent, info["edit/entropy"])):
        wanted = list(agent.base_policy.parameters())
        assert all(g is None for g in torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True))
    script.gradient_step(optimizers.critic, critic_loss)
    script.gradient_step(optimizers.edit, script.edit_policy_loss(agent, batch)[0])
    assert same(agent.base_policy, before[0]) and same(agent.target_base_policy, before[1])


def test_imitation_does_not_touch_critic_or_edit_policy(script):
    agent, obs, actions = make_agent(script), torch.randn(8, 3), torch.rand(8, 2)
    others = {name: getattr(agent, name) for name in ("critic", "target_critic", "edit_policy")}
    before = {name: snapshot(part) for name, part in others.items()}
    loss = agent.base_policy.loss(obs, actions)
    for part in others.values():
        wanted = list(part.parameters())
        assert all(g is None for g in torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True))
    optimizers = script.make_optimizers(agent, agent.args)
    log_alpha = agent.log_alpha.item()
    script.update_base_policy(agent, optimizers, obs, actions)
    assert all(same(part, before[name]) for name, part in others.items())
    assert agent.log_alpha.item() == log_alpha


def test_edit_step_moves_the_edit_policy_only(script):
    """The critic's parameters get neither a step nor a leftover gradient from the edit loss."""
    agent, batch = make_agent(script, edit_lr=1e-2), make_batch(8)
    optimizers = script.make_optimizers(agent, agent.args)
    parts = {name: getattr(agent, name) for name in ("base_policy", "target_base_policy", "critic", "target_critic")}
    before, edit_policy = {name: snapshot(part) for name, part in parts.items()}, snapshot(agent.edit_policy)
    log_alpha = agent.log_alpha.item()
    loss, info = script.edit_policy_loss(agent, batch)
    assert torch.autograd.grad(loss, [agent.log_alpha], allow_unused=True, retain_graph=True) == (None,)
    wanted = list(agent.edit_policy.parameters())
    alpha_loss = script.alpha_loss(agent, info["edit/entropy"])
    assert all(g is None for g in torch.autograd.grad(alpha_loss, wanted, allow_unused=True))
    script.gradient_step(optimizers.edit, loss)
    assert not same(agent.edit_policy, edit_policy)
    assert all(same(part, before[name]) for name, part in parts.items())
    assert all(parameter.grad is None for part in parts.values() for parameter in part.parameters())
    assert agent.log_alpha.item() == log_alpha and agent.log_alpha.grad is None


def test_edit_steps_within_updates_do_not_leak_into_the_critic(script):
    """Without edited candidates in the backup's way, whether the edit policy learns makes no difference to Q."""
    agent = make_agent(script)
    agent.with_edits = lambda obs, base_actions: obs[..., None, :2].tanh().expand(*obs.shape[:-1], 8, 2)
    fast, still = updated(script, agent, edit_lr=0.1, alpha_lr=0.1), updated(script, agent, edit_lr=0.0, alpha_lr=0.0)
    assert not same(fast.edit_policy, snapshot(still.edit_policy))
    assert same(fast.critic, snapshot(still.critic)) and same(fast.target_critic, snapshot(still.target_critic))


# ------------------------------------------------------------------------------------------------ symmetric batches


def marked_buffer(rows: int, mark: float, capacity: int = 0) -> ReplayBuffer:
    """A buffer whose every field says which buffer it is and which row."""
    replay = ReplayBuffer(max(capacity, rows, 1), 1, 1)
    for row in range(rows):
        replay.add([mark * (row + 1)], [mark * (row + 1)], mark * (row + 1), [mark * (row + 1)], terminated=mark > 0)
    return replay


@pytest.mark.parametrize("rows", [2, 7, 8, 9, 256])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_every_slice_has_the_same_share_of_offline_rows(script, rows, ratio):
    offline, online = marked_buffer(50, -1.0), marked_buffer(30, 1.0, capacity=100)
    batch = script.draw_batch(offline, online, ratio, 6, rows)
    assert batch.obs.shape == batch.next_obs.shape == (6, rows, 1) and batch.actions.shape == (6, rows, 1)
    assert batch.rewards.shape == batch.terminations.shape == (6, rows)
    counts = (batch.rewards < 0).sum(1).tolist()
    assert len(set(counts)) == 1
    assert counts[0] in (math.floor(ratio * rows), math.ceil(ratio * rows))  # exactly half, or the nearest to it
    assert (batch.rewards != 0).all()  # none of the online buffer's unused rows
    for field in (batch.obs.squeeze(-1), batch.actions.squeeze(-1), batch.next_obs.squeeze(-1)):
        assert torch.equal(field, batch.rewards)  # rows stay together
    assert torch.equal(batch.terminations, (batch.rewards > 0).float())


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_batches_are_offline_while_the_online_buffer_is_empty(script, ratio):
    batch = script.draw_batch(marked_buffer(50, -1.0), ReplayBuffer(10, 1, 1), ratio, 3, 8)
    assert batch.rewards.shape == (3, 8) and (batch.rewards < 0).all()


def test_batches_are_drawn_anew_and_from_all_rows(script):
    offline, online = marked_buffer(20, -1.0), marked_buffer(20, 1.0, capacity=40)
    first, second = (script.draw_batch(offline, online, 0.5, 50, 8).rewards for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert set(first.flatten().tolist()) == {*map(float, range(-20, 0)), *map(float, range(1, 21))}
