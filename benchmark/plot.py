"""Tables and learning curves from the results of a grid.

    python benchmark/plot.py benchmark/results/mazes --out docs/images/mazes.png

Curves are interquartile means over seeds with 95 % bootstrap intervals. "Steps to 90 %" is the first evaluation with
that success, counted in environment steps; "s to 90 %" is the run's own clock then, everything before included. One
lucky evaluation is not yet a policy: "held" is the first of three evaluations in a row whose mean is 90 %.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

# Okabe-Ito, readable for the colour-blind; with the line styles also in black and white.
STYLES = [
    ("#0072B2", "-"),
    ("#D55E00", "-"),
    ("#009E73", "-"),
    ("#E69F00", "--"),
    ("#CC79A7", "-."),
    ("#56B4E9", ":"),
    ("#000000", "--"),
    ("#8C8C8C", ":"),
]


@dataclass
class Curve:
    """Evaluations of one run: steps, seconds and success, all (n,), environment steps >= 0 only."""

    steps: np.ndarray
    seconds: np.ndarray
    success: np.ndarray
    base_success: np.ndarray

    def first(self, level: float, evaluations: int = 1) -> tuple[float, float]:
        """Environment steps and seconds at the first evaluation with this success; infinite if there is none.

        With several `evaluations`, the mean of it and those that follow it must reach the level.
        """
        means = np.convolve(self.success, np.full(evaluations, 1 / evaluations), "valid")
        reached = np.flatnonzero(means >= level - 1e-9) if len(self.success) >= evaluations else []
        if len(reached) == 0:
            return math.inf, math.inf
        return float(self.steps[reached[0]]), float(self.seconds[reached[0]])

    def below_half(self, steps: float) -> tuple[float, float]:
        """Lowest success of the first `steps` environment steps, and for how many of them (from one evaluation to the
        next) it was below half of the base policy's own at step 0."""
        early = self.steps <= steps
        low = self.success < self.base_success[0] / 2
        lengths = np.diff(self.steps, append=self.steps[-1])
        return float(self.success[early].min()), float(lengths[early & low].sum())


def read_curve(path: Path, key: str = "eval/success_rate") -> Curve:
    """The evaluations in a metrics.csv."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(key) and int(row["step"]) >= 0]
    column = lambda name: np.array([float(row.get(name) or "nan") for row in rows])  # noqa: E731
    return Curve(column("step"), column("seconds"), column(key), column("eval/base_success_rate"))


def read_results(folder: Path) -> dict[str, dict[str, list[Curve]]]:
    """task -> method -> curves by seed, from <folder>/<task>/<method>/seed<n>/metrics.csv."""
    results: dict[str, dict[str, list[Curve]]] = {}
    for path in sorted(folder.glob("*/*/seed*/metrics.csv")):
        task, method = path.parts[-4], path.parts[-3]
        results.setdefault(task, {}).setdefault(method, []).append(read_curve(path))
    return results


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along axis 0, quartiles weighted by the share of them that lies inside."""
    values = np.sort(values, axis=0)
    n = len(values)
    edges = np.arange(n + 1) / n
    weights = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    return np.tensordot(weights / weights.sum(), values, axes=1)


def bootstrap(values: np.ndarray, samples: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the interquartile mean over axis 0 (the seeds)."""
    rng = np.random.default_rng(seed)
    draws = values[rng.integers(len(values), size=(samples, len(values)))]
    means = np.stack([interquartile_mean(draw) for draw in draws])
    return np.quantile(means, 0.025, axis=0), np.quantile(means, 0.975, axis=0)


def area(curve: Curve) -> float:
    """Mean success over the environment steps of the run (area under the curve / its length)."""
    if len(curve.steps) < 2:
        return float(curve.success.mean())
    return float(np.trapezoid(curve.success, curve.steps) / (curve.steps[-1] - curve.steps[0]))


def median_of(values: list[float]) -> str:
    """Median over seeds, "-" where it is infinite; how many seeds got there if not all."""
    reached = sum(map(math.isfinite, values))
    middle = float(np.median(values))
    text = f"{middle:,.0f}" if math.isfinite(middle) else "-"
    return text if reached == len(values) else f"{text} ({reached}/{len(values)})"


def table(methods: dict[str, list[Curve]], order: list[str]) -> str:
    """A Markdown table: medians over seeds; a count in brackets where not all seeds got there."""
    head = ["method", "seeds", "base policy alone at 0", "at 0"]
    head += ["steps to 80 %", "90 %", "90 % held", "s to 80 %", "90 %", "90 % held", "final", "area"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in order:
        curves = methods[method]
        cells = [method, str(len(curves))]
        base = float(np.median([c.base_success[0] for c in curves]))
        cells += ["" if math.isnan(base) else f"{base:.2f}", f"{np.median([c.success[0] for c in curves]):.2f}"]
        firsts = [[curve.first(*level) for curve in curves] for level in ((0.8,), (0.9,), (0.9, 3))]
        cells += [median_of([first[i] for first in level]) for i in (0, 1) for level in firsts]
        final = interquartile_mean(np.array([c.success[-3:].mean() for c in curves]))
        cells += [f"{float(final):.2f}", f"{np.median([area(c) for c in curves]):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seed_table(curves: list[Curve]) -> str:
    """A Markdown table with a row per seed of one method."""
    head = ["seed", "base policy alone at 0", "at 0", "steps to 90 %", "90 % held", "s to 90 %"]
    head += ["lowest of the first 1,000 steps", "of them below half of the base policy", "final (last 5 evaluations)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for seed, curve in enumerate(curves, 1):
        steps, seconds = curve.first(0.9)
        cells = [f"{curve.base_success[0]:.2f}", f"{curve.success[0]:.2f}", f"{steps:,.0f}"]
        cells += [f"{curve.first(0.9, 3)[0]:,.0f}", f"{seconds:.0f}"]
        lowest, below = curve.below_half(1000)
        cells += [f"{lowest:.2f}", f"{below:,.0f}", f"{curve.success[-5:].mean():.2f}"]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list[Curve]]], order: list[str], out: Path) -> None:
    """One panel per task; `out` gets the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.6 * len(results), 4.2), squeeze=False, sharey=True)
    for axis, (task, methods) in zip(axes[0], results.items(), strict=True):
        for method, (color, style) in zip(order, STYLES * 3, strict=False):
            curves = methods.get(method, [])
            if not curves or min(len(c.steps) for c in curves) < 2:
                continue
            length = min(len(c.steps) for c in curves)
            values = np.stack([c.success[:length] for c in curves])
            low, high = bootstrap(values)
            label = f"{method} ({len(curves)} seeds)"
            axis.plot(curves[0].steps[:length], interquartile_mean(values), style, color=color, lw=1.8, label=label)
            axis.fill_between(curves[0].steps[:length], low, high, color=color, alpha=0.13, lw=0)
            if len(order) == 1:  # room for its base policy
                base = interquartile_mean(np.stack([c.base_success[:length] for c in curves]))
                axis.plot(
                    curves[0].steps[:length], base, "--", color=STYLES[1][0], lw=1.8, label="its base policy alone"
                )
        axis.set(title=task, xlabel="environment steps", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("success rate (interquartile mean, 95 % interval)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(4, max(len(labels), 1)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06 + 0.05 * (len(labels) // 5), 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140)


def main(results: Annotated[Path, tyro.conf.Positional], out: Path | None = None, per_seed: bool = False) -> None:
    """Prints a table per task and, with --out, writes the learning curves.

    Args:
        results: a folder of benchmark/results.
        out: file for the picture (png, pdf, svg).
        per_seed: print a table with a row per seed, too.
    """
    found = read_results(results)
    if not found:
        raise SystemExit(f"error: {results} holds no <task>/<method>/seed<n>/metrics.csv")
    args_file = next(iter(sorted(results.glob("*/*/seed*/args.json"))))
    print(f"versions: {json.loads(args_file.read_text())['versions']}\n")
    order = list(dict.fromkeys(method for methods in found.values() for method in methods))
    known = ["expo_diffusion", "expo_flow", "expo_finetune", "no_edit", "rlpd", "idql", "diffusion_ql", "base_alone"]
    order.sort(key=lambda method: (known.index(method) if method in known else len(known), method))
    for task, methods in found.items():
        print(f"{task}\n\n{table(methods, [m for m in order if m in methods])}\n")
        for method in order if per_seed else []:
            print(f"{method}, by seed\n\n{seed_table(methods[method])}\n")
    if out:
        plot(found, order, out)
        print(f"written: {out}")


if __name__ == "__main__":
    tyro.cli(main)
