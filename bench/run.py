"""`flashpo bench`: prints tables for people, then one JSON document on the last line of output."""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator

import torch

import flashpo
from flashpo import _op
from flashpo.bench import cases
from flashpo.bench.timing import Device


def machine(device: str) -> dict:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = f"{fields.get('model name', platform.processor())} model {fields.get('model', '?')}"
    return {
        "machine": name,
        "threads": torch.get_num_threads(),
        "isa": getattr(_op.native, "isa", None),
        "flashpo": flashpo.__version__,
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "load": os.getloadavg()[0],
    }


def show(title: str, records: list[dict]) -> None:
    columns = list(dict.fromkeys(key for record in records for key in record if key != "variant"))
    width = max(len(record["variant"]) for record in records)
    print(f"\n{title}\n{'':{width}}" + "".join(f"  {column:>6}" for column in columns))
    for record in records:
        cells = "".join(f"  {number(record.get(column)):>{max(6, len(column))}}" for column in columns)
        print(f"{record['variant']:{width}}{cells}", flush=True)


def number(x: float | str | None) -> str:
    if isinstance(x, str):
        return x
    return "" if x is None else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def plot(tables: dict[str, list[dict]], folder: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from flashpo.bench import growth

    folder.mkdir(parents=True, exist_ok=True)
    for title, records in tables.items():
        lines = title.startswith(growth.TITLE)
        figure, axes = plt.subplots(figsize=(8, 4 if lines else 0.4 * len(records) + 1.2), layout="constrained")
        axes.set(title=title)
        (growth.draw if lines else draw_bars)(axes, records)
        figure.savefig(folder / (re.sub(r"\W+", "_", title) + ".png"), dpi=120)
        plt.close(figure)


def draw_bars(axes, records: list[dict]) -> None:
    unit = next(name for name in ("us", "ms", "standard_deviation") if name in records[0])
    names = [record["variant"] for record in records]
    colours = ["tab:blue" if name.startswith("FlashPO") else "silver" for name in names]
    bars = axes.barh(names, [record[unit] for record in records], color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel=unit)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flashpo bench", description=__doc__)
    parser.add_argument("op", nargs="?", choices=tuple(cases.SUITES), help="one suite; default: all")
    parser.add_argument("--peers", action="store_true", help="TRL, Liger, CCE ... too, where a suite knows them")
    parser.add_argument("--only", default="", metavar="TEXT", help="the tables whose titles contain it")
    parser.add_argument("--quick", action="store_true", help="the smallest shape only, of suites with several")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    plots = {"nargs": "?", "type": pathlib.Path, "const": pathlib.Path("out/bench"), "metavar": "FOLDER"}
    parser.add_argument("--plot", help="write a PNG of each table (default: into out/bench)", **plots)
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="append the JSON document to this .jsonl file")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    document = {
        **machine(args.device),
        "command": "flashpo bench " + shlex.join(sys.argv[1:] if argv is None else argv),
    }
    document["tables"] = tables = {}
    print(f"{document['machine']}, {document['threads']} threads, {document['isa']}, torch {document['torch']}")
    try:
        with stoppable():
            for title, measure in cases.run(Device(args.device), args.op, args.peers, args.quick):
                if args.only in title:
                    tables[title] = records = list(measure())
                    show(title, records)
    finally:  # even what was measured before a failure or an interruption
        document["backends"] = flashpo.stats()
        write(document, args.out)
    if args.plot:
        plot(tables, args.plot)
    return 0


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside this context SIGTERM raises, and so does SIGINT, which a background job would ignore."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: lambda number, _: sys.exit(128 + number)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write(document: dict, file: pathlib.Path | None) -> None:
    text = json.dumps(document)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
