"""Q-Flow: networks, roll-out and the three losses against slower versions, gradients, and a bandit with two modes."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_agent, make_args, make_batch

from baselines import qflow


def agent_and_batch(**flags):
    agent = make_agent(qflow, num_critics=3, denoising_steps=4, time_frequencies=3, gamma=0.9, **flags)
    return agent.double(), qflow.Batch(*(field.double() for field in make_batch(qflow, 7)))


def slow_values(network, *inputs) -> torch.Tensor:
    """(heads, rows): Linear, GELU, LayerNorm, again and again, then a Linear."""
    values, last = [], len(network.scales)
    for head in range(3):
        x = torch.cat(inputs, -1)
        for i in range(last):
            x = F.gelu(x @ network.weights[i][head] + network.biases[i][head])
            x = F.layer_norm(x, x.shape[-1:], network.scales[i][head, 0], network.shifts[i][head, 0], 1e-6)
        values.append(x @ network.weights[last][head] + network.biases[last][head])
    return torch.stack(values).squeeze(-1)


def slow_inner_values(agent, obs, x, t) -> torch.Tensor:
    code = [wave(16**k * t) for wave in (torch.sin, torch.cos) for k in range(3)]  # three frequencies: 1, 16, 256
    return slow_values(agent.inner_value, obs, x, *code)


def slow_velocity(agent, obs, x, t) -> torch.Tensor:
    x = torch.cat([obs, x, t], -1)
    for layer in agent.policy.layers:
        x = F.gelu(x @ layer.weight.T + layer.bias)
    return x @ agent.policy.output.weight.T + agent.policy.output.bias


def slow_flow(agent, obs, x, t) -> torch.Tensor:
    for _ in range(4):
        step = (1 - t).clamp(max=0.25)
        x, t = x + step * slow_velocity(agent, obs, x, t), t + step
    return x.clamp(-1, 1)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.6, 0.75, 0.99])
def test_flow_ends_at_time_1_from_any_time(t):
    (agent, batch), times = agent_and_batch(), torch.tensor([[0.2], [t]]).double()
    obs, x = batch.obs[:2], batch.actions[:2]
    torch.testing.assert_close(agent.policy.flow(obs, x, times), slow_flow(agent, obs, x, times))
    agent.policy.forward = lambda obs, x, t: torch.full_like(x, -0.7)  # by hand: a constant velocity, then the clip
    torch.testing.assert_close(agent.policy.flow(obs, x, times), (x - 0.7 * (1 - times)).clamp(-1, 1))


@pytest.mark.parametrize("agg", ["mean", "min"])
def test_losses(agg):
    """The guidance is measured by central differences of the mean, also where the targets take the minimum."""
    agent, batch = agent_and_batch(critic_agg=agg, guidance_lambda=0.5)
    x, t, line = qflow.points_between(batch.actions)
    torch.testing.assert_close(line, batch.actions - (x - t * batch.actions) / (1 - t))  # action - noise
    torch.manual_seed(2)
    losses = [agent.critic_loss(batch)[0], agent.inner_value_loss(batch.obs, x, t)[0]]
    losses.append(agent.policy_loss(batch.obs, x, t, line)[0])
    torch.manual_seed(2)
    next_actions = slow_flow(agent, batch.next_obs, torch.randn(7, 2).double(), 0 * t)
    values = [slow_values(agent.target_critic, batch.next_obs, next_actions)]
    values.append(slow_values(agent.target_critic, batch.obs, slow_flow(agent, batch.obs, x, t)))
    values.append(slow_inner_values(agent, batch.obs, x, t))
    next_q, q, inner = (value.mean(0) if agg == "mean" else value.amin(0) for value in values)
    target = batch.rewards + 0.9 * (1 - batch.terminations) * next_q
    slow = [(slow_values(agent.critic, batch.obs, batch.actions) - target).square().mean(), (inner - q).square().mean()]
    moved = [x + sign * h for h in 1e-5 * torch.eye(2).double() for sign in (1, -1)]
    guides = torch.stack([slow_inner_values(agent, batch.obs, point, t).mean(0) for point in moved], -1)
    velocity = line + (guides[:, ::2] - guides[:, 1::2]) / 2e-5 / 0.5
    slow.append((slow_velocity(agent, batch.obs, x, t) - velocity).square().sum(-1).mean())
    torch.testing.assert_close(torch.stack(losses), torch.stack(slow), rtol=1e-6, atol=0)


def test_every_loss_teaches_one_network_only():
    agent, batch = agent_and_batch()
    x, t, velocity = qflow.points_between(batch.actions)
    losses = {"critic": agent.critic_loss(batch), "inner_value": agent.inner_value_loss(batch.obs, x, t)}
    losses["policy"] = agent.policy_loss(batch.obs, x, t, velocity)
    for name, (loss, _) in losses.items():
        grads = torch.autograd.grad(loss, list(agent.parameters()), allow_unused=True)
        learns = [key.startswith(f"{name}.") for key, _ in agent.named_parameters()]
        assert [grad is not None and bool(grad.abs().max() > 0) for grad in grads] == learns, name


@pytest.mark.parametrize("guidance_lambda, low, high", [(0.5, 0.95, 1.0), (1e6, 0.4, 0.6)])
def test_bandit_with_two_modes(guidance_lambda, low, high):
    """Half of the data is near -.6, half near .6. Only there the reward is 1. Value takes it; imitation keeps both."""
    args = make_args(qflow, hidden_dim=32, denoising_steps=5, learning_rate=3e-3, guidance_lambda=guidance_lambda)
    agent, zeros = qflow.Agent(1, 1, args), torch.zeros(5, 64, 1)
    optimizers = qflow.Optimizers(agent, args)
    for _ in range(60):
        actions = 1.2 * torch.randint(2, (5, 64, 1)) - 0.6 + 0.05 * torch.randn(5, 64, 1)
        batch = qflow.Batch(zeros, actions, (actions[..., 0] > 0).float(), zeros, torch.ones(5, 64))
        qflow.update(agent, optimizers, batch)
    assert low <= (agent(torch.zeros(1000, 1)) > 0).float().mean() <= high
