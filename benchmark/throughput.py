"""Measures how long an update takes.

    python benchmark/throughput.py --task antmaze-umaze --rows expo_flow "cuda_graph expo_flow" baselines.rlpd

All other flags go to the scripts. Times are medians. On a shared machine a ratio, measured in turns, says more.
"""

import inspect
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts when this file is run

from benchmark.grid import ROOT
from tools import one_line_errors
from tools.changed import load_script
from tools.cuda_graph import cuda_graph
from utils.envs import make_env
from utils.tasks import parse_args


@dataclass
class Options:
    """This program's own flags; all others are the script's."""

    rows: tuple[str, ...] = ("expo_diffusion",)  # "[cuda_graph] MODULE FLAGS" each; several are measured in turn
    repeats: int = 5  # measurements of everything
    cpu_time: bool = False  # count CPU time: with one thread, other programs then disturb less
    json: str = ""  # also write everything to this file


class Side:
    """An agent with optimizers and a buffer of random rows, of one of the rows and of flags for all rows."""

    def __init__(self, row: str, words: list[str], size: int = 100_000):
        name, *flags = shlex.split(row.removeprefix("cuda_graph "))
        self.script = script = SimpleNamespace(**vars(load_script(name)))
        if row.startswith("cuda_graph "):
            cuda_graph(script)
        self.args = args = parse_args(script.Args, argv=[*words, *flags])
        env = make_env(args.env_id, args.task, args.max_episode_steps, args.action_repeat, args.obs_keys)
        self.dims: Any = (*(env.observation_space.shape or ()), *(env.action_space.shape or ()))
        self.configure()
        device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        obs, next_obs = torch.randn(2, size, self.dims[0])
        data = obs, 2 * torch.rand(size, self.dims[1]) - 1, torch.randn(size), next_obs, torch.zeros(size)
        self.agent = script.Agent(*self.dims, args).to(device)
        self.optimizers = script.Optimizers(self.agent, args)
        windows = (args.chunk_length, args.gamma) if hasattr(args, "chunk_length") else ()
        self.buffer = script.ReplayBuffer(data, 1, device, *windows)
        self.obs = self.buffer.fields.obs[:1]
        if args.compile:  # what the script's `main` compiles
            names = re.findall(r"for name in (.*):\n.*torch.compile", inspect.getsource(script.main))[0]
            for name in re.findall(r"\w+", names):
                setattr(self.agent, name, torch.compile(getattr(self.agent, name), options={"fallback_random": True}))

    def configure(self) -> None:
        """Settings of the whole process, as in the script's `main`."""
        torch.set_float32_matmul_precision(self.args.matmul_precision)
        torch.set_num_threads(self.args.threads or torch.get_num_threads())

    def update(self) -> dict[str, torch.Tensor]:
        self.configure()
        batch = self.buffer.draw(1.0, self.args.utd_ratio, self.args.batch_size)
        return self.script.update(self.agent, self.optimizers, batch)

    def action(self) -> torch.Tensor:
        self.configure()
        return getattr(self.agent, type(self.agent).forward.__name__)(self.obs)


def clock(cpu_time: bool = False) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() if cpu_time else time.perf_counter()


def measure(functions: dict[str, Callable[[], Any]], options: Options) -> dict[str, list[float]]:
    """Seconds of every function, several times. They are called in turn, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(options.repeats + 1):
        for name, function in functions.items():
            count, begin = 0, clock(options.cpu_time)  # a single short call would measure the clock
            while count < (1 if repeat else 4) or (repeat and clock(options.cpu_time) - begin < 0.1):
                function()
                count += 1
            if repeat:
                seconds[name].append((clock(options.cpu_time) - begin) / count)
    return seconds


def print_table(rows: list[str], seconds: dict[str, list[float]], gflop: dict[str, float]) -> None:
    """Medians of every row, and its ratio to the first row: of the medians, and from the least to the largest pair."""
    print("| row | GFLOP | update, ms | of the first | pairs | action, ms |\n|---|---|---|---|---|---|")
    for row in rows:
        update, action, first = (seconds[name] for name in (f"update {row}", f"action {row}", f"update {rows[0]}"))
        ratios = [a / b for a, b in zip(update, first, strict=True)]
        ratio = f"{median(update) / median(first):.3f} | {min(ratios):.3f} to {max(ratios):.3f}"
        print(f"| {row} | {gflop[row]} | {1e3 * median(update):,.1f} | {ratio} | {1e3 * median(action):.2f} |")


def main() -> None:
    """Reads both sets of flags, measures, prints, and writes the file."""
    options, words = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    sides = {row: Side(row, words) for row in options.rows}
    rows, side = list(sides), next(iter(sides.values()))
    cpu = subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo").split(": ")[-1]
    gpu = torch.cuda.get_device_name() if side.obs.is_cuda else "no GPU"
    machine = f"{gpu}, {cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    commit = subprocess.getoutput(f'git -C "{ROOT}" describe --always --dirty --exclude="*"')
    print(f"{', '.join(rows)}: {side.args.task or side.args.env_id}, O {side.dims[0]}, A {side.dims[1]}, on {machine}")
    gflop: dict[str, float] = {}  # of the matrix products of an update
    calls = {f"{key} {row}": getattr(side, key) for row, side in sides.items() for key in ("update", "action")}
    for row in rows:
        with FlopCounterMode(display=False) as counter:
            calls[f"update {row}"]()
        gflop[row] = float(f"{counter.get_total_flops() / 1e9:.4g}")
    seconds = measure(calls, options)
    print_table(rows, seconds, gflop)
    result = {"command": sys.argv, "commit": commit, "torch": torch.__version__, "machine": machine}
    if options.json:
        Path(options.json).write_text(json.dumps(result | {"seconds": seconds, "gflop": gflop}, indent=1) + "\n")


if __name__ == "__main__":
    one_line_errors(main)
