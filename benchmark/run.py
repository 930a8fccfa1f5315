"""Runs a grid (methods x tasks x seeds) with a chosen number of processes and keeps what the figures need.

    python benchmark/run.py benchmark/grids/mazes.toml --processes 2
    python benchmark/run.py benchmark/grids/mazes.toml --only expo_flow --dry-run

A grid is a TOML file: `tasks`, `seeds`, `flags` (for every run), and under [methods] a name and its command each; a
table [task_flags] may add flags for one task. Every run has a folder of its own under runs/grids/. When it has ended
well, its metrics.csv and args.json are copied to benchmark/results/<grid>/<task>/<method>/seed<seed>/; such a run is
skipped the next time. One that died is started anew; one that fails is reported with its last line, and makes the exit
code 1.
"""

import concurrent.futures
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """One cell of the grid: what to start, where it works, where its results are kept."""

    name: str
    command: tuple[str, ...]
    run_dir: Path
    result_dir: Path


def read_grid(path: Path, only: str = "") -> list[Run]:
    """The runs of a grid file, seed by seed, so that a grid that was stopped early is still a fair comparison."""
    grid = tomllib.loads(path.read_text())
    runs = []
    for seed in grid["seeds"]:
        for task in grid["tasks"]:
            for method, command in grid["methods"].items():
                name = f"{task}/{method}/seed{seed}"
                if only not in name:
                    continue
                flags = f"{grid.get('flags', '')} {grid.get('task_flags', {}).get(task, '')}"
                run_dir = ROOT / "runs" / "grids" / path.stem / name
                words = [*shlex.split(command), "--task", task, "--seed", str(seed), *shlex.split(flags)]
                words = [sys.executable, *words, "--run-dir", str(run_dir.relative_to(ROOT))]
                runs.append(Run(name, tuple(words), run_dir, ROOT / "benchmark" / "results" / path.stem / name))
    return runs


def execute(run: Run) -> str:
    """Starts one run and waits; returns "" or the last line of what a failed one said."""
    shutil.rmtree(run.run_dir, ignore_errors=True)  # what a run that died has left
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run.run_dir.with_name(run.run_dir.name + ".log")
    with open(log, "w") as file:
        code = subprocess.run(run.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log.read_text().strip().splitlines()
        return f"exit code {code}: {lines[-1] if lines else 'no output'} ({log.relative_to(ROOT)})"
    part = run.result_dir.with_name(run.result_dir.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in ("metrics.csv", "args.json"):
        shutil.copy(run.run_dir / name, part / name)
    os.replace(part, run.result_dir)
    return ""


def main(
    grid: Annotated[Path, tyro.conf.Positional], processes: int = 1, only: str = "", dry_run: bool = False
) -> None:
    """Runs what is missing of a grid.

    Args:
        grid: a TOML file, see benchmark/grids/.
        processes: how many runs at a time; give the runs --threads so that they share the cores.
        only: just the runs with this text in their name (task/method/seedN).
        dry_run: print the commands and stop.
    """
    runs = [run for run in read_grid(grid, only) if not run.result_dir.exists()]
    if dry_run:
        print("\n".join(shlex.join(run.command) for run in runs))
        return
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        futures = {pool.submit(execute, run): run for run in runs}
        with tqdm(total=len(futures), desc=grid.stem, unit="run") as bar:
            for future in concurrent.futures.as_completed(futures):
                error = future.result()
                if error:
                    failed += 1
                    tqdm.write(f"FAILED {futures[future].name}: {error}")
                bar.update()
    if failed:
        print(f"{failed} of {len(runs)} runs failed; start the same command again to repeat them", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    tyro.cli(main)
