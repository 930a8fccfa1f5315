"""The on-the-fly policy against brute force: candidates, ranking, choice, ties, every N and M."""

import itertools

import pytest
import torch
from conftest import candidate_actions, make_agent, table_critic
from torch import Tensor

# N base samples and M edits: equal, fewer edits, more edits, one each, one base sample, no edits.
SIZES = [(4, 4), (4, 2), (3, 7), (1, 1), (1, 3), (5, 0), (1, 0)]


def with_fixed_samples(agent, base_actions: Tensor, edits: Tensor | None = None):
    """The agent with a base policy that returns `base_actions` (..., N, A) and edits `edits` (..., M, A)."""
    agent.target_base_policy.sample = lambda obs: base_actions
    if edits is not None:
        agent.edit_policy.forward = lambda obs, to_edit: (edits, None)
    return agent


@pytest.mark.parametrize("shape", [(3,), (6, 3), (2, 5, 3)], ids=["one", "batch", "slices"])
@pytest.mark.parametrize("n, m", SIZES)
def test_candidates_are_base_actions_then_their_edits(script, n, m, shape):
    """Candidate i < N is a base action; candidate N + j is base action j mod N, edited and clipped to [-1, 1]."""
    agent = make_agent(script, num_base_samples=n, num_edit_samples=m, edit_scale=0.5)
    obs, lead = torch.randn(*shape), shape[:-1]
    seen = {}

    def sample(many_obs):
        assert torch.equal(many_obs, torch.stack([obs] * n, dim=-2))  # every sample sees its own observation
        seen["base"] = torch.rand(*lead, n, 2) * 2 - 1
        return seen["base"]

    def edit(many_obs, to_edit):
        assert torch.equal(many_obs, torch.stack([obs] * m, dim=-2))
        seen["to_edit"], seen["edits"] = to_edit, torch.rand(*lead, m, 2) - 0.5
        return seen["edits"], None

    agent.base_policy.sample, agent.edit_policy.forward = sample, edit
    candidates = candidate_actions(agent, obs, agent.base_policy)
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


def test_candidates_of_the_real_networks_differ_and_obey_the_edit_bound(script):
    agent = make_agent(script, num_base_samples=3, num_edit_samples=6, edit_scale=0.1)
    candidates = candidate_actions(agent, torch.randn(50, 3), agent.base_policy)
    base, edited = candidates[:, :3], candidates[:, 3:]
    assert ((edited - base.repeat(1, 2, 1)).abs() <= 0.1 + 1e-6).all()
    assert (edited != base.repeat(1, 2, 1)).any(-1).float().mean() > 0.5
    assert (edited[:, :3] != edited[:, 3:]).any(-1).float().mean() > 0.5  # two edits of one action: both drawn anew
    assert not candidates.requires_grad


@pytest.mark.parametrize("shape", [(3,), (6, 3), (2, 5, 3)], ids=["one", "batch", "slices"])
def test_rank_equals_brute_force(script, shape):
    """The minimum over all five heads (one subset only is possible), candidate by candidate."""
    agent = make_agent(script, num_min_critics=5)
    obs, candidates = torch.randn(*shape), torch.randn(*shape[:-1], 8, 2)
    q = agent.rank(obs, candidates)
    assert q.shape == (*shape[:-1], 8) and not q.requires_grad
    with torch.no_grad():
        for index in itertools.product(*map(range, shape[:-1])):
            for c in range(8):
                row = agent.target_critic(obs[index].unsqueeze(0), candidates[index][c].unsqueeze(0))  # (E, 1)
                assert float(q[index][c]) == pytest.approx(min(row.squeeze(1).tolist()), rel=1e-4, abs=1e-5)


def test_rank_uses_one_subset_of_the_right_size_per_call(script):
    agent = make_agent(script, num_critics=6, num_min_critics=2)
    table = torch.randn(6, 4, 8)
    agent.target_critic = table_critic(script, lambda e, obs, actions: table[e], 6)
    seen = set()
    for _ in range(400):
        q = agent.rank(torch.randn(4, 3), torch.randn(4, 8, 2))
        fits = [p for p in itertools.combinations(range(6), 2) if torch.equal(q, table[list(p)].amin(0))]
        assert len(fits) == 1  # the same two heads for all rows and candidates
        seen.add(fits[0])
    assert len(seen) == 15


@pytest.mark.parametrize("n, m", SIZES)
def test_choice_equals_brute_force(script, n, m):
    agent = make_agent(script, num_base_samples=n, num_edit_samples=m, num_min_critics=5, edit_scale=0.5)
    obs, base_actions, edits = torch.randn(40, 3), torch.rand(40, n, 2) * 2 - 1, torch.rand(40, m, 2) - 0.5
    actions = with_fixed_samples(agent, base_actions, edits).on_the_fly_actions(obs)
    chosen = set()
    for b in range(40):
        candidates = [*base_actions[b], *((base_actions[b, j % n] + edits[b, j]).clip(-1, 1) for j in range(m))]
        best, best_q = None, -float("inf")
        with torch.no_grad():
            for c, action in enumerate(candidates):
                q = float(agent.target_critic(obs[b : b + 1], action.unsqueeze(0)).min())
                if q > best_q:
                    best, best_q = c, q
        assert best is not None
        assert torch.equal(actions[b], candidates[best])
        chosen.add(best)
    assert len(chosen) >= min(n + m, 3)  # else a constant choice would have passed


@pytest.mark.parametrize("n, m", SIZES)
def test_ties_go_to_the_first_base_action(script, n, m):
    agent = make_agent(script, num_base_samples=n, num_edit_samples=m)
    agent.target_critic = table_critic(script, lambda e, obs, actions: torch.full(actions.shape[:-1], 7.0), 5)
    base_actions, edits = torch.rand(20, n, 2), torch.full((20, m, 2), 0.01)
    actions = with_fixed_samples(agent, base_actions, edits).on_the_fly_actions(torch.randn(20, 3))
    assert torch.equal(actions, base_actions[:, 0])


def test_a_tie_of_a_base_and_an_edited_action_goes_to_the_base_action(script):
    agent = make_agent(script, action_dim=1, num_base_samples=3, num_edit_samples=3)
    agent.target_critic = table_critic(script, lambda e, obs, actions: -actions.squeeze(-1).abs(), 5)
    base_actions = torch.tensor([[[0.5], [-0.25], [0.75]]])
    edits = torch.tensor([[[-0.25], [0.5], [0.0]]])  # edited: .25, .25, .75, as good as base action 1
    actions = with_fixed_samples(agent, base_actions, edits).on_the_fly_actions(torch.randn(1, 3))
    assert actions.tolist() == [[-0.25]]


def test_an_edited_action_wins_where_it_is_better(script):
    agent = make_agent(script, action_dim=1, num_base_samples=2, num_edit_samples=2)
    agent.target_critic = table_critic(script, lambda e, obs, actions: actions.squeeze(-1), 5)
    base_actions, edits = torch.tensor([[[0.25], [0.5]]]), torch.tensor([[[0.5], [0.125]]])
    actions = with_fixed_samples(agent, base_actions, edits).on_the_fly_actions(torch.randn(1, 3))
    assert actions.tolist() == [[0.75]]


def test_acting_uses_the_moving_average_and_the_target_critic(script):
    """Not the online base policy, and not the online critic: neither may change an action."""
    agent, obs = make_agent(script), torch.randn(20, 3)

    def actions_after(part: str | None):
        changed = make_agent(script)
        changed.load_state_dict(agent.state_dict())
        if part is not None:
            for parameter in getattr(changed, part).parameters():
                parameter.data += torch.randn_like(parameter)
        torch.manual_seed(1)
        return changed.on_the_fly_actions(obs)

    before = actions_after(None)
    for part in ("base_policy", "critic"):
        assert torch.equal(actions_after(part), before), part
    for part in ("target_base_policy", "target_critic", "edit_policy"):
        assert not torch.equal(actions_after(part), before), part


def test_acting_is_stochastic_and_calling_the_agent_acts(script):
    agent, obs = make_agent(script), torch.randn(20, 3)
    torch.manual_seed(1)
    first, second = agent.on_the_fly_actions(obs), agent.on_the_fly_actions(obs)
    torch.manual_seed(1)
    assert torch.equal(agent(obs), first) and not torch.equal(first, second)
    assert agent(obs[0]).shape == (2,)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_take_equals_indexing(script, lead):
    candidates, choice = torch.randn(*lead, 6, 2), torch.randint(6, lead)
    taken = script.take(candidates, choice)
    assert taken.shape == (*lead, 2)
    for index in itertools.product(*map(range, lead)):
        assert torch.equal(taken[index], candidates[index][int(choice[index])])
