"""Commands for people: tools/data.py and tools/evaluate.py."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, make_args

import expo_diffusion
from baselines import idql
from tools import data, evaluate, one_line_errors
from utils import InputError, sources
from utils.data import read_dataset
from utils.envs import make_env
from utils.tasks import TASKS

FILES = Path(__file__).parent / "data"
CONTENT, counts = bytes(range(256)) * 4000, {}


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a command in this process. Returns what it prints, or the one line of an error of exit code 2."""

    def call(module: Any, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
        try:
            one_line_errors(module.main)
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert stop.code == 2 and err.startswith("error: ") and err.count("\n") == 1
            return err
        return capsys.readouterr().out

    return call


def test_list(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (tmp_path / "door-human-v1.hdf5").write_bytes(bytes(1500))
    out = tool(data, "list")
    assert all(f"{name}: {task.about}" in out for name, task in TASKS.items())
    assert f"1.5 kB at {tmp_path}" in out and "not here; from https://rail.eecs.berkeley.edu" in out


def test_inspect(tool):
    """Where the file says less than that of tests/test_readme.py, which compares every line."""
    out = tool(data, "inspect", FILES / "d4rl-antmaze.hdf5")
    assert "99 (1 rows dropped: no successor in the file)" in out and "not in the file" in out
    out = tool(data, "inspect", FILES / "d4rl-antmaze.hdf5", "--task", "antmaze-umaze", "--max-episode-steps", 45)
    assert "1 of 2 episodes (50.0%)" in out and "2 episodes exceed the limit of 45, up to 50" in out


def test_thin(tool, tmp_path, monkeypatch):
    """Whole episodes, and every array of them; what has no value for each row stays whole."""
    path, few = Path(shutil.copy(FILES / "d4rl-door.hdf5", tmp_path)), tmp_path / "few.hdf5"
    file: Any
    with h5py.File(path, "a") as file:
        file["infos/map"] = np.arange(3)
        file["next_observations"] = h5py.SoftLink("/observations")
        file["infos/goal_achieved"] = h5py.SoftLink("/terminals")
    assert tool(data, "thin", path, few, "--episodes", 1) == f"{few}: 1 of 2 episodes, 30 of 80 rows\n"
    with h5py.File(path) as old, h5py.File(few) as new:
        for key in ("observations", "next_observations", "timeouts", "infos/qpos", "infos/map", "infos/goal_achieved"):
            before, after = np.asarray(old[key]), np.asarray(new[key])
            assert np.array_equal(after, before if key == "infos/map" else before[50:]) and after.dtype == before.dtype
        assert new.attrs["source"] == old.attrs["source"] and new.attrs["thinned"] == "1 of 2 episodes, seed 0"
    assert "is there already" in tool(data, "thin", path, few, "--episodes", 1)
    assert "has 2" in tool(data, "thin", path, tmp_path / "new.hdf5", "--episodes", 3)
    with h5py.File(path, "a") as file:
        del file["next_observations"]
        file["terminals"][55] = True  # on the way: the episode goes on, for its steps are shorter than a reset
    assert "keep two or more" in tool(data, "thin", path, tmp_path / "new.hdf5", "--episodes", 1)
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError(28, "No space left on device")))
    out = tool(data, "thin", path, tmp_path / "new.hdf5", "--episodes", 2)
    assert "cannot be written ([Errno 28] No space left on device)\n" in out
    assert sorted(path.name for path in tmp_path.glob("*.hdf5*")) == ["d4rl-door.hdf5", "few.hdf5"]


BAD = """
 | --help shows
inspect nowhere.hdf5 | nowhere.hdf5: no such file
inspect nowhere.hdf5 --task antmaze | --task 'antmaze' is unknown (known: laptop, pointmaze-umaze
thin tests/test_tools.py new.hdf5 --episodes 2 | not a complete npz or HDF5 file
download nothing | neither a task nor a word
generate ogbench-cube-billion | is unknown
generate pointmaze-umaze --episodes -1 | cannot be negative
replay nowhere.hdf5 --task pointmaze-umaze | only these can be set
replay tests/data/d4rl-antmaze.hdf5 --task adroit-door-binary | has no 'infos/qpos'
inspect tests/data/d4rl-antmaze.hdf5 --env-id Ant-v5 | 29 wide, the environment's 105
replay generated:pointmaze-umaze --task antmaze-umaze | tools/data.py generate pointmaze-umaze
replay tests/data/d4rl-pen.hdf5 --task antmaze-umaze | observations are 45 wide
replay tests/data/d4rl-pen.hdf5:1 --task adroit-pen-binary | give the file without a count
replay tests/data/d4rl-pen.hdf5 --task adroit-pen-binary --rows 0 | --rows must be at least 1
thin tests/data/d4rl-pen.hdf5:1 new.hdf5 --episodes 1 | give the file without a count
thin tests/data/d4rl-pen.hdf5 new.hdf5 --episodes 1 --seed -1 | --seed must be at least 0"""


def test_commands(tool, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in BAD[1:].splitlines():
        words, expected = line.split(" | ")
        assert expected in tool(data, *words.split()), line
    replay = "replay tests/data/d4rl-door.hdf5 --task adroit-door-binary --rows 9"
    assert tool(data, *replay.split()).endswith("success as in the file in 9 of 9 rows\n")
    path = Path(tool(data, "generate", "pointmaze-umaze", "--episodes", 2, "--seed", 3).strip())
    assert path.name == "pointmaze-umaze-2-seed3.hdf5" and path.exists()
    command = f"{sys.executable} tools/data.py list | head -n 1; exit ${{PIPESTATUS[0]}}"  # nobody reads the rest
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        counts[name] = counts.get(name, 0) + 1
        if name in ("missing", "broken") or (name == "once-broken" and counts[name] == 1):
            return self.send_error(404 if name == "missing" else 503)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) + 10_000 * (name == "too-short")))
        self.end_headers()
        return self.wfile.write(CONTENT[: len(CONTENT) // 2 if (name, counts[name]) == ("once-cut", 1) else None])

    def log_message(self, *_):
        pass


def test_download(tool, tmp_path, monkeypatch):
    """Whole or not at all; what may work the next time is tried three times."""
    counts.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address, path = f"http://127.0.0.1:{server.server_port}/", tmp_path / "new" / "file"
    monkeypatch.setattr(data.fetch, "__defaults__", (2, 0.01))
    for name, tries in (("good", 1), ("once-broken", 2), ("once-cut", 2)):
        data.fetch(address + name, path)
        assert path.read_bytes() == CONTENT and counts[name] == tries and len(list(path.parent.iterdir())) == 1
        path.unlink()
    for name, words, tries in (("missing", "404", 1), ("broken", "503", 3), ("too-short", "of 1.0 MB", 3)):
        with pytest.raises(InputError, match=f"{address}{name} .*{words}.*put the file at {path}"):
            data.fetch(address + name, path)
        assert counts[name] == tries and not list(path.parent.iterdir())
    for wrong, words in (("http://127.0.0.1:9/", "no connection"), ("file:///etc/passwd", "not an http address")):
        with pytest.raises(InputError, match=words):
            data.fetch(wrong, path)
    monkeypatch.setenv("OGBENCH_DATA_DIR", str(path.parent))
    monkeypatch.setitem(sources.SOURCES, "ogbench", ("OGBENCH_DATA_DIR", "", address))
    for _ in range(2):
        assert tool(data, "download", "ogbench:scene-play-v0").strip() == str(path.parent / "scene-play-v0.npz")
    assert counts["scene-play-v0.npz"] == 1
    for digest, words in ((hashlib.sha256(CONTENT).hexdigest(), ""), ("0" * 64, "its SHA-256 is")):  # B11
        monkeypatch.setattr(data, "checksums", lambda digest=digest: {"/good": digest})
        with contextlib.nullcontext() if not words else pytest.raises(InputError, match=words):
            data.fetch(address + "good", path)
        path.unlink(missing_ok=True)
    server.shutdown()


class Near:
    """Minari's network layer, with a folder in place of the network."""

    def __init__(self, name, token=None):
        self.folder = FILES / "minari"

    def list_datasets(self, prefix=None):
        return [f"reach/{path.name}" for path in (self.folder / "reach").iterdir()]

    def get_dataset_metadata(self, dataset_id):
        return json.loads((self.folder / dataset_id / "data" / "metadata.json").read_text())

    def download_dataset(self, dataset_id, path):
        shutil.copytree(self.folder / dataset_id, path / dataset_id)

    def download_namespace_metadata(self, namespace, path):
        (path / namespace).mkdir(parents=True, exist_ok=True)
        (path / namespace / "namespace_metadata.json").write_text("{}")

    def list_namespaces(self):
        return ["reach"]


def test_minari_download(tool, tmp_path, monkeypatch):
    """B1: with the package's own code. A wrong name leaves nothing behind."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("MINARI_REMOTE", "near://by")
    minari = pytest.importorskip("minari", reason="minari is not installed (requirements-dev.txt)")
    monkeypatch.setattr("minari.storage.remotes._registry", {"near": lambda: Near})
    assert "could not be downloaded (ValueError" in tool(data, "download", "minari:reach/none-v0")
    assert not (tmp_path / "reach").exists()
    path = tool(data, "download", "minari:reach/dict-v0").splitlines()[-1]
    assert Path(path).exists() and len(read_dataset(["minari:reach/dict-v0"]).episodes) == 2
    monkeypatch.setattr(minari, "download_dataset", lambda name: (tmp_path / "reach/arrow-v0/data").mkdir(parents=True))
    for words in ("but not in HDF5", "has no data in HDF5"):  # downloaded now, and there already
        assert words in tool(data, "download", "minari:reach/arrow-v0")
    assert f"is a folder of data sets; name one: {Path(path).parents[1]}" in tool(data, "download", "minari:reach")
    monkeypatch.setitem(sys.modules, "minari", None)
    assert "pip install" in tool(data, "download", "minari:reach/tuple-v0")


@pytest.mark.parametrize(("script", "file"), [(expo_diffusion, "agent.pt"), (idql, "checkpoint.pt")])
def test_evaluate(tool, tmp_path, script, file):
    """A folder as a run leaves it; the agent was never trained."""
    settings = dict(task="pointmaze-umaze", env_id="PointMaze_UMaze-v3", max_episode_steps=4, action_repeat=10)
    args = make_args(script, denoising_steps=2, **settings)
    agent = script.Agent(8, 2, args).eval()
    record = {"script": script.__name__.rpartition(".")[2], "args": vars(args), "starts": [{"command": ["a.py"]}]}
    (tmp_path / "args.json").write_text(json.dumps(record))
    torch.save({"agent": agent.state_dict(), "step": 3}, tmp_path / file)
    out = tool(evaluate, tmp_path, "--episodes", 3, "--seed", 7, "--num-envs", 2)
    args.eval_episodes, args.seed, flags = 3, 7, (args.env_id, args.task, 4, 10)
    metrics = script.evaluate({"eval/": agent}, [make_env(*flags) for _ in "12"], args, torch.device("cpu"))
    printed = {f"eval/{line.split()[0]}": float(line.split()[1]) for line in out.splitlines()[1:]}
    assert len(printed) >= 3 and printed == pytest.approx({key: metrics[key] for key in printed}, rel=1e-3)
    assert "--num-envs must be at least 1" in tool(evaluate, tmp_path, "--episodes", 0)
    other = tmp_path / ("checkpoint.pt" if file == "agent.pt" else "agent.pt")
    other.write_bytes(b"")
    words = "checkpoint.pt is damaged" if file == "agent.pt" else "return"  # checkpoint.pt counts, whatever its age
    assert words in tool(evaluate, tmp_path, "--episodes", 1)
    other.unlink()
    for changed, words in (
        (record | {"args": vars(args) | {"hidden_dim": 17}}, f"{file} is damaged, or does not fit its args.json"),
        (record | {"script": "expo_magic"}, "is a run of 'expo_magic'"),
        (
            record | {"starts": [{"command": ["ablation.py", "--change=x"]}]},
            "with a change of benchmark/ablation.py",
        ),
        ({"script": 3}, "args.json is damaged"),
    ):
        (tmp_path / "args.json").write_text(json.dumps(changed))
        assert words in tool(evaluate, tmp_path, "--episodes", 1)
    (tmp_path / file).unlink()
    (tmp_path / "args.json").write_text(json.dumps(record))
    assert "neither agent.pt" in tool(evaluate, tmp_path, "--episodes", 1)
    assert "holds no run" in tool(evaluate, tmp_path / "none")
