"""Queues a grid's runs on a Slurm cluster with submitit. Only `squeue` is asked: clusters need not keep accounts."""

import contextlib
import shlex
import subprocess

from benchmark.grid import ROOT, Run, Work
from utils import InputError


def queue_runs(runs: list[Run], sbatch: str, minutes: int, processes: int) -> None:
    """One job array of all runs that are not in the queue yet. `processes` of them run at a time; 0: Slurm decides."""
    if minutes < 5:
        raise InputError(f"--time-minutes {minutes} must be at least 5: Slurm warns a run 3 minutes before the limit")
    options = {"job_name": "expo", "time": minutes, "setup": [f"cd {shlex.quote(str(ROOT))}"]}
    options |= {"array_parallelism": processes} if processes else {}
    try:
        import submitit  # pyright: ignore[reportMissingImports]

        words = (word.removeprefix("--").partition("=") for word in sbatch.split())
        options["additional_parameters"] = {key: value if equals else True for key, equals, value in words}
        queued = subprocess.check_output("squeue --me --noheader --array --format=%i".split(), text=True).split()
        new = [run for run in runs if not run.beside(".job").exists() or run.beside(".job").read_text() not in queued]
        executor = submitit.SlurmExecutor(runs[0].run_dir.parent.parent.parent / "slurm", max_num_timeout=100)
        executor.update_parameters(**options)
        with executor.batch() if new else contextlib.nullcontext():
            jobs = [executor.submit(Work(run)) for run in new]
    except Exception as error:  # what squeue, submitit and sbatch say comes in many kinds
        said = " ".join(str(error).split())[-300:]
        raise InputError(f"--engine slurm (pip install submitit), --sbatch {sbatch!r}: {said}") from None
    for run, job in zip(new, jobs, strict=True):
        run.beside(".job").parent.mkdir(parents=True, exist_ok=True)
        run.beside(".job").write_text(job.job_id)
    print(f"{len(new)} runs were queued, {len(runs) - len(new)} before; the same command later says how they ended")
