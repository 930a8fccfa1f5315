"""Q-Flow: networks, roll-out and the three losses against slower versions, gradients, and a bandit with two modes."""

import math

import pytest
import torch
from conftest import make_agent, make_args, make_batch

from baselines import qflow
from utils import InputError
from utils.tasks import parse_args


def agent_and_batch(**flags):
    agent = make_agent(qflow, num_critics=3, denoising_steps=4, time_frequencies=3, gamma=0.9, **flags)
    return agent.double(), qflow.Batch(*(field.double() for field in make_batch(qflow, 7)))


def slow_value(network, head: int, *inputs) -> torch.Tensor:
    """One head for one row: Linear, GELU, LayerNorm, again and again, then a Linear."""
    x, last = torch.cat(inputs), len(network.scales)
    for i in range(last):
        x = x @ network.weights[i][head] + network.biases[i][head, 0]
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt() * network.scales[i][head, 0]
        x = x + network.shifts[i][head, 0]
    return (x @ network.weights[last][head] + network.biases[last][head, 0])[0]


def slow_inner_values(agent, obs, x, t: float) -> list[torch.Tensor]:
    code = [wave(16**k * t) for wave in (math.sin, math.cos) for k in range(3)]  # three frequencies: 1, 16, 256
    return [slow_value(agent.inner_value, e, obs, x, torch.tensor(code).double()) for e in range(3)]


def slow_velocity(agent, obs, x, t: float) -> torch.Tensor:
    x = torch.cat([obs, x, torch.tensor([t]).double()])
    for layer in agent.policy.layers:
        x = torch.nn.functional.gelu(layer.weight @ x + layer.bias)
    return agent.policy.output.weight @ x + agent.policy.output.bias


def slow_flow(agent, obs, x, t: float) -> torch.Tensor:
    while t < 1 - 1e-9:
        step = min(1 / 4, 1 - t)
        x, t = x + step * slow_velocity(agent, obs, x, t), t + step
    return x.clamp(-1, 1)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.6, 0.75, 0.99])
def test_flow_ends_at_time_1_from_any_time(t):
    (agent, batch), times = agent_and_batch(), torch.tensor([[0.2], [t]]).double()
    obs, x = batch.obs[:2], batch.actions[:2]
    torch.testing.assert_close(agent.policy.flow(obs, x, times)[1], slow_flow(agent, obs[1], x[1], times[1].item()))
    agent.policy.forward = lambda obs, x, t: torch.full_like(x, -0.7)  # by hand: a constant velocity, then the clip
    torch.testing.assert_close(agent.policy.flow(obs, x, times), (x - 0.7 * (1 - times)).clamp(-1, 1))


@pytest.mark.parametrize("agg, aggregate", [("mean", lambda values: sum(values) / 3), ("min", min)])
def test_losses_row_by_row(agg, aggregate):
    """The guidance is measured by central differences of the mean, also where the targets take the minimum."""
    (agent, batch), slow = agent_and_batch(critic_agg=agg, guidance_lambda=0.5), torch.zeros(3).double()
    x, t, line = qflow.points_between(batch.actions)
    torch.testing.assert_close(line, batch.actions - (x - t * batch.actions) / (1 - t))  # action - noise
    torch.manual_seed(2)
    losses = [agent.critic_loss(batch)[0], agent.inner_value_loss(batch.obs, x, t)[0]]
    losses.append(agent.policy_loss(batch.obs, x, t, line)[0])
    torch.manual_seed(2)
    for row, z in enumerate(torch.randn(7, 2).double()):
        obs, action, reward, next_obs, end = (field[row] for field in batch)
        next_action, time = slow_flow(agent, next_obs, z, 0.0), t[row].item()
        next_q = aggregate([slow_value(agent.target_critic, e, next_obs, next_action) for e in range(3)])
        target = reward + 0.9 * (1 - end) * next_q
        slow[0] += sum((slow_value(agent.critic, e, obs, action) - target) ** 2 for e in range(3)) / 3
        becomes = slow_flow(agent, obs, x[row], time)
        q = aggregate([slow_value(agent.target_critic, e, obs, becomes) for e in range(3)])
        slow[1] += (aggregate(slow_inner_values(agent, obs, x[row], time)) - q) ** 2
        for i, h in enumerate(1e-5 * torch.eye(2).double()):
            up, down = (sum(slow_inner_values(agent, obs, x[row] + d, time)) / 3 for d in (h, -h))
            velocity = line[row, i] + (up - down) / 2e-5 / 0.5
            slow[2] += (slow_velocity(agent, obs, x[row], time)[i] - velocity) ** 2
    torch.testing.assert_close(torch.stack(losses), slow / 7, rtol=1e-6, atol=0)


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


def test_lambda_0_is_refused():
    with pytest.raises(InputError, match=r"--guidance-lambda 0\.0 must be at least"):
        parse_args(qflow.Args, argv=["--guidance-lambda", "0"])
