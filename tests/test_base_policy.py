"""Base policies: flow matching as slow loops, and recovery of a known distribution. test_authors.py has diffusion."""

import math
import re
import textwrap

import pytest
import torch
from conftest import ROOT, make_agent, make_args

only_flow = pytest.mark.parametrize("script", ["expo_flow"], indirect=True)


def predict(policy, x: torch.Tensor, obs: torch.Tensor, time: float) -> torch.Tensor:
    """What the policy's network says about one row."""
    return policy.network(x, obs, policy.network.time_code(torch.tensor([time])))


@pytest.mark.parametrize("script", ["expo_diffusion"], indirect=True)
def test_ddim_as_in_the_docs_of_faster(script):
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "expo_faster.md").read_text(), re.S)[0]
    exec(textwrap.dedent(block), found := dict(vars(script)))
    policy, obs, noise = make_agent(script).base_policy, torch.randn(6, 3), torch.randn(6, 2)
    bars, x = [1.0, *policy.alpha_bars.tolist()], noise
    for k in range(10, 0, -1):
        eps = predict(policy, x, obs, k - 1.0)
        action = (x - (1 - bars[k]) ** 0.5 * eps) / bars[k] ** 0.5
        x = (bars[k - 1] ** 0.5 * action + (1 - bars[k - 1]) ** 0.5 * eps).clamp(-1, 1)
    torch.testing.assert_close(found["sample"](policy, obs, noise), x)


@pytest.mark.parametrize("script", ["expo_diffusion"], indirect=True)
def test_diffusion_loss_draws_every_level_equally_often(script):
    policy, seen = make_agent(script, denoising_steps=4).base_policy, []
    policy.network.time_code = lambda times: seen.extend(times.flatten().tolist()) or torch.zeros(len(times), 16)
    policy.loss(torch.randn(4000, 3), torch.randn(4000, 2))
    assert set(seen) == {0, 1, 2, 3} and min(map(seen.count, range(4))) > 850  # 1000 expected, standard deviation 27


@only_flow
def test_flow_loss_equals_a_slow_loop(script):
    policy = make_agent(script, action_dim=3).base_policy
    obs, actions = torch.randn(40, 3), torch.rand(40, 3) * 2 - 1
    with torch.no_grad():
        torch.manual_seed(5)
        loss = policy.loss(obs, actions)
        torch.manual_seed(5)  # the same random numbers
        times, noise, total = torch.rand(40, 1), torch.randn(40, 3), 0.0
        for row in range(40):
            t = float(times[row])
            velocity = predict(policy, (1 - t) * noise[row] + t * actions[row], obs[row], t)
            total += sum((float(velocity[j]) - float(actions[row, j] - noise[row, j])) ** 2 for j in range(3))
    assert loss.item() == pytest.approx(total / 40, rel=1e-4)


@only_flow
@pytest.mark.parametrize("steps", [1, 4])
def test_flow_sampler_equals_a_slow_loop(script, steps):
    policy, obs, outside = make_agent(script, denoising_steps=steps).base_policy, torch.randn(30, 3), 0
    torch.manual_seed(5)
    actions = policy.sample(obs)
    torch.manual_seed(5)
    start = torch.randn(30, 2)
    with torch.no_grad():
        for row in range(30):
            x = start[row]
            for k in range(steps):
                x = x + predict(policy, x, obs[row], k / steps) / steps
                outside += k < steps - 1 and bool((x.abs() > 1).any())
            torch.testing.assert_close(actions[row], x.clip(-1, 1), rtol=1e-4, atol=1e-4)
    assert steps == 1 or outside > 3  # x may leave [-1, 1] on the way: clipping at every step would show


# ---------------------------------------------------------------------------------------------------------- both


def test_samples_have_shape_range_and_no_gradient(script):
    policy = script.BasePolicy(3, 2, make_args(script))
    for shape in [(3,), (6, 3), (2, 5, 3)]:
        actions = policy.sample(torch.randn(*shape))
        assert actions.shape == (*shape[:-1], 2)
        assert actions.abs().max() <= 1 and not actions.requires_grad
    assert len(policy.sample(torch.zeros(200, 3)).unique(dim=0)) > 100  # a distribution, not one action


@pytest.mark.parametrize("script, least_near", [("expo_diffusion", 0.6), ("expo_flow", 0.75)], indirect=["script"])
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
