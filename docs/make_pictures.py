"""Draws the pictures of docs/how_expo_works.md from agents that it trains on the quickstart maze, in some minutes.

    python docs/make_pictures.py      # trains into runs/pictures/ and writes docs/images/*.png

A run that is complete is used again. Delete runs/pictures/ to train anew.
"""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts when this file is run

from benchmark.overestimation import Recorder
from utils.data import read_dataset
from utils.envs import make_env
from utils.tasks import MAZES

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
# Four moments of one run: with the same seed, a shorter run is the beginning of a longer one.
MOMENTS = {
    "200 offline updates": ["--offline-steps", "200", "--total-timesteps", "0"],
    "1,500 offline updates (step 0)": ["--total-timesteps", "0"],
    "step 100": ["--total-timesteps", "100"],
    "step 600": ["--total-timesteps", "600"],
}
BASE, EDIT, CHOSEN, GOAL = "#0072B2", "#E69F00", "#D55E00", "#009E73"


def trained_agent(name: str, moment: str, flags: list[str]) -> Any:
    """The agent of a run of a script; the run is made if it is not there."""
    run_dir = ROOT / "runs" / "pictures" / f"{name}-{moment.replace(' ', '-')}"
    if not (run_dir / "agent.pt").exists():
        shutil.rmtree(run_dir, ignore_errors=True)  # of a run that was stopped
        words = [sys.executable, f"{name}.py", "--save-model", "--eval-every", "100000", *flags, "--run-dir", run_dir]
        subprocess.run(words, cwd=ROOT, check=True)
    script = importlib.import_module(name)
    saved = torch.load(run_dir / "agent.pt", weights_only=True)
    args = script.Args(**json.loads((run_dir / "args.json").read_text())["args"])
    agent = script.Agent(saved["obs_dim"], saved["action_dim"], args)
    agent.load_state_dict(saved["agent"])
    return agent


def draw_maze(axis: Any) -> None:
    """Walls as grey cells, in metres."""
    grid = np.array([[cell == "1" for cell in row] for row in MAZES["medium"].split()])
    height, width = grid.shape
    extent = (-width / 2, width / 2, -height / 2, height / 2)
    axis.imshow(grid, cmap="Greys", vmin=0, vmax=2.2, extent=extent, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


@torch.no_grad()
def landscape(agents: dict[str, Any], obs: np.ndarray) -> None:
    """Candidates over the Q landscape of one state, at the moments of `agents`."""
    figure, axes = plt.subplots(1, 1 + len(agents), figsize=(4.1 * (1 + len(agents)), 4.2))
    draw_maze(axes[0])
    axes[0].arrow(obs[4], obs[5], 0.3 * obs[6], 0.3 * obs[7], color=CHOSEN, width=0.06, zorder=3)
    axes[0].plot(obs[4], obs[5], "o", color=CHOSEN, ms=9)
    axes[0].plot(*obs[2:4], "*", color=GOAL, ms=16)
    axes[0].set_title("the state: position and velocity\n(star: the goal)")
    ticks = torch.linspace(-1, 1, 81)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1).reshape(-1, 2)
    state = torch.as_tensor(obs)
    for axis, (moment, agent) in zip(axes[1:], agents.items(), strict=True):
        torch.manual_seed(0)
        q = agent.target_critic(state.expand(len(grid), -1), grid).amin(0).reshape(81, 81)
        picture = axis.contourf(ticks, ticks, q, levels=20, cmap="Greys_r", alpha=0.8)
        figure.colorbar(picture, ax=axis, fraction=0.046, pad=0.03)
        base = agent.base_actions(state, agent.target_base_policy, agent.args.num_base_samples)
        candidates = agent.with_edits(state, base)
        best = int(agent.rank(state, candidates).argmax())
        edited = candidates[len(base) :]
        for start, end in zip(base.tolist(), edited.tolist(), strict=True):
            axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-", "color": EDIT, "lw": 1.5})
        axis.plot(*base.T, "o", color=BASE, ms=8, label="base samples")
        axis.plot(*edited.T, "s", color=EDIT, ms=6, label="their edits")
        axis.plot(*candidates[best], "o", ms=17, mfc="none", mec=CHOSEN, mew=2.5, label="chosen: highest Q")
        axis.set(title=f"{moment}\nQ, minimum over the critics", xlabel="force in x", aspect="equal")
        axis.set(xlim=(-1, 1), ylim=(-1, 1))
    axes[1].set_ylabel("force in y")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(IMAGES / "landscape.png", dpi=110)


def paths(imitation: Any, expo: Any, data: Any, env: Any) -> None:
    """Demonstrations, imitation alone, EXPO: paths in the maze."""
    panels = [("demonstrations", [data.rows.obs[a:b] for a, b in data.episodes], data.success)]
    policies = {"imitation alone (base policy)": imitation.target_base_policy.sample, "EXPO after 600 steps": expo}
    evaluate = importlib.import_module("expo_diffusion").evaluate
    for title, act in policies.items():
        recorder = Recorder(env)
        recorder.episodes = []
        evaluate({"": act}, [recorder], expo.args, torch.device("cpu"))
        episodes = [[np.stack(column) for column in zip(*rows, strict=True)] for rows in recorder.episodes]
        # An episode of this maze ends at the goal, or by its time limit.
        panels.append((title, [episode[0] for episode in episodes], np.array([e[3][-1] for e in episodes])))
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 5.6))
    for axis, (title, lines, success) in zip(axes, panels, strict=True):
        draw_maze(axis)
        for line, good in zip(lines, success, strict=True):
            axis.plot(line[:, 4], line[:, 5], color=BASE if good else CHOSEN, lw=1.0, alpha=0.7)
        axis.plot(*data.rows.obs[0, 2:4], "*", color=GOAL, ms=16)
        length = np.mean([len(line) for line in lines])
        axis.set_title(f"{title}\n{success.mean():.0%} in time, {length:.0f} actions on average")
    axes[0].plot([], [], color=BASE, label="reaches the goal in time")
    axes[0].plot([], [], color=CHOSEN, label="does not")
    figure.legend(loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    figure.savefig(IMAGES / "paths.png", dpi=110)


@torch.no_grad()
def denoising(agents: dict[str, Any], obs: np.ndarray) -> None:
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
    figure.savefig(IMAGES / "denoising.png", dpi=110)


def main() -> None:
    """Trains what is missing and draws."""
    plt.switch_backend("Agg")
    agents = {moment: trained_agent("expo_diffusion", moment, flags) for moment, flags in MOMENTS.items()}
    flow = trained_agent("expo_flow", "step 0", ["--total-timesteps", "0"])
    _, step_0, _, last = agents.values()
    args = last.args
    env = make_env(args.env_id, args.task, args.max_episode_steps, args.action_repeat)
    data = read_dataset(args.dataset, env)
    assert data.success is not None
    first = data.episodes[np.argmax(data.success)][0]  # the first demonstration that succeeds
    landscape(agents, data.rows.obs[first + 10])  # ten actions later
    paths(step_0, last, data, env)
    denoising({"diffusion": step_0, "flow": flow}, data.rows.obs[first])


if __name__ == "__main__":
    main()
