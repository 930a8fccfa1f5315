"""Bytes and seconds of checkpoints: published networks on AntMaze's shapes, a replay of 1,000,000 rows.

python -m benchmark.checkpoint_time
"""

import tempfile
import time
from pathlib import Path

import torch

import expo_diffusion
from utils import cli
from utils.buffer import ReplayBuffer
from utils.checkpoint import Run
from utils.files import human_size
from utils.logger import Logger

ROWS, OBS, ACT = 1_000_000, 29, 8


def open_run(folder: str, *words: str) -> Run:
    args = cli.parse_args(expo_diffusion.Args, list(words))
    agent = expo_diffusion.Agent(OBS, ACT, args)
    optimizers = expo_diffusion.make_optimizers(agent, args)
    offline, online = ReplayBuffer(256, OBS, ACT), ReplayBuffer(ROWS, OBS, ACT)
    offline.size = 256
    for optimizer in optimizers[:4]:  # Adam's averages are there after one step
        parameters = optimizer.param_groups[0]["params"]
        expo_diffusion.gradient_step(optimizer, sum((p.sum() for p in parameters), torch.tensor(0.0)))
    return Run(args, Logger(args, "expo_diffusion"), agent, optimizers, offline, online)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--task", "antmaze-large-play", "--total-timesteps", str(ROWS), "--run-dir", folder]
        run = open_run(folder, *words)
        print(f"parameters {sum(p.numel() for p in run.agent.parameters()):,}")
        run.online.data.obs.normal_()
        for rows, what in ((5_000, "5,000 new rows"), (10_000, "5,000 new rows"), (ROWS, "990,000 new rows")):
            run.online.size = run.step = rows
            begin = time.perf_counter()
            run._save()
            print(f"checkpoint with {what}: {time.perf_counter() - begin:.2f} s")
        run.logger.close()
        for name in ("checkpoint.pt", "replay.bin"):
            print(f"{name}: {human_size((Path(folder) / name).stat().st_size)}")
        begin = time.perf_counter()
        open_run(folder, "--resume", folder).logger.close()
        print(f"resume: {time.perf_counter() - begin:.2f} s")


if __name__ == "__main__":
    main()
