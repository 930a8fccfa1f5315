"""Tables and learning curves from the results of one or more grids.

    python benchmark/plot.py benchmark/results/mazes --out docs/images/mazes.png
    python benchmark/plot.py benchmark/results/mazes benchmark/results/pen --level 0.5 --out both.png
    python benchmark/plot.py benchmark/results/mazes --metrics edit/alpha edit/entropy --out edits.png

Curves are interquartile means over seeds with 95 % bootstrap intervals. "Steps to 90 %" is the first evaluation with
that success, counted in environment steps, 0 if it is the one before the first; "seconds" is the run's own clock then,
everything before included. A level that is not reached is infinitely far. One lucky evaluation is not yet a policy:
"held" is the first of three evaluations in a row whose mean is 90 %. docs/benchmark.md defines the rest.
"""

import csv
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not as a module

from benchmark.grid import ROOT, read_grid
from utils.errors import InputError, exit_on_input_error
from utils.files import reason
from utils.logger import read_record

# Okabe-Ito, readable for the colour-blind; lines and markers tell them apart in black and white.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C"]
LINES, MARKERS = ["-", "--", "-.", ":"], "osD^vPX*"

# The main comparison: each of these has the same colour in every figure.
KNOWN = ["expo_diffusion", "expo_flow", "expo_finetune", "no_edit", "rlpd", "idql", "diffusion_ql", "base_alone"]

LEVELS = [(0.5, 1), (0.8, 1), (0.9, 1), (0.9, 3)]  # success, and over how many evaluations in a row

Results = dict[str, dict[str, dict[int, "Curve"]]]  # task -> method -> seed -> curve


@dataclass
class Curve:
    """Evaluations of one run: steps, seconds, success and mean actions per episode (nan where not logged), all (n,),
    environment steps >= 0 only."""

    steps: np.ndarray
    seconds: np.ndarray
    success: np.ndarray
    base_success: np.ndarray
    length: np.ndarray

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
        lengths = np.diff(np.minimum(self.steps, steps), append=min(self.steps[-1], steps))
        return float(self.success[early].min()), float(lengths[low].sum())


def read_curve(path: Path, key: str = "eval/success_rate") -> Curve:
    """The evaluations in a metrics.csv.

    Raises:
        InputError: it cannot be read, is cut or no table of numbers, or holds no evaluation.
    """
    needed = ["step", "seconds", key]
    shown = [*needed, "eval/base_success_rate", key.replace("success_rate", "length")]
    columns: dict[str, list[float]] = {name: [] for name in shown}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval=None)
            absent = [name for name in needed if name not in (reader.fieldnames or [])]
            if absent:
                raise InputError(f"{path} has no column {absent[0]!r}")
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(f"{path}, line {reader.line_num}: not as many values as columns")
                if row[key] and float(row["step"]) >= 0:
                    for name, values in columns.items():
                        values.append(float(row.get(name) or "nan"))
                    if not all(math.isfinite(columns[name][-1]) for name in needed):
                        raise InputError(f"{path}, line {reader.line_num}: a value is missing or not finite")
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}, line {reader.line_num}: {reason(error)}") from None
    curve = Curve(*(np.array(columns[name]) for name in shown))
    if len(curve.steps) == 0:
        raise InputError(f"{path} holds no evaluation ({key} at step 0 or later)")
    if (np.diff(curve.steps) <= 0).any():
        raise InputError(f"{path}: the steps of the evaluations do not rise")
    return curve


def read_results(folder: Path) -> Results:
    """All curves in <folder>/<task>/<method>/seed<n>/metrics.csv, by seed; of `base_alone` those of its base policy.

    Raises:
        InputError: there are none, or one is broken.
    """
    results: Results = {}
    for path in sorted(folder.glob("*/*/seed*/metrics.csv")):
        task, method, seed = path.parts[-4:-1]
        if seed[4:].isdecimal():
            # Of a run without critics the policy without critics counts.
            key = "eval/base_success_rate" if method == "base_alone" else "eval/success_rate"
            results.setdefault(task, {}).setdefault(method, {})[int(seed[4:])] = read_curve(path, key)
    if not results:
        raise InputError(f"{folder} holds no <task>/<method>/seed<n>/metrics.csv")
    return {task: {m: dict(sorted(c.items())) for m, c in methods.items()} for task, methods in results.items()}


def read_metric(path: Path, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps (n,) and values (n,) of one column of a metrics.csv that `read_curve` has read; None if it is not there.

    Offline steps are below 0.

    Raises:
        InputError: it holds something that is no number.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        found = [(float(row["step"]), float(row[key])) for row in rows if row.get(key)]
    except ValueError as error:
        raise InputError(f"{path}, column {key!r}: {reason(error)}") from None
    steps, values = np.array(found).reshape(-1, 2).T
    return (steps, values) if found else None


def expected_seeds(results: Results, grid: Path | None) -> dict[tuple[str, str], set[int]]:
    """(task, method) -> the seeds that there should be: the grid's; without one, all that any method of a task has."""
    expected: dict[tuple[str, str], set[int]] = {}
    if grid is not None:
        for run in read_grid(grid):
            expected.setdefault((run.task, run.method), set()).add(run.seed)
    methods = {method for by_method in results.values() for method in by_method}
    for task, by_method in results.items():
        seeds = {seed for curves in by_method.values() for seed in curves}
        for method in methods if grid is None else by_method:
            expected.setdefault((task, method), seeds)
    return expected


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


def final(curves: list[Curve], column: str = "success") -> float:
    """Interquartile mean over seeds of the mean of the last five evaluations; `column` is success or length."""
    return float(interquartile_mean(np.array([getattr(curve, column)[-5:].mean() for curve in curves])))


def step_ratio(
    curves: list[Curve], against: list[Curve], level: float = 0.9, samples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """How many times fewer environment steps to a level than `against`, and a 95 % bootstrap interval over seeds.

    The ratio of the medians over seeds, theirs / ours. To every count of steps one evaluation interval is added: an
    evaluation cannot tell steps apart that lie between two of them, and step 0 has a ratio. Infinite if only they do
    not reach the level, 0 if only we do not, nan if nobody does; in the interval nan is 0 below and infinite above.
    """
    gaps = [np.diff(curve.steps).max() for curve in [*curves, *against] if len(curve.steps) > 1]
    if not gaps:
        return math.nan, 0.0, math.inf
    rng = np.random.default_rng(seed)
    medians, draws = [], []
    for side in (against, curves):
        steps = np.array([curve.first(level)[0] for curve in side]) + max(gaps)
        medians.append(np.median(steps))
        draws.append(np.median(steps[rng.integers(len(steps), size=(samples, len(steps)))], axis=1))
    with np.errstate(invalid="ignore"):
        ratio, ratios = medians[0] / medians[1], draws[0] / draws[1]
    low = np.quantile(np.nan_to_num(ratios, nan=0.0, posinf=math.inf), 0.025, method="lower")
    high = np.quantile(np.nan_to_num(ratios, nan=math.inf, posinf=math.inf), 0.975, method="higher")
    return float(ratio), float(low), float(high)


def number(value: float, digits: int = 0) -> str:
    """For a cell of a table: infinite is ∞, nan is -."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-" if math.isnan(value) else "∞"


def median_of(values: list[float]) -> str:
    """Median over seeds, and in how many of them it is finite if not in all."""
    reached = sum(map(math.isfinite, values))
    text = number(float(np.median(values)))
    return text if reached == len(values) else f"{text} ({reached}/{len(values)})"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def table(
    methods: dict[str, dict[int, Curve]], order: list[str], expected: dict[str, int], against: str, level: float
) -> str:
    """A row per method: medians over seeds; a count in brackets where not all seeds got there."""
    head = ["method", "seeds", "base policy alone at 0", "at 0", "steps to 50 %", "80 %", "90 %", "90 % held"]
    ratio_head = f"times fewer steps to {100 * level:.0f} % than {against}"
    head += ["lowest", "final", "area", "actions, final", *([ratio_head] if against in methods else [])]
    rows = []
    for method in order:
        curves = list(methods[method].values())
        cells = [method, count_of(len(curves), expected[method])]
        cells += [number(float(np.median([c.base_success[0] for c in curves])), 2)]
        cells += [number(float(np.median([c.success[0] for c in curves])), 2)]
        cells += [median_of([c.first(*rung)[0] for c in curves]) for rung in LEVELS]
        cells += [number(float(np.median([c.success.min() for c in curves])), 2)]
        cells += [number(final(curves), 2)]
        cells += [number(float(np.median([area(c) for c in curves])), 2)]
        cells += [number(final(curves, "length"), 1)]
        if against in methods and method != against:
            ratio, low, high = step_ratio(curves, list(methods[against].values()), level)
            cells += [f"{number(ratio, 2)} ({number(low, 2)} to {number(high, 2)})"]
        elif against in methods:
            cells += ["1"]
        rows.append(cells)
    return markdown(head, rows)


def seconds_table(methods: dict[str, dict[int, Curve]], order: list[str]) -> str:
    """A row per method: median seconds over seeds."""
    rows = []
    for method in order:
        curves = methods[method].values()
        cells = [median_of([c.first(*level)[1] for c in curves]) for level in LEVELS]
        rows.append([method, *cells, median_of([float(c.seconds[-1]) for c in curves])])
    return markdown(["method", "seconds to 50 %", "80 %", "90 %", "90 % held", "last evaluation"], rows)


def summary_table(results: Results, order: list[str]) -> str:
    """A row per task: the final success of every method; the best, and those within .05 of it, are bold."""
    rows = []
    for task, methods in results.items():
        values = {method: final(list(curves.values())) for method, curves in methods.items()}
        close = max(values.values()) - 0.05 - 1e-9
        words = {method: f"**{value:.2f}**" if value >= close else f"{value:.2f}" for method, value in values.items()}
        rows.append([task, *(words.get(method, "-") for method in order)])
    return markdown(["final success", *order], rows)


def seed_table(curves: dict[int, Curve]) -> str:
    """A row per seed of one method."""
    head = ["seed", "base policy alone at 0", "at 0", "steps to 90 %", "90 % held", "s to 90 %"]
    head += ["lowest of the first 1,000 steps", "of them below half of the base policy", "final (last 5 evaluations)"]
    head += ["every evaluation"]
    rows = []
    for seed, curve in curves.items():
        steps, seconds = curve.first(0.9)
        lowest, below = curve.below_half(1000)
        cells = [str(seed), number(curve.base_success[0], 2), number(curve.success[0], 2), number(steps)]
        cells += [number(curve.first(0.9, 3)[0]), number(seconds)]
        cells += [number(lowest, 2), number(below), number(curve.success[-5:].mean(), 2)]
        rows.append([*cells, " ".join(number(success, 2) for success in curve.success)])
    return markdown(head, rows)


def metric_table(folder: Path, methods: dict[str, dict[int, Curve]], order: list[str], metrics: tuple[str, ...]) -> str:
    """A row per method: of every metric the last value, median over seeds."""
    rows = []
    for method in order:
        cells = [method]
        for metric in metrics:
            places = [folder / method / f"seed{seed}" / "metrics.csv" for seed in methods[method]]
            values = [found[1][-1] for path in places if (found := read_metric(path, metric))]
            cells.append(f"{np.median(values):.3g}" if values else "-")
        rows.append(cells)
    return markdown(["method", *(f"{metric}, last" for metric in metrics)], rows)


def count_of(found: int, expected: int) -> str:
    """5, or "3 of 5" where seeds are missing."""
    return str(found) if found >= expected else f"{found} of {expected}"


def family(method: str) -> str:
    """The method of the main comparison that this one is a change of (rlpd_cold, rlpd+two), else its own name."""
    name = method.split("+")[0]
    return next((known for known in KNOWN if name.startswith(f"{known}_")), name)


def line_styles(order: list[str]) -> dict[str, dict[str, Any]]:
    """method -> colour, line and marker.

    Changes of a method (method+variant, or method_change of those in KNOWN) share its colour, and differ from it by the
    line and a hollow marker. Methods in KNOWN have their own colours where no others are drawn.
    """
    families = list(dict.fromkeys(map(family, order)))
    variants = list(dict.fromkeys(method.partition("+")[2] for method in order))
    places = KNOWN if set(families) <= set(KNOWN) else families
    members: Counter[str] = Counter()
    styles = {}
    for method in order:
        index, variant = places.index(family(method)), variants.index(method.partition("+")[2])
        member = members[family(method)]  # how many of its family come before it
        members[family(method)] += 1
        line = variant if len(variants) > 1 else index + index // 8 + member
        styles[method] = {"color": COLORS[index % 8], "linestyle": LINES[line % 4], "lw": 1.8}
        styles[method] |= {"marker": MARKERS[index % 8], "markersize": 4.5}
        if member and len(variants) == 1:
            styles[method]["markerfacecolor"] = "white"
    return styles


def draw(axis: Any, curves: list[tuple[np.ndarray, np.ndarray]], style: dict[str, Any], name: str, label: str) -> None:
    """Interquartile mean and interval over seeds of curves (steps (n,), values (n,)).

    Raises:
        InputError: they do not share their steps.
    """
    steps, values = curves[0][0], [curve[1] for curve in curves]
    if any(not np.array_equal(curve[0], steps) for curve in curves):
        raise InputError(f"{name}: its seeds were evaluated at different steps; no mean can be drawn")
    if len(steps) < 2:  # imitation only
        line = {key: style[key] for key in ("color", "linestyle", "lw")}
        axis.axhline(interquartile_mean(np.stack(values))[0], label=label, **line)
        return
    axis.plot(steps, interquartile_mean(np.stack(values)), label=label, markevery=max(len(steps) // 8, 1), **style)
    axis.fill_between(steps, *bootstrap(np.stack(values)), color=style["color"], alpha=0.13, lw=0)


def plot(
    results: Results,
    order: list[str],
    expected: dict[tuple[str, str], set[int]],
    out: Path,
    folders: dict[str, Path],
    *metrics: str,
) -> None:
    """A row of panels per task: success, then one panel for each of the `metrics`; `out` gets the picture.

    Without metrics, a panel per task, two or three side by side. `folders` has the results of each task.

    Raises:
        InputError: the seeds of a method were evaluated at different steps, or nobody logged a metric.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # With metrics, a task is a row; without, a panel.
    columns = 2 if len(results) == 4 else min(len(results), 3)
    shape = (len(results), 1 + len(metrics)) if metrics else (math.ceil(len(results) / columns), columns)
    size = (4.2 * shape[1], 3.4 * shape[0] + 1.2) if metrics else (5.6 * shape[1], 4.8 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, sharey=not metrics)
    for axis in [] if metrics else axes.flat[len(results) :]:
        axis.axis("off")
    styles = line_styles(order)
    for index, (task, methods) in enumerate(results.items()):
        panels = axes[index] if metrics else [axes.flat[index]]
        for method in (method for method in order if method in methods):
            curves, name = methods[method], f"{task}/{method}"
            seeds = count_of(len(curves), len(expected[task, method].union(curves)))
            label = f"{method} ({seeds} seed{'s' if seeds != '1' else ''})"
            draw(panels[0], [(curve.steps, curve.success) for curve in curves.values()], styles[method], name, label)
            if len(order) == 1 and all(np.isfinite(curve.base_success).all() for curve in curves.values()):
                base = [(curve.steps, curve.base_success) for curve in curves.values()]  # there is room for it
                style = styles[method] | {"color": COLORS[1], "linestyle": "--"}
                draw(panels[0], base, style, name, f"its base policy alone ({seeds} seeds)")
            for axis, metric in zip(panels[1:], metrics, strict=True):
                places = [folders[task] / method / f"seed{seed}" / "metrics.csv" for seed in curves]
                logged = [found for path in places if (found := read_metric(path, metric))]
                if logged:  # not by every script
                    draw(axis, logged, styles[method], f"{name}, {metric}", label)
        panels[0].set(title=task, ylim=(-0.03, 1.03), ylabel="success rate (interquartile mean, 95 % interval)")
        for axis, metric in zip(panels[1:], metrics, strict=True):
            if not axis.lines:
                raise InputError(f"--metrics {metric}: no run of {task} has logged it")
            axis.set(title=metric)
            if metric == "edit/alpha":
                axis.set_yscale("log")
        for axis in panels:
            axis.set(xlabel="environment steps")
            axis.locator_params(axis="x", nbins=6)
            axis.grid(alpha=0.25)
        if not metrics:
            panels[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8.5)
    figure.tight_layout()
    if metrics:
        lines, names = axes[0][0].get_legend_handles_labels()
        figure.legend(lines, names, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5, frameon=False, fontsize=9)
    else:
        for axis in axes[:, 1:].flat:
            axis.set_ylabel("")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140, bbox_inches="tight")


def print_versions(results: tuple[Path, ...]) -> None:
    """The versions that the runs were made with: all, if they differ."""
    paths = [path for folder in results for path in sorted(folder.glob("*/*/seed*/args.json"))]
    records = [read_record(path.parent) for path in paths]
    versions = Counter(str(record.get("versions", "unknown")) for record in records)
    for words, runs in versions.items():
        print(f"versions ({runs} of {len(records)} runs): {words}")
    if len(versions) > 1:
        print("warning: the runs were not all made with the same versions")
    print()


def gather(
    folders: tuple[Path, ...], grid: Path | None
) -> tuple[Results, dict[tuple[str, str], set[int]], dict[str, Path]]:
    """The curves of several grids, the seeds that there should be of (task, method), and the folder of each task.

    Raises:
        InputError: a folder has no results, a broken one, or a task that another has too.
    """
    found: Results = {}
    expected: dict[tuple[str, str], set[int]] = {}
    places: dict[str, Path] = {}
    for folder in folders:
        part = read_results(folder)
        twice = [task for task in part if task in found]
        if twice:
            raise InputError(f"{twice[0]} is in {places[twice[0]].parent} and in {folder}; give one of them")
        named = ROOT / "benchmark" / "grids" / f"{folder.resolve().name}.toml"
        expected |= expected_seeds(part, grid or (named if named.exists() else None))
        places |= {task: folder / task for task in part}
        found |= part
    return found, expected, places


def main(
    results: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path | None = None,
    per_seed: bool = False,
    grid: Path | None = None,
    against: str = "rlpd",
    level: float = 0.9,
    metrics: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
) -> None:
    """Prints tables per task and, with --out, writes the learning curves.

    Args:
        results: folders of benchmark/results, one or more.
        out: file for the picture (png, pdf, svg).
        per_seed: print a table with a row per seed, too.
        grid: the grid, to know which runs are missing; unset: the one of the results' name in benchmark/grids.
        against: the method that steps to the level are compared with.
        level: the success whose steps are compared.
        metrics: columns of metrics.csv to draw beside success, as edit/alpha; below step 0 is what is learned offline.
        methods: only these; unset: all.
    """
    if not results:
        raise InputError("which results? As in: python benchmark/plot.py benchmark/results/mazes")
    if not 0 < level <= 1:
        raise InputError(f"--level {level} must be a success rate, above 0 and at most 1")
    found, expected, places = gather(results, grid)
    print_versions(results)
    unknown = [method for method in methods if not any(method in by_method for by_method in found.values())]
    if unknown:
        raise InputError(f"--methods {unknown[0]}: {' '.join(map(str, results))} has no such method")
    if methods:
        found = {
            task: {m: curves for m, curves in by_method.items() if m in methods} for task, by_method in found.items()
        }
        expected = {key: seeds for key, seeds in expected.items() if key[1] in methods}
    order = list(dict.fromkeys(method for methods in found.values() for method in methods))
    rank = {method: KNOWN.index(family(method)) for method in order if family(method) in KNOWN}
    order.sort(key=lambda method: (rank.get(method, len(KNOWN)), method))
    for task, curves in found.items():
        here = [method for method in order if method in curves]
        counts = {method: len(expected[task, method].union(curves[method])) for method in here}
        print(f"{task}\n\n{table(curves, here, counts, against, level)}\n\n{seconds_table(curves, here)}\n")
        if metrics:
            print(f"{metric_table(places[task], curves, here, metrics)}\n")
        for method in here if per_seed else []:
            print(f"{method}, by seed\n\n{seed_table(curves[method])}\n")
    if len(found) > 1:
        print(f"{summary_table(found, order)}\n")
    for (task, method), seeds in expected.items():
        missing = sorted(seeds - set(found.get(task, {}).get(method, {})))
        if missing:
            print(f"MISSING {task}/{method}: seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}")
    if out:
        plot(found, order, expected, out, places, *metrics)
        print(f"written: {out}")


if __name__ == "__main__":
    with exit_on_input_error():
        tyro.cli(main)
