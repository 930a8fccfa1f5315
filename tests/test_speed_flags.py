"""What makes a run fast does not change it: parts of the candidates, bfloat16, --compile, no waiting for the device."""

import contextlib
import importlib
import runpy
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVERY_SCRIPT, ROOT, make_agent, make_batch
from running import read_state, run_here, small_args
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import expo_diffusion
import expo_flow


@pytest.mark.parametrize("script", [expo_diffusion, expo_flow])
def test_bfloat16_is_for_the_candidates_only(script):
    """Their products are bfloat16, what comes out is float32 and close to float32's. Nothing else changes."""
    agents = {kind: make_agent(script, precision=kind, denoising_steps=3) for kind in ("float32", "bfloat16")}
    agents["bfloat16"].load_state_dict(agents["float32"].state_dict())
    next_obs, seen, candidates = torch.randn(2, 8, 3), [], {}
    for kind, agent in agents.items():
        for layer in (agent.base_policy.network.output, agent.target_base_policy.network.output):
            layer.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
        torch.manual_seed(1)
        candidates[kind] = script.next_candidates(agent, next_obs)
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert candidates["bfloat16"].dtype == torch.float32
    assert 1e-6 < (candidates["bfloat16"] - candidates["float32"]).abs().mean() < 0.02
    seen.clear()
    agent = agents["bfloat16"]
    info = script.update(agent, script.Optimizers(agent, agent.args), make_batch(script, 2, 8))
    agent.on_the_fly_actions(next_obs[0])
    assert {value.dtype for value in info.values()} == {torch.float32} == {p.dtype for p in agent.parameters()}
    assert seen == [torch.bfloat16] * 3 + [torch.float32] * 4  # imitation, and acting


# -------------------------------------------------------------------------------------- nothing waits for the device


class OneDevice(TorchDispatchMode):
    """Refuses operations on two devices where `meta` does not. Only new rows may be copied from one to the other."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
        if len({x.device for x in tensors}) > 1 and func is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{func} mixes meta and another device")
        return result


def loop_on_meta(script: Any, agent: Any) -> set[str]:
    """The work of two steps with tensors that have no values; the devices of the results."""
    data = tuple(np.zeros(shape, np.float32) for shape in ((9, 3), (9, 2), 9, (9, 3), 9))
    buffer, optimizers = script.ReplayBuffer(data, 5, torch.device("meta")), script.Optimizers(agent, agent.args)
    log, found = SimpleNamespace(sums={}), []
    with OneDevice():
        for _ in range(2):
            found.append(agent(torch.zeros(1, 3, device="meta")))
            buffer.add(np.zeros(3), np.zeros(2), 1.0, np.zeros(3), True)
            info = script.update(agent, optimizers, buffer.draw(0.5, 2, 8))
            script.Log.add(log, info)
    assert not any(value.requires_grad for value in info.values())
    return {value.device.type for value in (*found, *info.values(), *(total for total, _ in log.sums.values()))}


@pytest.fixture
def meta(monkeypatch):
    """Fused optimizers and autocast do not know the device; both are torch's own and do not wait."""
    for name in ("Adam", "AdamW"):
        plain = getattr(torch.optim, name)
        monkeypatch.setattr(torch.optim, name, lambda *p, plain=plain, **flags: plain(*p, **{**flags, "fused": False}))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("name, flags", [*((name, {}) for name in EVERY_SCRIPT), ("expo_flow", {"backup": "entropy"})])
def test_nothing_in_the_loop_waits_for_the_device(name, flags, meta):
    """Torch's `meta` tensors have no values: whatever would read one back, or mix two devices, raises."""
    script = importlib.import_module(name)
    assert loop_on_meta(script, make_agent(script, **flags).to("meta")) == {"meta"}


WAITS = {"number": Tensor.item, "copy": Tensor.cpu, "if": bool, "index": lambda loss: loss.expand(3)[torch.tensor([1])]}


@pytest.mark.parametrize("wait", WAITS)
def test_a_loop_that_waits_is_found(wait, meta):
    """The tool of the test above: a value that is read back, a copy, a condition, and an index from another device."""
    script: Any = importlib.import_module("expo_diffusion")
    agent = make_agent(script).to("meta")
    critic_loss = agent.critic_loss
    agent.critic_loss = lambda *inputs: WAITS[wait](critic_loss(*inputs)[0]) or critic_loss(*inputs)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        loop_on_meta(script, agent)


# --------------------------------------------------------------------------------------------------------- --compile


def test_what_the_compiler_raises_is_one_line(monkeypatch, capsys):
    """B7, with the compiler's own exception. Any other RuntimeError is a fault of ours, and shows its traceback."""
    errors = iter([BackendCompilerFailed(print, ValueError("no Python.h\nat line 3"), None), RuntimeError("ours")])
    monkeypatch.setattr(sys, "argv", ["expo_diffusion.py"])
    monkeypatch.setattr("utils.envs.make_env", lambda *_: (_ for _ in ()).throw(next(errors)))
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "expo_diffusion.py"), run_name="__main__")
    err = capsys.readouterr().err
    assert err.startswith("error: backend=") and err.endswith("; use --no-compile\n") and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="ours"):
        runpy.run_path(str(ROOT / "expo_diffusion.py"), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("num_critics", [2, 3])
def test_compiled_and_eager_agree(num_critics, each, tmp_path):
    """Same seed: after four updates and a step, networks and action agree to float32 rounding."""
    flags = {"offline_steps": 3, "pretrain_steps": 0, "learning_starts": 0, "total_timesteps": 1}
    for name, compiled in (("eager", False), ("compiled", True)):
        run_here(each, small_args(each, tmp_path / name, compile=compiled, num_critics=num_critics, **flags))
    eager, compiled = (read_state(tmp_path / name) for name in ("eager", "compiled"))
    torch.testing.assert_close(compiled["agent"], eager["agent"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled["rows"], eager["rows"], rtol=1e-4, atol=1e-3)
