"""Runs what is missing of a grid, on this machine or on a Slurm cluster. docs/benchmark.md has more commands.

    python benchmark/run.py benchmark/grids/mazes.toml --processes 8 --gpus 4

A run that is done is skipped. A run that was stopped goes on. A run that fails makes the exit code 1.
"""

import concurrent.futures
import os
import queue
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds `benchmark` when this file is run

from benchmark.grid import ROOT, Run, Work, read_grid, read_record
from benchmark.slurm import queue_runs
from tools import one_line_errors
from utils import InputError


def run_here(runs: list[Run], processes: int, gpus: int) -> int:
    """Does the runs, several at a time, and says how each ended. Returns how many failed."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = listed.split(",") if listed else [str(gpu) for gpu in range(gpus)]
    if processes < 1 or not 0 <= gpus <= len(devices):
        raise InputError(f"--processes {processes} --gpus {gpus}: CUDA_VISIBLE_DEVICES has {listed or 'no list'}")
    free: queue.Queue[str] = queue.Queue()  # the GPU of every process
    for process in range(processes):
        free.put(devices[process % gpus] if gpus else "")

    def do(work: Work) -> str:
        work.gpu = free.get()
        print(f"start   {work.run.name}\n", end="", flush=True)  # in one piece: other threads print, too
        problem = work()
        free.put(work.gpu)
        return problem

    for number in (signal.SIGTERM, signal.SIGHUP):  # they stop the grid as Ctrl-C does; nohup stays nohup
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    failed, pool = 0, concurrent.futures.ThreadPoolExecutor(processes)
    works = {pool.submit(do, work): work for work in map(Work, runs)}
    try:
        for future in concurrent.futures.as_completed(works):
            name, problem = works[future].run.name, future.result()
            failed += bool(problem)
            print(f"FAILED  {name}: {problem}\n" if problem else f"done    {name}\n", end="", flush=True)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for work in works.values():
            work.stop()
        print("the runs finish their episodes and save; Ctrl-C again stops them at once", file=sys.stderr, flush=True)
        try:
            pool.shutdown()
        except KeyboardInterrupt:
            for work in works.values():
                if work.process is not None:
                    work.process.kill()
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    return failed


def main(
    grid: Annotated[Path, tyro.conf.Positional],
    processes: int | None = None,
    gpus: int = 0,
    only: str = "",
    dry_run: bool = False,
    engine: Literal["local", "slurm"] = "local",
    sbatch: str = "",
    time_minutes: int = 24 * 60,
    runs_dir: Path = ROOT / "runs" / "grids",
    results_dir: Path = ROOT / "benchmark" / "results",
) -> None:
    """Runs what is missing of a grid.

    Args:
        grid: a TOML file; benchmark/grids has examples.
        processes: how many runs at a time; default: 1 here, and on Slurm as many as Slurm starts.
        gpus: spread the processes over this many GPUs of this machine.
        only: only the runs with this text in their name (task/method/seedN).
        dry_run: print the commands, and stop.
        engine: local is this machine; slurm is a cluster and needs `pip install submitit`.
        sbatch: options of sbatch, for example "partition=gpu gpus-per-node=1 cpus-per-task=4 account=lab".
        time_minutes: Slurm's time limit; a run that reaches it saves, is queued again, and continues.
        runs_dir: where the runs work; with slurm, on a disk that all nodes share.
        results_dir: where the results are kept.
    """
    runs = read_grid(grid, only, runs_dir.resolve(), results_dir.resolve())
    missing = [run for run in runs if not run.result_dir.exists()]
    if dry_run:
        print("\n".join(shlex.join(["python", *run.command, "--run-dir", str(run.run_dir)]) for run in missing))
        return
    for run in runs:
        if run not in missing and not run.made(read_record(run.result_dir)):
            print(f"warning: {run.name} was made by another command; to repeat it, delete {run.result_dir} and its run")
        elif run in missing and run.beside(".failed").exists():
            print(f"failed before, and repeated now: {run.name}: {run.beside('.failed').read_text()}")
    print(f"{grid.stem}: {len(runs)} runs, {len(runs) - len(missing)} of them are done", flush=True)
    if missing and engine == "slurm":
        queue_runs(missing, sbatch, time_minutes, processes or 0)
    elif missing and (failed := run_here(missing, 1 if processes is None else processes, gpus)):
        print(f"{failed} of {len(missing)} runs failed; the same command repeats them", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    one_line_errors(lambda: tyro.cli(main))
