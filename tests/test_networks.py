"""Networks against plain nn.Linear / nn.LayerNorm, explicit loops, torch.distributions and numeric integration."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_agent, make_args
from torch import Tensor, nn
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

# ------------------------------------------------------------------------------------------------------- critics


def separate_mlp(critic, head: int) -> nn.Sequential:
    """Head `head` of the ensemble as an ordinary MLP of torch's own layers."""
    layers: list[nn.Module] = []
    for linear, norm in zip([*critic.layers, critic.output], [*critic.norms, None], strict=True):
        in_dim, out_dim = linear.weight[head].shape
        plain = nn.Linear(in_dim, out_dim)
        plain.weight.data = linear.weight.data[head].T.clone()
        plain.bias.data = linear.bias.data[head, 0].clone()
        layers.append(plain)
        if norm is not None:
            plain_norm = nn.LayerNorm(out_dim, eps=1e-6)
            plain_norm.weight.data = norm.weight.data[head, 0].clone()
            plain_norm.bias.data = norm.bias.data[head, 0].clone()
            layers += [plain_norm, nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("heads", [None, torch.tensor([3, 1]), torch.tensor([4])], ids=["all", "two", "one"])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 4)])
def test_ensemble_equals_separate_mlps(script, shape, heads):
    critic = make_agent(script).critic
    obs, actions = torch.randn(*shape, 3), torch.randn(*shape, 2)
    qs = critic(obs, actions, heads)
    chosen = range(5) if heads is None else heads.tolist()
    assert qs.shape == (len(chosen), *shape)
    for q, head in zip(qs, chosen, strict=True):
        mlp = separate_mlp(critic, head)
        assert len(mlp) == 3 * 2 + 1
        for index in itertools.product(*map(range, shape)):  # one row at a time: no row may see another
            expected = mlp(torch.cat([obs[index], actions[index]]))
            torch.testing.assert_close(q[index], expected.squeeze(), rtol=1e-4, atol=1e-5)


def test_layer_norm_eps_is_the_published_one(script):
    """Where activations are as small as eps itself, 1e-5 (torch's default) in place of 1e-6 would show."""
    critic = make_agent(script).critic
    with torch.no_grad():
        critic.layers[0].weight.mul_(1e-3)
        critic.layers[0].bias.mul_(1e-3)
    obs, actions = torch.randn(7, 3), torch.randn(7, 2)
    expected = torch.stack([separate_mlp(critic, head)(torch.cat([obs, actions], -1)).squeeze(-1) for head in range(5)])
    torch.testing.assert_close(critic(obs, actions), expected, rtol=1e-4, atol=1e-5)


def test_random_min_is_the_minimum_of_a_random_subset(script):
    """Every subset of two heads is drawn, about equally often, one for all rows of a call."""
    critic = make_agent(script).critic
    obs, actions = torch.randn(4, 3), torch.randn(4, 2)
    with torch.no_grad():
        # Heads far apart, in another order in every row: the minimum names the smaller head, four rows the subset.
        order = torch.stack([torch.randperm(5) for _ in range(4)], dim=1).float()  # (E, B)
        assert len({tuple(order[list(pair)].amin(0).tolist()) for pair in itertools.combinations(range(5), 2)}) == 10
        critic.forward = lambda obs, actions, heads: order[heads]
        counts = Counter()
        for _ in range(2000):
            q = critic.random_min(obs, actions, 2)
            fits = [p for p in itertools.combinations(range(5), 2) if torch.equal(q, order[list(p)].amin(0))]
            assert len(fits) == 1
            counts[fits[0]] += 1
    assert len(counts) == 10
    assert 130 < min(counts.values()) and max(counts.values()) < 270  # 200 expected, standard deviation 13


@pytest.mark.parametrize("num", [1, 3, 5])
def test_random_min_by_brute_force(script, num):
    critic = make_agent(script).critic
    obs, actions = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    mlps = [separate_mlp(critic, head) for head in range(5)]
    with torch.no_grad():
        qs = [mlp(torch.cat([obs, actions], -1)).squeeze(-1) for mlp in mlps]
        minima = [torch.stack([qs[i] for i in subset]).amin(0) for subset in itertools.combinations(range(5), num)]
        q = critic.random_min(obs, actions, num)
    assert any(torch.allclose(q, minimum, rtol=1e-4, atol=1e-5) for minimum in minima)  # of one subset for all rows


def test_heads_start_different_and_xavier_uniform(script):
    critic = script.Critic(30, 10, make_args(script, hidden_dim=80, hidden_layers=3, num_critics=4))
    for layer in [*critic.layers, critic.output]:
        bound = math.sqrt(6 / sum(layer.weight.shape[1:]))
        for head, other in itertools.pairwise(layer.weight):
            assert not torch.equal(head, other)
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not layer.bias.any()


# --------------------------------------------------------------------------------------------- denoising network


def slow_denoising_network(network, noisy_action: Tensor, obs: Tensor, time: float) -> Tensor:
    """One row through the published architecture, written out."""
    angles = [2 * math.pi * time * f for f in network.frequencies.tolist()]
    code = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
    first, second = network.time_mlp[0], network.time_mlp[2]
    code = first.weight @ code + first.bias
    code = second.weight @ (code * torch.sigmoid(code)) + second.bias
    x = network.input.weight @ torch.cat([noisy_action, obs, code]) + network.input.bias
    for block in network.blocks:
        y = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-6) * block.norm.weight + block.norm.bias
        y = block.widen.weight @ y + block.widen.bias
        x = x + block.narrow.weight @ (y * torch.sigmoid(y)) + block.narrow.bias
    return network.output.weight @ (x * torch.sigmoid(x)) + network.output.bias


def test_denoising_network_equals_its_definition(script):
    network = make_agent(script).base_policy.network
    actions, obs, times = torch.randn(5, 2), torch.randn(5, 3), torch.tensor([[1.0], [2.0], [0.3], [10.0], [0.0]])
    with torch.no_grad():
        expected = [
            slow_denoising_network(network, *row) for row in zip(actions, obs, times.squeeze(-1).tolist(), strict=True)
        ]
        per_row = network(actions, obs, network.time_code(times))
        torch.testing.assert_close(per_row, torch.stack(expected), rtol=1e-4, atol=1e-4)
        shared = network(actions, obs, network.time_code(torch.tensor([2.0])))  # one time for the whole batch
        expected = [slow_denoising_network(network, a, o, 2.0) for a, o in zip(actions, obs, strict=True)]
    torch.testing.assert_close(shared, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_denoising_network_has_the_published_sizes_and_init(script):
    """64 frequencies, time MLP 128-256-256, three blocks of 256-1024-256; Xavier, in the blocks LeCun-normal."""
    network = script.BasePolicy(20, 10, script.Args()).network
    assert network.frequencies.shape == (64,) and network.frequencies.requires_grad
    assert network.frequencies.std().item() == pytest.approx(0.2, rel=0.3)
    assert [layer.weight.shape for layer in (network.time_mlp[0], network.time_mlp[2])] == [(256, 128), (256, 256)]
    assert network.input.weight.shape == (256, 10 + 20 + 256) and network.output.weight.shape == (10, 256)
    assert len(network.blocks) == 3
    for layer in (network.time_mlp[0], network.time_mlp[2], network.input, network.output):
        assert layer.weight.abs().max() <= math.sqrt(6 / sum(layer.weight.shape))
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / sum(layer.weight.shape)), rel=0.1)
        assert not layer.bias.any()
    for block in network.blocks:
        assert block.widen.weight.shape == (1024, 256) and block.narrow.weight.shape == (256, 1024)
        for layer in (block.widen, block.narrow):
            std = layer.weight.shape[1] ** -0.5
            assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
            assert layer.weight.abs().max() <= 2 * std / 0.87962566 + 1e-6  # cut at two of its standard deviations
            assert not layer.bias.any()


# --------------------------------------------------------------------------------------------------- edit policy


def edit_distribution(policy, obs: Tensor, base_actions: Tensor) -> TransformedDistribution:
    """The edit policy's distribution, by torch.distributions."""
    x = torch.cat([obs, base_actions], -1)
    for layer in policy.layers:
        x = torch.relu(x @ layer.weight.T + layer.bias)
    mean = x @ policy.mean.weight.T + policy.mean.bias
    log_std = torch.clip(x @ policy.log_std.weight.T + policy.log_std.bias, -20, 2)
    return TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(), AffineTransform(0, policy.scale)])


@pytest.mark.parametrize("edit_scale", [0.05, 0.7])
def test_edit_log_prob_equals_torch_distributions(script, edit_scale):
    policy = make_agent(script, action_dim=4, edit_scale=edit_scale).edit_policy.double()
    obs, base_actions = torch.randn(50, 3).double(), torch.rand(50, 4).double() * 2 - 1
    with torch.no_grad():
        edits, log_prob = policy(obs, base_actions)
        distribution = edit_distribution(policy, obs, base_actions)
        inside = (edits.abs() < edit_scale * (1 - 1e-6)).all(-1)  # where torch's inverse tanh is exact
        expected = distribution.log_prob(edits).sum(-1)
    assert edits.shape == (50, 4) and log_prob.shape == (50,)
    assert (edits.abs() <= edit_scale).all()
    assert inside.sum() > 30
    torch.testing.assert_close(log_prob[inside], expected[inside], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("edit_scale", [0.05, 0.3, 1.0])
def test_edit_density_integrates_to_one(script, edit_scale):
    """The density at 100,000 sampled edits, integrated over (-edit_scale, edit_scale) by the trapezoid rule."""
    policy = make_agent(script, action_dim=1, edit_scale=edit_scale).edit_policy.double()
    obs, base_action = torch.randn(3).double(), torch.tensor([0.3]).double()
    with torch.no_grad():
        policy.log_std.bias.fill_(-0.3)
        policy.log_std.weight.mul_(0.1)
        edits, log_prob = policy(obs.expand(100_000, -1), base_action.expand(100_000, -1))
    order = np.argsort(edits.squeeze().numpy())
    points, density = edits.squeeze().numpy()[order], log_prob.exp().numpy()[order]
    integral = np.concatenate([[0], np.cumsum(np.diff(points) * (density[1:] + density[:-1]) / 2)])
    assert integral[-1] == pytest.approx(1, abs=2e-3)
    # ... and it is the density of these very samples: its integral counts them.
    share = np.arange(len(points)) / len(points)
    assert np.abs(integral - share).max() < 0.01


@pytest.mark.parametrize("bias, expected", [(100.0, 2.0), (-100.0, -20.0)])
def test_edit_log_std_is_clipped(script, bias, expected):
    policy = make_agent(script, edit_scale=0.5).edit_policy.double()
    obs, base_actions = torch.randn(2000, 3).double(), torch.zeros(2000, 2).double()
    with torch.no_grad():
        policy.log_std.bias.fill_(bias)
        policy.mean.weight.zero_()
        policy.mean.bias.zero_()
        edits, log_prob = policy(obs, base_actions)
        u = torch.atanh((edits / 0.5).clamp(-1 + 1e-15, 1 - 1e-15))
    assert log_prob.isfinite().all()
    quartile = 0.6744897501960817 * math.exp(expected)  # half of a Gaussian lies within .674 standard deviations
    assert u.abs().median().item() == pytest.approx(quartile, rel=0.1)


def test_edit_log_prob_is_finite_where_tanh_saturates(script):
    policy = make_agent(script, edit_scale=0.1).edit_policy
    with torch.no_grad():
        policy.mean.bias.fill_(200.0)
        edits, log_prob = policy(torch.randn(20, 3), torch.zeros(20, 2))
    assert torch.equal(edits, torch.full((20, 2), 0.1))
    assert log_prob.isfinite().all() and (log_prob > 50).all()


def test_edit_dropout_acts_in_training_only(script):
    policy = make_agent(script, edit_dropout=0.5).edit_policy
    obs, base_actions = torch.randn(20, 3), torch.randn(20, 2)
    with torch.no_grad():
        policy.log_std.bias.fill_(-1000.0)  # no noise to speak of: what varies is dropout
        first, second = policy(obs, base_actions)[0], policy(obs, base_actions)[0]
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
        first, second = policy(obs, base_actions, train=True)[0], policy(obs, base_actions, train=True)[0]
        assert ((first - second).abs() > 1e-4).any(-1).sum() > 10


def test_edit_policy_depends_on_the_base_action(script):
    policy = make_agent(script).edit_policy
    obs, noise_free = torch.randn(5, 3), -1000.0
    with torch.no_grad():
        policy.log_std.bias.fill_(noise_free)
        change = policy(obs, torch.full((5, 2), 0.9))[0] - policy(obs, torch.full((5, 2), -0.9))[0]
    assert (change.abs() > 1e-4).any()
