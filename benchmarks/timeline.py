"""A trace of the engine (DIT_TRACE) as a picture: which picture stepped in which tick, and the rows of every forward.

python benchmarks/timeline.py trace.jsonl docs/engine-timeline.png [--ticks 120]
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(path: Path, ticks: int) -> list[dict[str, Any]]:
    """The first ticks of a trace; it may still be written to, so that its last line is not whole."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines[:ticks] if line.endswith("\n")]


def draw(trace: list[dict[str, Any]], out: Path) -> None:
    start = trace[0]["t"]
    pictures: dict[tuple[str, int], int] = {}
    for tick in trace:
        for job, index, _ in tick["steps"]:
            pictures.setdefault((job, index), len(pictures))
    jobs = list(dict.fromkeys(job for job, _ in pictures))
    colours = dict(zip(jobs, itertools.cycle(plt.get_cmap("tab10").colors), strict=False))
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(11, 6), height_ratios=[4, 1], layout="constrained")
    for tick in trace:
        begin, width = 1e3 * (tick["t"] - start), 1e3 * tick["seconds"]
        for job, index, _ in tick["steps"]:
            above.broken_barh([(begin, 0.94 * width)], (pictures[job, index] - 0.4, 0.8), color=colours[job])
        below.bar(begin, tick["bucket"], width=width, align="edge", color="0.85")
        below.bar(begin, tick["rows"], width=0.94 * width, align="edge", color="0.35")
        if tick["decoded"]:
            above.axvline(begin + width, color="0.8", linewidth=0.5, zorder=0)
    firsts = {job: min(row for (name, _), row in pictures.items() if name == job) for job in jobs}
    above.set_yticks(list(firsts.values()), [f"job {number}" for number in range(1, len(jobs) + 1)])
    above.invert_yaxis()
    above.set_title("each bar is one evaluation of one picture; a column is one forward")
    below.set_ylabel("rows")
    below.set_xlabel("milliseconds (light: padding; thin lines above: a batch was decoded)")
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ticks", type=int, default=120)
    arguments = parser.parse_args()
    draw(read(arguments.trace, arguments.ticks), arguments.out)


if __name__ == "__main__":
    main()
