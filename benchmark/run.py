"""Runs a grid (methods x variants x tasks x seeds) on this machine or on a Slurm cluster; docs/benchmark.md says more.

    python benchmark/run.py benchmark/grids/mazes.toml --processes 2
    python benchmark/run.py benchmark/grids/mazes.toml --processes 8 --gpus 4
    python benchmark/run.py benchmark/grids/mazes.toml --engine slurm --partition gpu --gpus-per-run 1
    python benchmark/run.py benchmark/grids/mazes.toml --only expo_flow --dry-run

Every run has a folder of its own under runs/grids/. When it has ended well, its metrics.csv and args.json (flags,
versions, commit) are copied to benchmark/results/<grid>/<task>/<method>/seed<seed>/; such a run is skipped the next
time. One that was stopped or died goes on from its checkpoint, or starts anew where it cannot. One that fails is
reported with its last line, and makes the exit code 1.
"""

import concurrent.futures
import contextlib
import csv
import os
import queue
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not as a module

from benchmark.grid import RESULTS, RUNS, Run, Work, read_grid, record_of
from utils.errors import InputError, exit_on_input_error


class Engine(Protocol):
    """Where runs are done."""

    def submit(self, runs: list[Run]) -> None:
        """Hands over all runs at once."""

    def poll(self) -> tuple[list[Run], list[Run]]:
        """The runs that are active now, and those that wait; all others have ended."""
        ...

    def stop(self) -> str:
        """After Ctrl-C; returns what became of the active runs."""
        ...


class Local:
    """This machine.

    Args:
        processes: how many runs at a time.
        gpus: how many GPUs they are spread over; 0 leaves the choice to the scripts.

    Raises:
        InputError: numbers that cannot work.
    """

    def __init__(self, processes: int, gpus: int):
        listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = listed.split(",") if listed else [str(gpu) for gpu in range(gpus)]
        if processes < 1:
            raise InputError(f"--processes {processes} must be at least 1")
        if not 0 <= gpus <= len(devices):
            raise InputError(f"--gpus {gpus}: CUDA_VISIBLE_DEVICES lists {listed or 'none'}")
        self.pool = concurrent.futures.ThreadPoolExecutor(processes)
        self.devices: queue.Queue[str | None] = queue.Queue()  # one for every process
        for process in range(processes):
            self.devices.put(devices[process % gpus] if gpus else None)
        self.works: dict[Run, Work] = {}
        self.futures: dict[Run, concurrent.futures.Future[None]] = {}

    def submit(self, runs: list[Run]) -> None:
        for run in runs:
            self.works[run] = Work(run)
            self.futures[run] = self.pool.submit(self._do, self.works[run])

    def _do(self, work: Work) -> None:
        work.gpu = self.devices.get()
        try:
            work()
        finally:
            self.devices.put(work.gpu)

    def poll(self) -> tuple[list[Run], list[Run]]:
        active, waiting = [], []
        for run, future in self.futures.items():
            if not future.done():
                (active if future.running() else waiting).append(run)
        return active, waiting

    def stop(self) -> str:
        active, _ = self.poll()
        for work in self.works.values():
            work.stop()
        print(f"stopping {len(active)} runs after their current step; once more: at once", file=sys.stderr)
        try:
            self.pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            for work in self.works.values():
                if work.process is not None:
                    work.process.kill()
            self.pool.shutdown()
        return "stopped; the same command goes on"


def progress(run: Run) -> str:
    """The last step and the last evaluation in a run's metrics.csv."""
    try:
        with open(run.run_dir / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("step") and row.get("seconds")]
    except (OSError, csv.Error, UnicodeDecodeError):
        rows = []
    if not rows:
        return "starting"
    words = f"step {rows[-1]['step']}, {float(rows[-1]['seconds']):.0f} s"
    evaluations = [row for row in rows if row.get("eval/success_rate")]
    if evaluations:
        words += f", success {float(evaluations[-1]['eval/success_rate']):.2f} at {evaluations[-1]['step']}"
    return words


class Display:
    """The state of the grid: redrawn in place in a terminal, now and then in a log file."""

    def __init__(self, title: str):
        self.title, self.lines, self.drawn = title, 0, -1e9
        self.terminal = sys.stdout.isatty()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(text, flush=True)
        self.drawn = -1e9 if self.terminal else self.drawn

    def show(self, counts: Counter[str], active: list[Run]) -> None:
        """Counts and active runs, every 2 seconds; every 10 minutes where lines cannot be redrawn."""
        now = time.monotonic()
        if now - self.drawn < (2 if self.terminal else 600):
            return
        self.drawn = now
        lines = [
            f"{self.title}: " + ", ".join(f"{counts[word]} {word}" for word in ("done", "failed", "active", "left"))
        ]
        width = max(map(len, (run.name for run in active)), default=0)
        lines += [f"  {run.name:<{width}}  {progress(run)}" for run in active]
        columns, rows = shutil.get_terminal_size()
        if self.terminal:
            lines = [line[: columns - 1] for line in lines[: rows - 1]]
            self._clear()
            self.lines = len(lines)
        print("\n".join(lines), flush=True)

    def _clear(self) -> None:
        if self.lines:
            print(f"\x1b[{self.lines}A\x1b[J", end="")
            self.lines = 0


def watch(engine: Engine, runs: list[Run], title: str) -> int:
    """Waits for all runs and says how each has ended; returns how many failed."""
    display, left, counts = Display(title), list(runs), Counter[str]()
    while left:
        active, waiting = engine.poll()
        busy = {*active, *waiting}
        for run in [run for run in left if run not in busy]:
            left.remove(run)
            failure = run.beside(".failed")
            if run.result_dir.exists():
                counts["done"] += 1
                display.note(f"done    {run.name}  ({progress(run)})")
            else:
                counts["failed"] += 1
                text = failure.read_text() if failure.exists() else f"ended without a result ({run.beside('.log')})"
                display.note(f"FAILED  {run.name}: {text}")
        counts["active"], counts["left"] = len(active), len(waiting)
        display.show(counts, active)
        time.sleep(0.2 if left else 0)
    return counts["failed"]


@contextlib.contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal stop the grid as Ctrl-C does."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(
    grid: Annotated[Path, tyro.conf.Positional],
    processes: int | None = None,
    gpus: int = 0,
    only: str = "",
    dry_run: bool = False,
    engine: Literal["local", "slurm"] = "local",
    partition: str = "",
    time_minutes: int = 24 * 60,
    cpus_per_run: int = 1,
    gpus_per_run: int = 0,
    sbatch: str = "",
    no_wait: bool = False,
    runs_dir: Path = RUNS,
    results_dir: Path = RESULTS,
) -> None:
    """Runs what is missing of a grid.

    Args:
        grid: a TOML file, see benchmark/grids/ and docs/benchmark.md.
        processes: how many runs at a time; unset: 1 here, on Slurm as many as it starts. Give runs that share cores
            --threads in the grid's flags.
        gpus: spread the processes over this many GPUs of this machine (CUDA_VISIBLE_DEVICES of each run).
        only: just the runs with this text in their name (task/method/seedN).
        dry_run: print the commands and stop.
        engine: where the runs are done: local is this machine, slurm a cluster (needs `pip install submitit`).
        partition: Slurm's partition; unset: its default.
        time_minutes: Slurm's limit for a run; one that meets it saves its state, is queued again, and goes on.
        cpus_per_run: CPU cores that Slurm gives a run.
        gpus_per_run: GPUs that Slurm gives a run.
        sbatch: more options of sbatch, as in "account=lab mem=8G".
        no_wait: with slurm, end when all jobs are queued; the same command later says how they went.
        runs_dir: where the runs' folders are made; with slurm, on a disk that all nodes share.
        results_dir: where the results are kept.
    """
    if engine == "slurm" and gpus:
        raise InputError("--gpus is for this machine; with --engine slurm, --gpus-per-run")
    if engine == "local" and (partition or sbatch or gpus_per_run or no_wait):
        raise InputError("--partition, --sbatch, --gpus-per-run and --no-wait need --engine slurm")
    runs = read_grid(grid, only, runs_dir.resolve(), results_dir.resolve())
    missing = [run for run in runs if not run.result_dir.exists()]
    if dry_run:
        print("\n".join(shlex.join(["python", *run.command, "--run-dir", str(run.run_dir)]) for run in missing))
        return
    for run in runs:
        if run not in missing and not run.made(record_of(run.result_dir)):
            print(f"warning: {run.name} was made with other flags than the grid has now; delete it to repeat it:")
            print(f"    {run.result_dir}")
    print(f"{grid.stem}: {len(runs)} runs, {len(runs) - len(missing)} of them done before", flush=True)
    for run in missing:
        if run.beside(".failed").exists():
            print(f"failed before, repeated now: {run.name}: {run.beside('.failed').read_text()}", flush=True)
    if not missing:
        return
    place: Engine
    if engine == "slurm":
        from benchmark.slurm import Slurm

        folder = missing[0].run_dir.parent.parent.parent / "slurm"
        place = Slurm(folder, partition, time_minutes, cpus_per_run, gpus_per_run, sbatch, processes or 0)
    else:
        place = Local(1 if processes is None else processes, gpus)
    with signals_as_ctrl_c():
        try:
            place.submit(missing)
            if engine == "slurm" and no_wait:
                return
            failed = watch(place, missing, grid.stem)
        except KeyboardInterrupt:
            print(place.stop(), file=sys.stderr)
            sys.exit(130)
    if failed:
        print(f"{failed} of {len(missing)} runs failed; the same command repeats them", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_input_error():
        tyro.cli(main)
