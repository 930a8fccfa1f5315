"""Grids are read, run, continued and reported as docs/benchmark.md says; tables and curves agree with slow versions."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_RUN, flags_of
from hypothesis import given, settings
from hypothesis import strategies as st

import expo_diffusion
from benchmark import plot, run
from benchmark.grid import Work, read_grid
from benchmark.plot import Curve
from utils import cli
from utils.errors import InputError
from utils.files import locked

FAKE = "tests/fake_script.py"


def write_grid(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def fake_grid(folder: Path, flags: str = "", seeds: str = "[1, 2]", methods: str = f'a = "{FAKE}"', more: str = ""):
    return write_grid(
        folder,
        f'tasks = ["pointmaze-umaze"]\nseeds = {seeds}\nflags = "--steps 3 {flags}"\n[methods]\n{methods}\n{more}',
    )


def run_grid(grid: Path, **options) -> int:
    """The exit code of benchmark/run.py, its folders beside the grid."""
    try:
        run.main(grid, runs_dir=grid.parent / "runs", results_dir=grid.parent / "results", **options)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def folder_of(grid: Path, kind: str, method: str = "a", seed: int = 1) -> Path:
    return grid.parent / kind / "grid" / "pointmaze-umaze" / method / f"seed{seed}"


# ------------------------------------------------------------------------------------------------------------- grids


def test_runs_are_methods_x_variants_x_tasks_x_seeds_and_the_most_special_flag_is_last(tmp_path):
    grid = write_grid(
        tmp_path,
        """
        tasks = ["pointmaze-umaze", "pointmaze-large"]
        seeds = [3, 1]
        flags = "--utd-ratio 1"
        [task_flags]
        pointmaze-large = "--utd-ratio 2"
        [methods]
        flow = "expo_flow.py --utd-ratio 3"
        rlpd = "baselines/rlpd.py"
        [variants]
        base = ""
        many = "--num-critics 10 --utd-ratio 4"
        """,
    )
    runs = read_grid(grid, "", tmp_path / "runs", tmp_path / "results")
    assert len(runs) == len({r.run_dir for r in runs}) == 2 * 2 * 2 * 2
    assert [r.seed for r in runs] == [3] * 8 + [1] * 8  # seed by seed
    chosen = next(r for r in runs if r.name == "pointmaze-large/flow+many/seed1")
    assert " ".join(chosen.command) == (
        "expo_flow.py --task pointmaze-large --seed 1 --utd-ratio 1 --utd-ratio 2 --utd-ratio 3 "
        "--num-critics 10 --utd-ratio 4"
    )
    assert chosen.run_dir == tmp_path / "runs/grid/pointmaze-large/flow+many/seed1"
    assert [r.name for r in read_grid(grid, "umaze/rlpd+base")] == [
        f"pointmaze-umaze/rlpd+base/seed{s}" for s in (3, 1)
    ]
    assert cli.parse_args(expo_diffusion.Args, chosen.command[1:]).utd_ratio == 4  # of a flag given twice, the last


def test_every_grid_of_the_repository_is_read():
    for path in (ROOT / "benchmark" / "grids").glob("*.toml"):
        assert read_grid(path)


def test_the_example_of_the_docs_is_read(tmp_path):
    text = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "benchmark.md").read_text(), re.S)
    assert len(text) == 1 and len(read_grid(write_grid(tmp_path, text[0]))) == 2 * 2 * 2 * 3


GOOD = 'tasks = ["pointmaze-umaze"]\nseeds = [1]\n[methods]\na = "expo_flow.py"\n'


@pytest.mark.parametrize(
    "text, words",
    [
        (GOOD.replace("seeds", "seed"), "unknown key 'seed'; did you mean 'seeds'"),
        (GOOD.replace("seeds = [1]\n", ""), "'seeds' is missing; it must be a list of whole numbers"),
        (GOOD.replace("[1]", '["1"]'), "'seeds' must be a list of whole numbers"),
        (GOOD.replace("[1]", "[true]"), "'seeds' must be a list of whole numbers"),
        (GOOD.replace("[1]", "[-1]"), "'seeds' must be a list of whole numbers from 0 on"),
        (GOOD.replace("[1]", "[1, 1]"), "'seeds' names something twice"),
        (GOOD.replace("[1]", "[]"), "'seeds' must be a list of whole numbers"),
        (GOOD.replace('["pointmaze-umaze"]', '"pointmaze-umaze"'), "'tasks' must be a list"),
        (GOOD.replace("pointmaze-umaze", "pointmaze-umze"), "unknown task 'pointmaze-umze'; did you mean 'pointmaze-u"),
        (GOOD.replace("expo_flow.py", "expo_flo.py"), "method 'a': there is no script 'expo_flo.py'"),
        (GOOD.replace("expo_flow.py", ""), "method 'a': there is no script ''"),
        (GOOD.replace("expo_flow.py", "expo_flow.py 'x"), "No closing quotation"),
        (GOOD.replace("expo_flow.py", "expo_flow.py --seed=3"), "--seed is given by the grid itself"),
        (GOOD.replace("a =", '"../a" ='), "'../a' names a folder"),
        (GOOD + "[task_flags]\nmaze = '--x 1'\n", "unknown task 'maze'"),
        (GOOD + "[variants]\nb = 1\n", "'variants' must be a table"),
        (GOOD.replace("[1]", "[1"), "is not TOML"),
    ],
)
def test_a_bad_grid_is_one_clear_line(tmp_path, text, words):
    grid = write_grid(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_grid(grid)
    assert words in str(caught.value) and str(grid) in str(caught.value) and "\n" not in str(caught.value)


def test_no_grid_and_no_run_of_that_name(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_grid(tmp_path / "none.toml")
    with pytest.raises(InputError, match="no run with 'rlpd'"):
        read_grid(write_grid(tmp_path, GOOD), "rlpd")


# -------------------------------------------------------------------------------------------------------------- runs


def test_a_grid_is_run_then_skipped_then_only_what_is_missing_is_run(tmp_path, capsys):
    grid = fake_grid(tmp_path)
    assert run_grid(grid, processes=2) == 0
    for seed in (1, 2):
        record = json.loads((folder_of(grid, "results", seed=seed) / "args.json").read_text())
        assert record["versions"] == {"commit": "c"}
        lines = (folder_of(grid, "results", seed=seed) / "metrics.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["step", "0", "1", "2"]
    out = capsys.readouterr().out
    assert len(re.findall(r"^done    pointmaze-umaze/a/seed\d  \(step 2, 0 s, success 0.67 at 2\)$", out, re.M)) == 2
    before = folder_of(grid, "results", seed=1).stat().st_mtime_ns
    shutil.rmtree(folder_of(grid, "results", seed=2))
    shutil.rmtree(folder_of(grid, "runs", seed=2))
    assert run_grid(grid) == 0
    assert folder_of(grid, "results", seed=1).stat().st_mtime_ns == before
    assert folder_of(grid, "results", seed=2).exists()
    assert "2 runs, 1 of them done before" in capsys.readouterr().out


def test_a_failed_run_is_named_with_its_last_line_and_the_rest_goes_on(tmp_path, capsys):
    grid = fake_grid(tmp_path, "--fail 1")
    assert run_grid(grid) == 1
    out, err = capsys.readouterr()
    log = folder_of(grid, "runs").with_name("seed1.log")
    assert f"FAILED  pointmaze-umaze/a/seed1: exit code 1: error: it fails ({log})" in out
    assert "1 of 2 runs failed" in err
    assert not folder_of(grid, "results", seed=1).exists() and folder_of(grid, "results", seed=2).exists()
    assert run_grid(grid) == 1  # repeated, and said so
    assert "failed before, repeated now: pointmaze-umaze/a/seed1: exit code 1" in capsys.readouterr().out


def test_a_run_that_was_killed_goes_on_from_its_checkpoint(tmp_path):
    grid = fake_grid(tmp_path, "--sleep 0.03 --steps 20", "[1]")
    (cell,) = read_grid(grid, "", tmp_path / "runs", tmp_path / "results")
    work = Work(cell)

    def kill():
        while not (cell.run_dir / "checkpoint.pt").exists():
            time.sleep(0.01)
        assert work.process
        work.process.kill()

    threading.Thread(target=kill).start()
    work()
    assert cell.beside(".failed").read_text().startswith("exit code -9")
    assert run_grid(grid) == 0
    assert "resumed after step" in cell.beside(".log").read_text()
    assert not cell.beside(".failed").exists()


@pytest.mark.parametrize("how", ["damaged", "other flags", "no checkpoint", "no args.json"])
def test_what_cannot_be_continued_starts_anew(tmp_path, how):
    grid = fake_grid(tmp_path, "--fail 1", "[1]")
    assert run_grid(grid) == 1
    folder = folder_of(grid, "runs")
    fake_grid(tmp_path, "--fail 1" if how == "damaged" else "--fail 2", "[1]")
    if how != "no checkpoint":
        (folder / "checkpoint.pt").write_text("damaged" if how == "damaged" else "2")
    if how == "no args.json":
        (folder / "args.json").unlink()
    (folder / "old").touch()
    assert run_grid(grid) == (1 if how == "damaged" else 0)
    assert not (folder / "old").exists() and (folder.with_name("seed1.old1") / "old").exists()
    assert "resumed after step" not in folder.with_name("seed1.log").read_text()


def test_a_checkpoint_stays_where_it_is_if_the_machine_is_to_blame(tmp_path):
    grid = fake_grid(tmp_path, seeds="[1]")
    assert run_grid(grid) == 0
    shutil.rmtree(tmp_path / "results")
    folder = folder_of(grid, "runs")
    record = json.loads((folder / "args.json").read_text())
    record["command"][-2:] = ["--nogpu", "yes", *record["command"][-2:]]  # as if it was the same command all along
    del record["finished"]
    (folder / "args.json").write_text(json.dumps(record))
    fake_grid(tmp_path, "--nogpu yes", "[1]")
    assert run_grid(grid) == 1
    assert (folder / "checkpoint.pt").exists() and not folder.with_name("seed1.old1").exists()
    assert "finds no CUDA" in folder.with_name("seed1.failed").read_text()


def test_a_run_that_ended_while_nobody_watched_is_only_copied(tmp_path):
    grid = fake_grid(tmp_path, seeds="[1]")
    assert run_grid(grid) == 0
    shutil.rmtree(tmp_path / "results")
    before = (folder_of(grid, "runs") / "metrics.csv").stat().st_mtime_ns
    assert run_grid(grid) == 0
    assert (folder_of(grid, "results") / "metrics.csv").exists()
    assert (folder_of(grid, "runs") / "metrics.csv").stat().st_mtime_ns == before


def test_commands_are_the_same_if_their_flags_have_the_same_values(tmp_path):
    grid = fake_grid(tmp_path, "--sleep 0 --fail 7", "[1]")
    (cell,) = read_grid(grid)
    flags = ["--fail", "7", "--steps", "9", "--steps=3", "--sleep", "0", "--seed", "1", "--task", "pointmaze-umaze"]
    for words, same in (
        (flags, True),
        (flags[::-1], False),
        ([*flags, "--other"], False),
        ([{"7": "0", "0": "7"}.get(word, word) for word in flags], False),  # the same words, swapped
    ):
        assert cell.made({"command": ["fake_script.py", *words, "--run-dir", "x"]}) is same
    assert not cell.made({"command": ["expo_flow.py", *flags]}) and not cell.made({})
    for changed, same in ({"total_timesteps": 5}, False), ({"threads": 2, "device": "cuda"}, True), ({}, True):
        assert cell.made({"command": ["fake_script.py", *flags], "resumes": [{"changed": changed}]}) is same


def test_nothing_that_is_set_aside_is_deleted(tmp_path):
    for number in range(1, 4):
        grid = fake_grid(tmp_path, f"--fail {number}", "[1]")
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        run_grid(grid)
        (folder_of(grid, "runs") / str(number)).touch()
    assert [(folder_of(grid, "runs").with_name(f"seed1.old{i}") / str(i)).exists() for i in (1, 2)] == [True, True]


def test_results_of_other_flags_are_kept_and_named(tmp_path, capsys):
    grid = fake_grid(tmp_path, seeds="[1]")
    assert run_grid(grid) == 0
    assert "warning" not in capsys.readouterr().out
    fake_grid(tmp_path, "--sleep 0", "[1]")
    assert run_grid(grid) == 0
    assert "pointmaze-umaze/a/seed1 was made with other flags" in capsys.readouterr().out


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path, capsys):
    grid = fake_grid(tmp_path, seeds="[1]")
    folder_of(grid, "runs").mkdir(parents=True)
    with locked(folder_of(grid, "runs")):
        assert run_grid(grid) == 1
    assert "is still being written by another process" in capsys.readouterr().out


def test_the_display_names_what_is_active_and_redraws_it_in_a_terminal(tmp_path, capsys, monkeypatch):
    cells = read_grid(fake_grid(tmp_path), "", tmp_path / "runs", tmp_path / "results")
    monkeypatch.setenv("COLUMNS", "60")
    display, counts = run.Display("mazes"), Counter(done=1, failed=0, active=2, left=5)
    display.terminal = True
    cells[0].run_dir.mkdir(parents=True)
    (cells[0].run_dir / "metrics.csv").write_text(
        "step,seconds,eval/success_rate\n-50,1.2,\n0,3.0,0.25\n50,4.6,\n60,"  # the last is being written
    )
    display.show(counts, cells)
    lines = ["mazes: 1 done, 0 failed, 2 active, 5 left"]
    lines += ["  pointmaze-umaze/a/seed1  step 50, 5 s, success 0.25 at 0"[:59], "  pointmaze-umaze/a/seed2  starting"]
    assert capsys.readouterr().out == "\n".join(lines) + "\n"
    display.show(counts, cells)  # too early
    assert capsys.readouterr().out == ""
    display.note("FAILED  x: y")
    display.show(counts, cells[:1])
    assert capsys.readouterr().out == "\x1b[3A\x1b[JFAILED  x: y\n" + "\n".join(lines[:2]) + "\n"


def test_gpus_are_shared_out_evenly(tmp_path, monkeypatch):
    grid = fake_grid(tmp_path, "--sleep 0.1", "[1, 2, 3, 4]")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert run_grid(grid, processes=4, gpus=2) == 0
    records = [json.loads((folder_of(grid, "results", seed=s) / "args.json").read_text()) for s in (1, 2, 3, 4)]
    assert sorted(record["gpu"] for record in records) == ["4", "4", "5", "5"]
    with pytest.raises(InputError, match="--gpus 4: CUDA_VISIBLE_DEVICES lists 4,5,7"):
        run.Local(4, 4)
    with pytest.raises(InputError, match="--processes 0 must be at least 1"):
        run.Local(0, 0)


def test_ctrl_c_lets_runs_save_and_the_same_command_goes_on(tmp_path):
    grid = fake_grid(tmp_path, "--sleep 0.05 --steps 40", "[1, 2, 3]")
    command = [sys.executable, "benchmark/run.py", str(grid), "--processes", "2"]
    command += ["--runs-dir", str(tmp_path / "runs"), "--results-dir", str(tmp_path / "results")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    while not all((folder_of(grid, "runs", seed=seed) / "checkpoint.pt").exists() for seed in (1, 2)):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopping 2 runs after their current step" in err and "the same command goes on" in err and "Trac" not in err
    for seed in (1, 2):
        log = folder_of(grid, "runs", seed=seed).with_name(f"seed{seed}.log").read_text()
        assert log.count("stopped by SIGTERM after step") == 1
        assert not folder_of(grid, "runs", seed=seed).with_name(f"seed{seed}.failed").exists()
    assert not folder_of(grid, "runs", seed=3).exists()
    assert run_grid(grid, processes=3) == 0
    for seed in (1, 2, 3):
        lines = (folder_of(grid, "results", seed=seed) / "metrics.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == [str(step) for step in range(40)]


@pytest.mark.parametrize("program", ["run", "plot"])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, program):
    monkeypatch.setattr(sys, "argv", [f"{program}.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmark" / f"{program}.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


# -------------------------------------------------------------------------------------------------- tables and curves


def curve(success: list[float], every: int = 100, base: float = 0.1) -> Curve:
    n = len(success)
    return Curve(np.arange(n) * every * 1.0, 5.0 + np.arange(n), np.array(success), np.full(n, base), np.full(n, 9.0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_interquartile_mean_is_the_mean_of_the_middle_half_of_many_copies(values):
    copies = np.sort(np.repeat(values, 4))  # every value four times: the quartiles fall between copies
    n = len(values)
    assert plot.interquartile_mean(np.array(values)) == pytest.approx(copies[n : 3 * n].mean())


def test_bootstrap_is_that_of_a_loop():
    values = np.random.default_rng(1).random((5, 3))
    low, high = plot.bootstrap(values, samples=500, seed=3)
    rng, means = np.random.default_rng(3), []
    for rows in rng.integers(5, size=(500, 5)):
        means.append([plot.interquartile_mean(np.array([values[row, column] for row in rows])) for column in range(3)])
    for column in range(3):
        ordered = sorted(mean[column] for mean in means)
        assert low[column] == pytest.approx(np.quantile(ordered, 0.025))
        assert high[column] == pytest.approx(np.quantile(ordered, 0.975))


def test_first_evaluation_held_and_area_of_hand_worked_curves():
    c = curve([0.0, 0.9, 0.5, 0.8, 0.9, 1.0, 1.0])
    assert c.first(0.5) == c.first(0.9) == (100, 6)
    assert c.first(0.9, 3) == (300, 8)  # .8, .9, 1.0
    assert c.first(0.0) == (0, 5)
    assert c.first(1.01) == (math.inf, math.inf)
    assert curve([1.0, 1.0]).first(0.9, 3) == (math.inf, math.inf)  # too short to hold
    assert plot.area(curve([0.0, 1.0, 1.0])) == pytest.approx(0.75)
    assert plot.area(curve([0.4])) == pytest.approx(0.4)
    assert plot.median_of([100, 300, math.inf]) == "300 (2/3)"
    assert plot.median_of([100, math.inf, math.inf]) == "∞ (1/3)"
    assert plot.median_of([0, 1000, 2000]) == "1,000"


def test_ratio_of_hand_worked_curves():
    at = lambda step: curve([0.0] * (step // 100) + [1.0] * (6 - step // 100))  # noqa: E731
    never = curve([0.0] * 6)
    rlpd = [at(300), at(300), at(500)]  # with one interval more: 400, 400, 600
    assert plot.step_ratio(rlpd, rlpd)[0] == 1
    assert plot.step_ratio([at(100)], rlpd) == (2.0, 2.0, 3.0)  # 400 / 200; the bootstrap's medians are 400 or 600
    assert plot.step_ratio([at(0)], [at(0)]) == (1, 1, 1)  # both at step 0
    assert plot.step_ratio([at(0)], [at(300)])[0] == 4
    assert plot.step_ratio([never], rlpd) == (0, 0, 0)
    assert plot.step_ratio([at(100)], [never]) == (math.inf, math.inf, math.inf)
    ratio, low, high = plot.step_ratio([never], [never])
    assert math.isnan(ratio) and (low, high) == (0, math.inf)
    ratio, low, high = plot.step_ratio([at(100), at(100), never], rlpd)
    assert (ratio, low) == (2, 0) and high in (2, 3)  # an unlucky draw of seeds does not get there


def write_results(folder: Path, task: str, method: str, seeds: dict[int, list[float]]) -> None:
    for seed, success in seeds.items():
        place = folder / task / method / f"seed{seed}"
        place.mkdir(parents=True)
        lines = ["step,seconds,losses/critic,eval/success_rate,eval/base_success_rate,eval/length", "-10,1.0,0.5,,,"]
        lines += [f"{100 * i},{10 + i}.0,,{s},0.1,{60 - 10 * s}" for i, s in enumerate(success)]
        (place / "metrics.csv").write_text("\n".join(lines) + "\n")
        (place / "args.json").write_text('{"script": "s", "args": {}, "versions": {"commit": "c"}}')


def test_tables_by_hand_missing_seeds_and_curves_with_their_counts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "mpl"))
    folder = tmp_path / "some_grid"
    good = [0.0, 0.5, 0.8, 0.9, 1.0, 1.0]
    write_results(folder, "maze", "expo_flow", {s: good for s in (1, 2, 10)})
    write_results(folder, "maze", "rlpd", {1: [0.0] * 5 + [1.0], 2: [0.0] * 6})
    write_results(folder, "maze", "base_alone", {1: [0.3], 2: [0.3], 10: [0.3]})
    drawn = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.legend", lambda axis, **_: drawn.extend(axis.get_legend_handles_labels()[1])
    )
    plot.main((folder,), out=tmp_path / "out.png", per_seed=True)
    out = capsys.readouterr().out
    rows = {line.split(" | ")[0][2:]: line for line in out.split("\n\n")[2].splitlines()}
    assert rows["expo_flow"] == (
        "| expo_flow | 3 | 0.10 | 0.00 | 100 | 200 | 300 | 200 | 0.00 | 0.84 | 0.74 | 51.6 | ∞ (1.50 to ∞) |"
    )
    assert (
        rows["rlpd"]
        == "| rlpd | 2 of 3 | 0.10 | 0.00 | ∞ (1/2) | ∞ (1/2) | ∞ (1/2) | ∞ (0/2) | 0.00 | 0.10 | 0.05 | 59.0 | 1 |"
    )
    assert "| expo_flow | 11 | 12 | 13 | 12 | 15 |" in out
    assert re.search(r"^\| 10 \| 0.10 \| 0.00 \| 300", out, re.M)  # its number, not its place
    assert re.search(r"^\| 10 .* \| 0.84 \| 0.00 0.50 0.80 0.90 1.00 1.00 \|$", out, re.M)
    assert "MISSING maze/rlpd: seed 10" in out and "MISSING maze/expo" not in out
    assert rows["base_alone"].endswith("| 0.10 | - | - (0.00 to ∞) |")  # no column eval/base_length
    assert plot.read_results(folder)["maze"]["base_alone"][10].success.tolist() == [
        0.1
    ]  # not the untrained critics' .3
    assert drawn == ["expo_flow (3 seeds)", "rlpd (2 of 3 seeds)", "base_alone (3 seeds)"]
    assert (tmp_path / "out.png").stat().st_size > 10_000
    plot.main((folder,), methods=("expo_flow",))
    out = capsys.readouterr().out
    assert "| expo_flow | 3 |" in out and "rlpd" not in out and "base_alone" not in out
    with pytest.raises(InputError, match=r"--methods expo_flaw: .*some_grid has no such method"):
        plot.main((folder,), methods=("expo_flow", "expo_flaw"))


def test_seeds_and_methods_that_the_grid_has_and_the_results_lack_are_named(tmp_path, capsys):
    grid = fake_grid(tmp_path, "--fail 1", methods=f'a = "{FAKE}"\nb = "{FAKE}"')
    assert run_grid(grid, only="/a/") == 1
    capsys.readouterr()
    plot.main((tmp_path / "results" / "grid",), grid=grid)
    out = capsys.readouterr().out
    assert "| a | 1 of 2 |" in out
    assert "MISSING pointmaze-umaze/a: seed 1\n" in out and "MISSING pointmaze-umaze/b: seeds 1, 2\n" in out


def test_other_versions_are_named(tmp_path, capsys):
    write_results(tmp_path, "maze", "a", {1: [0.0, 1.0], 2: [0.0, 1.0]})
    (tmp_path / "maze/a/seed2/args.json").write_text('{"script": "s", "args": {}, "versions": {"commit": "d"}}')
    plot.main((tmp_path,))
    out = capsys.readouterr().out
    assert "versions (1 of 2 runs): {'commit': 'd'}" in out and "warning: the runs were not all made with" in out


def test_styles_are_different_in_colour_and_without():
    styles = plot.line_styles([f"method{i}" for i in range(24)]).values()
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 24
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == 24


def test_variants_share_their_methods_colour_and_differ_by_the_line():
    a, b, c, d = plot.line_styles(["x+one", "x+two", "y+one", "y+two"]).values()
    assert a["color"] == b["color"] != c["color"] == d["color"]
    assert a["linestyle"] == c["linestyle"] != b["linestyle"] == d["linestyle"]


def test_a_changed_method_has_the_colour_of_the_one_it_is_a_change_of():
    styles = plot.line_styles(["expo_flow_small", "rlpd", "rlpd_cold"])
    assert styles["rlpd"]["color"] == styles["rlpd_cold"]["color"] != styles["expo_flow_small"]["color"]
    assert styles["rlpd"]["linestyle"] != styles["rlpd_cold"]["linestyle"]
    assert styles["rlpd_cold"]["markerfacecolor"] == "white" and "markerfacecolor" not in styles["rlpd"]
    assert plot.line_styles(["rlpd"])["rlpd"]["color"] == styles["rlpd"]["color"]  # the same in every figure
    assert plot.line_styles(["warm", "rlpd"])["warm"]["color"] != styles["rlpd"]["color"]


def test_several_folders_a_level_of_ones_own_and_a_task_that_is_there_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "mpl"))
    for grid, task in (("one", "maze"), ("two", "pen"), ("two", "door"), ("two", "ant"), ("again", "pen")):
        write_results(tmp_path / grid, task, "a", {1: [0.6, 0.6], 2: [0.6, 0.6]})
        write_results(tmp_path / grid, task, "rlpd", {1: [0.0, 0.6], 2: [0.0, 0.6]})
    write_results(tmp_path / "one", "maze", "b", {2: [0.0, 0.5]})
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set", lambda axis, **words: titles.append(words.get("title")))
    plot.main((tmp_path / "one", tmp_path / "two"), level=0.5, out=tmp_path / "out.png")
    out = capsys.readouterr().out
    assert [title for title in titles if title] == ["maze", "ant", "door", "pen"]
    assert out.count("times fewer steps to 50 % than rlpd") == 4 and out.count("| 2.00 (2.00 to 2.00) |") == 4
    assert "| final success | rlpd | a | b |\n| --- | --- | --- | --- |\n| maze | 0.30 | **0.60** | 0.25 |\n" in out
    assert "| pen | 0.30 | **0.60** | - |\n" in out
    assert out.count("MISSING") == 1 and "MISSING maze/b: seed 1" in out  # nobody expects b on pen
    with pytest.raises(InputError, match=r"pen is in .*two and in .*again; give one of them"):
        plot.main((tmp_path / "two", tmp_path / "again"))
    with pytest.raises(InputError, match=r"--level 50\.0 must be a success rate"):
        plot.main((tmp_path / "one",), level=50.0)
    with pytest.raises(InputError, match="which results"):
        plot.main(())


def test_logged_metrics_are_drawn_beside_success(tmp_path, monkeypatch, capsys):
    import matplotlib.axes

    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "mpl"))
    for task, base in (("maze", 0.0), ("pen", 100.0)):
        write_results(tmp_path, task, "a", {1: [0.0, 1.0], 2: [0.5, 1.0], 3: [1.0, 1.0]})
        for seed in (1, 2, 3):
            path = tmp_path / task / "a" / f"seed{seed}" / "metrics.csv"
            path.write_text(path.read_text().replace("-10,1.0,0.5,,", f"-10,1.0,{base + seed},,,\n5,2.0,{base + 4},,"))
    drawn, line = [], matplotlib.axes.Axes.plot

    def spy(axis, *args, **style):
        drawn.append([np.asarray(arg).tolist() for arg in args[:2]])
        return line(axis, *args, **style)

    monkeypatch.setattr("matplotlib.axes.Axes.plot", spy)
    plot.main((tmp_path,), out=tmp_path / "out.png", metrics=("losses/critic",))
    assert re.findall(r"^\| a \| (\d+) \|$", capsys.readouterr().out, re.M) == ["4", "104"]  # the last values
    success = [[0, 100], [0.5, 1.0]]
    assert [d for d in drawn if d[0] == [-10, 5]] == [[[-10, 5], [2.0, 4.0]], [[-10, 5], [102.0, 104.0]]]
    assert drawn.count(success) == 2 and (tmp_path / "out.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="--metrics edit/alpha: no run of maze has logged it"):
        plot.main((tmp_path,), out=tmp_path / "out2.png", metrics=("edit/alpha",))
    for path in tmp_path.glob("*/a/seed2/metrics.csv"):
        path.write_text(path.read_text().replace("5,2.0,", "5,2.0,x"))
    with pytest.raises(InputError, match="column 'losses/critic': could not convert string to float: 'x"):
        plot.main((tmp_path,), out=tmp_path / "out2.png", metrics=("losses/critic",))


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "has no column 'step'"),
        ("step,seconds\n0,1\n", "has no column 'eval/success_rate'"),
        ("step,seconds,eval/success_rate\n-5,1,\n", "holds no evaluation"),
        ("step,seconds,eval/success_rate\n0,1,0.5\n100,2\n", "line 3: not as many values as columns"),
        ("step,seconds,eval/success_rate\n0,1,0.5,7\n", "line 2: not as many values as columns"),
        ("step,seconds,eval/success_rate\n0,1,zero\n", "line 2: could not convert string to float: 'zero'"),
        ("step,seconds,eval/success_rate\n0,,0.5\n", "line 2: a value is missing or not finite"),
        ("step,seconds,eval/success_rate\n0,1,nan\n", "line 2: a value is missing or not finite"),
        ("step,seconds,eval/success_rate\n0,1,0.5\n0,2,0.5\n", "the steps of the evaluations do not rise"),
        ("step,seconds,eval/success_rate\n0,1,\xff", "line 2"),
    ],
)
def test_a_broken_metrics_csv_is_one_clear_line(tmp_path, content, words):
    place = tmp_path / "maze" / "a" / "seed1"
    place.mkdir(parents=True)
    (place / "metrics.csv").write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        plot.read_results(tmp_path)
    assert words in str(caught.value) and "metrics.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_binary_and_absent_results_and_seeds_that_do_not_fit_together(tmp_path):
    with pytest.raises(InputError, match="holds no <task>"):
        plot.read_results(tmp_path)
    write_results(tmp_path, "maze", "a", {1: [0.0, 1.0], 2: [0.0, 1.0, 1.0]})
    with pytest.raises(InputError, match="maze/a: its seeds were evaluated at different steps"):
        plot.main((tmp_path,), out=tmp_path / "out.png")
    (tmp_path / "maze/a/seed1/metrics.csv").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="cannot be read"):
        plot.read_results(tmp_path)


# ------------------------------------------------------------------------------------------------------ whole and slow


def tiny_flags(**more) -> str:
    values = {key: value for key, value in (TINY_RUN | more).items() if key != "task"}
    return " ".join(flags_of(expo_diffusion, values))


@pytest.mark.slow
def test_a_real_script_that_was_stopped_goes_on_and_one_that_refuses_starts_anew(tmp_path):
    grid = write_grid(
        tmp_path,
        f'tasks = ["pointmaze-umaze"]\nseeds = [1]\nflags = "{tiny_flags()}"\n[methods]\na = "expo_diffusion.py"\n',
    )
    (cell,) = read_grid(grid, "", tmp_path / "runs", tmp_path / "results")
    work = Work(cell)

    def stop():
        while "step       0" not in (cell.beside(".log").read_text() if cell.beside(".log").exists() else ""):
            time.sleep(0.05)
        work.stop()

    threading.Thread(target=stop).start()
    work()
    assert "stopped by SIGTERM" in cell.beside(".log").read_text() and not cell.result_dir.exists()
    assert run_grid(grid) == 0
    assert "resumed after step" in cell.beside(".log").read_text()
    shutil.rmtree(cell.result_dir)
    record = json.loads((cell.run_dir / "args.json").read_text())
    del record["finished"]
    (cell.run_dir / "args.json").write_text(json.dumps(record))
    for path in cell.run_dir.glob("checkpoint*.pt"):
        path.write_bytes(b"damaged")
    assert run_grid(grid) == 0
    assert "no checkpoint to go on from" in cell.beside(".log").read_text()
    assert len((cell.result_dir / "metrics.csv").read_text().splitlines()) > 3


@pytest.fixture
def slurm(monkeypatch):
    """A real Slurm of this machine, for one test."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    for program in ("munged", "slurmctld", "slurmd"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"{program} is not installed (Debian and Ubuntu: apt-get install slurm-wlm munge)")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: a socket's path may have 107 letters
    start = [str(ROOT / "tests" / "start_slurm.sh")]
    try:
        result = subprocess.run([*start, "start", str(folder), "2"], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
        subprocess.run(["scancel", "--me"], check=True)
    finally:
        subprocess.run([*start, "stop", str(folder)], timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def queue() -> list[str]:
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i %t"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_a_grid_on_a_real_slurm(tmp_path, slurm, capsys):
    """Skips, queues once, reports, limits what runs at a time, cancels, requeues and continues."""
    grid = fake_grid(tmp_path, "--sleep 0.1 --fail 3", "[1, 2, 3]")
    assert run_grid(grid, only="seed1") == 0
    assert run_grid(grid, engine="slurm", no_wait=True, processes=1) == 0
    assert "2 runs queued, 0 were in the queue" in capsys.readouterr().out
    assert len([line for line in queue() if not line.endswith(" PD")]) <= 1
    assert run_grid(grid, engine="slurm") == 1  # waits for those
    out = capsys.readouterr().out
    assert "3 runs, 1 of them done before" in out
    assert re.search(r"^done    pointmaze-umaze/a/seed2  \(step 2", out, re.M) or "2 of them done before" in out
    assert "FAILED  pointmaze-umaze/a/seed3: exit code 1: error: it fails" in out
    assert queue() == []

    # Slurm's word before the time limit or a preemption: saved, queued again, continued.
    grid = fake_grid(tmp_path, "--sleep 0.1 --steps 100", "[4]")
    assert run_grid(grid, engine="slurm", no_wait=True) == 0
    folder = folder_of(grid, "runs", seed=4)
    while not (folder / "checkpoint.pt").exists():
        time.sleep(0.1)
    subprocess.run(["scancel", "--signal=USR2", folder.with_name("seed4.job").read_text()], check=True)
    assert run_grid(grid, engine="slurm") == 0
    log = folder.with_name("seed4.log").read_text()
    assert log.count("stopped by SIGTERM after step") == log.count("resumed after step") == 1
    assert len((folder_of(grid, "results", seed=4) / "metrics.csv").read_text().splitlines()) == 101

    # A cancelled run has saved its state, is reported, and goes on when it is queued again.
    grid = fake_grid(tmp_path, "--sleep 0.1 --steps 100", "[5]")
    assert run_grid(grid, engine="slurm", no_wait=True) == 0
    folder = folder_of(grid, "runs", seed=5)
    while not (folder / "checkpoint.pt").exists():
        time.sleep(0.1)
    subprocess.run(["scancel", folder.with_name("seed5.job").read_text()], check=True)
    while queue():
        time.sleep(0.5)
    capsys.readouterr()
    assert run_grid(grid, engine="slurm") == 0
    assert "failed before, repeated now: pointmaze-umaze/a/seed5: exit code 143: stopped by SIGTERM" in (
        capsys.readouterr().out
    )
    assert folder.with_name("seed5.log").read_text().count("resumed after step") == 1


@pytest.mark.slow
def test_a_real_script_on_a_real_slurm(tmp_path, slurm):
    methods = 'a = "expo_diffusion.py"\nb = "expo_diffusion.py --utd-ration 2"'
    grid = write_grid(
        tmp_path, f'tasks = ["pointmaze-umaze"]\nseeds = [1]\nflags = "{tiny_flags()}"\n[methods]\n{methods}\n'
    )
    assert run_grid(grid, engine="slurm") == 1
    record = json.loads((folder_of(grid, "results") / "args.json").read_text())
    assert record["finished"] == TINY_RUN["total_timesteps"] and record["versions"]["commit"]
    assert "Unrecognized options: --utd-ration" in folder_of(grid, "runs", "b").with_name("seed1.failed").read_text()


@pytest.mark.slow
def test_bad_options_of_slurm_are_one_line(tmp_path, slurm, monkeypatch):
    grid = fake_grid(tmp_path)
    for options, words in (
        ({"partition": "none"}, "sbatch refuses the runs: .*partition"),
        ({"time_minutes": 1}, "--time-minutes 1 must be at least 5"),
        ({"sbatch": "mem"}, "--sbatch 'mem' must be pairs"),
        ({"gpus_per_run": 1}, "sbatch refuses the runs"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            run_grid(grid, engine="slurm", **options)
        assert "\n" not in str(caught.value)


def test_flags_of_the_other_engine_are_refused(tmp_path):
    with pytest.raises(InputError, match="with --engine slurm, --gpus-per-run"):
        run_grid(fake_grid(tmp_path), engine="slurm", gpus=1)
    with pytest.raises(InputError, match="need --engine slurm"):
        run_grid(fake_grid(tmp_path), no_wait=True)


def test_slurm_needs_submitit_and_slurm(tmp_path, monkeypatch):
    grid = fake_grid(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match="--engine slurm needs submitit: pip install submitit"):
        run_grid(grid, engine="slurm")
    monkeypatch.delitem(sys.modules, "submitit")
    pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="srun"):
        run_grid(grid, engine="slurm")
