"""The console commands of an installation: `stepnft-pi0`, `pi-stepnft-evaluate`, … run the files of `algos/` of these names."""

import runpy
import sys
from pathlib import Path


def main() -> None:
    program = Path(sys.argv[0]).stem.removeprefix("pi-stepnft-").replace("-", "_")
    runpy.run_module(f"pi_stepnft.algos.{program}", run_name="__main__", alter_sys=True)
