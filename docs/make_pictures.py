# ruff: noqa: E402
"""Draws the pictures of docs/how_expo_works.md from agents that it trains on the quickstart maze (some minutes).

python docs/make_pictures.py                 # trains into runs/pictures/ and writes docs/images/*.png
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python docs/make_pictures.py` finds the scripts this way

import expo_diffusion
import expo_flow
from utils import cli, data
from utils.evaluate import evaluate, load_agent
from utils.logger import read_record
from utils.pointmaze import MAPS
from utils.tasks import make_task_env

# Four moments of one and the same run: with the same seed, a shorter run is the beginning of a longer one. The last two
# are the one before them, resumed.
MOMENTS = {
    "200 offline updates": ["--offline-steps", "200", "--total-timesteps", "0"],
    "1,500 offline updates (step 0)": ["--total-timesteps", "0"],
    "step 100": ["--resume", "--total-timesteps", "100"],
    "step 600": ["--resume", "--total-timesteps", "600"],
}
BASE, EDIT, CHOSEN = "#0072B2", "#E69F00", "#D55E00"


def train(script: Any, name: str, flags: list[str], seed: int, before: Path | None = None) -> Path:
    """Folder of a run of `script` with --save-model, or of `before` made longer; made only if it is not there yet.

    "There" is a complete run of today's settings; what else lies in the folder is deleted.
    """
    run_dir = ROOT / "runs" / "pictures" / f"{script.__name__}-seed{seed}-{name.replace(' ', '-')}"
    if not ((run_dir / "agent.pt").exists() and same_settings(script, run_dir)):
        shutil.rmtree(run_dir, ignore_errors=True)
        if flags[0] == "--resume" and before is not None:
            shutil.copytree(before, run_dir, ignore=shutil.ignore_patterns("agent.pt"))
            words = ["--resume", str(run_dir), *flags[1:]]
        else:
            words = ["--seed", str(seed), "--save-model", "--run-dir", str(run_dir), "--eval-every", "100000", *flags]
        script.main(cli.parse_args(script.Args, words))
    return run_dir


def same_settings(script: Any, run_dir: Path) -> bool:
    """Whether a run's flags are those that its command line has today."""
    there, given = read_record(run_dir)["args"], ("run_dir", "resume", "seed", "save_model", "eval_every")
    now = json.loads(json.dumps(dataclasses.asdict(cli.parse_args(script.Args, []))))
    now |= {key: there[key] for key in (*given, "offline_steps", "total_timesteps")}
    return there == now


def draw_maze(axis: Any, maze: str = "medium") -> None:
    """Walls as grey cells, in metres."""
    grid = np.array([[c == "1" for c in row] for row in MAPS[maze]])
    height, width = grid.shape
    extent = (-width / 2, width / 2, -height / 2, height / 2)
    axis.imshow(grid, cmap="Greys", vmin=0, vmax=2.2, extent=extent, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


@torch.no_grad()
def landscape(agents: dict[str, Any], obs: np.ndarray, out: Path) -> None:
    """Candidates over the Q landscape of one state, at the moments of `agents`."""
    figure, axes = plt.subplots(1, 1 + len(agents), figsize=(4.1 * (1 + len(agents)), 4.2))
    draw_maze(axes[0])
    axes[0].arrow(obs[4], obs[5], 0.3 * obs[6], 0.3 * obs[7], color=CHOSEN, width=0.06, zorder=3)
    axes[0].plot(obs[4], obs[5], "o", color=CHOSEN, ms=9)
    axes[0].plot(*obs[2:4], "*", color="#009E73", ms=16)
    axes[0].set_title("the state: position and velocity\n(star: the goal)")
    ticks = torch.linspace(-1, 1, 81)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1).reshape(-1, 2)
    state = torch.as_tensor(obs)
    for axis, (moment, agent) in zip(axes[1:], agents.items(), strict=True):
        torch.manual_seed(0)
        q = agent.target_critic(state.expand(len(grid), -1), grid).amin(0).reshape(81, 81)
        picture = axis.contourf(ticks, ticks, q, levels=20, cmap="Greys_r", alpha=0.8)
        figure.colorbar(picture, ax=axis, fraction=0.046, pad=0.03)
        base_actions = agent.base_actions(state.unsqueeze(0), agent.target_base_policy)
        candidates = agent.with_edits(state.unsqueeze(0), base_actions)
        best = int(agent.rank(state.unsqueeze(0), candidates).argmax())
        base, edited = candidates[0].split([agent.args.num_base_samples, agent.args.num_edit_samples])
        for start, end in zip(base.tolist(), edited.tolist(), strict=True):
            axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-", "color": EDIT, "lw": 1.5})
        axis.plot(*base.T, "o", color=BASE, ms=8, label="base samples")
        axis.plot(*edited.T, "s", color=EDIT, ms=6, label="their edits")
        axis.plot(*candidates[0, best], "o", ms=17, mfc="none", mec=CHOSEN, mew=2.5, label="chosen: highest Q")
        axis.set(title=f"{moment}\nQ, minimum over the critics", xlabel="force in x", aspect="equal")
        axis.set(xlim=(-1, 1), ylim=(-1, 1))
    axes[1].set_ylabel("force in y")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(out, dpi=110)


def paths(agent: Any, args: Any, out: Path) -> None:
    """Demonstrations, imitation alone, EXPO: paths in the maze."""
    envs = [make_task_env(args) for _ in range(20)]
    dataset = data.load(args, envs[0])
    imitation = evaluate(agent["imitation"].target_base_policy.sample, envs, 20, 0)
    expo = evaluate(agent["expo"], envs, 20, 0)
    demonstrations = [dataset.obs[start:stop] for start, stop in dataset.episodes]
    assert dataset.success is not None and imitation.success is not None and expo.success is not None
    panels = [
        ("demonstrations", demonstrations, dataset.success, np.diff(dataset.episodes).mean()),
        ("imitation alone (base policy)", imitation.paths, imitation.success, imitation.lengths.mean()),
        ("EXPO after 600 steps", expo.paths, expo.success, expo.lengths.mean()),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 5.6))
    for axis, (title, lines, success, length) in zip(axes, panels, strict=True):
        draw_maze(axis)
        for line, good in zip(lines, success, strict=True):
            axis.plot(line[:, 4], line[:, 5], color=BASE if good else CHOSEN, lw=1.0, alpha=0.7)
        axis.plot(*dataset.obs[0, 2:4], "*", color="#009E73", ms=16)
        axis.set_title(f"{title}\n{success.mean():.0%} in time, {length:.0f} actions on average")
    axes[0].plot([], [], color=BASE, label="reaches the goal in time")
    axes[0].plot([], [], color=CHOSEN, label="does not")
    figure.legend(loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    figure.savefig(out, dpi=110)


@torch.no_grad()
def denoising(agents: dict[str, Any], obs: np.ndarray, out: Path) -> None:
    """300 samples on their way from noise to actions, for each kind of base policy."""
    figure, axes = plt.subplots(len(agents), 6, figsize=(15, 2.9 * len(agents)), sharex=True, sharey=True)
    for row, (name, agent) in zip(axes, agents.items(), strict=True):
        torch.manual_seed(0)
        network, stages = agent.target_base_policy.network, []
        hook = network.register_forward_pre_hook(lambda _, inputs, stages=stages: stages.append(inputs[0].clone()))
        stages.append(agent.target_base_policy.sample(torch.as_tensor(obs).expand(300, -1)))
        hook.remove()
        for k, (axis, x) in enumerate(zip(row, stages, strict=True)):
            axis.scatter(*x.T, s=5, color=BASE, alpha=0.6)
            axis.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
            axis.add_patch(Rectangle((-1, -1), 2, 2, fill=False, color="grey", lw=0.8))
            axis.set_title("noise" if k == 0 else f"{name}: action" if k == 5 else f"after step {k}", fontsize=10)
        row[0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main(seed: int = 1, out: Path = ROOT / "docs" / "images") -> None:
    """Trains what is missing and draws.

    Args:
        seed: of every run.
        out: folder for the pictures.
    """
    plt.switch_backend("Agg")
    out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Path] = {}
    for moment, flags in MOMENTS.items():
        runs[moment] = train(expo_diffusion, moment, flags, seed, before=next(reversed(runs.values()), None))
    agents = {moment: load_agent(run)[0] for moment, run in runs.items()}
    args = load_agent(runs["step 600"])[1]
    flow = load_agent(train(expo_flow, "step 0", ["--total-timesteps", "0"], seed))[0]
    moments = list(MOMENTS)
    demonstrations = data.load(args, make_task_env(args))
    assert demonstrations.success is not None
    first, _ = demonstrations.episodes[np.argmax(demonstrations.success)]  # a demonstration that succeeds ...
    obs = demonstrations.obs[first + 10]  # ... a second into it
    landscape(agents, obs, out / "landscape.png")
    paths({"imitation": agents[moments[1]], "expo": agents[moments[3]]}, args, out / "paths.png")
    denoising({"diffusion": agents[moments[1]], "flow": flow}, demonstrations.obs[first], out / "denoising.png")


if __name__ == "__main__":
    tyro.cli(main)
