"""variants/expo_faster.py: the choice of a noise, targets and losses, against slow versions; and whole updates."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_agent, make_args, make_batch
from running import small_args

import expo_flow
from variants import expo_faster as faster


def values(critic, obs, action) -> list[float]:  # of every head
    return critic(obs.unsqueeze(0), action.unsqueeze(0)).flatten().tolist()


def test_the_flow_is_that_of_the_parent():
    policy, parent, both = make_agent(faster).base_policy, expo_flow.BasePolicy(3, 2, make_args(expo_flow)), []
    parent.load_state_dict(policy.state_dict())
    for each in (policy, parent):
        torch.manual_seed(5)
        loss = each.loss(torch.ones(9, 3), torch.zeros(9, 2))
        both.append(torch.cat([loss[None], each.sample(torch.ones(9, 3)).flatten()]))
    assert torch.equal(*both)


def test_the_best_noise_is_that_of_the_highest_score_of_two_heads_of_the_average():
    agent, obs, seen = make_agent(faster, num_noises=7, num_critics=2), torch.randn(2, 5, 3), []
    agent.target_filter.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    noise, spread = agent.choose_noise(obs, 0.0)
    for row in np.ndindex(2, 5):
        scores = [min(values(agent.target_filter, obs[row], z)) for z in seen[0][row]]
        assert torch.equal(noise[row][0], seen[0][row][np.argmax(scores)])
        assert spread[row].item() == pytest.approx(np.std(scores), rel=1e-3)


@pytest.mark.parametrize("temperature, scale", [(1.0, 1.0), (0.3, 50.0), (1.0, 0.0)])
def test_training_draws_with_the_softmax_of_z_scores(temperature, scale):
    agent, scores, rows = make_agent(faster, num_noises=4), scale * np.array([0.1, 0.5, 0.7, -0.4]), 40_000
    agent.target_filter.random_min = lambda obs, noises, num: torch.tensor(scores).expand(noises.shape[:-1])
    torch.manual_seed(1)
    noise, _ = agent.choose_noise(torch.zeros(rows, 3), temperature)
    torch.manual_seed(1)
    shares = (torch.randn(rows, 4, 2) == noise).all(-1).float().mean(0)
    weights = np.exp((scores - scores.mean()) / max(scores.std(), 1e-6) / temperature)
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.0125)  # five standard deviations


def test_the_average_makes_the_action_and_the_lower_critic_decides_about_its_edit():
    agent, obs, noise, edited = make_agent(faster, num_critics=2), torch.randn(40, 3), torch.randn(40, 1, 2), set()
    agent.choose_noise = lambda obs, temperature: (noise, None)
    agent.edit_policy.forward = lambda obs, actions: (0.3 * obs[..., :2], None)
    base, network = noise[:, 0], agent.target_base_policy.network
    for k in range(10):  # nothing is drawn
        base = base + network(base, obs, network.time_code(torch.tensor([k / 10]))) / 10
    for o, b, action in zip(obs, base.clamp(-1, 1), agent(obs), strict=True):
        both = [b, (b + 0.3 * o[:2]).clamp(-1, 1)]
        edited.add(best := int(np.argmax([min(values(agent.target_critic, o, a)) for a in both])))
        torch.testing.assert_close(action, both[best], atol=1e-5, rtol=0)
    assert edited == {0, 1}


def test_one_critic_ranks_another_values_and_the_filter_gets_the_lower_one():
    agent, batch, seen = make_agent(faster, num_critics=2, gamma=0.9), make_batch(faster, 12), set()
    candidates, rows = torch.rand(12, 2, 2) * 2 - 1, range(12)
    q = np.array([[values(agent.target_critic, batch.next_obs[i], a) for a in candidates[i]] for i in rows])
    for _ in range(20):
        target_q, filter_target, choice = agent.td_target(batch, candidates)
        np.testing.assert_allclose(filter_target, q[:, 0].min(-1), atol=1e-5)  # of the action without its edit
        ranks = [head for head in (0, 1) if choice.tolist() == [int(q[i, 1, head] > q[i, 0, head]) for i in rows]]
        next_q = torch.tensor([q[i, choice[i], 1 - ranks[0]] for i in rows])
        np.testing.assert_allclose(target_q, batch.rewards + 0.9 * (1 - batch.terminations) * next_q, atol=1e-5)
        seen.update(ranks)
    assert seen == {0, 1}


def test_losses_and_whose_gradient_they_have():
    agent, batch, noise = make_agent(faster, num_critics=3), make_batch(faster, 8), torch.randn(8, 1, 2)
    targets, everything = [*torch.randn(2, 8)], list(agent.parameters())
    agent.td_target = lambda batch, candidates: (*targets, torch.tensor([0, 1, 1, 0, 1, 1, 1, 1]))
    loss, filter_target, info = agent.critic_loss(batch, torch.zeros(8, 2, 2))
    filter_loss = agent.filter_loss(batch.next_obs, noise, filter_target)
    assert info["edit/selected_share"] == 0.75 and filter_target is targets[1]
    for i, (value, network) in enumerate(((loss, agent.critic), (filter_loss, agent.filter))):
        inputs = [(batch.obs, batch.actions), (batch.next_obs, noise[:, 0])][i]
        slow = [np.subtract(values(network, *row), t.item()) ** 2 for *row, t in zip(*inputs, targets[i], strict=True)]
        assert value.item() == pytest.approx(np.mean(slow), rel=1e-4)
        gradients = zip(everything, torch.autograd.grad(value, everything, allow_unused=True), strict=True)
        assert {id(p) for p, gradient in gradients if gradient is not None} <= {id(p) for p in network.parameters()}


@pytest.mark.parametrize("edits", [True, False])
def test_update_with_the_noises_that_the_filter_chose_before(edits):
    agent, steps, chosen, learned = make_agent(faster, tau=0.1, edits=edits, filter_temperature=0.7), [], [], []
    optimizers, average, batch = faster.Optimizers(agent, agent.args), copy.deepcopy(agent), make_batch(faster, 4, 8)
    optimizers.critic.register_step_post_hook(lambda *_: steps.append(1))
    optimizers.filter.register_step_post_hook(lambda *_: faster.move_towards(average.target_filter, agent.filter, 0.1))
    choose, critic_loss, filter_loss = agent.choose_noise, agent.critic_loss, agent.filter_loss

    def checked(rows, candidates):
        base_actions = agent.base_policy.sample(rows.next_obs[:, None], chosen[len(steps)][2])
        assert torch.equal(rows.next_obs, chosen[len(steps)][0]) and torch.allclose(candidates[:, :1], base_actions)
        return critic_loss(rows, candidates)

    agent.critic_loss = checked
    agent.choose_noise = lambda obs, t: chosen.append((obs, t, *choose(obs, t))) or chosen[-1][2:]
    agent.filter_loss = lambda obs, z, q: learned.append(torch.cat([obs, z[:, 0]], -1)) or filter_loss(obs, z, q)
    info = faster.update(agent, optimizers, batch)
    assert len(steps) == len(chosen) == len(learned) == 4 and ("edit/alpha" in info) == edits
    for obs, temperature, noise, _ in chosen:
        assert torch.equal(learned.pop(0), torch.cat([obs, noise[:, 0]], -1)) and temperature == 0.7
    assert info["filter/spread"].item() == pytest.approx(np.mean([c[3].mean().item() for c in chosen]), rel=1e-5)
    torch.testing.assert_close(agent.target_filter.state_dict(), average.target_filter.state_dict())


def test_training_draws_and_evaluation_takes_the_best(monkeypatch, tmp_path):
    choose, seen, flags = faster.Agent.choose_noise, set(), {"batch_size": 6, "eval_episodes": 4, "total_timesteps": 4}
    monkeypatch.setattr(faster.Agent, "choose_noise", lambda *a: seen.add((len(a[1]), a[2])) or choose(*a))
    faster.main(small_args(faster, tmp_path / "run", learning_starts=0, filter_temperature=0.5, **flags))
    assert seen == {(1, 0.5), (6, 0.5), (4, 0.0)}  # acting, updates, evaluation
