"""Tables and learning curves, from the results of grids or from the folders of single runs.

    python benchmark/plot.py benchmark/results/mazes --metrics edit/alpha --out mazes.png
    python benchmark/plot.py runs/pointmaze* --per-seed

Curves are interquartile means over seeds with 95 % bootstrap intervals. docs/benchmark.md defines all columns.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds `benchmark` when this file is run

from benchmark.grid import GIVEN, NEUTRAL, flag_values, read_record
from tools import one_line_errors
from utils import InputError

# Okabe and Ito's colours, readable for the colour-blind. Lines and markers tell curves apart in black and white.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C"]
LINES, MARKERS = ["-", "--", "-.", ":"], "osD^vPX*"
# These methods have the same colour in every figure. Others take the colours that are free in a figure.
KNOWN = ["expo_diffusion", "expo_flow", "expo_finetune", "no_edit", "rlpd", "idql", "diffusion_ql", "base_alone"]


class Curve(NamedTuple):
    """The rows of one key of a metrics.csv."""

    steps: np.ndarray  # (n,) environment steps; offline updates are below 0
    seconds: np.ndarray  # (n,) since the data was ready
    values: np.ndarray  # (n,)


Seeds = dict[int, dict[str, Curve]]  # seed -> key -> curve
Results = dict[str, dict[str, Seeds]]  # task -> method -> seeds


def read_metrics(path: Path, until: float = np.inf) -> dict[str, Curve]:
    """Key -> curve, of one metrics.csv up to the step `until`."""
    head, *lines = path.read_bytes().splitlines() or [b""]
    if head != b"step,seconds,key,value":
        raise InputError(f"{path} does not start with step,seconds,key,value: no run of these scripts wrote it")
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for number, line in enumerate(lines, 2):
        try:
            step, seconds, key, value = line.decode().split(",")
            if float(step) <= until:
                rows.setdefault(key, []).append((float(step), float(seconds), float(value)))
        except ValueError:
            raise InputError(f"{path}, line {number} is not step,seconds,key,value: {line[:60]!r}") from None
    return {key: Curve(*np.array(values).T) for key, values in rows.items()}


def read_results(folders: tuple[Path, ...], until: float = np.inf) -> Results:
    """All curves of grids' results (<task>/<method>/seed<n>/metrics.csv) and of single runs' folders."""
    found: Results = {}
    commits, first_of = Counter[str](), dict[Any, dict[str, Any]]()
    for folder in folders:
        paths = sorted(folder.glob("*/*/seed*[0-9]/metrics.csv")) or sorted(folder.glob("metrics.csv"))
        if not paths:
            raise InputError(f"{folder} holds no metrics.csv, and no <task>/<method>/seed<n>/metrics.csv")
        for path in paths:
            record = read_record(path.parent)
            args, start = record.get("args", {}), (record.get("starts") or [{"command": [""], "commit": "unknown"}])[0]
            task, method, seed = path.absolute().parts[-4:-1]
            if path.parent == folder:  # a single run: its script and its flags are its name
                flags = flag_values(start["command"][1:])
                task, seed = args.get("task") or args.get("env_id", "unknown"), args.get("seed", 0)
                own = [f"{flag} {' '.join(flags[flag])}" for flag in flags if flag not in GIVEN | NEUTRAL]
                method = " ".join([record.get("script", folder.name), *own])
            seeds = found.setdefault(task, {}).setdefault(method, {})
            if (seed := int(str(seed).removeprefix("seed"))) in seeds:
                raise InputError(f"{path.parent}: {task}, {method}, seed {seed} is there twice; leave one of them out")
            seeds[seed] = keys = read_metrics(path, until)
            if method.startswith("base_alone"):  # its base policy counts, not the choice of untrained critics
                keys.pop("eval/success_rate", None)
                keys |= {key.replace("base_", ""): keys[key] for key in keys if key.startswith("eval/base_")}
            settings = {k: v for k, v in args.items() if f"--{k.replace('_', '-')}" not in GIVEN | NEUTRAL}
            settings["last step"] = max((curve.steps[-1] for curve in keys.values()), default=0)
            first = first_of.setdefault((task, method), settings)
            if differing := [key for key in first | settings if first.get(key) != settings.get(key)]:
                print(f"warning: {path.parent} differs from the first seed of {method} in {', '.join(differing)}")
            commits[start["commit"]] += 1
    print("commits: " + ", ".join(f"{commit} ({runs} runs)" for commit, runs in commits.items()))
    return found


def curves(seeds: Seeds, key: str, first: float = -np.inf) -> dict[int, Curve]:
    """Seed -> the rows of one key from step `first` on, if any. An evaluation that reports no success has 0."""
    found = {}
    for seed, keys in sorted(seeds.items()):
        curve = keys.get(key.replace("success_rate", "return"), keys.get(key))
        if curve and key.endswith("success_rate"):
            said = dict(zip(keys[key].steps, keys[key].values, strict=True)) if key in keys else {}
            curve = curve._replace(values=np.array([said.get(step, 0.0) for step in curve.steps]))
        if curve and curve.steps[-1] >= first:
            found[seed] = Curve(*(column[curve.steps >= first] for column in curve))
    return found


def reached(curve: Curve, level: float) -> tuple[float, float]:
    """Environment steps and seconds at the first value of at least `level`; infinite if there is none."""
    places = np.flatnonzero(curve.values >= level - 1e-9)
    return (float(curve.steps[places[0]]), float(curve.seconds[places[0]])) if len(places) else (np.inf, np.inf)


def area(curve: Curve) -> float:
    """The mean over the environment steps of the run: area under the curve by its length."""
    middles, lengths = (curve.values[1:] + curve.values[:-1]) / 2, np.diff(curve.steps)
    return float((middles * lengths).sum() / lengths.sum() if len(lengths) else curve.values.mean())


def final(curve: Curve) -> float:
    """The mean of the last five evaluations."""
    return float(curve.values[-5:].mean())


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along axis 0. A value on the edge of that half counts with the share that is inside."""
    edges = np.arange(len(values) + 1) / len(values)
    weights = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    return np.tensordot(weights / weights.sum(), np.sort(values, axis=0), axes=1)


def bootstrap(values: np.ndarray, samples: int = 2000) -> np.ndarray:
    """95 % interval (2, ...) of the interquartile mean over axis 0, the seeds."""
    draws = values[np.random.default_rng(0).integers(len(values), size=(len(values), samples))]  # (seeds, samples, ...)
    return np.quantile(interquartile_mean(draws), [0.025, 0.975], axis=0)


def interval(values: np.ndarray, sign: str = "") -> str:
    """Interquartile mean over the seeds, and its interval."""
    mean, low, high = (format(value, f"{sign}.2f") for value in (interquartile_mean(values), *bootstrap(values)))
    return f"{mean} ({low} to {high})"


def number(values: list[float], digits: int = 0) -> str:
    """The median over seeds. An infinite one is a level that is not reached; (2/3): two of three seeds reach it."""
    median, finite = np.median(values), np.isfinite(values).sum()
    text = f"{median:,.{digits}f}" if np.isfinite(median) else "∞"
    return text if finite == len(values) else f"{text} ({finite}/{len(values)})"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def table(shown: dict[str, dict[int, Curve]], success: bool, seeds: dict[str, Seeds], metrics: tuple[str, ...]) -> str:
    """One row a method. Final is an interquartile mean over seeds; everything else is a median."""
    head, rows = ["method", "seeds", "final (95 % interval)", "area", "lowest"], []
    head += ["steps to 50 %", "80 %", "90 %", "seconds to 90 %"] if success else []
    for method, by_seed in shown.items():
        found = list(by_seed.values())
        cells = [method, str(len(found)), interval(np.array([final(curve) for curve in found]))]
        cells += [number([area(c) for c in found], 2), number([float(c.values.min()) for c in found], 2)]
        if success:
            cells += [number([reached(curve, level)[0] for curve in found]) for level in (0.5, 0.8, 0.9)]
            cells += [number([reached(curve, 0.9)[1] for curve in found])]
        for metric in metrics:
            last = [curve.values[-1] for curve in curves(seeds[method], metric).values()]
            cells.append(f"{np.median(last):.3g}" if last else "-")
        rows.append(cells)
    return markdown([*head, *(f"{metric}, last" for metric in metrics)], rows)


def differences(shown: dict[str, dict[int, Curve]], less: str, base: dict[str, dict[int, Curve]]) -> str:
    """How far every method is above the method `less`, seed by seed. docs/benchmark.md explains own_base."""
    measures = {"first": lambda c: c.values[0], "lowest": lambda c: c.values.min(), "area": area, "final": final}
    rows = []
    for method, by_seed in shown.items():
        starts = {seed: Curve(*(column[:1] for column in curve)) for seed, curve in base[method].items()}
        others = shown.get(less, starts if less == "own_base" else base[method])
        if method != less and (seeds := by_seed.keys() & others.keys()):
            found = [np.array([f(by_seed[s]) - f(others[s]) for s in sorted(seeds)]) for f in measures.values()]
            rows.append([method, str(len(seeds)), *(interval(values, "+") for values in found)])
    return markdown([f"less {less}", "seeds", *measures], rows)


def style(place: int) -> dict[str, Any]:
    """Colour, line and marker of a method. From the ninth place on colours come again, with another line and marker."""
    other = place + place // 8
    return {"color": COLORS[place % 8], "linestyle": LINES[other % 4], "marker": MARKERS[other % 8], "markersize": 4}


def draw(axis: Any, found: list[Curve], over: str, place: int, **style: Any) -> None:
    """Interquartile mean and interval, at the steps that all seeds share. Markers of curves that coincide alternate."""
    steps = sorted(set.intersection(*(set(curve.steps) for curve in found)))
    rows = [np.isin(curve.steps, steps) for curve in found]
    values = np.stack([curve.values[row] for curve, row in zip(found, rows, strict=True)])
    x = np.median([getattr(curve, over)[row] for curve, row in zip(found, rows, strict=True)], axis=0)
    every = max(len(x) // 6, 1)
    axis.plot(x, interquartile_mean(values), markevery=(place % every, every), lw=1.6, **style)
    axis.fill_between(x, *bootstrap(values), color=style["color"], alpha=0.13, lw=0)


def figure(results: Results, shown: Any, keys: dict[str, str], metrics: tuple[str, ...], marks: Any, out: Path) -> None:
    """One column a task: over steps, over seconds, then a panel for each of the metrics. A single task is one row."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")  # no window
    panels = [("", "steps"), ("", "seconds"), *((metric, "steps") for metric in metrics)]
    shape = (len(panels), len(shown)) if len(shown) > 1 else (1, len(panels))
    whole, axes = plt.subplots(*shape, figsize=(4.4 * shape[1], 3.4 * shape[0]), squeeze=False, layout="tight")
    names = dict.fromkeys(method for methods in shown.values() for method in methods)
    free = iter([i for i in range(8 + len(names)) if i >= 8 or KNOWN[i] not in names])
    places = {name: KNOWN.index(name) if name in KNOWN else next(free) for name in names}
    counts = {name: sorted({len(methods[name]) for methods in shown.values() if name in methods}) for name in names}
    named: dict[str, Any] = {}
    for column, (task, methods) in zip(axes.T if len(shown) > 1 else axes, shown.items(), strict=True):
        for axis, (metric, over) in zip(column, panels, strict=True):
            for method, by_seed in methods.items():
                if found := list((curves(results[task][method], metric) if metric else by_seed).values()):
                    place, label = places[method], f"{method} ({' or '.join(map(str, counts[method]))} seeds)"
                    draw(axis, found, over, place, label=label, **style(place))
            axis.set(xlabel="environment steps" if over == "steps" else over, ylabel=metric or keys[task], title=task)
            axis.grid(alpha=0.25)
            for step, label in marks.items() if over == "steps" else ():
                axis.axvline(step, color="0.4", linestyle=":", label=label)
            named |= {label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    whole.legend(named.values(), named, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=shape[1] + 1, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    whole.savefig(out, dpi=140, bbox_inches="tight")


def main(
    results: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path | None = None,
    per_seed: bool = False,
    metrics: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    less: str = "",
    marks: tuple[float, ...] = (),
    marks_name: str = "marks",
    until: float = np.inf,
) -> None:
    """Prints one table a task, and draws the learning curves with --out.

    Args:
        results: folders of benchmark/results, or folders of runs.
        out: file for the figure (png, pdf, svg).
        per_seed: also print every evaluation of every seed.
        metrics: other keys of metrics.csv to show, for example edit/alpha.
        methods: show only these methods.
        less: also print how far all methods are above this one, or above own_base, own_base_now (docs/benchmark.md).
        marks: vertical lines in the figure, at these environment steps.
        marks_name: what the legend calls them.
        until: leave out everything after this environment step.
    """
    if out and out.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {out} must end with .png, .pdf or .svg")
    found, shown, keys = read_results(results, until), {}, {}
    if unknown := set(methods).difference(*found.values()):
        raise InputError(f"--methods: there is no {unknown.pop()}")
    for task, by_method in found.items():
        names = sorted(by_method.keys() & (methods or by_method), key=lambda n: ([*KNOWN, n].index(n), n))
        if not names:  # another task has them
            continue
        success = any("eval/success_rate" in keys for name in names for keys in by_method[name].values())
        keys[task] = key = "eval/success_rate" if success else "eval/return"
        base = {name: curves(by_method[name], key.replace("/", "/base_"), 0) for name in names}
        parts = {name: curves(by_method[name], key, 0) for name in names}
        shown[task] = {name: by_seed for name, by_seed in parts.items() if by_seed}
        if not shown[task]:
            raise InputError(f"{task}: no run has {key} at step 0 or later")
        if less and less not in (*shown[task], "own_base", "own_base_now"):
            raise InputError(f"--less {less}: {task} shows no such method (it shows {', '.join(shown[task])})")
        solved = ("eval/solved_share",) if task.startswith("adroit") else ()  # the metric of the paper there
        print(f"\n{task}, {key}\n\n{table(shown[task], success, by_method, (*solved, *metrics))}")
        if less:
            print(differences(shown[task], less, base))
        if len({tuple(by_seed) for by_seed in parts.values()}) > 1:
            print(f"warning: {task}: not all methods have the same seeds\n")
        for name, by_seed in shown[task].items() if per_seed else ():
            lines = [[str(seed), " ".join(f"{v:.2f}" for v in curve.values)] for seed, curve in by_seed.items()]
            print(f"{markdown([f'{name}, seed', 'every evaluation'], lines)}")
    if out:
        figure(found, shown, keys, metrics, dict.fromkeys(marks, marks_name), out)


if __name__ == "__main__":
    one_line_errors(lambda: tyro.cli(main))
