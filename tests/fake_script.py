"""Stands for a script in the tests of the benchmark: the same files, signals and words, in milliseconds.

Flags: --task, --seed, --run-dir or --resume of a grid; --steps N; --sleep S after every step; --fail SEED;
--nogpu YES refuses to start.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(words: list[str]) -> None:
    flags = dict(zip(words[::2], words[1::2], strict=True))
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    if "--nogpu" in flags:
        print("error: --device cuda: torch finds no CUDA here", file=sys.stderr)
        sys.exit(2)
    folder, last = Path(flags.get("--resume") or flags["--run-dir"]), -1
    record = {"script": "fake_script", "args": {}, "versions": {"commit": "c"}, "command": ["fake_script.py", *words]}
    if "--resume" in flags:
        if not (folder / "checkpoint.pt").read_text().isdecimal():
            print(f"error: --resume {folder}: no checkpoint to go on from", file=sys.stderr)
            sys.exit(2)
        last = int((folder / "checkpoint.pt").read_text())
        record = json.loads((folder / "args.json").read_text())
        print(f"resumed after step {last}", flush=True)
    else:
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(record))
        (folder / "metrics.csv").write_text("step,seconds,eval/success_rate,eval/base_success_rate\n")
    if flags.get("--fail") == flags["--seed"]:
        sys.exit("error: it fails")
    for step in range(last + 1, int(flags["--steps"])):
        with open(folder / "metrics.csv", "a") as file:
            file.write(f"{step},{step / 10},{step / int(flags['--steps'])},0.1\n")
        time.sleep(float(flags.get("--sleep", 0)))
        (folder / "checkpoint.pt").write_text(str(step))
        if signals:
            print(f"stopped by SIGTERM after step {step}", flush=True)
            sys.exit(143)
    record |= {"finished": int(flags["--steps"]), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    (folder / "args.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
