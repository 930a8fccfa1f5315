"""A roofline picture of what benchmark/throughput.py measured: one panel per JSON file.

    python benchmark/roofline.py benchmark/results/throughput/{paper,quickstart}.json --out docs/images/roofline.png

Across: arithmetic intensity, FLOP of the matrix products per byte that eager torch's operations read and write. Up:
FLOP per second of the parts of an update, as measured. The roof is the machine's own in the same run: a large float32
product, and to the left of it a copy of memory. A part above the slanted roof works in the cache.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not as a module

from benchmark.plot import COLORS, MARKERS
from utils.errors import InputError, exit_on_input_error
from utils.files import reason

NEEDED = ("limits", "parts_s", "parts_flop", "parts_bytes", "update_s", "threads")


def read(path: Path) -> dict[str, Any]:
    """A file of `throughput.py --json`.

    Raises:
        InputError: it is no such file.
    """
    try:
        found = json.loads(path.read_text())
        missing = [key for key in NEEDED if key not in found]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from None
    if missing:
        raise InputError(f"{path} has no {missing[0]!r}; write it with `benchmark/throughput.py --json {path}`")
    return found


def points(found: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Part -> FLOP per byte, FLOP/s, and share of the update's seconds."""
    parts = {part: (found["parts_flop"][part], found["parts_bytes"][part], s) for part, s in found["parts_s"].items()}
    return {p: (flop / moved, flop / s, s / found["update_s"]) for p, (flop, moved, s) in parts.items() if moved and s}


def main(results: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path) -> None:
    """Draws the picture.

    Args:
        results: files of `benchmark/throughput.py --json FILE`, of float32 runs.
        out: the picture (png, pdf, svg).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.8 * len(results), 4.6), squeeze=False)
    for axis, path in zip(axes[0], results, strict=True):
        found = read(path)
        peak, copy = found["limits"]["float32"], found["limits"]["copy"]
        parts = points(found)
        intensity = np.geomspace(min(min(x for x, _, _ in parts.values()), peak / copy) / 3, 300, 200)
        axis.plot(intensity, np.minimum(peak, copy * intensity) / 1e9, color="black", lw=1.5)
        roof = f"float32 product {peak / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.0f} GB/s"
        axis.text(290, peak * 1.08 / 1e9, roof, ha="right", va="bottom", fontsize=9)
        for index, (part, (x, y, share)) in enumerate(parts.items()):
            style = {"color": COLORS[index], "marker": MARKERS[index], "s": 60, "zorder": 3}
            axis.scatter(x, y / 1e9, label=f"{part}: {share:.0%} of the time", **style)
        axis.set(xscale="log", yscale="log", xlabel="FLOP per byte read and written by eager operations")
        axis.set(title=f"{path.stem} ({found['threads']} thread{'s' if found['threads'] > 1 else ''})")
        axis.set_ylim(top=peak * 2 / 1e9)
        axis.grid(alpha=0.25, which="both")
        axis.legend(loc="lower right", fontsize=8.5)
    axes[0][0].set_ylabel("GFLOP/s")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140)
    print(f"written: {out}")


if __name__ == "__main__":
    with exit_on_input_error():
        tyro.cli(main)
