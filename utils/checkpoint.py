"""Checkpoints: `Run` saves a script's state now and then, stops it cleanly, and goes on where a stopped run was.

In a run's folder lie `checkpoint.pt`, the one before it, `checkpoint.previous.pt`, and `replay.bin`: the online rows,
raw float32, to which every checkpoint appends what is new. What is promised, and how it is tested: docs/reliability.md.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import random
import shlex
import signal
import sys
import threading
import typing
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from utils.buffer import ReplayBuffer
from utils.errors import InputError
from utils.files import atomic_write, reason
from utils.logger import Logger, command, read_record, versions

NAMES = ("checkpoint.pt", "checkpoint.previous.pt")  # in the order in which they are tried
SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES}
_received: list[int] = []  # signals that no Run has acted on yet


class Stopped(SystemExit):
    """A signal was obeyed at a place where nothing is lost; the code is the shell's, 128 + signal."""


def stop_if_asked() -> None:
    """Raises Stopped if a signal has come while a Run is open: for what takes long and changes nothing."""
    if _received:
        raise Stopped(128 + _received[0])


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Any]:
    """The dict in a file of `torch.save`, on `device`. It can hold tensors and plain values only: nothing in it is run.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is damaged (every byte is checked), or is something else.
    """
    try:
        with zipfile.ZipFile(path) as file:
            # torch takes an entry with attributes for a folder, and reads whatever lies in memory for it
            damaged = file.testzip() or any(entry.external_attr for entry in file.infolist())
        state = None if damaged else torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception:  # zipfile and torch.load raise many kinds for damaged and foreign files
        state = None
    if not isinstance(state, dict):
        raise InputError(f"{path} is damaged, or was not saved by this project")
    return state


def _problem(error: OSError) -> str:
    return f"{error.filename or 'a file'} cannot be written or read ({error.strerror or error})"


class Run:
    """A script's run: its steps, its episodes, its checkpoints.

    As a context manager it closes the log, saves what a signal or an error leaves, and says how to go on.

    Args:
        args: the script's flags; with `args.resume` everything below is put into the state of that run's checkpoint.
        logger: of this run.
        agent: all parameters that are trained or averaged.
        optimizers: optimizers and schedules.
        offline: the data; a resumed run must find the same.
        online: the environment steps so far; must not be full before the run ends.

    Raises:
        InputError: nothing to resume there, a damaged checkpoint, other data, or a folder that cannot be written.
    """

    def __init__(self, args: Any, logger: Logger, agent: nn.Module, optimizers: Any, offline: Any, online: Any):
        self.args, self.logger, self.agent, self.optimizers = args, logger, agent, optimizers
        self.offline: ReplayBuffer = offline
        self.online: ReplayBuffer = online
        self.step: int | None = None  # the last one that is done
        self.now = 0  # the one that is not
        self.episode = self.episode_start = 0  # number of the running episode, and its first row in `online`
        self.replay_rows = self.replay_crc = 0  # of replay.bin
        self.saved: int | None = None  # the step of the last checkpoint
        self.whole = False  # whether checkpoint.pt is one that this process has written or read
        self.warned = False
        self.handlers: dict[int, Any] = {}
        self.data = {"rows": offline.size, "crc32": 0}
        for field in offline.rows:
            self.data["crc32"] = zlib.crc32(field.cpu().contiguous().numpy(), self.data["crc32"])
        random.seed(args.seed)  # of an environment that uses them; nothing here does
        np.random.seed(args.seed)  # noqa: NPY002
        try:
            self._resume() if args.resume else self._save()
        except OSError as error:
            logger.close()
            raise InputError(f"{logger.run_dir}: {_problem(error)}") from None
        except BaseException:
            logger.close()
            raise

    # ------------------------------------------------------------------------------------------------- the loop

    def steps(self, steps: range, desc: str, unit: str) -> Iterator[int]:
        """Those of `steps` that are not done yet, with a progress bar; after each: log, guards, checkpoint."""
        first = steps.start if self.step is None else min(max(steps.start, self.step + 1), steps.stop)
        bar = {"desc": desc, "unit": unit, "initial": first - steps.start, "total": len(steps), "disable": None}
        for step in tqdm(range(first, steps.stop), **bar):
            self.now = step
            yield step
            if step % self.args.log_every == 0:
                self.logger.write(step)
            due = (self.args.checkpoint_every and step % self.args.checkpoint_every == 0) or step == steps[-1]
            self.logger.check(step)
            if due or step % self.args.log_every == 0:
                self._check(step)
            self.step = step
            if due:
                self._save()
            stop_if_asked()

    def first_obs(self, env: gym.Env) -> tuple[np.ndarray, float]:
        """The observation (O,) to act on first, and the return of its episode so far.

        An episode that a stop has cut is played again, with its seed and its actions. If the simulator does not repeat
        itself to the last bit, the run warns and goes on with the next episode.
        """
        obs, episodic_return = self._reset(env), 0.0
        for row in range(self.episode_start, self.online.size):
            stored = [field[row].cpu().numpy() for field in self.online.rows]
            same = np.array_equal(obs, stored[0])
            obs, reward, *ends, _ = env.step(stored[1])
            if not same or any(ends) or not np.array_equal(obs, stored[3]):
                action = row - self.episode_start + 1
                tqdm.write(
                    f"warning: this environment does not repeat the episode that was cut (action {action} of it): the "
                    "run goes on with the next one, and is valid, but not the same to the last bit"
                )
                return self.next_obs(env), 0.0
            episodic_return += float(reward)
        return obs, episodic_return

    def next_obs(self, env: gym.Env) -> np.ndarray:
        """The first observation (O,) of a new episode."""
        self.episode, self.episode_start = self.episode + 1, self.online.size
        return self._reset(env)

    def _reset(self, env: gym.Env) -> np.ndarray:
        # A seed for every episode: its start can be had again without the environment's own random state.
        seed = np.random.SeedSequence([self.args.seed, self.episode]).generate_state(1)[0]
        return env.reset(seed=int(seed))[0]

    # ------------------------------------------------------------------------------------------------ the guards

    def _check(self, step: int) -> None:
        """Stops at a parameter that is not finite; warns once of values that no rewards could sum to."""
        finite = torch.stack([value.isfinite().all() for value in self.agent.parameters()])
        if not finite.all():
            wrong = [name for name, value in self.agent.named_parameters() if not value.isfinite().all()]
            raise InputError(f"step {step}: parameters are not finite ({wrong[0]}); lower the learning rates")
        q, gamma = self.logger.last_row.get("critic/q_mean"), self.args.gamma
        if self.warned or q is None or gamma == 1 or self._adds_entropy():
            return
        rewards = [buffer.data.rewards[: buffer.size] for buffer in (self.offline, self.online) if buffer.size]
        low, high = min(float(r.min()) for r in rewards), max(float(r.max()) for r in rewards)
        least, most = min(low, 0) / (1 - gamma), max(high, 0) / (1 - gamma)
        margin = 0.1 * (most - least) + 1  # critics that have learned nothing yet answer anything near 0
        if most > least and not least - margin <= q <= most + margin:
            self.warned = True
            tqdm.write(
                f"warning: step {step}: critic/q_mean is {q:.3g}, but rewards from {low:g} to {high:g} sum to "
                f"{least:.3g} to {most:.3g} at --gamma {gamma:g}. The critic diverges: lower --critic-lr or "
                "--utd-ratio, or raise --num-critics"
            )

    def _adds_entropy(self) -> bool:
        """Whether the TD target holds more than rewards."""
        return getattr(self.args, "backup", "") == "entropy" or getattr(self.args, "backup_entropy", False)

    # -------------------------------------------------------------------------------------------- ends of a run

    def __enter__(self) -> "Run":
        _received.clear()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.handlers[number] = signal.signal(number, self._on_signal) or signal.SIG_DFL
        return self

    def _on_signal(self, number: int, _frame: Any) -> None:
        _received.append(number)
        for known, handler in self.handlers.items():  # a second one ends the process at once
            signal.signal(known, handler)
        with contextlib.suppress(OSError):  # nobody may be listening any more: `... | tee log`
            os.write(2, b"\nstopping after this step; once more: at once\n")

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        try:
            if error is None:
                self.logger.save_record(finished=self.args.total_timesteps)
            elif isinstance(error, Stopped):
                self._save()
                how = SIGNALS[signal.Signals(_received[0])]
                with contextlib.suppress(OSError):
                    print(
                        f"stopped by {how} after step {self.step or 0}; go on with: {self._command()}", file=sys.stderr
                    )
            elif isinstance(error, InputError):
                self._fail(error)
            elif isinstance(error, OSError) and (error.filename is not None or error.errno in DISK):
                raise error
            else:
                error.add_note(f"go on from step {self.saved or 0} with: {self._command()}")
        except OSError as problem:
            raise InputError(
                f"step {self.now}: {_problem(problem)}; the checkpoint of step {self.saved or 0} is whole: make "
                f"room, then {self._command()}"
            ) from problem
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            _received.clear()
            with contextlib.suppress(OSError):
                self.logger.close()

    def _fail(self, error: InputError) -> None:
        """Leaves the state to look at in failed.pt; the checkpoints stay as they are."""
        message = str(error) if str(error).startswith("step ") else f"step {self.now}: {error}"
        try:
            path = self.logger.save("failed.pt", self._state())
        except (OSError, InputError) as problem:
            raise InputError(f"{message}; its state could not be saved ({reason(problem)})") from error
        raise InputError(f"{message}; its state: {path}, the last good one: step {self.saved or 0}") from error

    def _command(self) -> str:
        return shlex.join(["python", sys.argv[0], "--resume", str(self.logger.run_dir)])

    # --------------------------------------------------------------------------------------------- saving, loading

    def _save(self) -> None:
        """Makes checkpoint.pt anew; at every moment a whole one lies under one of the two names."""
        path, previous = (self.logger.run_dir / name for name in NAMES)
        state = self._state()
        with atomic_write(path, "check the run's folder") as temporary:
            with open(temporary, "wb") as file:
                torch.save(state, file)
            if self.whole:
                os.replace(path, previous)
            self.whole = False
        self.saved, self.whole = self.step, True

    def _state(self) -> dict[str, Any]:
        """Everything that the next step depends on; the online rows are in replay.bin before it returns."""
        self._append_replay()
        _, keys, *numpy_rest = np.random.get_state()  # noqa: NPY002
        return {
            "script": self.logger.script,
            "step": self.step,
            "episode": self.episode,
            "episode_start": self.episode_start,
            "agent": self.agent.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self.online.data.rewards.is_cuda else None,
            "numpy": [torch.from_numpy(np.asarray(keys, np.int64)), *numpy_rest],
            "python": random.getstate(),
            "log": self.logger.state(),
            "replay": {"rows": self.replay_rows, "crc32": self.replay_crc},
            "data": self.data,
            "kept": [buffer.kept() for buffer in (self.offline, self.online)],
        }

    def _append_replay(self) -> None:
        """Writes the rows (2 O + A + 2) that replay.bin does not have yet."""
        path, width = self.logger.run_dir / "replay.bin", self._row_bytes()
        with open(path, "ab") as file:
            if file.tell() < self.replay_rows * width:  # somebody has cut it
                self.replay_rows = self.replay_crc = 0
            file.truncate(self.replay_rows * width)  # rows beyond the last checkpoint
            new = [field[self.replay_rows : self.online.size] for field in self.online.rows]
            rows = torch.cat([f if f.ndim == 2 else f[:, None] for f in new], dim=1).cpu().numpy().tobytes()
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        self.replay_rows, self.replay_crc = self.online.size, zlib.crc32(rows, self.replay_crc)

    def _row_bytes(self) -> int:
        return 4 * sum(field[:1].numel() for field in self.offline.rows)

    def _read(self, name: str) -> tuple[dict[str, Any], np.ndarray]:
        """A checkpoint and its rows of replay.bin (n, 2 O + A + 2), both checked."""
        state = load_tensors(self.logger.run_dir / name)
        replay, width = self.logger.run_dir / "replay.bin", self._row_bytes()
        try:
            if state["script"] != self.logger.script:
                raise InputError(f"{self.logger.run_dir / name} is not a checkpoint of {self.logger.script}")
            count = state["replay"]["rows"]
            if count == 0 or 0 < count * width <= replay.stat().st_size:
                content = b""
                if count:
                    with open(replay, "rb") as file:
                        content = file.read(count * width)
                if zlib.crc32(content) == state["replay"]["crc32"]:
                    return state, np.frombuffer(content, np.float32).reshape(count, width // 4)
        except InputError:
            raise
        except Exception:  # of a foreign checkpoint: its values can be of any kind
            pass
        raise InputError(f"{replay} does not hold the rows of {name}")

    def _resume(self) -> None:
        """Puts everything into the state of the last checkpoint that is whole."""
        folder, problems = self.logger.run_dir, []
        for name in NAMES:
            try:
                state, rows = self._read(name)
                break
            except FileNotFoundError:
                problems.append(f"{name} is missing")
            except InputError as error:
                problems.append(str(error))
        else:
            raise InputError(f"--resume {folder}: no checkpoint to go on from ({'; '.join(problems)})")
        try:
            if self.data != state["data"]:
                raise InputError(f"--resume {folder}: the data set is not the one that run learned from")
            self._restore(state, rows)
        except (
            InputError,
            OSError,
            torch.OutOfMemoryError,
            torch.AcceleratorError,
        ):  # the machine's fault, not the file's
            raise
        except Exception as error:
            raise InputError(f"{folder / name} does not fit this run ({reason(error)})") from None
        self.whole = name == NAMES[0]
        changed = changed_flags(self.args, saved_args(type(self.args), folder))
        resume = {"step": self.step, "changed": changed, "versions": versions(), "command": command()}
        self.logger.save_record(finished=None, resumes=[*self.logger.record.get("resumes", []), resume])
        for problem in problems:
            tqdm.write(f"warning: {problem}; going on from {name}")
        tqdm.write(f"resumed after step {self.step or 0}")

    def _restore(self, state: dict[str, Any], rows: np.ndarray) -> None:
        step, finished = state["step"], self.logger.record.get("finished")
        if not (step is None or type(step) is int) or not 0 <= state["episode_start"] <= len(rows):
            raise ValueError("no step or episode of a run")
        if finished is not None and self.args.total_timesteps <= finished:
            raise InputError(
                f"--resume {self.logger.run_dir}: that run is complete; a larger --total-timesteps makes it go on"
            )
        if step is not None and step > self.args.total_timesteps:
            raise InputError(f"--total-timesteps {self.args.total_timesteps}: that run has done {step} already")
        device = self.online.data.rewards.device
        self.agent.load_state_dict(state["agent"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            if set(saved) != set(optimizer.state_dict()):
                raise ValueError("another optimizer")
            optimizer.load_state_dict(saved)
        columns = np.cumsum([0, *(field[:1].numel() for field in self.offline.rows)])
        for field, start, stop in zip(self.online.rows, columns, columns[1:], strict=False):
            field[: len(rows)] = torch.from_numpy(rows[:, start:stop].copy()).view_as(field[: len(rows)])
        self.online.size = len(rows)
        self.online.position = len(rows) % max(self.online.capacity, 1)
        for buffer, kept in zip((self.offline, self.online), state["kept"], strict=True):
            buffer.restore_kept(kept)
        self.step, self.episode, self.episode_start = step, int(state["episode"]), int(state["episode_start"])
        self.replay_rows, self.replay_crc = len(rows), state["replay"]["crc32"]
        self.saved = step
        self.logger.restore(state["log"], device)
        keys, *numpy_rest = state["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *numpy_rest))  # noqa: NPY002
        random.setstate(state["python"])
        if state["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu())
        torch.set_rng_state(state["torch"])


# ----------------------------------------------------------------------------------------------- flags of a resume

# Flags that a resumed run may change; the others make another run.
CHANGEABLE = {"total_timesteps", "eval_every", "eval_episodes", "log_every", "checkpoint_every", "save_model"}
CHANGEABLE |= {"capture_video", "track", "threads", "device", "compile"}


def saved_args(cls: type, run_dir: Path) -> Any:
    """The flags (an instance of `cls`) that the run in a folder had last; what the class does not have is left out.

    Raises:
        InputError: no run there, or its args.json is damaged.
    """
    record, hints, values = read_record(run_dir), typing.get_type_hints(cls), {}
    changes = [resume["changed"] for resume in record.get("resumes", [])]
    for key, value in itertools.chain(record["args"].items(), *(change.items() for change in changes)):
        if key not in hints:
            continue
        if type(value) is list and all(type(word) is str for word in value):
            value = tuple(value)
        hint = hints[key]
        fits = {
            tuple: type(value) is tuple,
            Literal: value in typing.get_args(hint),
            None: type(value) is hint or (hint is float and type(value) is int and abs(value) < 2**53),
        }
        if not fits[typing.get_origin(hint)]:
            raise InputError(f"{run_dir / 'args.json'} is damaged: {key} is {value!r}")
        values[key] = value
    return cls(**values | {"run_dir": str(run_dir), "resume": str(run_dir)})


def changed_flags(args: Any, saved: Any) -> dict[str, Any]:
    """Flag -> value, of the flags in `args` that differ from those `saved`.

    Raises:
        InputError: names those that cannot change.
    """
    changed = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    changed = {name: value for name, value in changed.items() if value != getattr(saved, name)}
    fixed = [f"--{name.replace('_', '-')} {changed[name]} (was {getattr(saved, name)})" for name in changed]
    fixed = [words for words, name in zip(fixed, changed, strict=True) if name not in CHANGEABLE]
    if fixed:
        raise InputError(f"--resume {saved.resume}: {', '.join(fixed)} cannot change; start a new run for that")
    return changed
