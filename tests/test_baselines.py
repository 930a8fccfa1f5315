"""The baselines: losses and TD targets against slower cases, their choice of actions, whole updates."""

import copy
import math
from typing import Any

import pytest
import torch
from conftest import make_agent, make_batch, same

from baselines import diffusion_ql, idql, qflow, rlpd

# Three critics, and the minimum over all of them, so that nothing in it is random.
FIXED: Any = {"num_critics": 3, "num_min_critics": 3, "gamma": 0.9}


# What an update does on every slice, and then on the last one: losses, and steps of optimizers.
UPDATES: dict[Any, tuple[str, str]] = {
    rlpd: ("critic_loss critic", "actor_loss actor alpha"),
    idql: ("value_loss value critic_loss critic", "loss base"),  # the target follows the new V
    diffusion_ql: ("critic_loss critic", "actor_loss actor"),
    qflow: ("critic_loss inner_value_loss policy_loss adam", ""),
}


@pytest.mark.parametrize("module", UPDATES, ids=lambda module: module.__name__)
def test_update_walks_through_the_slices(module):
    """Critics learn from one slice after the other, the policy from the last one (Q-Flow: from every one).

    Every network learns, and every average moves by its rate after each step.
    """
    rates: Any = {"tau": 0.1} if module in (rlpd, qflow) else {"tau": 0.1, "ema_rate": 0.2}
    agent, batch, order = make_agent(module, **rates), make_batch(module, 3, 8), []
    optimizers, before = module.Optimizers(agent, agent.args), copy.deepcopy(agent)
    for part, optimizer in vars(optimizers).items():
        if not part.endswith("decay"):
            optimizer.register_step_post_hook(lambda *_, part=part: order.append(part))
    critic, target_critic = vars(optimizers)[UPDATES[module][0].split()[-1]], copy.deepcopy(agent.target_critic)
    critic.register_step_post_hook(lambda *_: module.move_towards(target_critic, agent.critic, 0.1))

    def spy(owner, loss: str) -> None:
        original = getattr(owner, loss)

        def watched(rows, *rest):
            u = [torch.equal(getattr(rows, "obs", rows), obs) for obs in batch.obs].index(True)
            order.append(f"{loss} {u}")
            if module is diffusion_ql and rest:  # with the actions of its own next observations
                assert torch.equal(rest[0][:, 0], batch.next_obs[u][:, :2].tanh())
            return original(rows, *rest)

        setattr(owner, loss, watched)

    for loss in (word for word in " ".join(UPDATES[module]).split() if word.endswith("loss")):
        spy(agent.base_policy if loss == "loss" else agent, loss)
    if module is diffusion_ql:
        agent.target_actor.sample = lambda obs: obs[..., :2].tanh()
    module.update(agent, optimizers, batch)
    words = [(word, u) for u, part in ((0, 0), (1, 0), (2, 0), (2, 1)) for word in UPDATES[module][part].split()]
    assert order == [f"{word} {u}" if word.endswith("loss") else word for word, u in words]
    assert not any(same(child, getattr(before, part)) for part, child in agent.named_children())
    torch.testing.assert_close(agent.target_critic.state_dict(), target_critic.state_dict())
    for average, online in (("target_base_policy", "base_policy"), ("target_actor", "actor")):
        if hasattr(agent, average):
            module.move_towards(getattr(before, average), getattr(agent, online), 0.2)
            torch.testing.assert_close(getattr(agent, average).state_dict(), getattr(before, average).state_dict())


# ----------------------------------------------------------------------------------------------------------- RLPD


@pytest.mark.parametrize("backup_entropy", [False, True])
def test_rlpd_target(backup_entropy):
    agent, batch = make_agent(rlpd, backup_entropy=backup_entropy, **FIXED), make_batch(rlpd, 12)
    torch.manual_seed(5)
    target_q = agent.td_target(batch)
    torch.manual_seed(5)
    next_actions, log_prob = agent.actor(batch.next_obs)
    assert not target_q.requires_grad and 0 < batch.terminations.sum() < 12
    bonus = -agent.log_alpha.exp() * log_prob if backup_entropy else 0
    next_q = agent.target_critic(batch.next_obs, next_actions).amin(0) + bonus
    torch.testing.assert_close(target_q, batch.rewards + 0.9 * (1 - batch.terminations) * next_q)


@pytest.mark.parametrize("module", [rlpd, diffusion_ql], ids=["rlpd", "diffusion_ql"])
def test_targets_take_the_minimum_over_a_random_pair(module):
    agent, batch = make_agent(module, num_critics=3), make_batch(module, 1)._replace(terminations=torch.zeros(1))
    next_actions, seen = torch.rand(1, 1, 2), set()
    agent.actor.forward = lambda obs: (next_actions[:, 0], torch.zeros(1))
    qs = agent.target_critic(batch.next_obs, next_actions[:, 0]).squeeze(-1).tolist()
    pairs = [batch.rewards.item() + 0.99 * min(qs[i], qs[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    for _ in range(40):
        target_q = agent.td_target(batch, *([] if module is rlpd else [next_actions])).item()
        matches = [k for k, value in enumerate(pairs) if abs(value - target_q) < 1e-5]
        assert matches
        seen.update(matches)
    assert len(seen) == 3


def test_rlpd_actor_loss_is_sacs():
    agent, batch = make_agent(rlpd, **FIXED), make_batch(rlpd, 16)
    torch.manual_seed(3)
    loss, entropy, info = agent.actor_loss(batch)
    torch.manual_seed(3)
    actions, log_prob = agent.actor(batch.obs)
    slow = (agent.log_alpha.exp() * log_prob - agent.critic(batch.obs, actions).mean(0)).mean()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-4)
    assert entropy.item() == info["actor/entropy"].item() == pytest.approx(-log_prob.mean().item(), rel=1e-5)
    assert torch.autograd.grad(loss, [agent.log_alpha], allow_unused=True) == (None,)
    assert agent.target_entropy == -1


def test_rlpd_log_prob_equals_torch_distributions():
    agent, obs = make_agent(rlpd).double(), torch.randn(50, 3, dtype=torch.float64)
    torch.nn.init.constant_(agent.actor.log_std.bias, -2.0)  # where 1 - tanh^2 itself has digits enough
    actions, log_prob = agent.actor(obs)
    mean, log_std = agent.actor.gaussian(obs)
    slow = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions.atanh()) - torch.log(1 - actions**2)
    torch.testing.assert_close(log_prob, slow.sum(-1), atol=1e-5, rtol=1e-5)


def test_rlpd_alpha_grows_while_the_entropy_is_below_its_target():
    agent = make_agent(rlpd, alpha_lr=1e-2)
    before = agent.log_alpha.item()
    torch.nn.init.constant_(agent.actor.log_std.bias, -9.0)
    rlpd.update(agent, rlpd.Optimizers(agent, agent.args), make_batch(rlpd, 1, 64))
    assert agent.log_alpha.item() == pytest.approx(before + 1e-2, abs=1e-4)


def test_rlpd_evaluates_the_mode_and_trains_with_samples():
    agent, obs = make_agent(rlpd), torch.randn(4, 3)
    assert torch.equal(agent(obs), agent.actor.gaussian(obs)[0].tanh())
    assert not torch.equal(agent.sample_actions(obs), agent.sample_actions(obs))


# ----------------------------------------------------------------------------------------------------------- IDQL


def test_idql_value_loss():
    agent, batch = make_agent(idql, expectile=0.8, **FIXED), make_batch(idql, 12)
    difference = agent.target_critic(batch.obs, batch.actions).amin(0) - agent.value(batch.obs)
    weights = torch.tensor([0.8 if d > 0 else 0.2 for d in difference])
    torch.testing.assert_close(agent.value_loss(batch)[0], (weights * difference**2).mean())


def test_idql_critic_loss_of_terminal_and_ordinary_rows():
    agent, batch = make_agent(idql, **FIXED), make_batch(idql, 2)
    batch = batch._replace(rewards=torch.tensor([1.0, -1.0]), terminations=torch.tensor([1.0, 0.0]))
    agent.value.forward = lambda obs: torch.where((obs == batch.next_obs).all(-1), 10.0, -77.0)
    targets, qs = [1.0, -1.0 + 0.9 * 10], agent.critic(batch.obs, batch.actions)  # terminal: the reward alone
    slow = sum((qs[e, row].item() - targets[row]) ** 2 for e in range(3) for row in range(2)) / 6
    assert agent.critic_loss(batch)[0].item() == pytest.approx(slow, rel=1e-5)


def test_idql_takes_the_best_candidate_of_the_average():
    agent, obs = make_agent(idql, **FIXED), torch.randn(9, 3)
    torch.manual_seed(4)
    actions = agent(obs)
    torch.manual_seed(4)
    many_obs = obs.unsqueeze(1).expand(9, 6, 3)
    candidates = agent.target_base_policy.sample(many_obs)
    best = agent.target_critic(many_obs, candidates).amin(0).argmax(1)
    assert torch.equal(actions, candidates[range(9), best])
    torch.manual_seed(4)
    assert torch.equal(agent.training_actions(obs), actions)  # by default the best one acts, too


def test_idql_expectile_selection_weighs_both_sides_of_v():
    agent, rows = make_agent(idql, selection="expectile", expectile=0.9), 20_000
    candidates = torch.tensor([[-1.0, 0.0], [0.5, 0.0], [1.0, 0.0]]).expand(rows, 3, 2)
    q = torch.tensor([-1.0, -2.0, 3.0]).expand(rows, 3)  # V is 0: one candidate is better, two are worse
    agent.candidates_and_q = lambda _: (candidates, q)
    agent.value.forward = lambda obs: torch.zeros(obs.shape[:-1])
    actions = agent.training_actions(torch.zeros(rows, 3))[:, 0]
    for value, weight in ((-1.0, 0.1), (0.5, 0.1), (1.0, 0.9)):
        assert (actions == value).float().mean().item() == pytest.approx(weight / 1.1, abs=0.02)


# --------------------------------------------------------------------------------------------------- Diffusion-QL


def test_dql_chain_with_gradient_is_the_same_chain():
    """The same actions, and a gradient that reaches the network at each of its four steps."""
    agent, obs, outputs = make_agent(diffusion_ql, denoising_steps=4), torch.randn(64, 3), []
    torch.manual_seed(6)
    plain = agent.actor.sample(obs)
    agent.actor.network.register_forward_hook(lambda *call: call[2].retain_grad() or outputs.append(call[2]))
    torch.manual_seed(6)
    actions = agent.actor.sample_with_gradient(obs)
    assert torch.equal(plain, actions) and not plain.requires_grad
    actions.sum().backward()
    assert len(outputs) == 4 and all(output.grad.abs().sum() > 0 for output in outputs)


def test_dql_actor_loss_by_parts():
    """Imitation minus eta Q in units of its mean size. That unit is a constant: it gets no gradient."""
    agent, batch = make_agent(diffusion_ql, eta=2.0), make_batch(diffusion_ql, 16)
    torch.manual_seed(8)
    loss, info = agent.actor_loss(batch)
    gradient = torch.autograd.grad(loss, agent.actor.network.output.weight)[0]
    torch.manual_seed(8)
    imitation = agent.actor.loss(batch.obs, batch.actions) / 2  # a mean over the two action dimensions
    qs = agent.critic(batch.obs, agent.actor.sample_with_gradient(batch.obs)).flatten()
    unit = sum(abs(q) for q in qs.tolist()) / len(qs)
    expected = imitation - 2 * sum(qs) / len(qs) / unit
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert info["losses/imitation"].item() == pytest.approx(imitation.item(), rel=1e-5)
    slow = torch.autograd.grad(expected, agent.actor.network.output.weight)[0]
    torch.testing.assert_close(gradient, slow, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("max_q_backup, samples", [(False, 1), (True, 10)])
def test_dql_target(max_q_backup, samples):
    agent, batch = make_agent(diffusion_ql, max_q_backup=max_q_backup, **FIXED), make_batch(diffusion_ql, 8)
    agent.actor.sample = lambda obs: pytest.fail("the backup sampled from the online actor")
    next_actions = agent.next_action_samples(batch.next_obs)
    assert next_actions.shape == (8, samples, 2) and len(next_actions.unique(dim=1)[0]) == samples
    target_q = agent.td_target(batch, next_actions)
    q = agent.target_critic(batch.next_obs.unsqueeze(1).expand(8, samples, 3), next_actions)
    next_q = q.amax(2).amin(0)  # each head's own best of the samples, then the lowest head
    torch.testing.assert_close(target_q, batch.rewards + 0.9 * (1 - batch.terminations) * next_q)


def test_dql_draws_an_action_with_softmax_of_q():
    agent, rows = make_agent(diffusion_ql, kappa=2.0), 20_000
    candidates = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).expand(rows, 2, 2)
    agent.actor.sample = lambda _: candidates
    agent.target_critic.random_min = lambda *_: torch.tensor([0.0, 0.5]).expand(rows, 2)
    share = (agent(torch.zeros(rows, 3))[:, 0] == 1).float().mean().item()
    assert share == pytest.approx(math.e / (1 + math.e), abs=0.02)


def test_dql_cuts_every_gradient_to_its_norm(monkeypatch):
    agent, cut, norms = make_agent(diffusion_ql, grad_norm=0.7), torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda own, norm: norms.append(norm) or cut(own, norm))
    diffusion_ql.update(agent, diffusion_ql.Optimizers(agent, agent.args), make_batch(diffusion_ql, 3, 8))
    assert norms == [0.7] * 4  # three steps of the critics, one of the actor
