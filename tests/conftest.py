"""What the tests share: the scripts, small agents and batches, and a cache folder of their own."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils.tasks import parse_args

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["expo_diffusion", "expo_flow", "expo_finetune"]  # the algorithm's tests run on every one of them
BASELINES = ["baselines.rlpd", "baselines.idql", "baselines.diffusion_ql", "baselines.qflow"]
VARIANTS = {"variants.expo_faster": "expo_flow", "variants.expo_chunks": "expo_flow"}  # each with its parent
EVERY_SCRIPT = [*SCRIPTS, *BASELINES, *VARIANTS]

# A whole run in seconds: --task pointmaze-umaze with everything small.
TINY_RUN = {"task": "pointmaze-umaze", "total_timesteps": 60, "offline_steps": 20, "max_episode_steps": 20}
TINY_RUN |= {"eval_every": 30, "eval_episodes": 2, "log_every": 10, "utd_ratio": 2, "batch_size": 16, "threads": 1}
TINY_RUN |= {"hidden_dim": 16, "hidden_layers": 2, "base_hidden_dim": 16, "base_blocks": 1, "denoising_steps": 3}
TINY_RUN |= {"device": "cpu"}

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job; a grid would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(params=SCRIPTS)
def script(request) -> Any:
    """The module of each script in turn; a script that is missing is an error, not a skip."""
    return importlib.import_module(request.param)


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


def snapshot(module: nn.Module) -> list[Tensor]:
    """Copies of all parameters and buffers."""
    return [value.clone() for value in module.state_dict().values()]


def same(module: nn.Module, before: list[Tensor]) -> bool:
    """Whether every parameter and buffer is bit for bit as in the snapshot."""
    return all(torch.equal(value, old) for value, old in zip(module.state_dict().values(), before, strict=True))


def assert_close(module: nn.Module, other: nn.Module, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Fails where two modules differ by more than rounding."""
    for value, expected in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)


def flags_of(script: Any, settings: dict[str, Any]) -> list[str]:
    """Command line of `settings`; those that the script does not have are left out."""
    words = []
    for key, value in settings.items():
        if hasattr(script.Args, key) and value is not False:
            words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def tiny_run_args(script: Any, run_dir: Path, **settings: Any) -> Any:
    """Parsed Args of a whole run that takes seconds."""
    settings = {**TINY_RUN, "pretrain_steps": 20, "run_dir": run_dir, **settings}
    return parse_args(script.Args, argv=flags_of(script, settings))


def run_script(script: Any, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it, in a process of its own."""
    command = [sys.executable, str(ROOT / f"{script.__name__.replace('.', '/')}.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ.copy(), timeout=timeout)
