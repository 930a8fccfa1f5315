"""A Slurm cluster for benchmark/run.py, through submitit: a job array of a grid's runs, and what the queue says of it.

Whether a job has ended is asked of `squeue`, and how, of its run's files: a cluster need not keep accounts (`sacct`).
"""

import contextlib
import shlex
import subprocess
import time
from pathlib import Path

from benchmark.grid import ROOT, Run, Work
from utils.errors import InputError
from utils.files import reason

ENDED_AGO = 20.0  # seconds that a shared disk may take to show what a node has written
REQUEUES = 100  # how often a run may meet the time limit


class Slurm:
    """An engine of benchmark/run.py, see there for the arguments; `processes` 0: as many as Slurm starts.

    Raises:
        InputError: no submitit, no Slurm, or options that it does not take.
    """

    def __init__(self, folder: Path, partition: str, minutes: int, cpus: int, gpus: int, sbatch: str, processes: int):
        try:
            import submitit  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError("--engine slurm needs submitit: pip install submitit") from None
        pairs = [word.removeprefix("--").partition("=") for word in sbatch.split()]
        if any(not value for _, _, value in pairs):
            raise InputError(f"--sbatch {sbatch!r} must be pairs, as in 'account=lab mem=8G'")
        if minutes < 5:
            raise InputError(
                f"--time-minutes {minutes} must be at least 5: Slurm warns a run up to 3 minutes before its end"
            )
        try:
            self.executor = submitit.SlurmExecutor(folder, max_num_timeout=REQUEUES)
        except RuntimeError as error:
            raise InputError(f"--engine slurm: {error}") from None
        options = {
            "job_name": folder.parent.name,
            "time": minutes,
            "cpus_per_task": cpus,
            "setup": [f"cd {shlex.quote(str(ROOT))}"],
        }
        options |= {"partition": partition} if partition else {}
        options |= {"gpus_per_node": gpus} if gpus else {}
        options |= {"array_parallelism": processes} if processes else {}
        self.executor.update_parameters(**options, additional_parameters={key: value for key, _, value in pairs})
        self.jobs: dict[Run, str] = {}
        self.ended: dict[Run, float] = {}
        self.queue = self._ask()
        self.asked = time.monotonic()

    def _ask(self) -> dict[str, str]:
        """Job -> state (R, PD, ...) of all jobs of this user that have not ended."""
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i %t"]
        try:
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(f"squeue fails: {reason(Exception(getattr(error, 'stderr', '') or error))}") from None
        return dict(line.split() for line in lines)

    def submit(self, runs: list[Run]) -> None:
        """Queues the runs that are not in the queue already."""
        new = []
        for run in runs:
            number = run.beside(".job")
            if number.exists() and number.read_text() in self.queue:
                self.jobs[run] = number.read_text()
            else:
                new.append(run)
                run.beside(".failed").unlink(missing_ok=True)
                number.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.executor.batch() if new else contextlib.nullcontext():
                jobs = [self.executor.submit(Work(run)) for run in new]
        except Exception as error:  # submitit hands on what sbatch says in several kinds
            raise InputError(f"sbatch refuses the runs: {' '.join(str(error).split())[-300:]}") from None
        for run, job in zip(new, jobs, strict=True):
            self.jobs[run] = job.job_id
            run.beside(".job").write_text(job.job_id)
        numbers = sorted({job.split("_")[0] for job in self.jobs.values()})
        print(f"{len(new)} runs queued, {len(runs) - len(new)} were in the queue: jobs {' '.join(numbers)}", flush=True)
        self.queue = self._ask()

    def poll(self) -> tuple[list[Run], list[Run]]:
        """Those that run and those that wait; a run that left the queue without a result counts as active a while."""
        now = time.monotonic()
        if now - self.asked > 2:
            self.asked = now
            with contextlib.suppress(InputError):  # a busy controller
                self.queue = self._ask()
        active, waiting = [], []
        for run, job in self.jobs.items():
            state = self.queue.get(job)
            if state == "PD":
                waiting.append(run)
            elif state is not None:
                active.append(run)
            elif not run.result_dir.exists() and not run.beside(".failed").exists():
                if now - self.ended.setdefault(run, now) < ENDED_AGO:
                    active.append(run)
        return active, waiting

    def stop(self) -> str:
        return f"the jobs go on without this display; to stop them: scancel {' '.join(sorted(set(self.jobs.values())))}"
