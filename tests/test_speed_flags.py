"""--compile and --precision change speed, not results; candidates in parts are those at once; --refresh-share keeps."""

import contextlib
import importlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY_RUN, flags_of, make_agent, make_args, make_batch, tiny_run_args

import expo_flow
from benchmark import ablation
from benchmark.emulate_bfloat16 import RoundedProducts
from utils import compiling, data
from utils.buffer import ReplayBuffer
from utils.errors import InputError
from utils.logger import read_record
from utils.tasks import make_task_env

BASELINES = ["baselines.rlpd", "baselines.idql", "baselines.diffusion_ql"]


def next_batch(next_obs):
    """A batch with these next observations."""
    return make_batch(*next_obs.shape[:-1])._replace(next_obs=next_obs)


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
    candidates = script.next_candidates(agent, next_batch(next_obs))
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
        candidates[precision] = script.next_candidates(agent, next_batch(next_obs))
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


def test_emulated_bfloat16_is_bfloat16_but_for_the_order_of_additions(script):
    """Far nearer to torch's own than to float32, for the very same noise."""
    agent = make_agent(script, precision="bfloat16", denoising_steps=3, base_hidden_dim=64)
    batch, found = next_batch(torch.randn(2, 16, 3)), {}
    for name, precision, mode in (
        ("float32", "float32", contextlib.nullcontext()),
        ("own", "bfloat16", contextlib.nullcontext()),
        ("emulated", "bfloat16", RoundedProducts()),
    ):
        agent.args.precision = precision
        torch.manual_seed(1)
        with mode:
            found[name] = script.next_candidates(agent, batch)
    distance = {name: (found[name] - found["own"]).abs().mean() for name in ("float32", "emulated")}
    assert distance["emulated"] < distance["float32"] / 4
    x, weight, bias = torch.randn(5, 64), torch.randn(7, 64), torch.randn(7)
    with torch.autocast("cpu", torch.bfloat16), RoundedProducts():
        rounded = torch.nn.functional.linear(x, weight, bias)
    exact = x.bfloat16().double() @ weight.bfloat16().double().T + bias.bfloat16().double()
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.double(), exact, rtol=2**-8, atol=1e-5)
    with RoundedProducts():  # nobody asks for bfloat16: nothing happens
        assert torch.equal(torch.nn.functional.linear(x, weight, bias), x @ weight.T + bias)


def test_a_run_with_emulated_bfloat16(tmp_path):
    """The script's own run, recorded with the flags that it was started with."""
    flags = ["--script", "expo_flow", *flags_of(expo_flow, {**TINY_RUN, "run_dir": tmp_path / "run"})]
    command = [sys.executable, "benchmark/emulate_bfloat16.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "run")
    assert record["script"] == "expo_flow" and record["args"]["precision"] == "bfloat16"
    assert record["command"] == ["emulate_bfloat16.py", *flags]


def test_ablation_acting_only(script, monkeypatch):
    """One candidate in the target, a base action as it is; acting has all candidates as before."""
    monkeypatch.setattr(script, "next_candidates", script.next_candidates)  # put back afterwards
    agent = make_agent(script, num_base_samples=3, num_edit_samples=3)
    obs, batch = torch.randn(7, 3), next_batch(torch.randn(2, 8, 3))
    torch.manual_seed(0)
    usual = script.next_candidates(agent, batch)
    torch.manual_seed(1)
    action = agent(obs)
    ablation.acting_only(script)
    torch.manual_seed(0)
    assert usual.shape[2] == 6 and torch.equal(script.next_candidates(agent, batch), usual[:, :, :1])
    torch.manual_seed(0)
    assert torch.equal(
        usual[:, :, 0], script.sample_next(agent, batch.next_obs.flatten(0, 1)).unflatten(0, (2, 8))[:, :, 0]
    )
    torch.manual_seed(1)
    assert torch.equal(agent(obs), action)


def test_ablation_online_base(script, monkeypatch):
    """Acting asks the base policy itself, and not its moving average, for actions; otherwise nothing changes."""
    monkeypatch.setattr(script.Agent, "on_the_fly_actions", script.Agent.on_the_fly_actions)
    monkeypatch.setattr(script.Agent, "forward", script.Agent.forward)
    agent, obs = make_agent(script), torch.randn(7, 3)
    with torch.no_grad():
        for p in agent.base_policy.parameters():
            p += 0.5 * torch.randn_like(p)
    torch.manual_seed(0)
    with_average = agent(obs)
    ablation.online_base(script)
    torch.manual_seed(0)
    action = agent(obs)
    assert not torch.allclose(action, with_average)
    agent.target_base_policy.load_state_dict(agent.base_policy.state_dict())
    monkeypatch.undo()
    torch.manual_seed(0)
    assert torch.equal(agent(obs), action)


def test_ablation_growing_edits(script, monkeypatch):
    """The bound is .05 while offline, grows by the online update, and the entropy target is that of the bound."""
    monkeypatch.setattr(script, "update", script.update)
    agent = make_agent(script, edit_scale=0.65, offline_steps=2, total_timesteps=4)
    optimizers = script.make_optimizers(agent, agent.args)
    ablation.growing_edits(script)
    scales = []
    for _ in range(8):
        scales.append(float(script.update(agent, optimizers, make_batch(2, 5))["edit/scale"]))
        assert agent.edit_policy.scale == pytest.approx(scales[-1])
        fixed = make_agent(script, edit_scale=scales[-1])
        assert agent.target_entropy == pytest.approx(fixed.target_entropy)
    assert scales == pytest.approx([0.05, 0.05, 0.05, 0.2, 0.35, 0.5, 0.65, 0.65])


def test_ablation_flow_base(script, monkeypatch):
    """The agent has expo_flow's base policy and trains with it."""
    monkeypatch.setattr(script, "BasePolicy", script.BasePolicy)
    ablation.flow_base(script)
    agent = make_agent(script)
    assert type(agent.base_policy) is type(agent.target_base_policy) is expo_flow.BasePolicy
    before = [p.clone() for p in agent.base_policy.parameters()]
    script.update(agent, script.make_optimizers(agent, agent.args), make_batch(2, 5))
    assert not any(torch.equal(p, q) for p, q in zip(before, agent.base_policy.parameters(), strict=True))


def test_ablation_base_until_better(script, monkeypatch):
    """Which policy acts follows from the last evaluation; the row is about the one that acted until then."""
    for name in ("on_the_fly_actions", "forward"):
        monkeypatch.setattr(script.Agent, name, getattr(script.Agent, name))
    monkeypatch.setattr(script, "Evaluation", script.Evaluation)
    agent, obs = make_agent(script), torch.randn(7, 3)
    torch.manual_seed(0)
    chosen = agent(obs)
    monkeypatch.setattr(script.Agent, "trusted", False, raising=False)
    ablation.base_until_better(script)
    success = {"on_the_fly": 0.0, "base": 0.0}
    rows = []

    class Results:
        def __init__(self, policy):
            self.rate = success["on_the_fly" if "on_the_fly" in policy.__qualname__ else "base"]
            self.trusted = agent.trusted

        def metrics(self, prefix):
            assert self.trusted  # or the on-the-fly policy would not be what is evaluated
            return {prefix + name: self.rate for name in ("success_rate", "return", "length")}

    monkeypatch.setattr(script.Evaluation, "_episodes", lambda self, policy: Results(policy))
    logger = SimpleNamespace(write_evaluation=lambda step, values: rows.append(values["eval/success_rate"]))
    evaluation = script.Evaluation.__new__(script.Evaluation)
    for on_the_fly, base, trusted, reported in ((0.1, 0.4, False, 0.4), (0.5, 0.5, True, 0.5), (0.2, 0.3, False, 0.2)):
        success.update(on_the_fly=on_the_fly, base=base)
        evaluation.run(logger, 0, agent.on_the_fly_actions, agent.target_base_policy.sample)
        assert agent.trusted == trusted and rows[-1] == reported
        torch.manual_seed(0)
        action = agent(obs)
        torch.manual_seed(0)
        assert torch.equal(action, chosen if trusted else agent.target_base_policy.sample(obs))


def test_a_run_of_an_ablation(tmp_path):
    """The script's own run, recorded with the flags that it was started with."""
    flags = ["--change", "acting_only", "--script", "expo_flow"]
    flags += flags_of(expo_flow, {**TINY_RUN, "run_dir": tmp_path / "run"})
    command = [sys.executable, "benchmark/ablation.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "run")
    assert record["script"] == "expo_flow" and record["command"] == ["ablation.py", *flags]


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


# ------------------------------------------------------------------------------------------------- kept samples


def kept_buffers(rows: int, agent) -> list[ReplayBuffer]:
    """Two buffers whose row i has the next observation ((mark + i) / 1000, 0, 0)."""
    buffers = []
    for mark in (0, 1000):
        buffer = ReplayBuffer(rows, 3, 2, num_kept=agent.args.num_base_samples)
        for row in range(rows):
            buffer.add(torch.zeros(3), torch.zeros(2), 0.0, [(mark + row) / 1000, 0, 0], terminated=False)
        buffers.append(buffer)
    return buffers


def test_refresh_draws_a_share_of_the_kept_samples_anew(script, monkeypatch):
    """A base policy that answers with the observation and the number of the call shows what was drawn, and when."""
    agent = make_agent(script, refresh_share=0.25, num_base_samples=3)
    calls = 0

    def sample(obs):
        return torch.stack([obs[..., 0], torch.full(obs.shape[:-1], float(calls))], dim=-1)

    monkeypatch.setattr(agent.base_policy, "sample", sample)
    monkeypatch.setattr(agent.target_base_policy, "sample", lambda obs: pytest.fail("the moving average was sampled"))
    offline, online = kept_buffers(20, agent)
    script.refresh(agent, offline, online, 0.75, 16)  # all rows: none had any
    for buffer in (offline, online):
        kept = buffer.data.next_base_actions
        assert torch.equal(kept[..., 0], buffer.data.next_obs[:, :1].expand(-1, 3)) and kept[..., 1].eq(0).all()
    calls = 1
    script.refresh(agent, offline, online, 0.75, 16)  # a quarter of 16 rows: 3 offline, 1 online
    assert offline.data.next_base_actions[:, :, 1].sum(0).tolist() == [3, 3, 3]
    assert online.data.next_base_actions[:, :, 1].sum(0).tolist() == [1, 1, 1]
    calls = 2
    script.refresh(agent, offline, online, 1.0, 16)  # the online buffer is not drawn from
    assert (
        offline.data.next_base_actions[:, 0, 1].tolist() == [0] * 3 + [1] * 3 + [2] * 4 + [0] * 10
    )  # the first call had 3
    assert online.data.next_base_actions[:, 0, 1].sum() == 1


def test_candidates_are_the_kept_samples_and_fresh_edits_of_them(script, monkeypatch):
    agent = make_agent(script, refresh_share=0.25, num_base_samples=3, num_edit_samples=6, edit_scale=0.1)
    offline, online = kept_buffers(20, agent)
    for buffer in (offline, online):
        buffer.data.next_base_actions.copy_(0.8 * torch.rand(20, 3, 2))
    monkeypatch.setattr(agent.base_policy, "sample", lambda obs: pytest.fail("the chain was run"))
    batch = script.draw_batch(offline, online, 0.5, 2, 8)
    first, second = script.next_candidates(agent, batch), script.next_candidates(agent, batch)
    assert first.shape == (2, 8, 9, 2)
    for u in range(2):
        for b in range(8):
            mark = round(1000 * float(batch.next_obs[u, b, 0]))
            kept = (online if mark >= 1000 else offline).data.next_base_actions[mark % 1000]
            assert torch.equal(first[u, b, :3], kept)
    assert ((first[:, :, 3:] - first[:, :, :3].repeat(1, 1, 2, 1)).abs() <= 0.1 + 1e-6).all()
    assert (first[:, :, 3:] != second[:, :, 3:]).float().mean() > 0.9


def test_a_share_of_one_keeps_nothing(script, monkeypatch, tmp_path):
    """The default: no room for samples beside the transitions, and as many rows through the chain as are drawn."""
    rows, kept, sample_next, draw_batch = [], [], script.sample_next, script.draw_batch

    def spy(agent, next_obs):
        rows.append(len(next_obs))
        return sample_next(agent, next_obs)

    def draw(offline, online, *rest):
        kept.extend(buffer.data.next_base_actions.shape[1] for buffer in (offline, online))
        return draw_batch(offline, online, *rest)

    monkeypatch.setattr(script, "sample_next", spy)
    monkeypatch.setattr(script, "draw_batch", draw)
    flags = {"offline_steps": 2, "total_timesteps": 3, "utd_ratio": 2, "batch_size": 16}
    script.main(tiny_run_args(script, tmp_path / "run", **flags))
    assert rows == [16, 16, 32, 32, 32] and set(kept) == {0}


def test_a_run_with_kept_samples_runs_a_share_of_the_chain(script, monkeypatch, tmp_path):
    """Rows that go through the chain for TD targets: every row once, then the share."""
    rows, sample_next = [], script.sample_next

    def spy(agent, next_obs):
        rows.append(len(next_obs))
        return sample_next(agent, next_obs)

    monkeypatch.setattr(script, "sample_next", spy)
    flags = {"refresh_share": 0.25, "offline_steps": 2, "total_timesteps": 12, "learning_starts": 4}
    script.main(tiny_run_args(script, tmp_path / "run", utd_ratio=2, batch_size=16, **flags))
    args = tiny_run_args(script, tmp_path / "run")
    num_offline = len(data.load_specs(args.dataset, make_task_env(args)))
    # offline: all, then 16 / 4 rows; online from step 5: 32 / 8 of each buffer, at first the five new rows
    assert rows[:4] == [num_offline, 4, 4, 5]
    assert rows[4::2] == [4] * 7 and set(rows[5::2]) == {4, 5}  # 4 where the new row's turn came at once
