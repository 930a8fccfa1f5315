"""A grid of runs (methods x variants x tasks x seeds) in a TOML file, and how one of its runs is done."""

import itertools
import json
import os
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

from tools.files import hold
from utils import InputError
from utils.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
KEYS: dict[str, Any] = dict(tasks=list, seeds=list, flags=str, methods=dict, variants=dict, task_flags=dict, words=dict)
GIVEN = {"--task", "--seed", "--run-dir", "--resume"}  # flags that the grid itself gives to every run
# Flags that change nothing of what is compared, and flags that a longer or finer continuation of a run may change.
NEUTRAL = {"--run-dir", "--resume", "--threads", "--device", "--compile", "--track", "--save-model", "--capture-video"}
LONGER = {"--total-timesteps", "--eval-every", "--eval-episodes", "--log-every", "--checkpoint-every"}


@dataclass(frozen=True)
class Run:
    """One run of a grid: its command without the folder, where it works, and where its results are kept."""

    name: str  # task/method/seedN
    command: tuple[str, ...]
    run_dir: Path
    result_dir: Path

    def beside(self, ending: str) -> Path:
        """A file beside the run's folder: .log, .failed, or .job (of Slurm)."""
        return self.run_dir.with_name(self.run_dir.name + ending)

    def made(self, record: dict[str, Any], longer: Iterable[str] = ()) -> bool:
        """Whether an args.json is of a run of this command, but for the values that the flags `longer` have now."""
        words = [word for start in record.get("starts", []) for word in start["command"]]
        flags, wanted = flag_values(words), flag_values(self.command)
        keys = (flags | wanted).keys() - NEUTRAL - (wanted.keys() & set(longer))
        return words[:1] == [self.command[0]] and all(flags.get(key) == wanted.get(key) for key in keys)


def flag_values(words: Iterable[str]) -> dict[str, list[str]]:
    """Flag -> its values; of a flag given twice, the last ones."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[flag := flag.replace("_", "-")] = [value] if equals else []
        elif flag:
            found[flag].append(word)
    return found


def read_grid(path: Path, only: str, runs_dir: Path, results_dir: Path) -> list[Run]:
    """The runs of a grid whose name (task/method/seedN) contains `only`; docs/benchmark.md has an example of a grid."""
    try:
        grid = tomllib.loads(path.read_text())
        for key, value in grid.items():
            if not isinstance(value, KEYS.get(key, ())):
                raise ValueError(f"{key!r} is unknown, or of a wrong type (known: {', '.join(KEYS)})")
        seeds, tasks, methods = dict.fromkeys(grid["seeds"]), grid.get("tasks", [""]), grid["methods"].items()
        variants = grid.get("variants", {"": ""}).items()
        if unknown := (set(tasks) | set(grid.get("task_flags", {}))) - {"", *TASKS}:
            raise ValueError(f"unknown task {unknown.pop()!r} (known: {', '.join(TASKS)})")
        found = []  # seed by seed, so that a grid that was stopped early is still a fair comparison
        for seed, task, (method, text), (variant, more) in itertools.product(seeds, tasks, methods, variants):
            script, *own = shlex.split(text.format(**grid.get("words", {})))
            if not (ROOT / script).is_file():
                raise ValueError(f"method {method!r}: there is no script {script!r} in {ROOT}")
            # Of a flag given twice the last one counts: the more special flags come later.
            shared = f"{grid.get('flags', '')} {grid.get('task_flags', {}).get(task, '')}"
            flags = [*shlex.split(shared), *own, *shlex.split(more)]
            if given := GIVEN & flag_values(flags).keys():
                raise ValueError(f"method {method!r}: the grid itself gives {given.pop()}")
            # Without a task the flags say --env-id.
            place = task or "".join(flag_values(flags).get("--env-id", ["no-task"])).replace("/", "_")
            full_name = f"{method}+{variant}" if variant else method
            folder = Path(path.stem, place, full_name, f"seed{seed}")
            command = (script, *(("--task", task) if task else ()), "--seed", str(seed), *flags)
            found.append(Run(f"{place}/{full_name}/seed{seed}", command, runs_dir / folder, results_dir / folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: {f'{error} is missing' if isinstance(error, KeyError) else error}") from None
    if not (found := [run for run in found if only in run.name]):
        raise InputError(f"{path} has no run with {only!r} in its name (task/method/seedN)")
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """The args.json in a folder; {} where there is none."""
    try:
        return json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        return {}


class Work:
    """One run being done, in a thread or in a Slurm job. A call starts or continues it and keeps its results."""

    def __init__(self, run: Run):
        self.run, self.gpu, self.stopped = run, "", False
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> str:
        """Returns why the run failed, or an empty text. The same text is in its .failed file."""
        try:
            problem = self.do()
        except OSError as error:
            problem = str(error)
        if not self.stopped:
            failed = self.run.beside(".failed")
            failed.write_text(problem) if problem else failed.unlink(missing_ok=True)
        return problem

    def do(self) -> str:
        run_dir, log, result_dir = self.run.run_dir, self.run.beside(".log"), self.run.result_dir
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            if not hold(file):  # the script holds it, too, because it writes this file
                return f"another process does this run; its output is {log}"
            if result_dir.exists():  # another process did it in the meantime
                return ""
            old, place = (run_dir / "args.json").exists(), os.path.relpath(run_dir, ROOT)
            if old and not self.run.made(read_record(run_dir), LONGER):
                return f"{run_dir} was made by another command than the grid has now; delete it to start it anew"
            words = [sys.executable, *self.run.command, "--resume" if old else "--run-dir", place]
            env = os.environ | ({"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu else {})
            # A script inherits blocked signals: Slurm's warning, SIGUSR2, is for us. In its new session Ctrl-C is, too.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            self.process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
            if self.stopped:  # in the meantime
                self.process.terminate()
            if code := self.process.wait():
                lines = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
                return f"exit code {code}: {lines[-1] if lines else 'no output'} ({log})"
            os.makedirs(part := result_dir.with_name(f"{result_dir.name}.part"), exist_ok=True)
            for name in ("metrics.csv", "args.json"):
                shutil.copy(run_dir / name, part)
            os.replace(part, result_dir)  # both files or none
        return ""

    def stop(self) -> None:
        """Asks the script to finish its episode, to save, and to end. The call then returns."""
        self.stopped = True
        if self.process is not None:
            self.process.terminate()

    def checkpoint(self) -> Any:
        """submitit calls this before a time limit or a preemption: the script saves, and the job is queued again."""
        import submitit  # pyright: ignore[reportMissingImports]

        self.stop()
        if self.process is not None:  # not `wait`: the call that this interrupts is inside it and holds its lock
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Work(self.run))
