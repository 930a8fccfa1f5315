"""EXPO's parts that the authors' numbers (test_authors.py) do not show: starts, draws, rates, options, replay."""

import itertools
import math
import re
import textwrap
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_agent, make_args, make_batch, same

import expo_diffusion
import expo_flow

script: Any = expo_diffusion  # test_siblings.py: what is tested here is the same text in the other two scripts

# ------------------------------------------------------------------------------------------------ networks, their start


def test_a_new_agent():
    """Both averages start equal to their networks. Alpha is --init-alpha, and its target entropy the scaled one."""
    agent = script.Agent(3, 2, make_args(script, init_alpha=0.25))
    for target, online in ((agent.target_critic, agent.critic), (agent.target_base_policy, agent.base_policy)):
        assert same(target, online)
    assert agent.log_alpha.exp().item() == pytest.approx(0.25)
    assert agent.target_entropy == pytest.approx(2 * (math.log(0.05) - 0.5))


def test_heads_start_different_and_xavier_uniform():
    critic = script.Critic(30, 10, make_args(script, hidden_dim=80, hidden_layers=3, num_critics=4))
    assert [weight.shape[1:] for weight in critic.weights] == [(40, 80), (80, 80), (80, 80), (80, 1)]
    for weight in critic.weights:
        bound = math.sqrt(6 / sum(weight.shape[1:]))
        assert not any(torch.equal(head, other) for head, other in itertools.pairwise(weight))
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not any(parameter.any() for parameter in [*critic.biases, *critic.shifts])
    assert all((parameter == 1).all() for parameter in critic.scales)


def test_denoising_network_has_the_published_sizes_and_init():
    """64 frequencies, time MLP 128-256-256, three blocks of 256-1024-256; Xavier, in the blocks LeCun-normal."""
    network = script.BasePolicy(20, 10, script.Args()).network
    assert network.frequencies.shape == (64,) and network.frequencies.requires_grad
    assert network.frequencies.std().item() == pytest.approx(0.2, rel=0.3)
    xavier = (network.time_mlp[0], network.time_mlp[2], network.input, network.output)
    assert [tuple(layer.weight.shape) for layer in xavier] == [(256, 128), (256, 256), (256, 286), (10, 256)]
    for layer in xavier:
        assert layer.weight.abs().max() <= math.sqrt(6 / sum(layer.weight.shape))
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / sum(layer.weight.shape)), rel=0.1)
        assert not layer.bias.any()
    assert len(network.blocks) == 3
    for block in network.blocks:
        assert block.widen.weight.shape == (1024, 256) and block.narrow.weight.shape == (256, 1024)
        for layer in (block.widen, block.narrow):
            std = layer.weight.shape[1] ** -0.5
            assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
            assert layer.weight.abs().max() <= 2 * std / 0.87962566 + 1e-6  # cut at two of its standard deviations
            assert not layer.bias.any()


def test_edit_log_prob_is_finite_where_tanh_saturates():
    agent, batch = make_agent(script, edit_scale=0.1), make_batch(script, 20)
    agent.edit_policy.mean.bias.data = torch.tensor([200.0, -200.0])
    edits, log_prob = agent.edit_policy(batch.obs, batch.actions)
    assert (edits.abs() == 0.1).all() and log_prob.isfinite().all()
    assert agent.edit_policy_loss(batch)[2]["edit/abs_mean"].item() == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------------- the base policy


def test_ddim_as_in_the_docs_of_faster():
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "expo_faster.md").read_text(), re.S)[0]
    exec(textwrap.dedent(block), found := dict(vars(script)))
    policy, obs, noise = make_agent(script).base_policy, torch.randn(6, 3), torch.randn(6, 2)
    bars, x = [1.0, *policy.alpha_bars.tolist()], noise
    for k in range(10, 0, -1):
        eps = policy.network(x, obs, policy.network.time_code(torch.tensor([k - 1.0])))
        action = (x - (1 - bars[k]) ** 0.5 * eps) / bars[k] ** 0.5
        x = (bars[k - 1] ** 0.5 * action + (1 - bars[k - 1]) ** 0.5 * eps).clamp(-1, 1)
    torch.testing.assert_close(found["sample"](policy, obs, noise), x)


def test_diffusion_loss_draws_every_level_equally_often():
    policy, seen = make_agent(script, denoising_steps=4).base_policy, []
    policy.network.time_code = lambda times: seen.extend(times.flatten().tolist()) or torch.zeros(len(times), 16)
    policy.loss(torch.randn(4000, 3), torch.randn(4000, 2))
    assert set(seen) == {0, 1, 2, 3} and min(map(seen.count, range(4))) > 850  # 1000 expected, standard deviation 27


@pytest.mark.parametrize("script, least_near", [(expo_diffusion, 0.6), (expo_flow, 0.75)])
def test_base_policy_recovers_a_mixture_on_a_ring(script, least_near):
    """Three modes on a ring, shares .5 / .3 / .2, turned by half a circle where the observation says so.

    The script's own imitation update trains it, and the moving average keeps every mode in its share. Some samples end
    between the modes, because ten steps are coarse. Of a uniform square, 15 % would be near a mode. The third script's
    BasePolicy is that of expo_diffusion, letter by letter (test_siblings.py).
    """
    torch.manual_seed(3)
    sizes, rates = {"base_hidden_dim": 64, "base_blocks": 1}, {"base_lr": 3e-3, "ema_rate": 0.01, "lr_decay_steps": 800}
    agent = script.Agent(1, 2, make_args(script, **sizes, **rates))
    optimizers = script.Optimizers(agent, agent.args)
    shares = torch.tensor([0.5, 0.3, 0.2])
    angles = torch.tensor([0.3, 0.3 + 2 * math.pi / 3, 0.3 + 4 * math.pi / 3])
    modes = 0.7 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    for _ in range(800):
        obs = torch.randint(2, (128, 1)) * 2.0 - 1
        actions = obs * modes[torch.multinomial(shares, 128, replacement=True)] + 0.05 * torch.randn(128, 2)
        script.update_base_policy(agent, optimizers, obs, actions)
    for sign in (-1.0, 1.0):
        samples = agent.target_base_policy.sample(torch.full((3000, 1), sign))
        distances = torch.cdist(samples, sign * modes)
        near = (distances.amin(1) < 0.25).float().mean()  # the modes are 1.2 apart
        assert near > least_near
        found = torch.bincount(distances.argmin(1), minlength=3) / 3000
        torch.testing.assert_close(found, shares, rtol=0, atol=0.06)


# --------------------------------------------------------------------------------- candidates, targets, losses, rates


SIZES = [(4, 4, 0, 4), (4, 8, 2, 4), (4, 2, 2, 1), (2, 2, 6, 6), (4, 0, 1, 0), (32, 8, 2, 1)]
SIZES += [(1, 1, num, num) for num in (1, 3, 2000, 3000)]  # in parts of 2048, 682 and 1 observations


@pytest.mark.parametrize("n, m, given, edits", SIZES)
def test_candidates_of_all_slices_in_their_places(n, m, given, edits):
    """A target has so many base actions, 0 means N, and then edits of each in turn. Acting always has N + M candidates.

    A base action tells its observation and its place, an edit its observation.
    """
    agent = make_agent(script, num_base_samples=n, num_edit_samples=m, num_target_samples=given)
    num, next_obs, rows, sizes, rank = given or n, torch.rand(3, 700 if given < 10 else 2, 3) - 0.5, [], [], agent.rank
    places = torch.arange(num).unsqueeze(-1) / 10_000
    agent.base_policy.sample = lambda obs: rows.append(obs.shape[:-1].numel()) or obs[..., :2] + places
    agent.edit_policy.forward = lambda obs, to_edit: (0.1 * obs[..., 1:], None)
    candidates, obs = script.next_candidates(agent, next_obs), next_obs.unsqueeze(-2)
    base = obs[..., :2] + places
    assert torch.equal(candidates[:, :, :num], base)
    assert torch.equal(candidates[:, :, num:], base[:, :, torch.arange(edits) % num] + 0.1 * obs[..., 1:])
    assert max(rows) <= max(2048, num) and sum(rows) == next_obs.shape[:-1].numel() * num
    agent.rank = lambda obs, candidates: sizes.append(candidates.shape[-2]) or rank(obs, candidates)
    agent(torch.randn(5, 3))
    assert sizes == [n + m]


@pytest.mark.parametrize("given, share", [(0, 5 / 12), (3, 8 / 12), (7, 0)])
def test_selected_share_counts_the_edited_candidates(given, share):
    agent = make_agent(script, num_base_samples=4, num_edit_samples=4, num_target_samples=given)
    choice = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3, 0, 3, 5, 6])
    agent.td_target = lambda batch, candidates: (torch.zeros(12), choice)
    batch = make_batch(script, 12)
    _, info = agent.critic_loss(batch, torch.zeros(12, 7, 2))
    assert info["edit/selected_share"].item() == pytest.approx(share)
    assert info["critic/q_mean"] == agent.critic(batch.obs, batch.actions).mean()


def test_entropy_backup_by_hand():
    """q = 0 and log(3)/2 at kappa 2: the choice has probabilities 1/4 and 3/4, its bonus is alpha log 4 or log 4/3."""
    rows = 20_000
    agent = make_agent(script, action_dim=1, gamma=0.5, backup="entropy", backup_kappa=2.0, backup_alpha=0.1)
    agent.target_critic.random_min = lambda obs, actions, num: math.log(3) / 2 * actions.squeeze(-1)
    batch = make_batch(script, rows, action_dim=1)._replace(rewards=torch.full((rows,), 2.0))
    target_q, choice = agent.td_target(batch, torch.tensor([[[0.0], [1.0]]]).expand(rows, 2, 1))
    assert choice.float().mean().item() == pytest.approx(0.75, abs=0.015)  # five standard deviations
    by_choice = torch.tensor([0.1 * math.log(4), math.log(3) / 2 + 0.1 * math.log(4 / 3)])
    torch.testing.assert_close(target_q, 2 + 0.5 * (1 - batch.terminations) * by_choice[choice])


def test_edit_dropout_is_for_the_edit_policys_own_loss():
    agent, batch = make_agent(script, edit_dropout=0.5), make_batch(script, 20)
    torch.nn.init.constant_(agent.edit_policy.log_std.bias, -1000.0)  # almost no noise: what varies is dropout
    first, second = (agent.with_edits(batch.obs, batch.actions.unsqueeze(1)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert len({round(agent.edit_policy_loss(batch)[2]["edit/abs_mean"].item(), 4) for _ in range(9)}) > 4


def test_optimizers_are_the_published_ones(each):
    """And each learning rate reaches its own optimizer."""
    agent, args = make_agent(each), each.Args()
    flags = [name for name in vars(args) if name.endswith("_lr") or name == "learning_rate"]
    assert [getattr(args, name) for name in flags] == [3e-4] * len(flags)
    for i, name in enumerate(flags):
        setattr(args, name, 1e-4 * (i + 1))
    for part, optimizer in vars(each.Optimizers(agent, args)).items():
        if part.endswith("_decay"):
            continue
        (group,) = optimizer.param_groups
        names: dict = {"base": "base_policy.", "edit": "edit_policy.", "alpha": "log_alpha"}
        names["adam"] = ("policy.", "critic.", "inner_value.")  # one for all networks
        own = [p for name, p in agent.named_parameters() if name.startswith(names.get(part, f"{part}."))]
        assert list(map(id, group["params"])) == list(map(id, own)), part
        assert type(optimizer) is (torch.optim.AdamW if part == "base" else torch.optim.Adam)
        assert group["weight_decay"] == (1e-4 if part == "base" else 0)  # AdamW's own default is 1e-2
        flag = {"value": "critic_lr", "filter": "critic_lr", "adam": "learning_rate"}.get(part, f"{part}_lr")
        assert group["lr"] == getattr(args, flag), part
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8), part


def test_learning_rates_of_base_and_edit_policy_end_at_zero():
    agent = make_agent(script, lr_decay_steps=4)
    optimizers = script.Optimizers(agent, agent.args)
    for _ in range(6):
        script.update(agent, optimizers, make_batch(script, 2, 8))
    rates = [getattr(optimizers, part).param_groups[0]["lr"] for part in ("base", "edit", "critic", "alpha")]
    assert rates == pytest.approx([0, 0, 3e-4, 3e-4], abs=1e-12)


# ------------------------------------------------------------------------------------- replay and symmetric batches


def marked_buffer(offline: int, online: int, capacity: int = 100):
    """A buffer whose every field tells the row: -1, -2, ... offline, 1, 2, ... online (terminal)."""
    marks = -np.arange(1, offline + 1, dtype=np.float32)
    rows = (marks[:, None], np.stack([marks, marks], 1), marks, marks[:, None], np.zeros(offline, np.float32))
    buffer = script.ReplayBuffer(rows, capacity, torch.device("cpu"))
    for mark in range(1, online + 1):  # as main adds them: arrays, a tensor, a float and a bool
        buffer.add(np.array([mark]), torch.full((2,), float(mark)), float(mark), np.array([mark]), True)
    return buffer


@pytest.mark.parametrize("rows", [7, 8, 256])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_every_slice_has_the_same_share_of_offline_rows(rows, ratio):
    batch = marked_buffer(50, 30).draw(ratio, 6, rows)
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


def test_batches_are_drawn_uniformly_from_all_rows():
    """Also from the last ones, from the only online row, and from a buffer that is full to its capacity."""
    counts = Counter(marked_buffer(20, 20, capacity=20).draw(0.5, 50, 800).rewards.flatten().tolist())
    assert set(counts) == {*map(float, range(-20, 0)), *map(float, range(1, 21))}
    assert 820 < min(counts.values()) and max(counts.values()) < 1180  # 1000 expected, standard deviation 31
    first, second = marked_buffer(20, 20).draw(0.5, 2, 8).rewards
    assert not torch.equal(first, second)
    assert set(marked_buffer(20, 1).draw(0.0, 2, 8).rewards.flatten().tolist()) == {1.0}


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_batches_are_offline_while_there_is_no_online_row(ratio):
    assert (marked_buffer(50, 0).draw(ratio, 3, 8).rewards < 0).all()
