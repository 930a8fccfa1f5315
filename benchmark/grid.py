"""A grid: methods x variants x tasks x seeds from a TOML file, and how one run of it is started, continued, stopped.

docs/benchmark.md has an example of the file.
"""

import contextlib
import difflib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import locked, reason
from utils.logger import read_record

ROOT = Path(__file__).resolve().parent.parent
RUNS, RESULTS = ROOT / "runs" / "grids", ROOT / "benchmark" / "results"

# Key of a grid file -> whether it must be there, what its values are, and that in words.
KEYS: dict[str, tuple[bool, type, type | None, str]] = {
    "tasks": (True, list, str, "a list of names from `python -m utils.data list`"),
    "seeds": (True, list, int, "a list of whole numbers from 0 on"),
    "methods": (True, dict, str, 'a table of name = "script.py --flags"'),
    "variants": (False, dict, str, 'a table of name = "--flags"'),
    "flags": (False, str, None, "a text of flags for every run"),
    "task_flags": (False, dict, str, 'a table of task = "--flags"'),
}
OWN_FLAGS = {"--task", "--seed", "--run-dir", "--resume"}  # the grid gives them


@dataclass(frozen=True)
class Run:
    """One cell of a grid.

    Attributes:
        task: its task.
        method: its method, with the variant behind a "+" where there are any.
        seed: its seed.
        command: the script and its flags, without the run's folder.
        run_dir: where it works. Beside it lie its .log, why it .failed, its Slurm .job, and those, .old1
            and on, that could not be continued.
        result_dir: gets what tables and curves need, once it has ended well.
    """

    task: str
    method: str
    seed: int
    command: tuple[str, ...]
    run_dir: Path
    result_dir: Path

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}/seed{self.seed}"

    def beside(self, ending: str) -> Path:
        """The file of that ending beside the run's folder."""
        return self.run_dir.with_name(self.run_dir.name + ending)

    def made(self, record: dict[str, Any]) -> bool:
        """Whether an args.json is of a run of this command, whatever the order of its flags."""
        changed = {flag for resume in record.get("resumes", []) for flag in resume.get("changed", ())}
        if changed & {"total_timesteps", "eval_every", "eval_episodes", "log_every"}:
            return False
        script, *words = record.get("command") or [""]
        flags = flag_values(words)
        flags.pop("--run-dir", None)
        return script == Path(self.command[0]).name and flags == flag_values(self.command[1:])


def flag_values(words: Iterable[str]) -> dict[str, list[str]]:
    """Flag -> its values; of a flag given twice, the last."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[flag] = [value] if equals else []
        else:
            found.setdefault(flag, []).append(word)
    return found


def read_grid(path: Path, only: str = "", runs: Path = RUNS, results: Path = RESULTS) -> list[Run]:
    """The runs of a grid file, seed by seed, so that a grid that was stopped early is still a fair comparison.

    Args:
        path: the TOML file.
        only: just the runs with this text in their name (task/method/seedN).
        runs: their folders are made under it.
        results: their results are kept under it.

    Raises:
        InputError: what is wrong with the file.
    """
    grid = _checked(path)
    methods = {}
    for (method, command), (variant, flags) in itertools.product(
        grid["methods"].items(), (grid.get("variants") or {"": ""}).items()
    ):
        script, *own_flags = _words(path, command)
        methods[f"{method}+{variant}" if variant else method] = script, own_flags + _words(path, flags)
    found = []
    for seed, task, (method, (script, own_flags)) in itertools.product(grid["seeds"], grid["tasks"], methods.items()):
        shared = _words(path, f"{grid.get('flags', '')} {grid.get('task_flags', {}).get(task, '')}")
        command = (script, "--task", task, "--seed", str(seed), *shared, *own_flags)  # of a flag given twice, the last
        place = Path(path.stem, task, method, f"seed{seed}")
        run = Run(task, method, seed, command, runs / place, results / place)
        if only in run.name:
            found.append(run)
    if not found:
        raise InputError(f"{path} has no run with {only!r} in its name (task/method/seedN)")
    return found


def _checked(path: Path) -> dict[str, Any]:
    """The content of a grid file, every value of the right kind."""
    from utils.tasks import TASKS  # loads torch and gymnasium

    try:
        grid = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); a grid is a file like those in benchmark/grids"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {reason(error)}") from None
    for key in grid:
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{path}: unknown key {key!r}{hint} (known: {', '.join(KEYS)})")
    for key, (needed, kind, inner, words) in KEYS.items():
        if key not in grid:
            if needed:
                raise InputError(f"{path}: {key!r} is missing; it must be {words}")
            continue
        value: Any = grid[key]
        values = value.values() if isinstance(value, dict) else value
        fits = type(value) is kind and (value or not needed) and (not inner or all(type(v) is inner for v in values))
        if not fits or (inner is int and min(value) < 0):
            raise InputError(f"{path}: {key!r} must be {words}")
        if kind is list and len(set(value)) < len(value):
            raise InputError(f"{path}: {key!r} names something twice")
    for task in [*grid["tasks"], *grid.get("task_flags", {})]:
        if task not in TASKS:
            close = difflib.get_close_matches(task, TASKS, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{path}: unknown task {task!r}{hint} (`python -m utils.data list` shows all)")
    for name in [*grid["methods"], *grid.get("variants", {})]:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"{path}: {name!r} names a folder: letters, digits and _ . - only")
    for method, command in grid["methods"].items():
        script = next(iter(_words(path, command)), "")
        if not script.endswith(".py") or not (ROOT / script).is_file():
            raise InputError(f"{path}: method {method!r}: there is no script {script!r} in {ROOT}")
    return grid


def _words(path: Path, flags: str) -> list[str]:
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise InputError(f"{path}: {flags!r}: {error}") from None
    own = OWN_FLAGS & {flag.replace("_", "-") for flag in flag_values(words)}
    if own:
        raise InputError(f"{path}: {flags!r}: {own.pop()} is given by the grid itself")
    return words


def record_of(run_dir: Path) -> dict[str, Any]:
    """The args.json in a folder; {} where there is none, or a damaged one."""
    try:
        return read_record(run_dir)
    except InputError:
        return {}


class Work:
    """One run being done: a call starts or continues it, waits, and keeps its results. For a thread or a Slurm job.

    Args:
        run: the run.
        gpu: what its CUDA_VISIBLE_DEVICES is; None leaves it as it is.
    """

    def __init__(self, run: Run, gpu: str | None = None):
        self.run, self.gpu = run, gpu
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def __call__(self) -> None:
        failure = self.run.beside(".failed")
        try:
            error = self._do()
        except (OSError, InputError) as problem:
            error = reason(problem)
        with contextlib.suppress(OSError):
            failure.write_text(error) if error and not self.stopped else failure.unlink(missing_ok=True)

    def _do(self) -> str:
        """Does what is left of the run; returns "" or why it failed."""
        run_dir = self.run.run_dir
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        if run_dir.exists():
            try:
                with locked(run_dir, wait=False):
                    record = record_of(run_dir)
            except BlockingIOError:
                return f"{run_dir} is still being written by another process; stop that one first"
            if self.run.made(record):
                if record.get("finished") is not None:
                    return self._keep()
                if any(run_dir.glob("checkpoint*.pt")):
                    code, said = self._start("--resume")
                    # Anew only if the folder holds nothing to go on from: all else may be the machine's fault.
                    if not re.search(r"^error: .*(no checkpoint to go on from|has lost rows)", said, re.M):
                        return self._end(code, said)
            old = next(path for i in itertools.count(1) if not (path := self.run.beside(f".old{i}")).exists())
            os.replace(run_dir, old)
        return self._end(*self._start("--run-dir"))

    def _folder(self) -> str:
        """The run's folder as its script is told: seen from the repository if it lies there."""
        run_dir = self.run.run_dir
        return str(run_dir.relative_to(ROOT) if run_dir.is_relative_to(ROOT) else run_dir)

    def _start(self, flag: str) -> tuple[int, str]:
        """Starts the script and waits; returns its exit code and what it said."""
        if self.stopped:
            return 130, "stopped before it began"
        words = [sys.executable, *self.run.command, flag, self._folder()]
        env = os.environ | ({} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu})
        with open(self.run.beside(".log"), "ab") as file:
            begin = file.tell()
            # A session of its own: Ctrl-C in the terminal reaches only us, so that a run gets one signal and not two.
            # SIGUSR2 is Slurm's word before a time limit, and meant for us as well: blocked signals are inherited.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        if self.stopped:  # meanwhile
            self.process.terminate()
        code = self.process.wait()
        return code, self.run.beside(".log").read_bytes()[begin:].decode(errors="replace")

    def _end(self, code: int, said: str) -> str:
        if code == 0:
            return self._keep()
        lines = said.replace("\r", "\n").strip().splitlines()
        return f"exit code {code}: {lines[-1] if lines else 'no output'} ({self.run.beside('.log')})"

    def _keep(self) -> str:
        """Copies the results, all or nothing."""
        part = self.run.result_dir.with_name(self.run.result_dir.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name in ("metrics.csv", "args.json"):
            shutil.copy(self.run.run_dir / name, part / name)
        os.replace(part, self.run.result_dir)
        return ""

    def stop(self) -> None:
        """Asks the script to save its state and to end; the call then returns."""
        self.stopped = True
        if self.process is not None:
            self.process.terminate()

    def checkpoint(self) -> Any:
        """What submitit calls before a time limit or a preemption: the script saves and ends, the job is requeued."""
        import submitit  # pyright: ignore[reportMissingImports]

        self.stop()
        if self.process is not None:
            with contextlib.suppress(ChildProcessError):  # not `wait`: the interrupted call is in it and holds its lock
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Work(self.run))
