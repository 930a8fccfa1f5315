"""Networks against torch's own layers, brute force and numeric integration. test_authors.py has the rest."""

import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import make_agent, make_args
from torch import nn

# ------------------------------------------------------------------------------------------------------- critics


def separate_mlp(critic, head: int) -> nn.Sequential:
    """Head `head` of the ensemble as an ordinary MLP of torch's own layers."""
    layers: list[nn.Module] = []
    for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
        layers.append(nn.Linear(*weight[head].shape))
        layers[-1].load_state_dict({"weight": weight[head].T, "bias": bias[head, 0]})
        if i < len(critic.scales):
            norm = nn.LayerNorm(weight.shape[2], eps=1e-6)
            norm.load_state_dict({"weight": critic.scales[i][head, 0], "bias": critic.shifts[i][head, 0]})
            layers += [norm, nn.ReLU()]
    assert len(layers) == 3 * 2 + 1
    return nn.Sequential(*layers)


@pytest.mark.parametrize("size", [1.0, 1e-3])  # activations near the LayerNorm's eps: torch's default 1e-5 would show
@pytest.mark.parametrize("heads", [None, torch.tensor([3, 1]), torch.tensor([4])], ids=["all", "two", "one"])
def test_ensemble_equals_separate_mlps(script, heads, size):
    critic = make_agent(script).critic
    with torch.no_grad():
        critic.weights[0].mul_(size)
        critic.biases[0].mul_(size)
    chosen = range(5) if heads is None else heads.tolist()
    for shape in [(6,), (1, 2, 4)]:
        obs, actions = torch.randn(*shape, 3), torch.randn(*shape, 2)
        qs = critic(obs, actions, heads)
        assert qs.shape == (len(chosen), *shape)
        for q, head in zip(qs, chosen, strict=True):
            mlp = separate_mlp(critic, head)
            for index in itertools.product(*map(range, shape)):  # one row at a time: no row may see another
                expected = mlp(torch.cat([obs[index], actions[index]]))
                torch.testing.assert_close(q[index], expected.squeeze(), rtol=1e-4, atol=1e-5)


def test_random_min_is_the_minimum_of_a_random_subset(script):
    """Every pair of heads is drawn, about equally often, one pair for all rows of a call."""
    critic = make_agent(script).critic
    # The heads' values are in another order in every row: the minima of the four rows tell which pair it was.
    order = torch.stack([torch.randperm(5) for _ in range(4)], dim=1).float()  # (E, B)
    pairs = {tuple(order[list(pair)].amin(0).tolist()): pair for pair in itertools.combinations(range(5), 2)}
    assert len(pairs) == 10
    critic.forward = lambda obs, actions, heads: order[heads]
    obs, actions = torch.randn(4, 3), torch.randn(4, 2)
    counts = Counter(pairs[tuple(critic.random_min(obs, actions, 2).tolist())] for _ in range(2000))
    assert len(counts) == 10
    assert 130 < min(counts.values()) and max(counts.values()) < 270  # 200 expected, standard deviation 13


def test_random_min_over_all_heads_draws_nothing(script, monkeypatch):
    """No copy of the weights is made where all heads count, and the minimum is over all of them."""
    critic, seen = make_agent(script).critic, []
    obs, actions = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    expected = critic(obs, actions).amin(0)
    forward = critic.forward
    critic.forward = lambda obs, actions, heads: seen.append(heads) or forward(obs, actions, heads)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: pytest.fail("heads were drawn"))
    assert torch.equal(critic.random_min(obs, actions, 5), expected) and seen == [None]


def test_heads_start_different_and_xavier_uniform(script):
    critic = script.Critic(30, 10, make_args(script, hidden_dim=80, hidden_layers=3, num_critics=4))
    assert [weight.shape[1:] for weight in critic.weights] == [(40, 80), (80, 80), (80, 80), (80, 1)]
    for weight in critic.weights:
        bound = math.sqrt(6 / sum(weight.shape[1:]))
        assert not any(torch.equal(head, other) for head, other in itertools.pairwise(weight))
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not any(parameter.any() for parameter in [*critic.biases, *critic.shifts])
    assert all((parameter == 1).all() for parameter in critic.scales)


# --------------------------------------------------------------------------------------------- denoising network


def test_denoising_network_has_the_published_sizes_and_init(script):
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


def test_edit_log_prob_is_finite_where_tanh_saturates(script):
    policy = make_agent(script, edit_scale=0.1).edit_policy
    torch.nn.init.constant_(policy.mean.bias, 200.0)
    edits, log_prob = policy(torch.randn(20, 3), torch.zeros(20, 2))
    assert (edits == 0.1).all() and log_prob.isfinite().all()
