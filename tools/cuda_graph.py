"""Runs a script on a GPU with its whole update as one CUDA graph: the same method, far less waiting for Python.

    python tools/cuda_graph.py --script expo_flow --task antmaze-umaze --seed 1

An update is thousands of small kernels. Without a graph Python starts them one by one, and the GPU waits. The numbers
stay the same up to rounding. All flags but --script go to the script. docs/performance.md has the times.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts when this file is run

from benchmark.ablation import run_changed
from utils import InputError


def cuda_graph(script: Any) -> None:
    """Replaces the script's `update`. Batches of another shape get a graph of their own."""
    update, eager, recorded = script.update, Counter(), {}

    def replayed(agent: Any, optimizers: Any, batch: Any) -> dict[str, Tensor]:
        shape, parts = batch.obs.shape, vars(optimizers).values()
        if eager[shape] < 3:  # these calls allocate what the graph needs, on a stream of their own, as torch asks for
            if not batch.obs.is_cuda:
                raise InputError("tools/cuda_graph.py needs a GPU; run the script itself")
            eager[shape] += 1
            for group in (group for part in parts for group in getattr(part, "param_groups", ())):
                lr = torch.as_tensor(group["lr"], device=batch.obs.device)  # where a replay sees how it decays
                group |= {"capturable": True, "lr": lr}
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                info = update(agent, optimizers, batch)
            main.wait_stream(side)
            return info
        decays = [part for part in parts if isinstance(part, LambdaLR)]
        if shape not in recorded:  # no kernel runs yet, but the decays count this update
            inputs, graph, decays = type(batch)(*(field.clone() for field in batch)), torch.cuda.CUDAGraph(), []
            with torch.cuda.graph(graph):
                recorded[shape] = inputs, graph, update(agent, optimizers, inputs)
        inputs, graph, info = recorded[shape]
        for field, new in zip(inputs, batch, strict=True):
            field.copy_(new)
        graph.replay()
        for decay in decays:  # they are Python, and no part of the graph
            decay.step()
        return info

    script.update = replayed


if __name__ == "__main__":
    run_changed(cuda_graph)
