"""What the tests share: the scripts, small agents and batches, and a cache folder of their own."""

import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from utils import InputError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["expo_diffusion", "expo_flow", "expo_finetune"]  # the algorithm's tests run on every one of them
BASELINES = ["baselines.rlpd", "baselines.idql", "baselines.diffusion_ql", "baselines.qflow"]
VARIANTS = {"variants.expo_faster": "expo_flow", "variants.expo_chunks": "expo_flow"}  # each with its parent
EVERY_SCRIPT = [*SCRIPTS, *BASELINES, *VARIANTS]

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job; a grid would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Only `-m gpu` sees a GPU. Where torch has one, a fork (tests/running.py) cannot train after its parent has."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache folder for generated data that is neither the user's nor left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(params=EVERY_SCRIPT)
def each(request) -> Any:
    """The module of every script, baseline and variant in turn."""
    return importlib.import_module(request.param)


def make_args(script: Any, **flags: Any) -> Any:
    """The script's Args with small networks. Small values for flags that the script does not have are left out."""
    small = {"hidden_dim": 16, "hidden_layers": 2, "base_hidden_dim": 16, "base_blocks": 2, "base_expansion": 2}
    small |= {"num_critics": 5, "num_base_samples": 4, "num_edit_samples": 4, "num_action_samples": 6}
    small |= {"chunk_length": 1}
    return script.Args(**{key: value for key, value in small.items() if hasattr(script.Args, key)} | flags)


def make_agent(script: Any, obs_dim: int = 3, action_dim: int = 2, **flags: Any) -> Any:
    """A small agent with weights that hide nothing: no bias is 0, and no target network equals its online one."""
    agent = script.Agent(obs_dim, action_dim, make_args(script, **flags))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return agent


def make_batch(script: Any, *shape: int, obs_dim: int = 3, action_dim: int = 2) -> Any:
    """Random transitions, a third of them terminal. Where a batch has windows, they are one step long."""
    window = {"mask": torch.ones(*shape, action_dim), "lengths": torch.ones(shape)}
    return script.Batch(
        obs=torch.randn(*shape, obs_dim),
        actions=torch.rand(*shape, action_dim) * 2 - 1,
        rewards=torch.randn(*shape),
        next_obs=torch.randn(*shape, obs_dim),
        terminations=(torch.rand(*shape) < 1 / 3).float(),
        **{key: value for key, value in window.items() if key in script.Batch._fields},
    )


def same(module: nn.Module, other: nn.Module) -> bool:
    """Whether every parameter and buffer is bit for bit the same."""
    values = (each.state_dict().values() for each in (module, other))
    return all(torch.equal(*pair) for pair in zip(*values, strict=True))


def flags_of(script: Any, settings: dict[str, Any]) -> list[str]:
    """Command line of `settings`; those that the script does not have are left out."""
    words = []
    for key, value in settings.items():
        if hasattr(script.Args, key) and value is not False:
            words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def refused(function: Callable[..., Any], *inputs: Any, kind: type = InputError, **flags: Any) -> str:
    """The one line that a user reads."""
    with pytest.raises(kind) as error:
        function(*inputs, **flags)
    assert str(error.value).strip() and "\n" not in str(error.value)
    return str(error.value)
