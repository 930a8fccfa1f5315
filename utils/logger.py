"""A run's folder: args.json, metrics.csv, TensorBoard events; Weights & Biases on request."""

import contextlib
import csv
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from utils.errors import InputError
from utils.files import atomic_write, locked

PACKAGES = ("torch", "numpy", "gymnasium", "gymnasium-robotics", "mujoco", "h5py", "robosuite", "ogbench", "minari")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that move a result, and the git commit ("-dirty": changed since)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        root = Path(__file__).resolve().parent.parent
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found


def read_record(run_dir: Path) -> dict[str, Any]:
    """The args.json of a run: `script`, `args`, `versions`, `command`; `resumes` and `finished` where there were any.

    Raises:
        InputError: no run there, or a damaged one.
    """
    try:
        record = json.loads((run_dir / "args.json").read_text())
        if not (isinstance(record["script"], str) and isinstance(record["args"], dict)):
            raise TypeError
        if not all(isinstance(resume["changed"], dict) for resume in record.get("resumes", [])):
            raise TypeError
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{run_dir} holds no run: args.json is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise InputError(f"{run_dir / 'args.json'} is damaged or not a run of this project") from None
    return record


def command() -> list[str]:
    """The command line, without the folder of the script."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


class Logger:
    """Writes scalars of one run to `metrics.csv` (one row per call) and to TensorBoard.

    Args:
        args: the script's dataclass; `run_dir`, `resume`, `task`, `env_id`, `seed`, `track` are read, all are saved.
            With `resume` that run's folder is opened; its log is left as it is until `restore`.
        script: name of the script without its ending, for the folder's name and for `utils.evaluate`.

    Raises:
        InputError: the folder already holds a run, or cannot be written; `resume` is a run of another script, or one
            that another process is writing.
    """

    def __init__(self, args: Any, script: str):
        self.args, self.script = args, script
        self.columns, self.rows = ["step", "seconds"], 0
        self._csv = self.tensorboard = self.wandb = None
        self._open = contextlib.ExitStack()
        self._pending: dict[str, list[Any]] = {}
        self._new: dict[str, Any] = {}  # what was added since the last `check`
        self.last_row: dict[str, float] = {}
        self.start = time.perf_counter()
        self._last = (0, 0.0)  # step and seconds of the last row, for charts/SPS
        if args.track:
            try:
                import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise InputError("--track needs Weights & Biases: pip install wandb") from None
        if args.resume:
            self.run_dir = Path(args.resume)
            self.record = read_record(self.run_dir)
            if self.record["script"] != script:
                raise InputError(f"--resume {self.run_dir} is a run of {self.record['script']}, not of {script}")
            self._lock()
            return
        name = f"{args.task or args.env_id.replace('/', '_')}__{script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.run_dir = Path(args.run_dir) if args.run_dir else _free_dir(Path("runs") / name)
        self.record = {"script": script, "args": dataclasses.asdict(args), "versions": versions(), "command": command()}
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if any((self.run_dir / part).exists() for part in ("args.json", "metrics.csv")):
                raise InputError(f"--run-dir {self.run_dir} already holds a run; choose another folder")
            with open(self.run_dir / "args.json", "x") as file:
                json.dump(self.record, file, indent=2)
            self._lock()
            self._write_rows([])
        except FileExistsError:
            raise InputError(f"--run-dir {self.run_dir} already holds a run or is a file; choose another") from None
        except OSError as error:
            raise InputError(f"--run-dir {self.run_dir} cannot be written: {error.strerror}") from None
        self._open_mirrors()

    def _lock(self) -> None:
        try:
            self._open.enter_context(locked(self.run_dir, wait=False))
        except BlockingIOError:
            raise InputError(f"{self.run_dir} is still being written by another process; stop that one first") from None

    def _open_mirrors(self) -> None:
        self.tensorboard = SummaryWriter(str(self.run_dir))
        if self.args.track:
            import wandb  # pyright: ignore[reportMissingImports]

            self.wandb = wandb.init(project="expo", name=self.run_dir.name, config=self.record["args"])

    def _write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Writes metrics.csv anew, whole or not at all: a run may be killed meanwhile."""
        with atomic_write(self.run_dir / "metrics.csv", "choose another --run-dir") as path:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        if self._csv is not None:
            self._csv.close()
        self._csv = open(self.run_dir / "metrics.csv", "a", newline="")
        self._writer = csv.DictWriter(self._csv, self.columns, restval="")
        self.rows = len(rows)

    def _read_rows(self) -> list[dict[str, str]]:
        with open(self.run_dir / "metrics.csv", newline="") as file:
            return list(itertools.islice(csv.DictReader(file), self.rows))

    def seconds(self) -> float:
        """Seconds since the run began, without those between a stop and its resume."""
        return time.perf_counter() - self.start

    def add(self, values: Mapping[str, float | torch.Tensor]) -> None:
        """Remembers `values` (log key -> float or 0-d tensor) for the next `write`; nothing leaves the device yet."""
        for key, value in values.items():
            self._pending.setdefault(key, []).append(value)
        self._new |= values

    def check(self, step: int) -> None:
        """Looks at all values added since the last call, in one transfer from the device.

        Raises:
            InputError: one is not finite; everything pending is written as a row first.
        """
        tensors = [value for value in self._new.values() if torch.is_tensor(value)]
        finite = all(math.isfinite(value) for value in self._new.values() if not torch.is_tensor(value))
        if tensors:
            finite &= bool(torch.stack(tensors).isfinite().all())
        self._new = {}
        if not finite:
            self.write(step)

    def write(self, step: int, values: dict[str, float] | None = None) -> dict[str, float]:
        """Writes one row: the means of everything added since the last row, and `values`. Returns the row.

        Raises:
            InputError: a mean is not finite; the row is written first.
        """
        tensors = {k: torch.stack(v).double().mean() for k, v in self._pending.items() if torch.is_tensor(v[0])}
        row = {k: sum(v) / len(v) for k, v in self._pending.items() if k not in tensors}  # pyright: ignore
        if tensors:  # one transfer from the device for all of them
            row |= dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))
        row |= values or {}
        self._pending, self.last_row = {}, row
        seconds = self.seconds()
        if any(key not in self.columns for key in row):
            rows = self._read_rows()
            self.columns += [key for key in row if key not in self.columns]
            self._write_rows(rows)
        assert self._csv is not None
        self._writer.writerow({"step": step, "seconds": f"{seconds:.3f}"} | {k: f"{v:.8g}" for k, v in row.items()})
        self._csv.flush()
        self.rows += 1
        self._mirror(step, seconds, row)
        wrong = [key for key, value in row.items() if not math.isfinite(value)]
        if wrong:
            raise InputError(
                f"step {step}: {', '.join(wrong)} is not finite; lower the learning rates or check the rewards"
            )
        return row

    def _mirror(self, step: int, seconds: float, row: dict[str, float]) -> None:
        """The row in TensorBoard, with the steps per second since the one before, and in Weights & Biases."""
        assert self.tensorboard is not None
        last_step, last_seconds = self._last
        walltime = time.time() - self.seconds() + seconds
        if step > max(last_step, 0) and seconds > last_seconds:
            speed = (step - max(last_step, 0)) / (seconds - last_seconds)
            self.tensorboard.add_scalar("charts/SPS", speed, step, walltime)
        self._last = step, seconds
        for key, value in row.items():
            self.tensorboard.add_scalar(key, value, step, walltime)
        if self.wandb is not None:
            self.wandb.log(row | {"step": step})

    def write_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes a row and prints it as one line for people, above the progress bar."""
        self.write(step, values)
        parts = [f"step {step:>7,}", f"{self.seconds():6.0f} s"]
        names = {"eval/success_rate": "success", "eval/base_success_rate": "base policy alone", "eval/return": "return"}
        parts += [f"{name} {values[key]:.2f}" for key, name in names.items() if key in values]
        tqdm.write("   ".join(parts))

    def state(self) -> dict[str, Any]:
        """What `restore` needs, once all rows are on the disk."""
        assert self._csv is not None
        self._csv.flush()
        os.fsync(self._csv.fileno())
        pending = {k: torch.stack(v) if torch.is_tensor(v[0]) else list(v) for k, v in self._pending.items()}
        return {"rows": self.rows, "columns": list(self.columns), "pending": pending, "seconds": self.seconds()}

    def restore(self, state: dict[str, Any], device: torch.device | str) -> None:
        """Goes on as if nothing had been written after `state`: drops later rows, makes TensorBoard's files anew."""
        self.rows, self.columns = state["rows"], list(state["columns"])
        rows = self._read_rows()
        if len(rows) < self.rows:
            raise InputError(f"{self.run_dir / 'metrics.csv'} has lost rows: {len(rows)} of {self.rows} are there")
        for part in self.run_dir.glob("*.part"):  # of a process that was killed
            part.unlink()
        self._write_rows(rows)
        for events in self.run_dir.glob("events.out.tfevents.*"):
            events.unlink()
        self.start = time.perf_counter() - state["seconds"]
        self._open_mirrors()
        for row in rows:
            step, seconds = int(row.pop("step")), float(row.pop("seconds"))
            self._mirror(step, seconds, {key: float(value) for key, value in row.items() if value})
        for key, values in state["pending"].items():
            self._pending[key] = list(values.to(device)) if torch.is_tensor(values) else list(values)

    def save(self, name: str, state: dict[str, Any]) -> Path:
        """Writes `state` (tensors and plain values) to `name` in the run's folder, whole or not at all."""
        path = self.run_dir / name
        with atomic_write(path, "check the run's folder") as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
        return path

    def save_record(self, **values: Any) -> None:
        """Adds `values` to args.json, or takes away those that are None."""
        self.record = {key: value for key, value in (self.record | values).items() if value is not None}
        with atomic_write(self.run_dir / "args.json", "check the run's folder") as path:
            path.write_text(json.dumps(self.record, indent=2))

    def close(self) -> None:
        """Flushes and closes everything; safe to call twice."""
        with self._open:  # the lock falls last
            if self._csv is not None:
                self._csv.close()
            if self.tensorboard is not None:
                self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish()


def _free_dir(path: Path) -> Path:
    """`path`, or with -1, -2, ... behind it where a run of the same second has taken it; the folder is made."""
    for suffix in ("", *(f"-{i}" for i in range(1, 1000))):
        candidate = path.with_name(path.name + suffix)
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{candidate} cannot be written: {error.strerror}; choose a --run-dir") from None
    raise InputError(f"{path} is taken a thousand times over; choose a --run-dir")
