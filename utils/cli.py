"""Command line of the scripts: flags from the `Args` dataclass, a task's defaults under them, one-line errors."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import tyro

from utils import checkpoint, compiling
from utils.errors import InputError, exit_on_input_error
from utils.tasks import TASKS

T = TypeVar("T")

# Flag -> (smallest, largest allowed value); flags that a script does not have are passed over.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "total_timesteps": (0, math.inf),
    "learning_starts": (0, math.inf),
    "offline_steps": (0, math.inf),
    "pretrain_steps": (0, math.inf),
    "eval_every": (1, math.inf),
    "eval_episodes": (1, math.inf),
    "log_every": (1, math.inf),
    "checkpoint_every": (0, math.inf),
    "threads": (0, math.inf),
    "max_episode_steps": (0, math.inf),
    "action_repeat": (1, math.inf),
    "utd_ratio": (1, math.inf),
    "batch_size": (2, math.inf),
    "offline_ratio": (0, 1),
    "gamma": (0, 1),
    "tau": (0, 1),
    "ema_rate": (0, 1),
    "num_base_samples": (1, math.inf),
    "num_edit_samples": (0, math.inf),
    "denoising_steps": (1, math.inf),
    "edit_scale": (1e-6, 2),
    "edit_dropout": (0, 0.99),
    "num_critics": (1, math.inf),
    "num_min_critics": (1, math.inf),
    "hidden_dim": (1, math.inf),
    "hidden_layers": (1, math.inf),
    "base_hidden_dim": (1, math.inf),
    "base_blocks": (0, math.inf),
    "base_expansion": (1, math.inf),
    "base_lr": (0, math.inf),
    "base_weight_decay": (0, math.inf),
    "edit_lr": (0, math.inf),
    "actor_lr": (0, math.inf),
    "critic_lr": (0, math.inf),
    "alpha_lr": (0, math.inf),
    "init_alpha": (1e-12, math.inf),
    "lr_decay_steps": (1, math.inf),
    "backup_alpha": (0, math.inf),
    "backup_kappa": (0, math.inf),
    "expectile": (0, 1),
    "num_action_samples": (1, math.inf),
    "eta": (0, math.inf),
    "kappa": (0, math.inf),
    "grad_norm": (1e-6, math.inf),
    "heldout_share": (0, 0.5),
    "refresh_share": (1e-6, 1),
}


def parse_args(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """An instance of the dataclass `cls` from the command line.

    The defaults are the fields' own; `--task NAME` lays that task's settings over them; flags given explicitly win.
    `--env-id` without `--task` runs that environment with the fields' own defaults; with `--resume` that run's flags
    are the defaults.

    Raises:
        InputError: an unknown task, a value out of range, a flag that a resumed run cannot change.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    first.add_argument("--env-id", "--env_id", dest="env_id")
    first.add_argument("--resume", default="")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            known, _ = first.parse_known_args(argv)
    except SystemExit:  # a flag without its value: tyro words it better
        known = argparse.Namespace(task=None, env_id=None, resume="")
    if known.resume:
        saved = checkpoint.saved_args(cls, Path(known.resume))
        args = _read_flags(cls, saved, argv, description)
        check_ranges(args)
        args: Any = dataclasses.replace(cast(Any, args), resume=saved.resume)  # the same folder, however it was written
        checkpoint.changed_flags(args, saved)
        return args
    default: Any = cls()
    name = known.task if known.task is not None else "" if known.env_id is not None else default.task
    if name and name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, 1)
        raise InputError(
            f"--task {name!r} is unknown{f'; did you mean {close[0]!r}?' if close else ''} (known: {', '.join(TASKS)})"
        )
    fields = {field.name for field in dataclasses.fields(default)}
    settings: dict[str, Any] = {"task": name}
    if name:
        task = TASKS[name]
        settings |= {"env_id": task.env_id, "dataset": task.dataset}
        settings |= task.defaults(fields)
    default = dataclasses.replace(default, **settings)
    args = _read_flags(cls, default, argv, description)
    check_ranges(args)
    return args


def _read_flags(cls: type[T], default: T, argv: list[str], description: str | None) -> T:
    """tyro's answer; its boxed message of several lines becomes one InputError."""
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(cls, default=default, args=argv, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [re.sub("[│─╭╮╰╯]+", " ", line).strip() for line in boxes.getvalue().splitlines()[1:]]
        words = " ".join(itertools.takewhile(bool, lines))  # up to the first rule: the message itself
        raise InputError(f"{words.rstrip('.')} (--help shows all flags)") from None


def check_ranges(args: Any) -> None:
    """Raises InputError for a flag whose value cannot work."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        low, high = RANGES.get(field.name, (-math.inf, math.inf))
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{field.name.replace('_', '-')} {value} is not a finite number")
        if isinstance(value, int | float) and not low <= value <= high:
            bound = f"at least {low:g}" if value < low else f"at most {high:g}"
            raise InputError(f"--{field.name.replace('_', '-')} {value} must be {bound}")
    if getattr(args, "num_min_critics", 0) > getattr(args, "num_critics", math.inf):
        raise InputError(f"--num-min-critics {args.num_min_critics} exceeds --num-critics {args.num_critics}")
    if not args.env_id:
        raise InputError("--env-id is empty: name a --task or an --env-id")
    if not args.dataset:
        raise InputError(
            "--dataset is missing: every script here starts from offline data; give a file, d4rl:NAME, minari:ID, "
            "ogbench:NAME or robomimic:TASK/TYPE (docs/data.md)"
        )


def setup_torch(args: Any) -> torch.device:
    """Sets threads and compilation, and returns the device that `--device` asks for.

    Raises:
        InputError: `--device cuda` without CUDA, `--compile` without a compiler.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    compiling.enable(args.compile)
    if args.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {args.device!r} must be auto, cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA here; use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def run(
    main: Callable[[Any], Any], cls: type, description: str | None = None, argv: Sequence[str] | None = None
) -> None:
    """Parses the flags (`argv`, or the command line) and calls `main(args)`.

    Bad input ends with one line on stderr and exit code 2.
    """
    try:
        with exit_on_input_error():
            main(parse_args(cls, argv, description))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; what was logged is on disk", file=sys.stderr)
        sys.exit(130)
