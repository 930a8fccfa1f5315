"""A run's folder: args.json, metrics.csv, TensorBoard events; Weights & Biases on request."""

import csv
import dataclasses
import importlib.metadata
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


class Logger:
    """Writes scalars of one run to `metrics.csv` (one row per call) and to TensorBoard.

    Args:
        args: the script's dataclass; `run_dir`, `task`, `env_id`, `seed`, `track` are read, all are saved.
        script: name of the script without its ending, for the folder's name and for `utils.evaluate`.

    Raises:
        InputError: the folder already holds a run, or cannot be written.
    """

    def __init__(self, args: Any, script: str):
        if args.track:
            try:
                import wandb  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise InputError("--track needs Weights & Biases: pip install wandb") from None
        name = f"{args.task or args.env_id.replace('/', '_')}__{script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.run_dir = Path(args.run_dir) if args.run_dir else _free_dir(Path("runs") / name)
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if any((self.run_dir / part).exists() for part in ("args.json", "metrics.csv")):
                raise InputError(f"--run-dir {self.run_dir} already holds a run; choose another folder")
            record = {"script": script, "args": dataclasses.asdict(args), "versions": versions()}
            record["command"] = [Path(sys.argv[0]).name, *sys.argv[1:]]
            with open(self.run_dir / "args.json", "x") as file:
                json.dump(record, file, indent=2)
            self._csv = open(self.run_dir / "metrics.csv", "x+", newline="")
        except FileExistsError:
            raise InputError(f"--run-dir {self.run_dir} already holds a run or is a file; choose another") from None
        except OSError as error:
            raise InputError(f"--run-dir {self.run_dir} cannot be written: {error.strerror}") from None
        self.columns = ["step", "seconds"]
        self._write_rows([])
        self.tensorboard = SummaryWriter(str(self.run_dir))
        self.wandb = None
        if args.track:
            self.wandb = wandb.init(project="expo", name=self.run_dir.name, config=record["args"])
        self._pending: dict[str, list[Any]] = {}
        self.start = time.perf_counter()
        self._last = (0, 0.0)  # step and seconds of the last row, for charts/SPS

    def _write_rows(self, rows: list[dict[str, Any]]) -> None:
        self._csv.seek(0)
        self._csv.truncate()
        self._writer = csv.DictWriter(self._csv, self.columns, restval="")
        self._writer.writeheader()
        self._writer.writerows(rows)
        self._csv.flush()

    def add(self, values: Mapping[str, float | torch.Tensor]) -> None:
        """Remembers `values` (log key -> float or 0-d tensor) for the next `write`; nothing leaves the device yet."""
        for key, value in values.items():
            self._pending.setdefault(key, []).append(value)

    def write(self, step: int, values: dict[str, float] | None = None) -> dict[str, float]:
        """Writes one row: the means of everything added since the last row, and `values`. Returns the row.

        Raises:
            InputError: a mean is not finite; the row is written first.
        """
        tensors = {k: torch.stack(v).float().mean() for k, v in self._pending.items() if torch.is_tensor(v[0])}
        row = {k: sum(v) / len(v) for k, v in self._pending.items() if k not in tensors}  # pyright: ignore
        if tensors:  # one transfer from the device for all of them
            row |= dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))
        row |= values or {}
        self._pending = {}
        seconds = time.perf_counter() - self.start
        if any(key not in self.columns for key in row):
            self._csv.seek(0)
            rows = list(csv.DictReader(self._csv))
            self.columns += [key for key in row if key not in self.columns]
            self._write_rows(rows)
        self._writer.writerow({"step": step, "seconds": f"{seconds:.3f}"} | {k: f"{v:.8g}" for k, v in row.items()})
        self._csv.flush()
        last_step, last_seconds = self._last
        if step > max(last_step, 0):
            self.tensorboard.add_scalar("charts/SPS", (step - max(last_step, 0)) / (seconds - last_seconds), step)
        self._last = step, seconds
        for key, value in row.items():
            self.tensorboard.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(row | {"step": step})
        wrong = [key for key, value in row.items() if not math.isfinite(value)]
        if wrong:
            raise InputError(
                f"step {step}: {', '.join(wrong)} is not finite; lower the learning rates or check the rewards"
            )
        return row

    def write_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes a row and prints it as one line for people, above the progress bar."""
        self.write(step, values)
        parts = [f"step {step:>7,}", f"{time.perf_counter() - self.start:6.0f} s"]
        names = {"eval/success_rate": "success", "eval/base_success_rate": "base policy alone", "eval/return": "return"}
        parts += [f"{name} {values[key]:.2f}" for key, name in names.items() if key in values]
        tqdm.write("   ".join(parts))

    def save(self, name: str, state: dict[str, Any]) -> Path:
        """Writes `state` (tensors and plain values) to `name` in the run's folder, whole or not at all."""
        path = self.run_dir / name
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return path

    def close(self) -> None:
        """Flushes and closes everything; safe to call twice."""
        self._csv.close()
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
