"""Measures how long an update takes, and which of its parts takes how long.

    python benchmark/throughput.py --task antmaze-umaze                                  # the published sizes
    python benchmark/throughput.py --task pointmaze-medium --naive                       # and the obvious way beside it
    python benchmark/throughput.py --task antmaze-umaze --against /path/to/other/checkout
    python benchmark/throughput.py --task antmaze-umaze --against-flags "--matmul-precision medium" --differences

All flags that are not listed below go to the script. Every time is a median after a warm-up. A machine is often shared,
so a ratio that was measured in alternation says more than seconds. FLOP are those of the matrix products.
"""

import copy
import importlib
import json
import os
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

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts when this file is run

from benchmark.naive import NaiveExpo
from utils import InputError
from utils.envs import make_env
from utils.tasks import parse_args

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    """This program's own flags; all others are the script's."""

    script: Literal["expo_diffusion", "expo_flow", "expo_finetune"] = "expo_diffusion"
    repeats: int = 5  # measurements of everything
    rows: int = 100_000  # rows of random data to draw batches from
    naive: bool = False  # also measure benchmark/naive.py: the same update, written the obvious way
    against: str = ""  # another checkout of this repository: both are measured in turn, `repeats` times
    against_flags: str = ""  # flags for the other side alone; without --against, the other side is this checkout
    differences: bool = False  # also compare losses and gradients of one update under both sets of flags
    json: str = ""  # also write everything to this file


def measure(script: Any, args: Any, dims: tuple[int, int], options: Options) -> dict[str, Any]:
    """Median seconds of an update, of its parts, and of one action; FLOP of the parts."""
    agent, optimizers, buffer = start(script, args, dims, options.rows)
    device = buffer.fields.obs.device
    batch = draw(buffer, args)
    last, obs = script.Batch(*(field[-1] for field in batch)), batch.obs[0, :1]
    functions: dict[str, Callable[[], Any]] = {
        "update": lambda: script.update(agent, optimizers, draw(buffer, args)),
        "action": lambda: agent.on_the_fly_actions(obs),
        "candidates": lambda: script.next_candidates(agent, batch.next_obs),
        "chain": lambda: script.next_candidates(without_edits, batch.next_obs),
        "ranking": lambda: agent.td_target(last, candidates),
        "critic": lambda: critic_step(script, agent, optimizers, last, candidates),
        "base": lambda: script.update_base_policy(agent, optimizers, last.obs, last.actions),
    }
    if args.num_edit_samples:
        functions["edit"] = lambda: edit_step(script, agent, optimizers, last)
    without_edits, candidates = no_edits(agent), script.next_candidates(agent, batch.next_obs)[-1]
    flop = {name: count_flop(function) for name, function in functions.items()}  # torch.compile would hide them
    if args.compile:
        for name in ("on_the_fly_actions", "base_actions", "with_edits", "critic_loss", "edit_policy_loss"):
            setattr(agent, name, torch.compile(getattr(agent, name), options={"fallback_random": True}))
        without_edits = no_edits(agent)
    begin = time.perf_counter()
    functions["update"]()
    functions["action"]()
    first = time.perf_counter() - begin
    if options.naive:
        naive = NaiveExpo(script, *dims, args, device)
        functions["naive"] = lambda: naive.update(draw(buffer, args))
        functions["naive action"] = lambda: naive.best_actions(obs, naive.target_base_policy)
    seconds = median_times(functions, options.repeats, device)
    found = {"update_s": seconds["update"], "action_s": seconds["action"], "first_s": first}
    found |= {"naive_s": seconds.get("naive"), "naive_action_s": seconds.get("naive action")}
    return found | {"parts_s": parts(seconds, args.utd_ratio), "parts_flop": parts(flop, args.utd_ratio)}


def start(script: Any, args: Any, dims: tuple[int, int], rows: int) -> tuple[Any, Any, Any]:
    """Agent, optimizers, and a buffer of random rows, with the random state of --seed."""
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(0)
    shapes = (rows, dims[0]), (rows, dims[1]), (rows,), (rows, dims[0])
    obs, actions, rewards, next_obs = (rng.standard_normal(shape, np.float32) for shape in shapes)
    data = obs, actions.clip(-1, 1), rewards, next_obs, np.zeros(rows, np.float32)
    torch.manual_seed(args.seed)
    agent = script.Agent(*dims, args).to(device)
    return agent, script.Optimizers(agent, args), script.ReplayBuffer(data, 1, device)


def draw(buffer: Any, args: Any) -> Any:
    """A batch (U, B, ...) of one environment step."""
    return buffer.draw(args.offline_ratio, args.utd_ratio, args.batch_size)


def no_edits(agent: Any) -> Any:
    """The same agent, of which `next_candidates` runs the chain alone."""
    agent = copy.copy(agent)
    agent.with_edits = lambda obs, base_actions: base_actions
    return agent


def critic_step(script: Any, agent: Any, optimizers: Any, rows: Any, candidates: Any) -> None:
    """One of the U steps of `update`."""
    loss, _ = agent.critic_loss(rows, candidates)
    script.gradient_step(optimizers.critic, loss)
    script.move_towards(agent.target_critic, agent.critic, agent.args.tau)


def edit_step(script: Any, agent: Any, optimizers: Any, rows: Any) -> None:
    """The steps of edit policy and temperature in `update`."""
    loss, entropy, _ = agent.edit_policy_loss(rows)
    script.gradient_step(optimizers.edit, loss)
    script.gradient_step(optimizers.alpha, agent.log_alpha.exp() * (entropy.detach() - agent.target_entropy))


def count_flop(function: Callable[[], Any]) -> float:
    """FLOP of the matrix products, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def parts(values: dict[str, float], utd_ratio: int) -> dict[str, float]:
    """Every part's share of one `update`, from what one call of each function takes."""
    return {
        "chain": values["chain"],
        "edits": max(values["candidates"] - values["chain"], 0.0),
        "ranking": values["ranking"] * utd_ratio,
        "critic": max(values["critic"] - values["ranking"], 0.0) * utd_ratio,
        "base": values["base"],
        "edit": values.get("edit", 0.0),
    }


def median_times(functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of every function. They are called in turn, `repeats` times after a warm-up."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            count, begin = 0, clock()
            while count == 0 or (repeat and clock() - begin < 0.05):  # one short call would measure the clock
                function()
                count += 1
            if repeat:
                seconds[name].append((clock() - begin) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(found: dict[str, Any]) -> str:
    """What `measure` found, in Markdown."""
    lines = ["| part | ms | share | GFLOP | GFLOP/s |", "|---|---|---|---|---|"]
    total, update = sum(found["parts_s"].values()), found["update_s"]
    for name, seconds in found["parts_s"].items():
        flop = found["parts_flop"][name] / 1e9
        speed = flop / seconds if seconds else 0
        lines.append(f"| {name} | {1e3 * seconds:,.1f} | {seconds / total:.0%} | {flop:,.2f} | {speed:,.0f} |")
    lines += [f"| **update** | {1e3 * update:,.1f} | | {sum(found['parts_flop'].values()) / 1e9:,.2f} | |", ""]
    lines += [f"one action: {1e3 * found['action_s']:.2f} ms; first update and action: {found['first_s']:.1f} s"]
    if found["naive_s"]:
        action = f"one action: {1e3 * found['naive_action_s']:.2f} ms"
        lines.append(f"the obvious way: {1e3 * found['naive_s']:,.1f} ms, {found['naive_s'] / update:.2f} x; {action}")
    return "\n".join(lines)


def compare(options: Options, words: list[str]) -> dict[str, Any]:
    """Measures this checkout ("here") and the other side ("there") in turn, each time in a process of its own."""
    there = [*words, *shlex.split(options.against_flags)]
    sides = {"there": (Path(options.against or ROOT), there), "here": (ROOT, words)}
    seconds: dict[str, dict[str, list[float]]] = {key: {side: [] for side in sides} for key in ("update", "action")}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for side, (checkout, flags) in list(sides.items())[:: -1 if repeat % 2 else 1]:
                program, file = checkout.resolve() / "benchmark" / "throughput.py", Path(folder) / "found.json"
                command = [sys.executable, str(program), "--script", options.script, "--repeats", "2"]
                command += ["--json", str(file), *flags]
                done = subprocess.run(command, capture_output=True, text=True, cwd=program.parent.parent)
                if done.returncode:
                    said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
                    raise InputError(f"{shlex.join(command)} ended with exit code {done.returncode}: {said}")
                found = json.loads(file.read_text())
                for key, values in seconds.items():
                    values[side].append(found[f"{key}_s"])
    ratios = {}
    for key, values in seconds.items():
        here, there = statistics.median(values["here"]), statistics.median(values["there"])
        pairs = sorted(a / b for a, b in zip(values["here"], values["there"], strict=True))
        ratios[key] = here / there
        text = f"{key}: here {1e3 * here:,.2f} ms, there {1e3 * there:,.2f} ms; here / there {here / there:.3f} "
        print(f"{text}(pairs {pairs[0]:.3f} to {pairs[-1]:.3f}), there / here {there / here:.3f}")
    return {"seconds": seconds, "here_over_there": ratios}


def differences(script: Any, sides: list[Any], dims: tuple[int, int]) -> dict[str, float]:
    """Largest relative difference of the losses, and of the last gradients, after one update with the same draws."""
    found: list[dict[str, dict[str, torch.Tensor]]] = []
    for args in sides:
        agent, optimizers, buffer = start(script, args, dims, 10_000)
        info = script.update(agent, optimizers, draw(buffer, args))
        losses = {key: value for key, value in info.items() if key.startswith("losses/")}
        gradients = {name: value.grad for name, value in agent.named_parameters() if value.grad is not None}
        found.append({"losses": losses, "gradients": gradients})
    one, other = found
    return {
        kind: max(((other[kind][key] - value).norm() / value.norm()).item() for key, value in one[kind].items())
        for kind in one
    }


def main() -> None:
    """Reads both sets of flags, measures, prints, and writes the file."""
    options, words = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    script = importlib.import_module(options.script)
    args = parse_args(script.Args, argv=words)
    env = make_env(args.env_id, args.task, args.max_episode_steps, args.action_repeat, args.obs_keys)
    dims = env.observation_space.shape[0], env.action_space.shape[0]  # pyright: ignore[reportOptionalSubscript]
    sizes = f"O {dims[0]}, A {dims[1]}, U {args.utd_ratio}, B {args.batch_size}"
    threads = args.threads or torch.get_num_threads()
    print(f"{options.script}, {args.task or args.env_id}: {sizes}, {threads} threads")
    commit = subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty --exclude='*'")
    cpu = subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo").split(": ")[-1]
    result = {"command": sys.argv, "commit": commit, "torch": torch.__version__, "cpu": cpu, "cpus": os.cpu_count()}
    result |= {"threads": threads, "instructions": torch.backends.cpu.get_cpu_capability()}
    if options.differences:
        other = parse_args(script.Args, argv=[*words, *shlex.split(options.against_flags)])
        result["differences"] = differences(script, [args, other], dims)
        print("largest relative difference: " + ", ".join(f"{k} {v:.1e}" for k, v in result["differences"].items()))
    if options.against or options.against_flags:
        result |= compare(options, words)
    else:
        found = measure(script, args, dims, options)
        print(table(found))
        result |= found
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
