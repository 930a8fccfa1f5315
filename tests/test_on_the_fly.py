"""The on-the-fly policy against brute force: candidates, ranking, choice, for several N and M."""

import itertools

import pytest
import torch
from conftest import make_agent, make_batch

# N base samples and M edits: equal, fewer edits, more edits, one base sample, no edits.
SIZES = [(4, 4), (4, 2), (3, 7), (1, 3), (5, 0)]


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3)], ids=["one", "slices"])
@pytest.mark.parametrize("n, m", SIZES)
def test_candidates_are_base_actions_then_their_edits(script, n, m, shape):
    """Candidate i < N is a base action; candidate N + j is base action j mod N, edited and clipped to [-1, 1]."""
    agent = make_agent(script, num_base_samples=n, num_edit_samples=m)
    obs, lead, seen = torch.randn(*shape), shape[:-1], {}

    def sample(many_obs):
        assert torch.equal(many_obs, torch.stack([obs] * n, dim=-2))  # every sample sees its own observation
        seen["base"] = torch.rand(*lead, n, 2) * 2 - 1
        return seen["base"]

    def edit(many_obs, to_edit):
        assert torch.equal(many_obs, torch.stack([obs] * m, dim=-2))
        seen["to_edit"], seen["edits"] = to_edit, torch.rand(*lead, m, 2) - 0.5
        return seen["edits"], None

    agent.base_policy.sample, agent.edit_policy.forward = sample, edit
    candidates = agent.with_edits(obs, agent.base_actions(obs, agent.base_policy, n))
    assert candidates.shape == (*lead, n + m, 2)
    for index in itertools.product(*map(range, lead)):
        for i in range(n):
            assert torch.equal(candidates[index][i], seen["base"][index][i])
        for j in range(m):
            source = seen["base"][index][j % n]
            assert torch.equal(seen["to_edit"][index][j], source)  # the edit policy sees the action that it edits
            expected = [min(max(float(a + e), -1.0), 1.0) for a, e in zip(source, seen["edits"][index][j], strict=True)]
            assert candidates[index][n + j].tolist() == expected
    assert ("edits" in seen) == (m > 0)


def test_acting_is_stochastic_and_calling_the_agent_acts(script):
    agent, obs = make_agent(script), torch.randn(20, 3)
    torch.manual_seed(1)
    first, second = agent.on_the_fly_actions(obs), agent.on_the_fly_actions(obs)
    torch.manual_seed(1)
    assert torch.equal(agent(obs), first) and not torch.equal(first, second)
    assert agent(obs[0]).shape == (2,)


# ------------------------------------------------------------------------------------------- --num-target-samples


@pytest.mark.parametrize("n, m, given, edits", [(4, 4, 0, 4), (4, 8, 2, 4), (4, 2, 2, 1), (2, 2, 6, 6), (4, 0, 1, 0)])
def test_targets_have_their_own_number_of_candidates(script, n, m, given, edits):
    """So many base samples and edits in proportion; 0 means N. Acting has N + M candidates whatever the flag says."""
    agent = make_agent(script, num_base_samples=n, num_edit_samples=m, num_target_samples=given)
    num, batch, sizes, rank = given or n, make_batch(script, 2, 5), [], agent.rank
    sampled = agent.base_policy.sample
    agent.base_policy.sample = lambda obs: sizes.append(obs.shape[-2]) or sampled(obs)
    candidates = script.next_candidates(agent, batch.next_obs)
    assert candidates.shape == (2, 5, num + edits, 2) and set(sizes) == {num}
    edited_from = candidates[:, :, torch.arange(edits) % num]
    assert ((candidates[:, :, num:] - edited_from).abs() <= agent.args.edit_scale + 1e-6).all()
    agent.rank = lambda obs, candidates: sizes.append(candidates.shape[-2]) or rank(obs, candidates)
    agent(batch.obs)
    assert sizes[-1] == n + m


@pytest.mark.parametrize("given, share", [(0, 5 / 12), (3, 8 / 12), (7, 0)])
def test_selected_share_counts_the_edited_candidates(script, given, share):
    agent = make_agent(script, num_base_samples=4, num_edit_samples=4, num_target_samples=given)
    choice = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3, 0, 3, 5, 6])
    agent.td_target = lambda batch, candidates: (torch.zeros(12), choice)
    batch = make_batch(script, 12)
    _, info = agent.critic_loss(batch, torch.zeros(12, 7, 2))
    assert info["edit/selected_share"].item() == pytest.approx(share)
    assert info["critic/q_mean"] == agent.critic(batch.obs, batch.actions).mean()
