"""An hour of the quickstart: does memory stay flat, do files stay closed, does it keep its speed?

    python benchmark/soak.py --minutes 60

Starts `expo_diffusion.py` with more steps than it can do in that time, looks at the process every ten seconds, stops it
with SIGTERM, and prints six rows. The exit code is 1 if, after the first sixth, memory has grown by more than 5 %, more
files are open, or the steps per CPU second (the clock of a shared machine says little) have fallen by more than 10 %.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Look:
    """Seconds since the start, CPU seconds used, environment steps done, resident bytes, open files."""

    seconds: float
    cpu: float
    step: int
    memory: int
    files: int


def look(pid: int, begin: float, run_dir: Path) -> Look:
    """The state of process `pid`; the step is the last one that its log has."""
    with open(f"/proc/{pid}/stat") as file:
        stat = file.read().rpartition(")")[2].split()
    cpu = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    memory = int(stat[21]) * os.sysconf("SC_PAGE_SIZE")
    step = 0
    if (run_dir / "metrics.csv").exists():
        with open(run_dir / "metrics.csv", newline="") as file:
            step = max([int(row["step"]) for row in csv.DictReader(file) if row.get("step")], default=0)
    return Look(time.monotonic() - begin, cpu, step, memory, len(os.listdir(f"/proc/{pid}/fd")))


def sixths(looks: list[Look]) -> list[dict[str, Any]]:
    """A summary of each sixth of the looks: last memory and files, environment steps per second of clock and of CPU."""
    rows, size = [], len(looks) / 6
    for i in range(6):
        part = looks[int(i * size) : int((i + 1) * size) + (i < 5)]
        first, last = part[0], part[-1]
        steps = last.step - first.step
        rows.append(
            {
                "minutes": last.seconds / 60,
                "step": last.step,
                "memory_mb": last.memory / 1e6,
                "files": max(one.files for one in part),
                "steps_per_s": steps / (last.seconds - first.seconds),
                "steps_per_cpu_s": steps / (last.cpu - first.cpu),
            }
        )
    return rows


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """What is not steady after the first sixth."""
    found = []
    if rows[-1]["memory_mb"] > 1.05 * rows[1]["memory_mb"]:
        found.append(f"memory grew from {rows[1]['memory_mb']:.0f} to {rows[-1]['memory_mb']:.0f} MB")
    if max(row["files"] for row in rows[1:]) > rows[1]["files"]:
        found.append(f"open files grew from {rows[1]['files']} to {max(row['files'] for row in rows[1:])}")
    if rows[-1]["steps_per_cpu_s"] < 0.9 * rows[1]["steps_per_cpu_s"]:
        found.append(
            f"steps per CPU second fell from {rows[1]['steps_per_cpu_s']:.1f} to {rows[-1]['steps_per_cpu_s']:.1f}"
        )
    return found


def main(minutes: float = 60, json_file: Path | None = None) -> None:
    """Runs, looks, judges.

    Args:
        minutes: how long the run may take, its start included.
        json_file: also write all looks here.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        words = [sys.executable, "expo_diffusion.py", "--total-timesteps", "1000000", "--run-dir", str(run_dir)]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        begin, looks = time.monotonic(), []
        while time.monotonic() - begin < 60 * minutes and process.poll() is None:
            time.sleep(min(10.0, minutes))
            if process.poll() is None:
                looks.append(look(process.pid, begin, run_dir))
        process.send_signal(signal.SIGTERM)
        _, words_of_the_run = process.communicate()
        code = process.returncode
    online = [one for one in looks if one.step > 0]
    if code != 143 or len(online) < 12:
        raise SystemExit(
            f"error: the run ended with {code} after {len(online)} looks: {words_of_the_run.strip()[-300:]}"
        )
    rows = sixths(online)
    print("| minutes | step | memory, MB | open files | steps per s | steps per CPU s |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['minutes']:.0f}", f"{row['step']:,}", f"{row['memory_mb']:.0f}", f"{row['files']}"]
        print("| " + " | ".join([*cells, f"{row['steps_per_s']:.1f}", f"{row['steps_per_cpu_s']:.1f}"]) + " |")
    if json_file:
        json_file.write_text(json.dumps([vars(one) for one in looks], indent=1) + "\n")
    found = problems(rows)
    if found:
        raise SystemExit("not steady: " + "; ".join(found))
    print("steady")


if __name__ == "__main__":
    tyro.cli(main)
