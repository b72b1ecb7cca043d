"""Does a result still hold? python benchmarks/holds.py

    make results                                                                # repeats the front page's command, then asks
    python benchmarks/holds.py --result runs/RUN/result.json --stored stepnft-PickCube-v1-rgb-1.json

Compares a run, by default the newest of runs/, with what is stored of its algorithm, task and mode in benchmarks/results/. Its
start and end hold if they are no worse than the stored intervals say, from the lowest lower end to the highest upper end of all
seeds. Where another renderer draws the pictures, or time is up after fewer iterations, a result may well be another one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pages


def verdict(result: dict, stored: list[dict]) -> tuple[bool, list[str]]:
    """Whether a run is as good as stored ones, and the reasons, a line each."""
    holds, lines = True, []
    for key in ("before", "after"):
        low, high = min(r[key]["interval"][0] for r in stored), max(r[key]["interval"][1] for r in stored)
        success = result[key]["success"]
        place = "below" if success < low else "above" if success > high else "within"
        holds &= place != "below"
        lines.append(f"{key}: {pages.rate(result[key])} %, {place} the stored {100 * low:.1f} to {100 * high:.1f} %")
    ran = lambda r: f"{r['iterations']} in {r['training_minutes']:.0f} min on commit {pages.commit(r)}"
    return holds, [*lines, f"iterations: {ran(result)}; stored: {', '.join(map(ran, stored))}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, help="a run's result.json; default: the newest of runs/")
    parser.add_argument("--stored", help="files to compare with, as a glob under benchmarks/results/; default: the plain command's")
    args = parser.parse_args()
    path = args.result or max(Path("runs").glob("*/result.json"), key=lambda file: file.stat().st_mtime, default=None)
    if not path or not path.is_file():
        sys.exit(f"error: no result at {path or 'runs/*/result.json'}")
    result = pages.read(path)
    label = result["algorithm"].removesuffix("_pi0").replace("_", "-")  # of stepnft_pi0 and stepnft_pi05; a rival's with π0
    pattern = args.stored or f"{label}-{result['env_id'].replace('/', '-')}-{result['obs_mode']}-*.json"
    if not (stored := pages.load(pages.ROOT / "benchmarks" / "results", pattern)):
        sys.exit(f"error: nothing is stored as benchmarks/results/{pattern}")
    holds, lines = verdict(result, stored)
    print(f"{path}, compared with {', '.join(r['path'].name for r in stored)}", *lines, sep="\n")
    print("holds" if holds else "DOES NOT HOLD")
    return int(not holds)


if __name__ == "__main__":
    sys.exit(main())
