"""Grids are read, run, continued and reported; tables and curves agree with hand-worked cases and slower versions."""

import fcntl
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT

from benchmark import ablation, plot, run
from benchmark.grid import Work, flag_values, read_grid
from utils import InputError

# Stands for a script: the same files and signals, in milliseconds. --fail SEED lets a run fail, --sleep S slows it.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
flags, signals = dict(zip(sys.argv[1::2], sys.argv[2::2])), []
signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
folder = Path(flags.get("--resume") or flags["--run-dir"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "args.json").write_text(json.dumps({"starts": [{"command": sys.argv}], "env": dict(os.environ)}))
if flags.get("--fail") == flags["--seed"]:
    sys.exit("error: it fails")
with open(folder / "metrics.csv", "a+", buffering=1) as file:
    file.seek(0)
    for step in range(len(file.readlines()), int(flags["--total-timesteps"])):
        file.write(f"{step},{step / 10},eval/success_rate,0.5\\n")
        time.sleep(float(flags.get("--sleep", 0)))
        if signals:
            sys.exit(143)
"""


def fake_grid(folder: Path, flags: str = "", seeds: str = "[1, 2]", steps: int = 3) -> Path:
    (folder / "fake.py").write_text(FAKE)
    flags = f"--env-id My/Env-v0 --total-timesteps {steps} {flags}"
    (folder / "g.toml").write_text(f"seeds = {seeds}\nflags = '{flags}'\n[methods]\na = '{folder}/fake.py'")
    return folder / "g.toml"


def run_grid(grid: Path, **options) -> int:
    """The exit code of benchmark/run.py, its folders beside the grid."""
    try:
        run.main(grid, runs_dir=grid.parent / "runs", results_dir=grid.parent / "results", **options)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def folder_of(grid: Path, kind: str, seed: int = 1) -> Path:
    return grid.parent / kind / "g" / "My_Env-v0" / "a" / f"seed{seed}"


def steps_of(folder: Path) -> list[int]:
    return [int(line.split(",")[0]) for line in (folder / "metrics.csv").read_text().splitlines()]


def test_a_grid_is_methods_x_variants_x_tasks_x_seeds_and_the_most_special_flag_is_last(tmp_path):
    text = (ROOT / "docs" / "benchmark.md").read_text().split("```toml\n")[1].split("```")[0]
    (tmp_path / "grid.toml").write_text(text.replace("--threads 1", "--num-critics 3"))
    runs = read_grid(tmp_path / "grid.toml", "", tmp_path / "runs", tmp_path / "results")
    assert len({r.run_dir for r in runs}) == 2 * 2 * 2 * 3
    assert [r.name[-1] for r in runs] == ["1"] * 8 + ["2"] * 8 + ["3"] * 8  # seed by seed
    chosen = next(r for r in runs if r.name == "pointmaze-large/expo_flow+two/seed1")
    flags = "--num-critics 3 --total-timesteps 2000 --num-critics 2"
    assert " ".join(chosen.command) == f"expo_flow.py --task pointmaze-large --seed 1 {flags}"
    assert all("--hidden-dim 32" in " ".join(r.command) for r in runs if "/rlpd+" in r.name)
    # A bad one is one clear line.
    good = 'tasks = ["pointmaze-umaze"]\nseeds = [1]\n[methods]\na = "expo_flow.py"\n'
    for old, new, words in (
        ("seeds", "seed", "'seed' is unknown"),
        ("pointmaze-umaze", "pointmaze-umze", "unknown task 'pointmaze-umze'"),
        ("expo_flow.py", "expo_flo.py", "there is no script 'expo_flo.py'"),
        ("expo_flow.py", "expo_flow.py --seed=3", "the grid itself gives --seed"),
        ("expo_flow.py", "expo_flow.py {large}", "'large' is missing"),
        ("[1]", "[[1]]", "unhashable"),
        ("[1]", "[1", ""),
    ):
        (tmp_path / "grid.toml").write_text(good.replace(old, new))
        with pytest.raises(InputError, match=rf"^.*grid\.toml: .*{words}[^\n]*$"):
            read_grid(tmp_path / "grid.toml", "", tmp_path, tmp_path)


@pytest.mark.parametrize("path", (ROOT / "benchmark" / "grids").glob("*.toml"), ids=lambda path: path.stem)
def test_the_scripts_have_the_flags_of_every_grid(path, tmp_path):
    for cell in read_grid(path, "", tmp_path, tmp_path):
        flags = flag_values(cell.command)
        (name,) = flags.get("--script", [cell.command[0].removesuffix(".py").replace("/", ".")])
        assert all(hasattr(ablation, change) for change in flags.get("--change", []))
        names = {flag[2:].replace("-", "_") for flag in flags} - {"script", "change"}
        assert names <= vars(importlib.import_module(name).Args()).keys()


def test_a_grid_is_run_then_skipped_then_only_what_is_missing_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    path = fake_grid(tmp_path, "--sleep 0.1", "[1, 2, 3, 4]")
    assert run_grid(path, processes=4, gpus=2) == 0 and capsys.readouterr().out.count("done    My_Env-v0/a/seed") == 4
    records = [json.loads((folder_of(path, "results", seed) / "args.json").read_text()) for seed in (1, 2, 3, 4)]
    assert sorted(record["env"]["CUDA_VISIBLE_DEVICES"] for record in records) == ["4", "4", "5", "5"]
    shutil.rmtree(folder_of(path, "results", seed=2))
    fake_grid(tmp_path, "--sleep 0.1 --threads 2", "[1, 2, 3, 4]")  # changes nothing of what is compared
    assert run_grid(path) == 0
    assert "3 of them are done" in (out := capsys.readouterr().out) and "warning" not in out and "seed1" not in out
    assert run_grid(fake_grid(tmp_path, "--sleep 0.2")) == 0
    assert "seed1 was made by another command" in capsys.readouterr().out
    shutil.copy(tmp_path / "fake.py", tmp_path / "other.py")
    (tmp_path / "g.toml").write_text(fake_grid(tmp_path, "--sleep 0.1").read_text().replace("fake.py", "other.py"))
    assert run_grid(path) == 0
    assert "seed1 was made by another command" in capsys.readouterr().out  # or by another script


def test_a_failed_run_is_named_with_its_last_line_and_other_flags_do_not_continue_it(tmp_path, capsys):
    path = fake_grid(tmp_path, "--fail 1")
    assert run_grid(path) == 1
    assert "FAILED  My_Env-v0/a/seed1: exit code 1: error: it fails (" in capsys.readouterr().out
    assert not folder_of(path, "results", seed=1).exists() and folder_of(path, "results", seed=2).exists()
    assert run_grid(fake_grid(tmp_path, "--fail 3")) == 1
    out = capsys.readouterr().out
    assert (
        "failed before, and repeated now: My_Env-v0/a/seed1" in out and "made by another command than the grid" in out
    )
    shutil.rmtree(folder_of(path, "runs"))
    assert run_grid(path) == 0 and not folder_of(path, "runs").with_name("seed1.failed").exists()
    shutil.rmtree(folder_of(path, "results"))
    assert run_grid(fake_grid(tmp_path, "--fail 3", steps=7), only="seed1") == 0  # a longer grid continues its runs
    assert steps_of(folder_of(path, "results")) == list(range(7))
    shutil.rmtree(folder_of(path, "results"))
    path.write_text(path.read_text().replace("--total-timesteps 7", ""))
    assert run_grid(path, only="seed1") == 1  # it would go on with the 7 that the grid has no more


def test_a_run_that_another_process_does_is_left_alone(tmp_path, capsys):
    path = fake_grid(tmp_path, seeds="[1, 1, 2]")
    log = folder_of(path, "runs").with_name("seed1.log")
    log.parent.mkdir(parents=True)
    with open(log, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_grid(path) == 1
    assert f"another process does this run; its output is {log}" in capsys.readouterr().out
    assert not folder_of(path, "runs").exists() and folder_of(path, "results", 2).exists()
    folder_of(path, "results").with_name("seed1.part").mkdir()  # of a copy that was interrupted
    assert run_grid(path, processes=3) == 0 and steps_of(folder_of(path, "results")) == [0, 1, 2]
    shutil.rmtree(folder_of(path, "runs"))
    assert Work(read_grid(path, "seed1", tmp_path / "runs", tmp_path / "results")[0])() == ""  # done in the meantime
    assert not folder_of(path, "runs").exists()
    with mock.patch("fcntl.flock", side_effect=OSError(38, "Function not implemented")):  # a disk without locks
        shutil.rmtree(folder_of(path, "results"))
        assert run_grid(path) == 0


def test_ctrl_c_lets_runs_save_and_the_same_command_goes_on(tmp_path):
    path = fake_grid(tmp_path, "--sleep 0.05", "[1, 2, 3]", steps=40)
    command = [sys.executable, "benchmark/run.py", str(path), "--processes", "2"]
    command += ["--runs-dir", str(tmp_path / "runs"), "--results-dir", str(tmp_path / "results")]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not all((folder_of(path, "runs", seed) / "metrics.csv").exists() for seed in (1, 2)):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "finish their episodes" in err and "Traceback" not in err, err
    assert 0 < len(steps_of(folder_of(path, "runs"))) < 40 and not folder_of(path, "runs", 3).exists()
    assert run_grid(path, processes=3) == 0
    assert all(steps_of(folder_of(path, "results", seed)) == list(range(40)) for seed in (1, 2, 3))


def write_results(folder: Path, method: str, seeds: dict[int, list[float]], key: str = "eval/success_rate") -> None:
    for seed, values in seeds.items():
        place = folder / "maze" / method / f"seed{seed}"
        place.mkdir(parents=True)
        lines = ["step,seconds,key,value", "-10,1.0,losses/critic,0.5", f"-5,2.0,{key},1.0"]
        for i, value in enumerate(values):
            base = 0.3 if i else 0.1
            lines += [f"{100 * i},{10 + i}.0,{key},{value}", f"{100 * i},{10 + i}.0,eval/base_success_rate,{base}"]
        (place / "metrics.csv").write_text("\n".join(lines) + "\n")
        start = {"command": ["s.py", "--seed", str(seed), "--utd-ratio", "2", "--threads", "1"], "commit": "c"}
        record = {"script": "s", "args": {"task": "", "env_id": "E", "seed": seed}, "starts": [start]}
        (place / "args.json").write_text(json.dumps(record))


def test_tables_by_hand_and_a_figure(tmp_path, capsys, monkeypatch):
    write_results(tmp_path, "expo_flow", {s: [0.0, 0.5, 0.8, 0.9, 1.0, 1.0] for s in (1, 2, 10)})
    write_results(tmp_path, "rlpd", {1: [0.0] * 5 + [1.0], 2: [0.0] * 6})
    for path in tmp_path.glob("maze/rlpd/*/metrics.csv"):  # RLPD has no base policy
        path.write_text(re.sub(r".*/base_.*\n", "", path.read_text()))
    write_results(tmp_path, "base_alone", {1: [0.3], 2: [0.3], 10: [0.3]})
    shutil.copytree(tmp_path / "maze/rlpd/seed1", tmp_path / "maze/rlpd/seed3.part")  # of a copy that was interrupted
    plot.main((tmp_path,), tmp_path / "out.png", per_seed=True, metrics=("losses/critic",), less="rlpd", marks=(100,))
    out = capsys.readouterr().out
    assert "commits: c (8 runs)" in out and "warning: maze: not all methods have the same seeds" in out
    assert "| expo_flow | 3 | 0.84 (0.84 to 0.84) | 0.74 | 0.00 | 100 | 200 | 300 | 13 | 0.5 |" in out
    assert "| rlpd | 2 | 0.10 (0.00 to 0.20) | 0.05 | 0.00 | ∞ (1/2) | ∞ (1/2) | ∞ (1/2) | ∞ (1/2) | 0.5 |" in out
    with pytest.raises(
        InputError, match=r"--less rlp: maze shows no such method \(it shows expo_flow, rlpd, base_alone\)"
    ):
        plot.main((tmp_path,), less="rlp")
    # Seed by seed: .0 and .0 at first, .84 - .2 and .84 - 0 at the end.
    assert "| less rlpd | seeds | first | lowest | area | final |" in out
    assert re.search(r"\| expo_flow \| 2 \| \+0.00 \(.*\| \+0.74 \(\+0.64 to \+0.84\) \|\n", out)
    plot.main((tmp_path,), less="own_base")  # .1 before the first step, in every run
    assert re.search(r"\| expo_flow \| 3 \| -0.10 \(.*\| \+0.74 \(\+0.74 to \+0.74\) \|\n", capsys.readouterr().out)
    plot.main((tmp_path,), less="own_base_now")  # .3 at every later step
    assert re.search(r"\| expo_flow \| 3 \| -0.10 \(.*\| \+0.54 \(\+0.54 to \+0.54\) \|\n", capsys.readouterr().out)
    assert "| base_alone | 3 | 0.10 (0.10" in out  # its base policy, not the choice of untrained critics
    assert "| 10 | 0.00 0.50 0.80 0.90 1.00 1.00 |" in out and (tmp_path / "out.png").stat().st_size > 10_000
    values = np.random.default_rng(1).random((5, 3))
    copies = np.sort(np.repeat(values, 4, axis=0), axis=0)  # every value four times: the quartiles fall between copies
    np.testing.assert_allclose(plot.interquartile_mean(values), copies[5:15].mean(0))
    for path in tmp_path.glob("maze/expo_flow/*/metrics.csv"):
        path.write_text(path.read_text() + "500,15.0,eval/solved_share,0.25\n")
    shutil.copytree(tmp_path / "maze", tmp_path / "adroit" / "adroit-pen-binary")
    plot.main((tmp_path / "adroit",), methods=("expo_flow",))
    assert re.search(r"eval/solved_share, last \|\n.*\n.* 13 \| 0.25 \|\n", capsys.readouterr().out)
    write_results(tmp_path / "cut", "m", {1: [0.0, 1.0], 2: [0.0, 1.0, 1.0]})
    plot.main((tmp_path / "cut",))
    assert "seed2 differs from the first seed of m in last step\n" in capsys.readouterr().out
    plot.main((tmp_path / "cut",), until=100)
    assert "| m | 2 | 0.50" in (out := capsys.readouterr().out) and "differs" not in out
    (tmp_path / "cut/maze/m/seed2/metrics.csv").write_text("step,seconds,key,value\n")  # of a run that has just begun
    plot.main((tmp_path / "cut",))
    assert "| m | 1 |" in capsys.readouterr().out
    # Where success is only reported when there is some, an evaluation without a word of it has none.
    write_results(tmp_path / "gaps", "m", {1: [0.0, 0.0, 1.0]}, "eval/return")
    with open(tmp_path / "gaps/maze/m/seed1/metrics.csv", "a") as file:
        file.write("200,12.0,eval/success_rate,1.0\n")
    plot.main((tmp_path / "gaps",))
    assert "| m | 1 | 0.33 (0.33 to 0.33) | 0.25 | 0.00 | 200 |" in capsys.readouterr().out
    with pytest.raises(InputError, match="there is no rlp"):
        plot.main((tmp_path / "gaps",), methods=("m", "rlp"))
    with pytest.raises(InputError, match="must end with"):
        plot.main((tmp_path / "gaps",), Path("a.xyz"))
    # Single runs are named by their flags. Returns stand in for success.
    write_results(tmp_path, "x", {1: [1.0, 3.0], 2: [1.0, 3.0]}, "eval/return")
    folders = tuple(sorted(tmp_path.glob("maze/x/*")))
    monkeypatch.chdir(folders[0])
    plot.main((Path(), folders[1]), tmp_path / "out.pdf")
    assert "| s --utd-ratio 2 | 2 | 2.00 (2.00 to 2.00) | 2.00 | 1.00 |" in capsys.readouterr().out
    (folders[0] / "metrics.csv").write_text("step,seconds,key,value\n1,2,eval/return,x\n")
    with pytest.raises(InputError, match=r"metrics.csv, line 2 is not step,seconds,key,value"):
        plot.main(folders)
