"""Bad input: one clear line on stderr that starts with "error:", exit code 2, no traceback, nothing overwritten."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, flags_of, run_script
from gymnasium.envs.registration import EnvSpec

import expo_diffusion
from utils import cli, data
from utils.errors import InputError
from utils.tasks import TASKS, make_task_env

PENDULUM = ["--env-id", "Pendulum-v1", "--device", "cpu", "--threads", "1"]  # 3 observations, 1 action within +-2


def arrays_for_pendulum(rows: int = 20) -> dict[str, np.ndarray]:
    """Good data of two episodes, in the environment's own bounds."""
    rng = np.random.default_rng(0)
    timeouts = np.zeros(rows, bool)
    timeouts[[rows // 2 - 1, -1]] = True
    return {
        "observations": rng.normal(size=(rows, 3)).astype(np.float32),
        "actions": rng.uniform(-2, 2, (rows, 1)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": timeouts,
    }


def write(path: Path, arrays: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


@pytest.fixture
def refuse(monkeypatch, capsys, tmp_path):
    """Runs a script's main with flags that must be refused; returns the one line behind "error: "."""

    def run(*words: object, script: Any = expo_diffusion, run_dir: Path | None = None) -> str:
        run_dir = run_dir or tmp_path / "run"
        existed = run_dir.exists()
        argv = [f"{script.__name__}.py", *map(str, words), "--run-dir", str(run_dir)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            cli.run(script.main, script.Args)
        assert stop.value.code == 2
        output = capsys.readouterr()
        assert re.fullmatch(r"error: [^\n]+\n", output.err), output.err
        assert existed or not run_dir.exists()  # what was refused leaves no folder behind
        return output.err.removeprefix("error: ").strip()

    return run


# ----------------------------------------------------------------------------------------------------- data sets


def test_the_good_file_is_accepted(tmp_path, script):
    """Else every test below might pass for another reason."""
    path = write(tmp_path / "good.hdf5", arrays_for_pendulum())
    tiny = {**TINY_RUN, "task": "pointmaze-umaze", "total_timesteps": 2, "offline_steps": 1, "pretrain_steps": 1}
    words = [*flags_of(script, {**tiny, "run_dir": tmp_path / "run"}), *PENDULUM, "--dataset", str(path)]
    script.main(cli.parse_args(script.Args, words))
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") >= 3


def test_missing_file(refuse, tmp_path, script):
    line = refuse(*PENDULUM, "--dataset", tmp_path / "nowhere.hdf5", script=script)
    assert "nowhere.hdf5" in line and "no such file" in line


def test_a_folder_in_place_of_a_file(refuse, tmp_path):
    assert "is a folder" in refuse(*PENDULUM, "--dataset", tmp_path)


def test_no_data_set_at_all(refuse):
    assert "--dataset is missing" in refuse(*PENDULUM)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.95])
def test_truncated_file(refuse, tmp_path, share):
    path = write(tmp_path / "cut.hdf5", arrays_for_pendulum(2000))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    line = refuse(*PENDULUM, "--dataset", path)
    assert "cut.hdf5" in line and "not a complete HDF5 file" in line


def test_file_of_another_kind(refuse, tmp_path):
    path = tmp_path / "text.hdf5"
    path.write_text("observations,actions\n1,2\n" * 500)
    assert "not a complete HDF5 file" in refuse(*PENDULUM, "--dataset", path)


def test_damaged_chunk(refuse, tmp_path):
    """The file opens, but its numbers cannot be read."""
    path = tmp_path / "chunk.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in arrays_for_pendulum(2000).items():
            file.create_dataset(key, data=value, compression="gzip")
        offset = file["observations"].id.get_chunk_info(0).byte_offset  # pyright: ignore
    content = bytearray(path.read_bytes())
    content[offset + 10 : offset + 60] = bytes(50)
    path.write_bytes(content)
    line = refuse(*PENDULUM, "--dataset", path)
    assert "chunk.hdf5" in line and "observations" in line


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
def test_missing_key(refuse, tmp_path, key):
    arrays = arrays_for_pendulum()
    del arrays[key]
    line = refuse(*PENDULUM, "--dataset", write(tmp_path / "keys.hdf5", arrays))
    assert f"has no {key!r}" in line
    assert all(other in line for other in arrays)  # what it does have


@pytest.mark.parametrize("key", ["actions", "rewards", "terminals", "timeouts"])
@pytest.mark.parametrize("rows", [19, 21])
def test_unequal_lengths(refuse, tmp_path, key, rows):
    arrays = arrays_for_pendulum()
    arrays[key] = np.resize(arrays[key], (rows, *arrays[key].shape[1:]))
    line = refuse(*PENDULUM, "--dataset", write(tmp_path / "lengths.hdf5", arrays))
    assert repr(key) in line and str(rows) in line and "20" in line


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "next_observations"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300], ids=str)
def test_values_that_are_not_finite(refuse, tmp_path, key, value):
    arrays = {name: array.astype(float) for name, array in arrays_for_pendulum().items()}
    arrays["next_observations"] = arrays["observations"] + 1
    arrays[key][13:15] = value
    line = refuse(*PENDULUM, "--dataset", write(tmp_path / "nan.hdf5", arrays))
    assert repr(key) in line and "row 13" in line
    assert str(value) in line or (value == 1e300 and "inf" in line)  # as float32, 1e300 is infinite
    assert f"{arrays[key][13:15].size} values" in line


@pytest.mark.parametrize("value, row", [(2.1, 17), (-5.0, 3)])
def test_actions_outside_of_the_bounds(refuse, tmp_path, value, row):
    arrays = arrays_for_pendulum()
    arrays["next_observations"] = arrays["observations"]  # no row is dropped: row numbers are the file's
    arrays["actions"][row:] = value
    line = refuse(*PENDULUM, "--dataset", write(tmp_path / "bounds.hdf5", arrays))
    assert f"{20 - row} rows" in line and f"{value:g}" in line and f"transition {row}" in line and "-2 to 2" in line


@pytest.mark.parametrize("key, width, wanted", [("observations", 4, 3), ("observations", 2, 3), ("actions", 2, 1)])
def test_widths_that_do_not_fit(refuse, tmp_path, key, width, wanted):
    arrays = arrays_for_pendulum()
    arrays[key] = np.zeros((20, width), np.float32)
    line = refuse(*PENDULUM, "--dataset", write(tmp_path / "width.hdf5", arrays))
    assert f"{key} are {width} wide" in line and line.endswith(str(wanted))


@pytest.mark.parametrize("key, shape", [("observations", (20,)), ("actions", (20, 1, 1)), ("rewards", (20, 2))])
def test_shapes_that_cannot_be_rows(refuse, tmp_path, key, shape):
    arrays = arrays_for_pendulum()
    arrays[key] = np.zeros(shape, np.float32)
    line = refuse(*PENDULUM, "--dataset", write(tmp_path / "shape.hdf5", arrays))
    assert repr(key) in line and str(shape) in line


def test_empty_data_set(refuse, tmp_path):
    arrays = {key: value[:0] for key, value in arrays_for_pendulum().items()}
    assert "is empty" in refuse(*PENDULUM, "--dataset", write(tmp_path / "empty.hdf5", arrays))
    assert "has no 'observations'" in refuse(*PENDULUM, "--dataset", write(tmp_path / "nothing.hdf5", {}))


@pytest.mark.parametrize("rows", [1, 20])
def test_no_complete_transition(refuse, tmp_path, rows):
    arrays = {key: value[:rows] for key, value in arrays_for_pendulum().items()}
    arrays["timeouts"] = np.ones(rows, bool)
    line = refuse(*PENDULUM, "--dataset", write(tmp_path / "cutoffs.hdf5", arrays))
    assert "no complete transition" in line


def test_words_in_place_of_numbers(refuse, tmp_path):
    arrays: dict[str, Any] = {**arrays_for_pendulum(), "rewards": [b"much"] * 20}
    assert "'rewards'" in refuse(*PENDULUM, "--dataset", write(tmp_path / "words.hdf5", arrays))


def test_a_group_in_place_of_an_array(refuse, tmp_path):
    arrays: dict[str, Any] = arrays_for_pendulum()
    arrays["actions/inner"] = arrays.pop("actions")
    assert "'actions' is a group" in refuse(*PENDULUM, "--dataset", write(tmp_path / "group.hdf5", arrays))


def test_the_second_of_two_files_is_named(refuse, tmp_path):
    good = write(tmp_path / "good.hdf5", arrays_for_pendulum())
    bad = write(tmp_path / "bad.hdf5", {**arrays_for_pendulum(), "rewards": np.full(20, np.nan)})
    assert "bad.hdf5" in refuse(*PENDULUM, "--dataset", good, bad)


def test_unknown_generated_data(refuse):
    line = refuse(*PENDULUM, "--dataset", "generated:pointmaze-huge")
    assert "generated:pointmaze-huge" in line and "generated:pointmaze-medium" in line


def test_cache_that_cannot_be_written(refuse, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EXPO_CACHE_DIR", str(tmp_path / "file" / "cache"))
    line = refuse("--task", "pointmaze-umaze", "--device", "cpu")
    assert "cannot be written" in line and "EXPO_CACHE_DIR" in line


# ------------------------------------------------------------------------------------------------- environments


def test_discrete_actions(refuse, tmp_path, script):
    path = write(tmp_path / "good.hdf5", arrays_for_pendulum())
    line = refuse("--env-id", "CartPole-v1", "--dataset", path, script=script)
    assert "CartPole-v1" in line and "Discrete" in line and "continuous Box" in line


def test_unknown_environment(refuse, tmp_path):
    path = write(tmp_path / "good.hdf5", arrays_for_pendulum())
    assert "Pendulun-v1" in refuse("--env-id", "Pendulun-v1", "--dataset", path)
    assert "no_such_module" in refuse("--env-id", "no_such_module:Env-v0", "--dataset", path)
    assert "--env-id is empty" in refuse("--env-id", "", "--dataset", path)


class Unbounded(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


def test_unbounded_actions(refuse, tmp_path, monkeypatch):
    monkeypatch.setitem(gym.registry, "Unbounded-v0", EnvSpec("Unbounded-v0", f"{__name__}:Unbounded"))
    path = write(tmp_path / "good.hdf5", arrays_for_pendulum())
    assert "unbounded actions" in refuse("--env-id", "Unbounded-v0", "--dataset", path)


# --------------------------------------------------------------------------------------------------------- flags


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(refuse, script):
    assert "--device cuda" in refuse("--device", "cuda", script=script)


def test_unknown_device(refuse):
    assert "--device 'tpu' must be auto, cpu or cuda" in refuse("--device", "tpu")


def test_generated_data_for_actions_of_another_length(refuse, script):
    line = refuse("--task", "pointmaze-large", "--action-repeat", "5", script=script)
    assert "--action-repeat 5: generated:pointmaze-large was made with 10" in line


def test_rendering_that_fails(refuse, script, monkeypatch):
    """Before there is a run folder."""

    def no_display(args, render=False):
        if render:
            raise InputError("no display")
        return make_task_env(args)

    monkeypatch.setattr("utils.evaluate.make_task_env", no_display)
    assert "no display" in refuse(*flags_of(script, TINY_RUN), "--capture-video", script=script)


def test_unknown_task(refuse, script):
    line = refuse("--task", "pointmaze-mediun", script=script)
    assert "pointmaze-mediun" in line and all(task in line for task in TASKS)


@pytest.mark.parametrize(
    "flag, value",
    [
        *[("--utd-ratio", "0"), ("--offline-ratio", "1.5"), ("--offline-ratio", "-0.1"), ("--gamma", "1.01")],
        *[("--batch-size", "1"), ("--num-base-samples", "0"), ("--num-edit-samples", "-1"), ("--edit-scale", "0")],
        *[("--total-timesteps", "-1"), ("--eval-episodes", "0"), ("--denoising-steps", "0"), ("--critic-lr", "-1")],
        *[("--reward-scale", "nan"), ("--reward-shift", "inf"), ("--num-min-critics", "99"), ("--init-alpha", "0")],
        *[
            ("--seed", "-1"),
            ("--refresh-share", "0"),
            ("--refresh-share", "1.1"),
            ("--seed", "99999999999999999999"),
            ("--base-weight-decay", "-1"),
        ],
    ],
)
def test_values_out_of_range(refuse, flag, value):
    tiny = flags_of(expo_diffusion, {key: TINY_RUN[key] for key in TINY_RUN if flag != f"--{key.replace('_', '-')}"})
    assert refuse(*tiny, flag, value).startswith(f"{flag} ")


@pytest.mark.parametrize(
    "words, named",
    [
        (["--utd-ration", "4"], "--utd-ration"),
        (["--utd-ratio", "many"], "--utd-ratio"),
        (["--utd-ratio", "1.5"], "--utd-ratio"),
        (["--utd-ratio"], "--utd-ratio"),
        (["--task"], "--task"),
        (["--backup", "soft"], "--backup"),
        (["pointmaze-umaze"], "pointmaze-umaze"),
    ],
    ids=["unknown", "word", "fraction", "no-value", "no-task", "choice", "positional"],
)
def test_flags_that_cannot_be_read(refuse, words, named):
    """The last word must not be taken for the value of --run-dir, which stands behind it."""
    line = refuse(*words, "--threads", "1")
    assert named in line


# ---------------------------------------------------------------------------------------------------- run folder


def test_run_dir_that_holds_a_run_is_never_overwritten(refuse, tmp_path, script):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("args.json", "metrics.csv", "agent.pt"):
        (run_dir / name).write_text(f"precious {name}")
    path = write(tmp_path / "good.hdf5", arrays_for_pendulum())
    line = refuse(*PENDULUM, "--dataset", path, script=script, run_dir=run_dir)
    assert str(run_dir) in line and "already holds a run" in line
    assert {file.name: file.read_text() for file in run_dir.iterdir()} == {
        name: f"precious {name}" for name in ("args.json", "metrics.csv", "agent.pt")
    }


def test_run_dir_with_metrics_alone_is_never_overwritten(refuse, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.csv").write_text("precious")
    path = write(tmp_path / "good.hdf5", arrays_for_pendulum())
    assert "already holds a run" in refuse(*PENDULUM, "--dataset", path, run_dir=run_dir)
    assert (run_dir / "metrics.csv").read_text() == "precious"


def test_run_dir_that_is_a_file(refuse, tmp_path):
    (tmp_path / "taken").write_text("precious")
    path = write(tmp_path / "good.hdf5", arrays_for_pendulum())
    line = refuse(*PENDULUM, "--dataset", path, run_dir=tmp_path / "taken")
    assert "taken" in line and (tmp_path / "taken").read_text() == "precious"


@pytest.mark.parametrize("place", ["file/run", "file/deep/run", "/proc/expo/run"])
def test_run_dir_that_cannot_be_written(refuse, tmp_path, place):
    """Below a regular file nobody can write, root neither."""
    (tmp_path / "file").write_text("in the way")
    path = write(tmp_path / "good.hdf5", arrays_for_pendulum())
    line = refuse(*PENDULUM, "--dataset", path, run_dir=tmp_path / place)
    assert "--run-dir" in line and "cannot be written" in line


# --------------------------------------------------------------------------------------- as a user starts them


def assert_refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert done.stdout == ""
    return done.stderr


def test_a_script_in_its_own_process(tmp_path):
    path = write(tmp_path / "cut.hdf5", arrays_for_pendulum())
    path.write_bytes(path.read_bytes()[:100])
    words = [*PENDULUM, "--dataset", str(path), "--run-dir", str(tmp_path / "run")]
    assert "cut.hdf5" in assert_refused(run_script(expo_diffusion, *words))
    assert not (tmp_path / "run").exists()


def in_process(module: str, *words: str) -> str:
    command = [sys.executable, "-m", module, *words]
    return assert_refused(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300))


def test_inspect_in_its_own_process(tmp_path):
    assert "nowhere.hdf5" in in_process("utils.data", "inspect", str(tmp_path / "nowhere.hdf5"))


def test_evaluate_in_its_own_process(tmp_path):
    assert "holds no run" in in_process("utils.evaluate", str(tmp_path))


def test_the_good_file_can_be_inspected(tmp_path, capsys):
    data.inspect(str(write(tmp_path / "good.hdf5", arrays_for_pendulum())))
    assert "20" not in capsys.readouterr().out.splitlines()[1]  # two rows have no successor and are dropped
