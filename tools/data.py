"""Looks at offline data, makes it, and fetches it.

    python tools/data.py list                         every task, its data, and whether it lies on this machine
    python tools/data.py inspect FILE                 shapes, episodes, success, returns and problems of a data set
    python tools/data.py replay FILE --task NAME      does the simulator do what the file says?
    python tools/data.py thin FILE OUT --episodes 25  keeps some episodes, drawn at random, of a D4RL-layout file
    python tools/data.py generate NAME                makes a generated data set and prints its path
    python tools/data.py download NAME                fetches the data of a task

FILE may also be a word of --dataset, such as d4rl:door-human-v1; for `inspect` also generated:pointmaze-medium.
"""

import argparse
import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h5py
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demonstrations
from tools import Parser, one_line_errors
from tools.files import own_folder, write_d4rl
from utils import InputError, reason, sources
from utils.data import OPTIONAL, REQUIRED, read_dataset
from utils.envs import make_env
from utils.problems import find_problems
from utils.tasks import TASKS

TRIES = 3


def list_tasks() -> None:
    for name, task in TASKS.items():
        print(f"{name}: {task.about}  (settings: {task.source})")
        for spec in task.dataset:
            if spec.startswith("generated:"):
                print(f"    {spec:<34} made at the start of a run")
                continue
            path, address = sources.locate(sources.split_count(spec)[0])
            here = f"{human_size(path.stat().st_size)} at {path}" if path.exists() else f"not here; from {address}"
            print(f"    {spec:<34} {here}")


def human_size(count: float) -> str:
    """Bytes for people: 812 B, 1.4 MB."""
    power = min(int(np.log10(max(count, 1)) // 3), 3)
    return f"{count / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB')[power]}"


def inspect(args: argparse.Namespace) -> None:
    """Prints what is in a data set; with a task or an environment, as that one reads it."""
    env = None
    if args.task and args.task not in TASKS:
        raise InputError(f"--task {args.task!r} is unknown (known: {', '.join(TASKS)})")
    task = TASKS.get(args.task)
    if env_id := args.env_id or (task.env_id if task else ""):
        settings = task.settings if task else {}
        limit, repeat = settings.get("max_episode_steps", 0), settings.get("action_repeat", 1)
        env = make_env(env_id, args.task, args.max_episode_steps or limit, repeat, args.obs_keys)
    data = read_dataset([args.file], env, args.obs_keys)
    rows, lengths = data.rows, data.episodes[:, 1] - data.episodes[:, 0]
    returns = np.add.reduceat(rows.rewards.astype(float), data.episodes[:, 0])
    spread = [np.quantile(values, [0, 0.5, 1], method="nearest") for values in (lengths, returns)]
    success = "not in the file"
    if data.success is not None:
        success = f"{data.success.sum()} of {len(data.success)} episodes ({data.success.mean():.1%})"
    print(args.file)
    place = "whole file" if sources.split_count(args.file)[1] else "file"
    print(f"  transitions   {len(rows.obs):,} ({data.dropped:,} rows dropped: no successor in the {place})")
    for name, array in (("observations", rows.obs), ("actions", rows.actions)):
        print(f"  {name:<13} {array.shape[1]} wide, {array.min():.4g} to {array.max():.4g}")
    print(f"  rewards       {rows.rewards.min():.4g} to {rows.rewards.max():.4g}, mean {rows.rewards.mean():.4g}")
    print(f"  episodes      {len(lengths):,}, length {' / '.join(map(str, spread[0]))} (least, median, most)")
    print(f"  terminations  {int(rows.terminations.sum()):,}")
    print(f"  returns       {' / '.join(f'{value:.4g}' for value in spread[1])} (least, median, most)")
    print(f"  success       {success}")
    print("  problems      " + ("\n                ".join(find_problems(data, env, [args.file])) or "none found"))


def thin(file: str, out: Path, episodes: int, seed: int) -> None:
    """Writes whole episodes of a D4RL-layout file, drawn at random, to a new file: less data, hence a weaker prior."""
    if out.exists():
        raise InputError(f"{out} is there already; choose another name")
    from tools.replay import read_rows

    path, rows = sources.find_file(file), read_rows(file, ())
    ends = rows["ends"]
    number = np.cumsum(ends) - ends  # of the episode that each row belongs to
    total = int(number[-1]) + 1
    if not 0 < episodes <= total:
        raise InputError(f"--episodes {episodes}: {path} has {total}")
    keep = np.isin(number, np.random.default_rng(seed).choice(total, episodes, replace=False))
    if episodes == 1 and "next_observations" not in rows and (rows["terminals"].astype(bool) & keep & ~ends).any():
        raise InputError("--episodes 1: keep two or more, because its episodes go on after a terminal row")
    arrays: dict[str, Any] = {}

    def copy(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):  # what has no value for each row is copied whole
            arrays[name] = item[()][keep] if (item.shape or ())[:1] == keep.shape else item[()]

    try:
        with h5py.File(path, "r") as opened:
            opened.visititems(copy)
            for name in (*REQUIRED, *OPTIONAL):  # visititems passes over links
                if name in opened and name not in arrays:
                    copy(name, opened[name])
            attributes = dict(opened.attrs) | {"thinned": f"{episodes} of {total} episodes, seed {seed}"}
    except OSError as error:
        raise InputError(f"{path} is no HDF5 file of D4RL's layout ({reason(error)})") from None
    if "observations" not in arrays:
        raise InputError(f"{path} is not of D4RL's layout: there are no flat arrays in it")
    write_d4rl(out, arrays, attributes)
    print(f"{out}: {episodes} of {total} episodes, {int(keep.sum()):,} of {len(keep):,} rows")


def generate(args: argparse.Namespace) -> None:
    """Makes a data set, writes it to a file, and prints the file's path."""
    if min(args.episodes, args.processes, args.steps) < 0:
        raise InputError("--episodes, --processes and --steps cannot be negative")
    if not args.name.startswith("ogbench-"):
        arrays = demonstrations.generate(args.name, args.episodes, args.seed)
        episodes = int((arrays["terminals"] | arrays["timeouts"]).sum())
        path = own_folder() / f"{args.name}-{episodes}-seed{args.seed}.hdf5"
        write_d4rl(path, arrays, {"task": args.name})
        print(path)
        return
    from tools import ogbench_oracle

    name = args.name.removeprefix("ogbench-")
    print(ogbench_oracle.generate(name, args.episodes or 1_000, args.seed, args.processes, args.steps or 1_000))


# ----------------------------------------------------------------------------------------------------------- download


def download(name: str) -> None:
    """Fetches the data of a task, or one word of --dataset, and prints where it lies."""
    for spec in TASKS[name].dataset if name in TASKS else (name,):
        kind = spec.partition(":")[0]
        if kind == "generated":
            print(f"{spec} is made at the start of a run: there is nothing to download")
            continue
        if ":" not in spec or kind not in sources.SOURCES:
            raise InputError(f"{name!r} is neither a task nor a word of --dataset; see `python tools/data.py list`")
        path, address = sources.locate(sources.split_count(spec)[0])
        if kind == "minari" and not path.exists():
            download_minari(spec.partition(":")[2], path)
        elif not path.exists():
            fetch(address, path)
        print(path)


def fetch(address: str, path: Path, timeout: float = 30, pause: float = 2) -> None:
    """Downloads `address` to `path`, whole or not at all. A connection that breaks off is tried again.

    The file must have the checksum of tools/checksums.tsv, where that lists one.
    """
    if urlsplit(address).scheme not in ("http", "https"):
        raise InputError(f"{address} is not an http address")
    temporary, wrong = path.with_name(f"{path.name}.{os.getpid()}.part"), ""
    published = next((digest for end, digest in checksums().items() if address.endswith(end)), "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written ({reason(error)})") from None
    try:
        for attempt in range(TRIES):
            time.sleep(pause * attempt)
            try:
                fetch_once(address, temporary, timeout)
                if published:
                    with open(temporary, "rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    if digest != published:
                        raise OSError(f"its SHA-256 is {digest[:8]}..., not the published one")
                os.replace(temporary, path)
                return
            except urllib.error.HTTPError as error:
                wrong = f"the server says {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):
                    break  # not found, or not allowed: it will not change its mind
            except urllib.error.URLError as error:
                wrong = f"no connection: {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                wrong = reason(error)
    finally:
        temporary.unlink(missing_ok=True)
    wrong = " ".join(wrong.split())
    raise InputError(f"{address} could not be downloaded ({wrong}); put the file at {path}")


def checksums() -> dict[str, str]:
    """End of an address -> SHA-256."""
    lines = (Path(__file__).parent / "checksums.tsv").read_text().splitlines()
    return {end: digest for digest, end in (line.split("\t") for line in lines if not line.startswith("#"))}


def fetch_once(address: str, path: Path, timeout: float) -> None:
    request = urllib.request.Request(address, headers={"User-Agent": "expo", "Accept-Encoding": "identity"})
    with urllib.request.urlopen(request, timeout=timeout) as response, open(path, "wb") as file:
        length = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=length or None, unit="B", unit_scale=True, desc=Path(address).name, disable=None) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        if file.tell() != length if length else file.tell() == 0:
            raise OSError(f"{human_size(file.tell())} came of {human_size(length)}")


def download_minari(name: str, path: Path) -> None:
    """Downloads with the minari package, which does nothing if the folder of the data set is there already."""
    folder = path.parents[1]
    if found := [str(file.parents[1]) for file in folder.glob("*/**/data/main_data.hdf5")]:
        raise InputError(f"minari:{name} is a folder of data sets; name one: {', '.join(sorted(found)[:9])}")
    if folder.exists():
        raise InputError(f"{folder} is there, but has no data in HDF5 format; remove it, or read another data set")
    try:
        import minari  # pyright: ignore[reportMissingImports]

        minari.download_dataset(name)
    except ImportError:
        raise InputError(f"minari:{name} needs a package: pip install 'minari[hf,hdf5]'") from None
    except Exception as error:  # the package and its network clients raise many kinds
        shutil.rmtree(folder, ignore_errors=True)
        wrong = f"{type(error).__name__}: {reason(error)}"
        raise InputError(f"minari:{name} could not be downloaded ({wrong}); copy its folder to {folder}") from None
    if not path.exists():
        raise InputError(f"minari:{name} lies at {folder}, but not in HDF5 format, which is the only one that is read")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="every task, its data, and whether it lies on this machine")
    command = commands.add_parser("inspect", help="shapes, episodes, success, returns and problems of a data set")
    command.add_argument("file")
    command.add_argument("--task", default="", help="read it as this task does, with its rewards and ends")
    command.add_argument("--env-id", default="", help="compare it with this Gymnasium environment")
    command.add_argument("--obs-keys", nargs="*", default=[], help="observations to use, where the file has several")
    command.add_argument("--max-episode-steps", type=int, default=0, help="time limit in actions; 0: the environment's")
    command = commands.add_parser("replay", help="one step from random rows, in the simulator and in the file")
    command.add_argument("file")
    command.add_argument("--task", required=True, help="antmaze-* or adroit-*")
    command.add_argument("--rows", type=int, default=2_000)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("thin", help="keeps some episodes of a D4RL-layout file")
    command.add_argument("file")
    command.add_argument("out", type=Path)
    command.add_argument("--episodes", type=int, required=True)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("generate", help="makes a generated data set and prints its path")
    command.add_argument("name", help="pointmaze-medium, fetch-pick-and-place, ogbench-cube-single and so on")
    command.add_argument("--episodes", type=int, default=0, help="0: 60 (pointmaze), 50 (fetch) or 1000 (ogbench)")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same data")
    command.add_argument("--processes", type=int, default=0, help="side by side (ogbench); 0: one per CPU core")
    command.add_argument("--steps", type=int, default=0, help="of each episode (ogbench); 0: 1000")
    command = commands.add_parser("download", help="fetches the data of a task")
    command.add_argument("name", help="a task, or a word of --dataset")
    args = parser.parse_args()
    for name, least in (("seed", 0), ("rows", 1), ("max_episode_steps", 0)):
        if getattr(args, name, least) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}")
    if args.command == "list":
        list_tasks()
    elif args.command == "inspect":
        inspect(args)
    elif args.command == "replay":
        from tools.replay import report

        report(args.file, args.task, args.rows, args.seed)
    elif args.command == "thin":
        thin(args.file, args.out, args.episodes, args.seed)
    elif args.command == "generate":
        generate(args)
    else:
        download(args.name)


if __name__ == "__main__":
    one_line_errors(main)
