"""What an update costs, where the time goes, and how near that is to the machine's limit.

    python benchmark/throughput.py --task antmaze-umaze                        # the published sizes
    python benchmark/throughput.py --task pointmaze-medium --naive             # beside the obvious implementation
    python benchmark/throughput.py --script expo_flow --task antmaze-umaze --precision bfloat16 --compile
    python benchmark/throughput.py --task antmaze-umaze --ladder               # from there to here, step by step
    python benchmark/throughput.py --task antmaze-umaze --grid                 # how the cost grows with the settings
    python benchmark/throughput.py --task antmaze-umaze --against 'COMMAND'    # another implementation, in alternation

Every flag that is not this program's own goes to the script. All times are medians after a warm-up, taken in one
process in alternation, since machines are shared: trust the ratios more than the seconds. FLOP are counted from the
shapes. The command of --against must print, as its last line, a JSON object with "update_s": seconds per environment
step.
"""

import contextlib
import importlib
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not as a module

from benchmark.naive import STEPS, NaiveExpo
from utils import cli, compiling, logger
from utils.buffer import Batch, ReplayBuffer
from utils.data import Dataset
from utils.errors import exit_on_input_error
from utils.tasks import make_task_env


@dataclass
class Options:
    """This program's own flags; all others are the script's."""

    script: str = "expo_diffusion"  # expo_diffusion, expo_flow or expo_finetune
    repeats: int = 5  # measurements of everything; the median counts
    rows: int = 100_000  # offline rows to draw from
    naive: bool = False  # also measure benchmark/naive.py, the same update written the obvious way
    ladder: bool = False  # how it becomes fast: benchmark/naive.py with one step more in every row, then the script
    profile: bool = False  # also which torch operations an update consists of, eager ones by name
    grid: bool = False  # vary U, N, K, batch and widths, one at a time
    against: str = ""  # another implementation's benchmark, run in alternation with this one
    json: str = ""  # also write the figures to this file


PARTS = ("chain", "edits", "ranking", "critic", "base", "edit")


# --------------------------------------------------------------------------------------------------- arithmetic


def products(network: nn.Module) -> int:
    """FLOP of all matrix products of a network for one row: 2 I J a Linear; of one head where it has several."""
    named = {name: p for name, p in network.named_parameters() if name.endswith("weight")}
    # A norm's weights are no matrix, and the time code is computed once for all rows.
    return sum(2 * p.shape[-1] * p.shape[-2] for name, p in named.items() if not ("norm" in name or "time_mlp" in name))


def flop(agent: Any) -> dict[str, float]:
    """FLOP of one environment step's update, by part: matrix products only, a backward pass twice its forward one."""
    args = agent.args
    rows, n, m = args.utd_ratio * args.batch_size, args.num_base_samples, args.num_edit_samples
    base, edit, head = (products(part) for part in (agent.base_policy, agent.edit_policy, agent.critic))
    base -= 2 * args.base_hidden_dim**2  # the first layer's share for the time code, one product for all rows
    heads, batch = args.num_min_critics, args.batch_size
    return {
        "chain": args.refresh_share * rows * n * args.denoising_steps * base,
        "edits": rows * m * edit,
        "ranking": rows * (n + m + 1) * heads * head,
        "critic": rows * args.num_critics * 3 * head,
        "base": batch * 3 * base,
        "edit": batch * (3 * edit + 2 * args.num_critics * head) if m else 0,
    }


class Traffic(TorchDispatchMode):
    """While active, adds up in `bytes` what the operations of eager torch read and write; views move nothing."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if views or func is torch.ops.aten._unsafe_view.default:
            return result
        moved = tree_leaves((args, kwargs, result))
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather):
            moved[0] = result  # of the source only what is taken is read
        if not func._schema.returns:  # written in place, as by fused optimizers
            written = [a for a, known in zip(args, func._schema.arguments, strict=False) if known.is_write]
            moved += tree_leaves(written)
        # What is only repeated (expand) lies in memory once.
        self.bytes += sum(min(v.nbytes, v.untyped_storage().nbytes()) for v in moved if isinstance(v, Tensor))
        return result


def traffic(function: Callable[[], Any]) -> int:
    """Bytes that the operations of `function` read and write: the memory's if no cache held any of it."""
    with Traffic() as counter:
        function()
    return counter.bytes


def per_environment_step(values: dict[str, float], utd_ratio: int) -> dict[str, float]:
    """By part, from what one call of each function takes; what happens inside something else is taken out of it."""
    return {
        "chain": values["chain"],
        "edits": values["edits"] if "edit" in values else 0.0,
        "ranking": values["ranking"] * utd_ratio,
        "critic": max(values["critic"] - values["ranking"], 0.0) * utd_ratio,
        "base": values["base"],
        "edit": values.get("edit", 0.0),
    }


# ------------------------------------------------------------------------------------------------------- timing


def median_times(functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of every function, called in turn `repeats` times after one warm-up each."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            count, begin = 0, clock()
            while count == 0 or (clock() - begin < 0.05 and repeat):  # what is short is called several times
                function()
                count += 1
            if repeat:
                seconds[name].append((clock() - begin) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


def operations(function: Callable[[], Any], device: torch.device, calls: int = 3) -> dict[str, dict[str, float]]:
    """Torch operation -> share of the time of `function` that is its own, and how often one call of it runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            function()
    events = profiler.key_averages()
    seconds = {e.key: e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total for e in events}
    counts, total = {e.key: e.count / calls for e in events}, sum(seconds.values())
    return {
        key: {"share": seconds[key] / total, "calls": counts[key]} for key in sorted(seconds, key=lambda k: -seconds[k])
    }


def limits(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large product in both precisions (the better of two sizes) and bytes/s of a copy, on this machine.

    Also what torch.set_float32_matmul_precision("medium") makes of float32: `medium_speed` in that of "highest", and
    the largest error under both as a share of the largest entry.
    """
    found = {}
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(512, 512, device=device, dtype=dtype) for _ in range(2))
        begin = time.perf_counter()
        torch.mm(a, b)
        slow = device.type == "cpu" and time.perf_counter() - begin > 0.1  # bfloat16 without instructions for it
        best = 0.0
        for size in (512,) if slow else sizes:
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            times = median_times({"product": lambda a=a, b=b: a @ b}, 1 if slow else 5, device)
            best = max(best, 2 * size**3 / times["product"])
        found[name] = best
    a, b = (torch.randn(sizes[0], sizes[0], device=device) for _ in range(2))
    exact, before = a.double() @ b.double(), torch.get_float32_matmul_precision()

    def product(precision: str) -> torch.Tensor:
        torch.set_float32_matmul_precision(precision)
        return a @ b

    precisions = {name: lambda name=name: product(name) for name in ("highest", "medium")}
    times = median_times(precisions, 9, device)
    found["medium_speed"] = times["highest"] / times["medium"]
    for name, function in precisions.items():
        found[f"{name}_error"] = ((function().double() - exact).abs().max() / exact.abs().max()).item()
    torch.set_float32_matmul_precision(before)
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    copy = median_times({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return found | {"copy": 2 * source.numel() * 4 / copy}


def reset_peak(device: torch.device) -> None:
    """From now on `peak_memory` counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # no Linux: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes since `reset_peak`: of the process, or on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(script: Any, args: Any, obs_dim: int, action_dim: int, options: Options) -> dict[str, Any]:
    """All figures of one setting."""
    device = cli.setup_torch(args)
    torch.manual_seed(args.seed)
    n, rng = options.rows, np.random.default_rng(0)
    dataset = Dataset(
        obs=rng.normal(size=(n, obs_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        next_obs=rng.normal(size=(n, obs_dim)).astype(np.float32),
        terminations=np.zeros(n, np.float32),
        episodes=np.array([[0, n]]),
    )
    kept = args.num_base_samples if args.refresh_share < 1 else 0
    offline = ReplayBuffer.from_dataset(dataset, device, kept)
    offline.unsampled = []  # zeros do as well here: filling them is no part of an update
    online = ReplayBuffer(1, obs_dim, action_dim, device, kept)
    reset_peak(device)
    before = peak_memory(device)
    agent = script.Agent(obs_dim, action_dim, args).to(device)
    optimizers = script.make_optimizers(agent, args)

    def draw() -> Batch:
        return script.draw_batch(offline, online, 1.0, args.utd_ratio, args.batch_size)

    def update() -> None:
        script.refresh(agent, offline, online, 1.0, args.utd_ratio * args.batch_size)
        script.update(agent, optimizers, draw())

    begin = time.perf_counter()
    update()
    agent.on_the_fly_actions(offline.data.obs[:1])
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - begin
    reset_peak(device)  # what the first call needs to compile is no part of the run
    update()
    memory = peak_memory(device) - before
    td_target = compiling.compilable(script.td_target)  # in the scripts it is compiled as a part of critic_loss

    batch, obs = draw(), offline.data.obs[:1]
    candidates = script.next_candidates(agent, batch)
    last = Batch(*(field[-1] for field in batch))
    sampled = script.sample_next(agent, batch.next_obs.flatten(0, 1)).unflatten(0, batch.next_obs.shape[:2])
    with_samples = batch._replace(next_base_actions=sampled)

    def chain() -> None:
        if kept:
            script.refresh(agent, offline, online, 1.0, args.utd_ratio * args.batch_size)
        else:
            script.sample_next(agent, batch.next_obs.flatten(0, 1))

    def critic_step() -> None:
        loss, _ = script.critic_loss(agent, last, candidates[-1])
        script.gradient_step(optimizers.critic, loss)
        script.move_towards(agent.target_critic, agent.critic, args.tau)

    def edit_step() -> None:
        loss, info = script.edit_policy_loss(agent, last)
        script.gradient_step(optimizers.edit, loss)
        script.gradient_step(optimizers.alpha, script.alpha_loss(agent, info["edit/entropy"]))

    functions: dict[str, Callable[[], Any]] = {
        "update": update,
        "chain": chain,
        "edits": lambda: script.next_candidates(agent, with_samples),
        "ranking": lambda: td_target(agent, last, candidates[-1]),
        "critic": critic_step,
        "base": lambda: script.update_base_policy(agent, optimizers, last.obs, last.actions),
        "action": lambda: agent.on_the_fly_actions(obs),
    }
    if args.num_edit_samples:
        functions["edit"] = edit_step
    rows = 2048 if device.type == "cpu" else 16_384  # about those of a part of the chain
    width, inner = args.base_hidden_dim, args.base_hidden_dim * args.base_expansion
    factors = [torch.randn(shape, device=device) for shape in ((rows, width), (width, inner), (inner, width))]
    functions["block"] = lambda: factors[0] @ factors[1] @ factors[2]
    functions["block of one action"] = lambda: factors[0][: args.num_base_samples] @ factors[1] @ factors[2]
    if options.ladder:
        for count in range(1, len(STEPS) + 1):
            steps = list(STEPS)[:count]
            rung = NaiveExpo(script, obs_dim, action_dim, args, device, steps)
            functions[f"+ {steps[-1]}"] = lambda rung=rung: rung.update(draw())
    if options.naive or options.ladder:
        naive = NaiveExpo(script, obs_dim, action_dim, args, device)
        functions["naive"] = lambda: naive.update(draw())
        functions["naive action"] = lambda: naive.next_actions(obs)
    seconds = median_times(functions, options.repeats, device)
    profile = operations(update, device) if options.profile else {}
    compiling.enable(False)  # a compiled function shows no operations
    moved = {name: float(traffic(functions[name])) for name in PARTS if name in functions}
    return {
        "update_s": seconds["update"],
        "action_s": seconds["action"],
        "first_s": first,
        "naive_s": seconds.get("naive"),
        "ladder_s": {name: value for name, value in seconds.items() if name.startswith("+ ")},
        "naive_action_s": seconds.get("naive action"),
        "action_products_s": args.denoising_steps * args.base_blocks * seconds["block of one action"],
        "parts_s": per_environment_step(seconds, args.utd_ratio),
        "parts_bytes": per_environment_step(moved, args.utd_ratio),
        "parts_flop": flop(agent),
        "block_flops": 4 * rows * width * inner / seconds["block"],
        "operations": profile,
        "data_bytes": sum(field.nbytes for field in offline.data),
        "memory_bytes": memory,
    }


# --------------------------------------------------------------------------------------------------------- output


def table(found: dict[str, Any], peak: dict[str, float], precision: str) -> str:
    """A Markdown table of one setting."""
    total = sum(found["parts_flop"].values())
    lines = ["| part | ms per environment step | share | GFLOP | GFLOP/s | of the limit |", "|---|---|---|---|---|---|"]
    update = found["update_s"]
    for part in (*PARTS, "update"):
        seconds = update if part == "update" else found["parts_s"][part]
        work = total if part == "update" else found["parts_flop"][part]
        rate = work / seconds if seconds else 0.0
        limit = peak[precision] if part in ("chain", "edits") else peak["float32"]
        share = "" if part == "update" and precision != "float32" else f"{rate / limit:.0%}"
        cells = [f"{1e3 * seconds:,.2f}", f"{seconds / update:.0%}", f"{work / 1e9:,.2f}", f"{rate / 1e9:,.0f}", share]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    sampled = found["parts_flop"]["chain"] + found["parts_flop"]["edits"]
    least = sampled / peak[precision] + (total - sampled) / peak["float32"]
    lines += ["", f"limit of its products on this machine: {1e3 * least:,.2f} ms ({least / update:.0%} reached)"]
    rate = f"{found['block_flops'] / 1e9:,.0f} GFLOP/s"
    lines += [f"float32 products of the chain's own shapes, nothing between them: {rate}"]
    of_chain = f"products of its chain alone: {1e3 * found['action_products_s']:.2f} ms"
    lines += [f"one action: {1e3 * found['action_s']:.2f} ms; {of_chain}"]
    lines += [f"first update and action: {found['first_s']:.1f} s"]
    lines += [f"memory beside {found['data_bytes'] / 1e6:,.0f} MB of data: {found['memory_bytes'] / 1e6:,.0f} MB"]
    if found["naive_s"]:
        ratio = f"{update / found['naive_s']:.3f} of it; action {1e3 * found['naive_action_s']:.2f} ms"
        lines.append(f"naive update: {1e3 * found['naive_s']:,.1f} ms, ours {ratio}")
    if found["ladder_s"]:
        lines += ["", "| update | ms | of the naive one |", "|---|---|---|"]
        rungs = {"naive": found["naive_s"], **found["ladder_s"], "the script": update}
        lines += [f"| {name} | {1e3 * value:,.1f} | {value / found['naive_s']:.2f} |" for name, value in rungs.items()]
    if found["operations"]:
        rest, shown = found["operations"], 14
        lines += ["", "| operation | share of the time | calls per update |", "|---|---|---|"]
        lines += [f"| {name} | {op['share']:.1%} | {op['calls']:,.0f} |" for name, op in list(rest.items())[:shown]]
        others = [sum(op[key] for op in list(rest.values())[shown:]) for key in ("share", "calls")]
        lines += [f"| {len(rest) - shown} others | {others[0]:.1%} | {others[1]:,.0f} |"] if len(rest) > shown else []
    return "\n".join(lines)


def variations(args: Any) -> dict[str, dict[str, int]]:
    """name -> changed flags: every setting that matters, halved and doubled."""
    names = ("utd_ratio", "num_base_samples", "denoising_steps", "batch_size", "base_hidden_dim", "hidden_dim")
    found: dict[str, dict[str, int]] = {"as it is": {}}
    for name in names:
        for factor in (0.5, 2):
            value = max(int(getattr(args, name) * factor), 1)
            flags = {name: value}
            if name == "num_base_samples":  # and as many edits of each
                flags["num_edit_samples"] = int(args.num_edit_samples * factor)
            found[f"{name} {value}"] = flags
    return found


def compare(command: str, repeats: int) -> None:
    """Runs another implementation's benchmark and this one in alternation and prints the ratio of the medians."""
    own = [sys.executable, __file__, *_without("--against", sys.argv[1:]), "--repeats", "1"]
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}  # theirs first: it is the one that may fail
    for _ in range(repeats):
        for name, words in (("theirs", shlex.split(command)), ("ours", own)):
            done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
            lines = done.stdout.strip().splitlines()
            try:
                seconds[name].append(float(json.loads(lines[-1])["update_s"]))
            except (IndexError, ValueError, KeyError, TypeError):
                tail = (done.stderr.strip().splitlines() or ["nothing"])[-1]
                raise SystemExit(
                    f"error: {shlex.join(words)} printed no JSON with update_s last; it said: {tail}"
                ) from None
    theirs, ours = (statistics.median(values) for values in seconds.values())
    print(f"ours {ours:.4f} s, theirs {theirs:.4f} s per environment step: {ours / theirs:.3f} of it ({repeats} pairs)")


def _without(flag: str, words: list[str]) -> list[str]:
    """A command line without a flag and its value."""
    if flag in words:
        at = words.index(flag)
        words = words[:at] + words[at + 2 :]
    return [word for word in words if not word.startswith(f"{flag}=")]


def main() -> None:
    """Reads both sets of flags, measures, prints, writes."""
    options, rest = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    if options.against:
        compare(options.against, options.repeats)
        return
    script = importlib.import_module(options.script)
    with exit_on_input_error():
        args = cli.parse_args(script.Args, rest)
        env = make_task_env(args)
        device = cli.setup_torch(args)
    assert env.observation_space.shape and env.action_space.shape
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{options.script}, {args.task or args.env_id}: O {dims[0]}, A {dims[1]}, on {device.type} ({name})")
    if options.grid:
        print("| setting | ms per environment step | GFLOP | one action, ms |\n|---|---|---|---|")
        found: dict[str, Any] = {}
        for name, flags in variations(args).items():
            for key, value in flags.items():
                setattr(args, key, value)
            found[name] = measure(script, args, *dims, options)
            work = sum(found[name]["parts_flop"].values()) / 1e9
            print(
                f"| {name} | {1e3 * found[name]['update_s']:,.1f} | {work:,.1f} | {1e3 * found[name]['action_s']:.2f} |"
            )
            args = cli.parse_args(script.Args, rest)
        peak = limits(device)
    else:
        found = measure(script, args, *dims, options)
        peak = limits(device)  # afterwards, since its large matrices would hide the memory that an update needs
        rates = ", ".join(f"{key} {peak[key] / 1e9:,.0f} GFLOP/s" for key in ("float32", "bfloat16"))
        print(f"products {rates}; copy {peak['copy'] / 1e9:.0f} GB/s")
        medium = f"{peak['medium_speed']:.2f} times as fast, errors {peak['medium_error']:.0e}"
        print(f"float32 products under matmul precision medium: {medium} (highest: {peak['highest_error']:.0e})\n")
        print(table(found, peak, args.precision) + "\n")
    result = {
        "command": _without("--json", sys.argv[1:]),  # where the file lies is no part of it
        "versions": logger.versions(),
        "cpus": os.cpu_count(),
        "limits": peak,
        "threads": torch.get_num_threads(),
        **found,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({"update_s": found["update_s"]} if not options.grid else {}))


if __name__ == "__main__":
    main()
