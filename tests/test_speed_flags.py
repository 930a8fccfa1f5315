"""--compile and --precision change speed, not results; candidates sampled in parts are those sampled at once."""

import importlib
import shutil

import pytest
import torch
from conftest import SCRIPTS, make_agent, make_args, make_batch

from utils import compiling
from utils.errors import InputError

BASELINES = ["baselines.rlpd", "baselines.idql", "baselines.diffusion_ql"]


@pytest.mark.parametrize("num_base_samples", [1, 3, 2000, 3000])
def test_candidates_of_all_slices_in_their_places(script, monkeypatch, num_base_samples):
    """Parts of 2048, 682 and 1 observations; a base policy that answers with the observation shows where each went."""
    agent = make_agent(script, num_base_samples=num_base_samples, num_edit_samples=0)
    rows = []

    def sample(obs):
        rows.append(obs.shape[:-1].numel())
        return obs[..., :2]

    monkeypatch.setattr(agent.base_policy, "sample", sample)
    next_obs = torch.randn(3, 700 if num_base_samples < 10 else 2, 3)
    candidates = script.next_candidates(agent, next_obs)
    assert torch.equal(candidates, next_obs[..., None, :2].expand(-1, -1, num_base_samples, -1))
    assert max(rows) <= max(2048, num_base_samples) and sum(rows) == next_obs.shape[:-1].numel() * num_base_samples


def test_bfloat16_is_for_the_candidates_only(script, monkeypatch):
    """The network's products are bfloat16, what comes out is float32 and close to float32's; nothing else changes."""
    agents = {p: make_agent(script, precision=p, denoising_steps=3) for p in ("float32", "bfloat16")}
    agents["bfloat16"].load_state_dict(agents["float32"].state_dict())
    next_obs, seen = torch.randn(2, 8, 3), []
    candidates = {}
    for precision, agent in agents.items():
        block = agent.base_policy.network.output
        block.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
        torch.manual_seed(1)
        candidates[precision] = script.next_candidates(agent, next_obs)
    assert set(seen[:3]) == {torch.float32} and set(seen[3:]) == {torch.bfloat16}
    assert candidates["bfloat16"].dtype == torch.float32
    difference = (candidates["bfloat16"] - candidates["float32"]).abs().mean()
    assert 1e-6 < difference < 0.02
    seen.clear()
    agent, batch = agents["bfloat16"], make_batch(2, 8)
    info = script.update(agent, script.make_optimizers(agent, agent.args), batch)
    assert {value.dtype for value in info.values()} == {torch.float32}
    assert {p.dtype for p in agent.parameters()} == {torch.float32}
    agent.on_the_fly_actions(next_obs[0])
    imitation_and_acting = seen[3:]
    assert imitation_and_acting == [torch.float32] * len(imitation_and_acting) != []


def test_compile_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(InputError, match=r"--compile needs a C\+\+ compiler"):
        compiling.enable(True)


def test_compilable_is_the_function_itself_where_nobody_asks(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda _: pytest.fail("compiled"))
    compiling.enable(False)
    double = compiling.compilable(lambda x: 2 * x)
    assert double(3) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SCRIPTS, *BASELINES])
def test_compiled_and_eager_agree(name):
    """Same seed, same batches: after five updates all parameters and actions agree to float32 rounding."""
    script = importlib.import_module(name)
    update = next(
        getattr(script, n) for n in ("update", "sac_update", "idql_update", "dql_update") if hasattr(script, n)
    )
    make_optimizers = next(getattr(script, n) for n in dir(script) if n.startswith("make") and n.endswith("optimizers"))
    args = make_args(script, num_critics=3) if name in SCRIPTS else script.Args(hidden_dim=16, hidden_layers=2)
    agents, actions = [], []
    try:
        for compiled in (False, True):
            compiling.enable(compiled)
            torch.manual_seed(0)
            agent = script.Agent(3, 2, args)
            optimizers = make_optimizers(agent, args)
            for _ in range(5):
                update(agent, optimizers, make_batch(2, 8))
            actions.append(agent(torch.randn(20, 3)))
            agents.append(agent)
    finally:
        compiling.enable(False)
    for (key, eager), value in zip(agents[0].state_dict().items(), agents[1].state_dict().values(), strict=True):
        assert torch.allclose(eager, value, rtol=1e-4, atol=1e-5), key
    assert torch.allclose(*actions, atol=1e-3)
