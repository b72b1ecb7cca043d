"""What every run needs and no algorithm is: arguments, records, storage of rollouts, evaluation, reports, films.

An algorithm calls this room; it never calls back.
"""

from pi_stepnft.harness.args import (
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    RLArgs,
    RunError,
    Seed,
    Share,
    TrainArgs,
    check,
    env_options,
    parse,
)
from pi_stepnft.harness.run import Averages, Run, check_fit, choose_device, command, command_line, commit, one_line_errors
from pi_stepnft.harness.storage import Prefixes, Rows, memory_gb

__all__ = [
    "Averages", "Count", "CountOrZero", "Positive", "PositiveOrZero", "Prefixes", "RLArgs", "Rows", "Run", "RunError", "Seed",
    "Share", "TrainArgs", "check", "check_fit", "choose_device", "command", "command_line", "commit", "env_options", "memory_gb",
    "one_line_errors", "parse",
]
