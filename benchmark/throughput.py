"""Measures how long an update takes, and which of its parts takes how long.

    python benchmark/throughput.py --task antmaze-umaze --naive       # the published sizes, and the obvious way beside
    python benchmark/throughput.py --task antmaze-umaze --against /path/to/another/checkout
    python benchmark/throughput.py --task antmaze-umaze --against-flags "--matmul-precision medium" --differences

All other flags go to the script. Times are medians. On a shared machine a ratio, measured in turns, says more.
"""

import contextlib
import functools
import importlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts when this file is run

from benchmark.grid import ROOT
from benchmark.naive import NaiveExpo
from tools import one_line_errors
from utils import InputError
from utils.envs import make_env
from utils.tasks import parse_args


@dataclass
class Options:
    """This program's own flags; all others are the script's."""

    script: Literal["expo_diffusion", "expo_flow", "expo_finetune"] = "expo_diffusion"
    repeats: int = 5  # measurements of everything
    cpu_time: bool = False  # count CPU time: with one thread, other programs then disturb less
    naive: bool = False  # also measure benchmark/naive.py: the same update, written the obvious way
    against: str = ""  # another checkout of this repository, measured in alternation with this one
    against_flags: str = ""  # more flags for the other side; without --against, the other side is this checkout
    differences: bool = False  # also compare the losses and gradients of both sides, after one update
    json: str = ""  # also write everything to this file


class Side:
    """An agent with optimizers and a buffer of random rows."""

    def __init__(self, script: Any, args: Any, dims: tuple[int, int], rows: int = 100_000):
        self.script, self.args = script, args
        self.configure()
        device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        torch.manual_seed(args.seed)
        obs, next_obs = torch.randn(2, rows, dims[0])
        data = obs, 2 * torch.rand(rows, dims[1]) - 1, torch.randn(rows), next_obs, torch.zeros(rows)
        self.agent = script.Agent(*dims, args).to(device)
        self.optimizers, self.buffer = script.Optimizers(self.agent, args), script.ReplayBuffer(data, 1, device)
        self.obs = self.buffer.fields.obs[:1]
        if args.compile:
            for name in ("on_the_fly_actions", "base_actions", "with_edits", "critic_loss", "edit_policy_loss"):
                setattr(self.agent, name, torch.compile(getattr(self.agent, name), options={"fallback_random": True}))

    def configure(self) -> None:
        """Settings of the whole process, as in the script's `main`."""
        torch.set_float32_matmul_precision(self.args.matmul_precision)
        torch.set_num_threads(self.args.threads or torch.get_num_threads())

    def draw(self) -> Any:
        return self.buffer.draw(1.0, self.args.utd_ratio, self.args.batch_size)

    def update(self) -> dict[str, torch.Tensor]:
        self.configure()
        return self.script.update(self.agent, self.optimizers, self.draw())

    def action(self) -> torch.Tensor:
        self.configure()
        return self.agent.on_the_fly_actions(self.obs)

    def parts(self) -> dict[str, float]:
        """Seconds of the parts of one update. With --compile the ranking is inside the critic's part."""
        seconds: dict[str, float] = dict.fromkeys(("chain", "edits", "ranking", "base", "edit"), 0.0)

        def timed(function: Callable[..., Any], part: str, *args: Any, **kwargs: Any) -> Any:
            begin = clock()
            result = function(*args, **kwargs)
            if part != "edit step" or args[0] in (self.optimizers.edit, self.optimizers.alpha):
                seconds[part.split()[0]] += clock() - begin
            return result

        names = {"base_actions": "chain", "with_edits": "edits", "td_target": "ranking", "edit_policy_loss": "edit"}
        places = [(self.agent, name, part) for name, part in names.items()]
        places += [(self.script, "update_base_policy", "base"), (self.script, "gradient_step", "edit step")]
        with contextlib.ExitStack() as stack:
            for owner, name, part in places:
                timer = functools.partial(timed, getattr(owner, name), part)
                stack.enter_context(mock.patch.object(owner, name, timer))
            begin = clock()
            self.update()
            return seconds | {"critic": clock() - begin - sum(seconds.values())}


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
            while count == 0 or (repeat and clock(options.cpu_time) - begin < 0.1):
                function()
                count += 1
            if repeat:
                seconds[name].append((clock(options.cpu_time) - begin) / count)
    return seconds


def alone(side: Side, dims: tuple[int, int], options: Options) -> dict[str, Any]:
    """Measures and prints the update, its parts, one action, and the naive implementation if it is asked for."""
    functions: dict[str, Callable[[], Any]] = {"update": side.update, "action": side.action}
    if options.naive:
        naive = NaiveExpo(side.script, *dims, side.args, side.obs.device)
        functions["naive"] = lambda: naive.update(side.draw())
        functions["naive action"] = lambda: naive.best_actions(side.obs, naive.target_base_policy)
    seconds = {name: statistics.median(values) for name, values in measure(functions, options).items()}
    update, rounds = seconds["update"], [side.parts() for _ in range(options.repeats)]
    parts = {name: statistics.median([found[name] for found in rounds]) for name in rounds[0]}
    print("| part | ms | share |\n|---|---|---|")
    for name, value in parts.items():
        print(f"| {name} | {1e3 * value:,.1f} | {value / sum(parts.values()):.0%} |")
    print(f"| **update** | {1e3 * update:,.1f} | |\n\none action: {1e3 * seconds['action']:.2f} ms")
    if options.naive:
        action = f"one action: {1e3 * seconds['naive action']:.2f} ms"
        print(f"the obvious way: {1e3 * seconds['naive']:,.1f} ms, {seconds['naive'] / update:.2f} x; {action}")
    return {"update_s": update, "action_s": seconds["action"], "seconds": seconds, "parts_s": parts}


def checkouts(options: Options, words: list[str]) -> dict[str, list[float]]:
    """Measures this checkout and another one in turn, each time with its own throughput.py in a process of its own."""
    sides = {"there": (Path(options.against).resolve(), [*words, *shlex.split(options.against_flags)])}
    sides["here"] = ROOT, words
    seconds: dict[str, list[float]] = {f"{key} {side}": [] for key in ("update", "action") for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for side, (root, flags) in list(sides.items()) * options.repeats:
            command = [sys.executable, str(root / "benchmark" / "throughput.py"), "--script", options.script]
            command += ["--repeats", "2", "--json", f"{folder}/found.json", *flags]
            done = subprocess.run(command, capture_output=True, text=True, cwd=root)
            if done.returncode:
                raise InputError(f"{shlex.join(command)} failed: {(done.stderr.splitlines() or ['nothing'])[-1]}")
            found = json.loads(Path(folder, "found.json").read_text())
            for key in ("update", "action"):
                seconds[f"{key} {side}"].append(found[f"{key}_s"])
    return seconds


def differences(*sides: Side) -> dict[str, float]:
    """Largest relative difference of the losses, and of the last gradients, after one update with the same draws."""
    losses, gradients = [], []
    for side in sides:
        torch.manual_seed(side.args.seed)
        losses.append([value for key, value in side.update().items() if key.startswith("losses/")])
        gradients.append([value.grad for value in side.agent.parameters() if value.grad is not None])
    pairs = {"losses": zip(*losses, strict=True), "gradients": zip(*gradients, strict=True)}
    return {name: max(((b - a).norm() / a.norm()).item() for a, b in both) for name, both in pairs.items()}


def main() -> None:
    """Reads both sets of flags, measures, prints, and writes the file."""
    argv = sys.argv[1:]
    for place in [i for i, word in enumerate(argv) if word == "--against-flags"]:  # its value begins with --, too
        argv[place : place + 2] = ["=".join(argv[place : place + 2])]
    options, words = tyro.cli(Options, args=argv, description=__doc__, return_unknown_args=True)
    script = importlib.import_module(options.script)
    args = parse_args(script.Args, argv=words)
    env = make_env(args.env_id, args.task, args.max_episode_steps, args.action_repeat, args.obs_keys)
    dims: Any = (*(env.observation_space.shape or ()), *(env.action_space.shape or ()))
    here = Side(script, args, dims)
    cpu = subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo").split(": ")[-1]
    machine = f"{here.obs.device}, {cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    commit = subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty --exclude='*'")
    result = {"command": sys.argv, "commit": commit, "torch": torch.__version__, "machine": machine}
    print(f"{options.script}, {args.task or args.env_id}: O {dims[0]}, A {dims[1]}, on {machine}")
    if options.against:
        result["seconds"] = checkouts(options, words)
    elif options.against_flags:
        there = Side(script, parse_args(script.Args, argv=[*words, *shlex.split(options.against_flags)]), dims)
        if options.differences:
            result["differences"] = differences(here, there)
            print(f"largest relative difference after one update: {result['differences']}")
        functions = {"update there": there.update, "update here": here.update, "action there": there.action}
        result["seconds"] = measure(functions | {"action here": here.action}, options)
    else:
        result |= alone(here, dims, options)
    for key in ("update", "action") if options.against or options.against_flags else ():
        lists: Any = [result["seconds"][f"{key} {side}"] for side in ("here", "there")]
        ours, theirs = map(statistics.median, lists)
        pairs = sorted(a / b for a, b in zip(*lists, strict=True))
        text = f"{key}: here {1e3 * ours:,.2f} ms, there {1e3 * theirs:,.2f} ms; here / there {ours / theirs:.3f}"
        print(f"{text} (pairs from {pairs[0]:.3f} to {pairs[-1]:.3f}), there / here {theirs / ours:.3f}")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    one_line_errors(main)
