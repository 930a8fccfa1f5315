"""Commands for people: tools/data.py and tools/evaluate.py."""

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, make_args

import expo_diffusion
from baselines import rlpd
from tools import data, evaluate, run
from utils import InputError
from utils.arrays import write_d4rl
from utils.envs import make_env
from utils.tasks import TASKS

CONTENT = bytes(range(256)) * 4000
counts: dict[str, int] = {}


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a command in this process, and gives its exit code, stdout and stderr."""

    def call(module: Any, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
        code = 0
        try:
            run(module.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def rows_of(path: Path, env_id: str, limit: int = 10) -> Path:
    """A D4RL-layout file of four random episodes in the environment."""
    env, rng, rows = make_env(env_id, max_episode_steps=limit), np.random.default_rng(0), []
    for episode in range(4):
        obs, done = env.reset(seed=episode)[0], False
        while not done:
            action = rng.uniform(-1, 1, env.action_space.shape or ()).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            rows.append((obs, action, reward, terminated, truncated))
            obs = following
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    arrays = {key: np.array(column) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}
    write_d4rl(path, arrays | {"infos/time": np.arange(40.0), "infos/map": np.arange(3)}, {"source": "here"})
    return path


def test_list(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (tmp_path / "door-human-v1.hdf5").write_bytes(bytes(1500))
    code, out, _ = tool(data, "list")
    assert code == 0 and all(f"{name}: {task.about}" in out for name, task in TASKS.items())
    assert f"1.5 kB at {tmp_path}" in out and "not here; from http://rail.eecs.berkeley.edu" in out


def test_inspect(tool, tmp_path):
    path = rows_of(tmp_path / "a.hdf5", "expo/AntMazeUMaze-v2")
    lines = tool(data, "inspect", path)[1].splitlines()
    parts = {line[2:16].strip(): line[16:] for line in lines[1:]}
    assert parts["transitions"] == "36 (4 rows dropped: no successor in the file)" and parts["terminations"] == "0"
    assert parts["observations"].startswith("29 wide, ") and parts["actions"].startswith("8 wide, ")
    assert parts["episodes"] == "4, length 9 / 9 / 9 (least, median, most)" and parts["success"] == "not in the file"
    assert parts["returns"] == "0 / 0 / 0 (least, median, most)" and "every reward is 0" in parts["problems"]
    out = tool(data, "inspect", path, "--task", "antmaze-umaze", "--max-episode-steps", 5)[1]
    assert "0 of 4 episodes (0.0%)" in out and "4 episodes exceed the limit of 5, up to 9" in out
    assert tool(data, "inspect", path, "--env-id", "Ant-v5")[2].endswith(
        "observations are 29 wide, the environment's 105\n"
    )


def test_thin(tool, tmp_path):
    """Whole episodes, and every array of them; what has no value for each row stays whole."""
    path, few = rows_of(tmp_path / "a.hdf5", "expo/AntMazeUMaze-v2"), tmp_path / "few.hdf5"
    assert tool(data, "thin", path, few, "--episodes", 2, "--seed", 1)[1] == f"{few}: 2 of 4 episodes, 20 of 40 rows\n"
    drawn = sorted(np.random.default_rng(1).choice(4, 2, replace=False))
    kept = np.concatenate([np.arange(10 * episode, 10 * episode + 10) for episode in drawn])
    with h5py.File(path) as old, h5py.File(few) as new:
        for key in ("observations", "actions", "timeouts", "infos/time", "infos/map"):
            before: Any = old[key]
            after: Any = new[key]
            assert np.array_equal(after[()], before[()] if key == "infos/map" else before[()][kept])
            assert after.dtype == before.dtype
        assert new.attrs["source"] == "here" and new.attrs["thinned"] == "2 of 4 episodes, seed 1"
    assert tool(data, "thin", path, few, "--episodes", 2)[::2] == (
        2,
        f"error: {few} is there already; choose another name\n",
    )
    assert "has 4" in tool(data, "thin", path, tmp_path / "new.hdf5", "--episodes", 5)[2]


def test_generate(tool):
    code, out, _ = tool(data, "generate", "pointmaze-umaze", "--episodes", 2, "--seed", 3)
    assert code == 0 and Path(out.strip()).name == "pointmaze-umaze-2x24x10-seed3.hdf5" and Path(out.strip()).exists()
    assert tool(data, "download", "pointmaze-umaze")[0] == 0  # nothing to fetch: it is made


def test_replay(tool, tmp_path):
    """The simulator's own rows: only float32 and the warm start of its solver differ."""
    path = rows_of(tmp_path / "a.hdf5", "expo/AntMazeUMaze-v2")
    code, out, _ = tool(data, "replay", path, "--task", "antmaze-umaze", "--rows", 9)
    assert code == 0 and out.splitlines()[-1].split()[:2] == ["all", "9"] and float(out.split()[-1]) < 1e-4
    assert "has no 'infos/qpos'" in tool(data, "replay", path, "--task", "adroit-door-binary")[2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "--help shows"),
        ("inspect nowhere.hdf5", "nowhere.hdf5: no such file"),
        ("inspect nowhere.hdf5 --task antmaze", "--task 'antmaze' is unknown (known: pointmaze-umaze"),
        ("inspect nowhere.hdf5 --env-id Pendulun-v1", "Pendulun"),
        ("thin nowhere.hdf5 new.hdf5 --episodes 2", "no such file"),
        ("thin tests/test_tools.py new.hdf5 --episodes 2", "not a complete HDF5 file"),
        ("download nothing", "neither a task nor a word"),
        ("download d4rl:nothing", "is unknown"),
        ("generate ogbench-cube-billion", "is unknown"),
        ("generate pointmaze-huge", "is unknown"),
        ("generate pointmaze-umaze --episodes -1", "cannot be negative"),
        ("generate pointmaze-umaze --episodes many", "many"),
        ("replay nowhere.hdf5 --task antmaze-umaze", "no such file"),
        ("replay nowhere.hdf5 --task pointmaze-umaze", "only these can be set"),
        ("replay generated:pointmaze-umaze --task antmaze-umaze", "observations are 8 wide"),
    ],
)
def test_bad_input_is_one_line(tool, monkeypatch, words, expected):
    monkeypatch.chdir(ROOT)
    code, _, err = tool(data, *words.split())
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_as_a_user_starts_them(tmp_path):
    """Into a pipe that nobody reads, and with a folder that holds no run."""
    command = f"{sys.executable} tools/data.py list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    done = subprocess.run([sys.executable, ROOT / "tools" / "evaluate.py", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path} holds no run: args.json is missing\n")


# ------------------------------------------------------------------------------------------------------------ download


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        counts[name] = counts.get(name, 0) + 1
        if name == "missing":
            return self.send_error(404)
        if name == "broken" or (name == "once-broken" and counts[name] == 1):
            return self.send_error(503)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) + 100 * (name == "too-short")))
        self.end_headers()
        cut = name == "once-cut" and counts[name] == 1
        return self.wfile.write(CONTENT[: len(CONTENT) // 2 if cut else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    counts.clear()
    monkeypatch.setattr(data.fetch, "__defaults__", (2, 0.01))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("name", ["good", "once-broken", "once-cut"])
def test_what_arrives_whole(server, tmp_path, name):
    data.fetch(server + name, tmp_path / "new" / "file")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "new").iterdir()] == [("file", CONTENT)]


@pytest.mark.parametrize(
    ("address", "words", "tries"),
    [
        ("missing", "404", 1),
        ("broken", "503", 3),
        ("too-short", "1.0 MB came of 1.0 MB", 3),
        ("http://127.0.0.1:9/", "no connection", 0),
        ("file:///etc/passwd", "not an http address", 0),
    ],
)
def test_what_does_not_arrive(server, tmp_path, address, words, tries):
    with pytest.raises(InputError) as error:
        data.fetch(address if ":" in address else server + address, tmp_path / "file")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "http address" in words or f"put the file at {tmp_path / 'file'}" in str(error.value)
    assert not list(tmp_path.iterdir()) and counts.get(address, 0) == tries


def test_a_word_is_downloaded_once(tool, server, tmp_path, monkeypatch):
    monkeypatch.setenv("OGBENCH_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("utils.sources.OGBENCH", server)
    for _ in range(2):
        assert tool(data, "download", "ogbench:scene-play-v0")[1].strip() == str(tmp_path / "scene-play-v0.npz")
    assert counts == {"scene-play-v0.npz": 1} and (tmp_path / "scene-play-v0.npz").read_bytes() == CONTENT
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OGBENCH_DATA_DIR", str(tmp_path / "file" / "inside"))
    assert "cannot be written" in tool(data, "download", "ogbench:scene-play-v0")[2]


def test_minari_is_left_to_its_package(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "minari", None)
    assert "pip install" in tool(data, "download", "minari:D4RL/door/human-v2")[2] and not list(tmp_path.iterdir())
    (tmp_path / "arrow-v0" / "data").mkdir(parents=True)
    assert "no data in HDF5 format" in tool(data, "download", "minari:arrow-v0")[2]


# ------------------------------------------------------------------------------------------------------------ evaluate


def save_run(script: Any, folder: Path, name: str) -> Any:
    """A folder as a run leaves it, of an agent that was never trained."""
    settings = dict(task="pointmaze-umaze", env_id=TASKS["pointmaze-umaze"].env_id, max_episode_steps=4)
    args = make_args(script, action_repeat=10, denoising_steps=2, **settings)
    agent = script.Agent(8, 2, args).eval()
    (folder / "args.json").write_text(json.dumps({"script": script.__name__.rpartition(".")[2], "args": vars(args)}))
    torch.save({"agent": agent.state_dict(), "step": 3}, folder / name)
    return agent, args


@pytest.mark.parametrize(("script", "file"), [(expo_diffusion, "agent.pt"), (rlpd, "checkpoint.pt")])
def test_evaluate_a_saved_agent(tool, tmp_path, script, file):
    agent, args = save_run(script, tmp_path, file)
    code, out, _ = tool(evaluate, tmp_path, "--episodes", 3, "--seed", 7)
    args.eval_episodes, args.seed = 3, 7
    flags = (args.env_id, args.task, args.max_episode_steps, args.action_repeat)
    metrics = script.evaluate({"eval/": agent}, [make_env(*flags) for _ in range(3)], args, torch.device("cpu"))
    printed = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()[1:]}
    assert code == 0 and printed == pytest.approx(
        {key.removeprefix("eval/"): metrics[key] for key in metrics}, rel=1e-3
    )
    assert tool(evaluate, tmp_path, "--episodes", 3, "--seed", 7)[1] == out


def test_runs_that_cannot_be_evaluated(tool, tmp_path):
    save_run(expo_diffusion, tmp_path, "agent.pt")
    record = json.loads((tmp_path / "args.json").read_text())
    assert "--episodes must be at least 1" in tool(evaluate, tmp_path, "--episodes", 0)[2]
    for changed, words in (
        (record | {"args": record["args"] | {"hidden_dim": 17}}, "agent.pt is damaged, or does not fit its args.json"),
        (record | {"script": "expo_magic"}, "is a run of 'expo_magic'"),
        ({"script": 3}, "args.json is damaged"),
    ):
        (tmp_path / "args.json").write_text(json.dumps(changed))
        code, _, err = tool(evaluate, tmp_path)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    (tmp_path / "args.json").write_text(json.dumps(record))
    (tmp_path / "agent.pt").write_bytes(b"PK\x03\x04")
    assert "agent.pt is damaged" in tool(evaluate, tmp_path)[2]
    (tmp_path / "agent.pt").unlink()
    assert "neither agent.pt" in tool(evaluate, tmp_path)[2]
