"""Updates and replay: what the authors' numbers (test_authors.py) do not show. Entropy backup, order, rates, draws."""

import copy
import importlib
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import EVERY_SCRIPT, make_agent, make_args, make_batch, same, snapshot


def test_a_new_agent(script):
    """Both averages start equal to their networks. Alpha is --init-alpha, and its target entropy the scaled one."""
    agent = script.Agent(3, 2, make_args(script, init_alpha=0.25))
    for target, online in ((agent.target_critic, agent.critic), (agent.target_base_policy, agent.base_policy)):
        assert same(target, snapshot(online))
    assert agent.log_alpha.exp().item() == pytest.approx(0.25)
    assert agent.target_entropy == pytest.approx(2 * (math.log(0.05) - 0.5))


def test_entropy_backup_by_hand(script):
    """q = 0 and log(3)/2 at kappa 2: the choice has probabilities 1/4 and 3/4, its bonus is alpha log 4 or log 4/3."""
    rows = 20_000
    agent = make_agent(script, action_dim=1, gamma=0.5, backup="entropy", backup_kappa=2.0, backup_alpha=0.1)
    agent.target_critic.random_min = lambda obs, actions, num: math.log(3) / 2 * actions.squeeze(-1)
    batch = make_batch(script, rows, action_dim=1)._replace(rewards=torch.full((rows,), 2.0))
    target_q, choice = agent.td_target(batch, torch.tensor([[[0.0], [1.0]]]).expand(rows, 2, 1))
    assert choice.float().mean().item() == pytest.approx(0.75, abs=0.015)  # five standard deviations
    by_choice = torch.tensor([0.1 * math.log(4), math.log(3) / 2 + 0.1 * math.log(4 / 3)])
    torch.testing.assert_close(target_q, 2 + 0.5 * (1 - batch.terminations) * by_choice[choice])


def test_edit_dropout_is_for_the_edit_policys_own_loss(script):
    agent, batch = make_agent(script, edit_dropout=0.5), make_batch(script, 20)
    torch.nn.init.constant_(agent.edit_policy.log_std.bias, -1000.0)  # almost no noise: what varies is dropout
    first, second = (agent.with_edits(batch.obs, batch.actions.unsqueeze(1)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert len({round(agent.edit_policy_loss(batch)[2]["edit/abs_mean"].item(), 4) for _ in range(9)}) > 4


# ------------------------------------------------------------------------------------------- averages and rates


@pytest.mark.parametrize("name", EVERY_SCRIPT)
def test_optimizers_are_the_published_ones(name):
    script = importlib.import_module(name)
    agent = make_agent(script)
    for part, optimizer in vars(script.Optimizers(agent, script.Args())).items():
        if part.endswith("_decay"):
            continue
        (group,) = optimizer.param_groups
        names: dict = {"base": "base_policy.", "edit": "edit_policy.", "alpha": "log_alpha"}
        names["adam"] = ("policy.", "critic.", "inner_value.")  # one for all networks
        own = [p for name, p in agent.named_parameters() if name.startswith(names.get(part, f"{part}."))]
        assert list(map(id, group["params"])) == list(map(id, own)), part
        assert type(optimizer) is (torch.optim.AdamW if part == "base" else torch.optim.Adam)
        assert group["weight_decay"] == (1e-4 if part == "base" else 0)  # AdamW's own default is 1e-2
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.9, 0.999), 1e-8), part


def test_learning_rates_of_base_and_edit_policy_end_at_zero(script):
    agent = make_agent(script, lr_decay_steps=4)
    optimizers = script.Optimizers(agent, agent.args)
    for _ in range(6):
        script.update(agent, optimizers, make_batch(script, 2, 8))
    rates = [getattr(optimizers, part).param_groups[0]["lr"] for part in ("base", "edit", "critic", "alpha")]
    assert rates == pytest.approx([0, 0, 3e-4, 3e-4], abs=1e-12)


# ----------------------------------------------------------------------------------------------------- update()


@pytest.mark.parametrize("slices, edits", [(1, 4), (4, 4), (3, 0)])
def test_update_makes_U_critic_steps_and_one_of_everything_else(script, slices, edits):
    """Without edited candidates, the edit policy and its temperature are left alone."""
    agent, counts = make_agent(script, num_edit_samples=edits), Counter()
    optimizers = script.Optimizers(agent, agent.args)
    for name in ("base", "edit", "critic", "alpha"):
        getattr(optimizers, name).register_step_post_hook(lambda *_, name=name: counts.update([name]))
    before, log_alpha = {name: snapshot(part) for name, part in agent.named_children()}, agent.log_alpha.item()
    info = script.update(agent, optimizers, make_batch(script, slices, 8))
    assert counts == {"critic": slices, "base": 1} | ({"edit": 1, "alpha": 1} if edits else {})
    unmoved = {name for name, old in before.items() if same(getattr(agent, name), old)}
    assert unmoved == (set() if edits else {"edit_policy"})
    assert (agent.log_alpha.item() != log_alpha) == (edits > 0)
    expected = {"losses/critic", "losses/base_policy", "critic/q_mean", "edit/selected_share"}
    expected |= {"losses/edit_policy", "edit/alpha", "edit/entropy", "edit/abs_mean"} if edits else set()
    assert set(info) == expected
    assert all(value.ndim == 0 and value.isfinite() and not value.requires_grad for value in info.values())


def test_update_walks_through_the_slices_and_ends_with_the_policies_on_the_last(script):
    """First the critics, slice by slice. Then base and edit policy, on the last slice."""
    agent, batch, order = make_agent(script), make_batch(script, 3, 8), []
    agent.base_policy.sample = lambda obs: obs[..., :2].tanh()  # an action that tells its observation
    agent.target_base_policy.sample = lambda obs: pytest.fail("the backup sampled from the moving average")
    critic_loss, edit_loss, base_loss = agent.critic_loss, agent.edit_policy_loss, agent.base_policy.loss

    def spy_critic(rows, candidates):
        u = order.count("critic")
        order.append("critic")
        assert all(torch.equal(field, whole[u]) for field, whole in zip(rows, batch, strict=True))
        expected = batch.next_obs[u][:, :2].tanh().unsqueeze(1).expand(8, 4, 2)
        assert candidates.shape == (8, 8, 2) and torch.equal(candidates[:, :4], expected)
        assert ((candidates[:, 4:] - expected).abs() <= agent.args.edit_scale + 1e-6).all()
        return critic_loss(rows, candidates)

    def spy_edit(rows):
        order.append("edit")
        assert all(torch.equal(field, whole[2]) for field, whole in zip(rows, batch, strict=True))
        return edit_loss(rows)

    def spy_base(obs, actions):
        order.append("base")
        assert torch.equal(obs, batch.obs[2]) and torch.equal(actions, batch.actions[2])  # this slice's, not next_obs
        return base_loss(obs, actions)

    agent.critic_loss, agent.edit_policy_loss, agent.base_policy.loss = spy_critic, spy_edit, spy_base
    script.update(agent, script.Optimizers(agent, agent.args), batch)
    assert order[:3] == ["critic"] * 3 and sorted(order[3:]) == ["base", "edit"]


# ----------------------------------------------------------------------------------------------------- gradients


def test_no_gradient_of_q_reaches_the_base_policy(script):
    """A critic that is another altogether, and a hundred times as steep, leaves the base policy bit for bit."""
    agent = make_agent(script, critic_lr=1e-2)
    before, other = snapshot(agent.base_policy), copy.deepcopy(agent)
    for parameter in [*other.critic.parameters(), *other.target_critic.parameters()]:
        parameter.data = 100 * torch.randn_like(parameter)
    for learner in (agent, other):
        optimizers = script.Optimizers(learner, learner.args)
        for seed in range(2):
            torch.manual_seed(seed)
            script.update(learner, optimizers, make_batch(script, 3, 8))
    assert not same(other.base_policy, before)  # it did learn
    assert same(other.base_policy, snapshot(agent.base_policy))


def test_a_gradient_step_is_for_the_optimizers_own_parameters(script):
    """The edit loss depends on the critic and on alpha: neither gets a step or a leftover gradient."""
    agent, batch = make_agent(script, edit_lr=1e-2), make_batch(script, 8)
    optimizers = script.Optimizers(agent, agent.args)
    others = [part for name, part in agent.named_children() if name != "edit_policy"]
    before, edit_policy = [snapshot(part) for part in others], snapshot(agent.edit_policy)
    log_alpha = agent.log_alpha.item()
    torch.manual_seed(1)
    loss, _, info = agent.edit_policy_loss(batch)
    torch.manual_seed(1)
    assert info["edit/abs_mean"] == agent.edit_policy(batch.obs, batch.actions)[0].abs().mean()
    assert torch.autograd.grad(loss, [agent.log_alpha], allow_unused=True, retain_graph=True) == (None,)
    script.gradient_step(optimizers.edit, loss)
    assert not same(agent.edit_policy, edit_policy)
    assert all(same(part, old) for part, old in zip(others, before, strict=True))
    assert all(parameter.grad is None for part in others for parameter in part.parameters())
    assert agent.log_alpha.item() == log_alpha and agent.log_alpha.grad is None


# ------------------------------------------------------------------------------------- replay and symmetric batches


def marked_buffer(script, offline: int, online: int, capacity: int = 100):
    """A buffer whose every field tells the row: -1, -2, ... offline, 1, 2, ... online (terminal)."""
    marks = -np.arange(1, offline + 1, dtype=np.float32)
    rows = (marks[:, None], np.stack([marks, marks], 1), marks, marks[:, None], np.zeros(offline, np.float32))
    buffer = script.ReplayBuffer(rows, capacity, torch.device("cpu"))
    for mark in range(1, online + 1):  # as main adds them: arrays, a tensor, a float and a bool
        buffer.add(np.array([mark]), torch.full((2,), float(mark)), float(mark), np.array([mark]), True)
    return buffer


@pytest.mark.parametrize("rows", [7, 8, 256])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_every_slice_has_the_same_share_of_offline_rows(script, rows, ratio):
    batch = marked_buffer(script, 50, 30).draw(ratio, 6, rows)
    assert batch.obs.shape == batch.next_obs.shape == (6, rows, 1) and batch.actions.shape == (6, rows, 2)
    assert batch.rewards.shape == batch.terminations.shape == (6, rows)
    assert {field.dtype for field in batch} == {torch.float32}
    counts = (batch.rewards < 0).sum(1).tolist()
    assert len(set(counts)) == 1
    assert counts[0] in (math.floor(ratio * rows), math.ceil(ratio * rows))  # exactly half, or the nearest to it
    assert (batch.rewards != 0).all()  # none of the buffer's unused rows
    for field in (batch.obs[..., 0], batch.actions[..., 0], batch.actions[..., 1], batch.next_obs[..., 0]):
        assert torch.equal(field, batch.rewards)  # rows stay together
    assert torch.equal(batch.terminations, (batch.rewards > 0).float())


def test_batches_are_drawn_uniformly_from_all_rows(script):
    """Also from the last ones, from the only online row, and from a buffer that is full to its capacity."""
    counts = Counter(marked_buffer(script, 20, 20, capacity=20).draw(0.5, 50, 800).rewards.flatten().tolist())
    assert set(counts) == {*map(float, range(-20, 0)), *map(float, range(1, 21))}
    assert 820 < min(counts.values()) and max(counts.values()) < 1180  # 1000 expected, standard deviation 31
    first, second = marked_buffer(script, 20, 20).draw(0.5, 2, 8).rewards
    assert not torch.equal(first, second)
    assert set(marked_buffer(script, 20, 1).draw(0.0, 2, 8).rewards.flatten().tolist()) == {1.0}


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_batches_are_offline_while_there_is_no_online_row(script, ratio):
    assert (marked_buffer(script, 50, 0).draw(ratio, 3, 8).rewards < 0).all()
