"""Readers of checkpoints, args.json and flags against what nobody would write: one clear line, or the right answer.

Those of the data sets: tests/test_data_formats.py.
"""

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import expo_diffusion
from utils import checkpoint, cli
from utils.buffer import ReplayBuffer
from utils.checkpoint import Run, load_tensors
from utils.errors import InputError
from utils.logger import Logger
from utils.tasks import TASKS

SUPPRESS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
CHECKPOINT, REPLAY = "checkpoint.pt", "replay.bin"


def fuzz(few: int, many: int) -> Any:
    """Runs a test with `few` random cases, and with `many` in the slow set."""

    def decorate(test: Any) -> Any:
        marks = [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]

        @pytest.mark.parametrize("cases", marks)
        def run(cases: int, tmp_path: Path) -> None:
            check = test(tmp_path)
            settings(max_examples=cases, deadline=None, suppress_health_check=SUPPRESS)(
                given(choice=st.data())(check)
            )()

        return run

    return decorate


def make_run(run_dir: Path, resume: bool = False) -> Run:
    """A run of a tiny agent, opened as a script does."""
    torch.manual_seed(0)
    args = expo_diffusion.Args(env_id="E-v0", dataset=("d",), total_timesteps=4, run_dir=str(run_dir))
    args.resume = str(run_dir) if resume else ""
    agent = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(agent.parameters())
    agent(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizers = optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    offline, online = ReplayBuffer(2, 2, 1), ReplayBuffer(4, 2, 1)
    offline.size = 2
    return Run(args, Logger(args, "expo_diffusion"), agent, optimizers, offline, online)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Without TensorBoard and git, which take longer than what is tested."""
    monkeypatch.setattr(Logger, "_open_mirrors", lambda self: None)
    monkeypatch.setattr(Logger, "_mirror", lambda *_: None)
    monkeypatch.setattr(checkpoint, "versions", dict)
    monkeypatch.setattr("utils.logger.versions", dict)


def good_folder(tmp_path: Path) -> dict[str, bytes]:
    """The files of a run of two steps."""
    run = make_run(tmp_path / "run")
    for step in (1, 2):
        run.online.add([step, 0], [0.5], 1.0, [step, 1], False)
        run.logger.add({"losses/critic": torch.tensor(1.0), "charts/episodic_return": 2.0})
        run.logger.write(step, {"a": 1.0})
    run.logger.add({"losses/critic": torch.tensor(1.0), "charts/episodic_return": 2.0})
    run.step = 2
    run._save()
    run.logger.close()
    return {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def check_line(error: InputError) -> None:
    assert str(error).strip() and "\n" not in str(error)


def same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one):
        return torch.is_tensor(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def damaged(content: bytes, draw: Any) -> bytes:
    """Cut off, lengthened, or with a few bytes overwritten."""
    result = bytearray(content)
    kind = draw(st.sampled_from(["cut", "more", "bytes"]))
    if kind == "cut":
        del result[draw(st.integers(0, len(result) - 1)) :]
    elif kind == "more":
        result += draw(st.binary(min_size=1, max_size=50))
    else:
        for _ in range(draw(st.integers(1, 4))):
            result[draw(st.integers(0, len(result) - 1))] = draw(st.integers(0, 255))
    return bytes(result)


@fuzz(few=300, many=60_000)
def test_a_checkpoint_with_damaged_bytes_is_refused_or_reads_the_same(tmp_path):
    files = good_folder(tmp_path)
    expected, path = load_tensors(tmp_path / "run" / CHECKPOINT), tmp_path / "damaged.pt"

    def check(choice: Any) -> None:
        path.write_bytes(damaged(files[CHECKPOINT], choice.draw))
        try:
            state = load_tensors(path)
        except InputError as error:
            check_line(error)
        else:
            assert same(state, expected)

    return check


def test_an_entry_that_calls_itself_a_folder_is_damage(tmp_path):
    """Found by the test above: torch reads no bytes of it, and leaves the tensor as the memory was."""
    content = bytearray(good_folder(tmp_path)[CHECKPOINT])
    with zipfile.ZipFile(tmp_path / "run" / CHECKPOINT) as file:
        entry = file.start_dir
        for info in file.infolist():
            if info.filename.endswith("data/0"):
                break
            entry += 46 + len(info.filename) + len(info.extra)
    content[entry + 38] = 16
    (tmp_path / "damaged.pt").write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        load_tensors(tmp_path / "damaged.pt")


VALUES: list[Any] = [None, True, -1, 0, 7, 2**80, 1e400, float("nan"), "", "step", [], {}, (), [1, 2], {"rows": -3}]
VALUES += [torch.zeros(0), torch.zeros(3), torch.zeros(2, 2), torch.tensor(1), torch.zeros(5056, dtype=torch.uint8)]


def places(state: Any, path: tuple = ()) -> list[tuple]:
    """The path of everything in a nested dict or list."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


@fuzz(few=60, many=12_000)
def test_a_foreign_checkpoint_is_refused_or_resumed(tmp_path):
    """Any value in place of any other, any absent; replay.bin and metrics.csv damaged."""
    files = good_folder(tmp_path)
    folder, expected = tmp_path / "run", load_tensors(tmp_path / "run" / CHECKPOINT)
    known = places(expected)

    def check(choice: Any) -> None:
        state = copy.deepcopy(expected)
        for place in choice.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)):
            owner = state
            try:
                for key in place[:-1]:
                    owner = owner[key]
                if choice.draw(st.booleans()):
                    owner[place[-1]] = choice.draw(st.sampled_from(VALUES))
                else:
                    del owner[place[-1]]
            except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
                continue  # gone with an earlier one
        write(folder, files)
        (folder / "checkpoint.previous.pt").unlink(missing_ok=True)
        torch.save(state, folder / CHECKPOINT)
        name = choice.draw(st.sampled_from(["", "", REPLAY, "metrics.csv"]))
        if name:
            (folder / name).write_bytes(damaged(files[name], choice.draw))
        try:
            run = make_run(folder, resume=True)
        except InputError as error:
            check_line(error)
        else:
            run.logger.close()
            assert run.online.size in (0, 2)

    return check


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=2)
)


@fuzz(few=200, many=25_000)
def test_args_json_is_refused_or_read(tmp_path):
    record = json.loads(good_folder(tmp_path)["args.json"])
    record["resumes"] = [{"step": 1, "changed": {"seed": 3}}]
    path = tmp_path / "run" / "args.json"
    known = places(record)

    def check(choice: Any) -> None:
        changed = copy.deepcopy(record)
        owner, place = changed, choice.draw(st.sampled_from(known))
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = choice.draw(JSON)
        content = json.dumps(changed).encode()
        path.write_bytes(damaged(content, choice.draw) if choice.draw(st.integers(0, 3)) == 0 else content)
        try:
            args = checkpoint.saved_args(expo_diffusion.Args, path.parent)
        except InputError as error:
            check_line(error)
        else:
            published = expo_diffusion.Args()
            for name in ("seed", "gamma", "dataset", "backup", "task", "track"):
                assert type(getattr(args, name)) in (type(getattr(published, name)), int)

    return check


FLAGS = [f"--{name.replace('_', '-')}" for name in vars(expo_diffusion.Args())]
WORDS = st.sampled_from([*FLAGS, *TASKS, "hard", "entropy", "--", "-1", "1e9", "nan", "inf", "True", "", "--no-track"])


@fuzz(few=25, many=3_000)
def test_flags_are_refused_or_understood(tmp_path):
    def check(choice: Any) -> None:
        words = choice.draw(st.lists(WORDS | st.text(max_size=6) | st.integers().map(str), max_size=6))
        try:
            args = cli.parse_args(expo_diffusion.Args, words)
        except InputError as error:
            check_line(error)
        except SystemExit as stop:
            assert stop.code in (0, None)  # -h, --help
        else:
            cli.check_ranges(args)
            assert args.task in {*TASKS, ""}

    return check
