"""On a GPU: the numbers of the CPU, a whole run that goes on, and the recorded update. `pytest -m gpu` runs them."""

import copy
import functools
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import EVERY_SCRIPT, make_agent, make_batch
from running import run_here, small_args

from benchmark.plot import read_metrics
from tools.cuda_graph import cuda_graph

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def drawn_on_the_cpu(draw: Any, *shape: Any, device: Any = None, **flags: Any) -> torch.Tensor:
    """The same random numbers for both devices."""
    device = device or getattr(shape[0], "device", "cpu")
    return draw(*(part.cpu() if isinstance(part, torch.Tensor) else part for part in shape), **flags).to(device)


def trained(script: Any, start: Any, batches: list[Any], device: str) -> tuple[Any, Any, list[dict[str, float]]]:
    """A copy of an agent after an update on each of the batches, its optimizers, and what the updates tell."""
    torch.manual_seed(1)
    agent = copy.deepcopy(start).to(device)
    optimizers, infos = script.Optimizers(agent, agent.args), []
    for batch in batches:
        info = script.update(agent, optimizers, script.Batch(*(field.to(device) for field in batch)))
        infos.append({key: float(value) for key, value in info.items()})
    return agent, optimizers, infos


def assert_same_training(agents: list[Any], infos: list[list[dict[str, float]]]) -> None:
    """Adam steps by about 3e-4, whatever the gradient's size. So rounding may move single weights, but not most."""
    for value, expected in zip(*(agent.cpu().parameters() for agent in agents), strict=True):
        assert (value - expected).abs().median() < 1e-6
    for info, expected in zip(*infos, strict=True):
        assert info == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_an_update_gives_the_numbers_of_the_cpu(each, monkeypatch):
    start, batches = make_agent(each), [make_batch(each, 3, 16)]
    for kind in ("rand", "randn", "randint", "randperm", "rand_like", "randn_like"):
        monkeypatch.setattr(torch, kind, functools.partial(drawn_on_the_cpu, getattr(torch, kind)))
    draw = torch.Tensor.exponential_  # FASTER's choice of a noise
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(draw(torch.empty(self.shape))))
    agents, _, infos = zip(*(trained(each, start, batches, device) for device in ("cuda", "cpu")), strict=True)
    assert_same_training(list(agents), list(infos))
    assert (next(agents[0].critic.parameters()) - next(start.critic.parameters())).abs().mean() > 1e-4


def test_a_recorded_update_is_the_update(each):
    """Offline and online batches, and learning rates that decay to 0 within the test."""
    recorded: Any = SimpleNamespace(**vars(each))
    cuda_graph(recorded)
    start = make_agent(each, **({"lr_decay_steps": 12} if hasattr(each.Args, "lr_decay_steps") else {}))
    batches = [make_batch(each, 1, 16) for _ in range(6)] + [make_batch(each, 2, 16) for _ in range(7)]
    agents, optimizers, infos = zip(*(trained(s, start, batches, "cuda") for s in (recorded, each)), strict=True)
    assert_same_training(list(agents), list(infos))
    for name, part in vars(optimizers[1]).items():
        if hasattr(part, "param_groups"):
            rates = [float(vars(o)[name].param_groups[0]["lr"]) for o in optimizers]
            assert rates[0] == pytest.approx(rates[1], rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in EVERY_SCRIPT if "expo" in name])
def test_a_recorded_choice_is_the_choice(name):
    """Also after the weights have changed, and with the random numbers that an evaluation asks for."""
    script: Any = importlib.import_module(name)
    recorded: Any = SimpleNamespace(**vars(script))
    cuda_graph(recorded)
    obs, plain = torch.randn(4, 3, device="cuda"), make_agent(script).cuda()
    agent = make_agent(recorded).cuda()
    agent.load_state_dict(plain.state_dict())
    for call in range(10):  # the fourth of a shape records it
        actions = []
        for each in (agent, plain):
            with torch.random.fork_rng([torch.device("cuda")]):
                torch.manual_seed(call)
                actions.append(each.on_the_fly_actions(obs[call % 2 :]).clone())
            with torch.no_grad():
                torch._foreach_mul_(list(each.parameters()), 0.9)  # pyright: ignore
        assert (actions[0] - actions[1]).abs().max() < 1e-5
    assert recorded.Agent is not script.Agent


def test_a_run_trains_and_goes_on(each, tmp_path, capsys):
    run_here(each, small_args(each, tmp_path / "run", device="cuda"))
    words = {"resume": tmp_path / "run", "run_dir": False, "total_timesteps": 90, "device": "cuda"}
    run_here(each, small_args(each, **words))
    assert "on cuda" in capsys.readouterr().out
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    assert metrics["losses/critic"].steps[-1] == 90
    assert metrics["eval/success_rate"].steps.tolist()[-4:] == [63, 72, 81, 90]
