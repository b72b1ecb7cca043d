"""What every run needs and no algorithm is: arguments, records, storage of rollouts, evaluation, reports, films.

An algorithm calls this room; it never calls back.
"""

from pi_stepnft.harness import ranks
from pi_stepnft.harness.args import (
    Batch,
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    RLArgs,
    RunArgs,
    RunError,
    Seconds,
    Seed,
    Share,
    Size,
    SizeOrZero,
    TaskArgs,
    Text,
    TrainArgs,
    check,
    env_options,
    parse,
)
from pi_stepnft.harness.rollout import Rollout, Turn
from pi_stepnft.harness.run import (
    Averages,
    Run,
    Training,
    adapt,
    check_fit,
    check_task,
    choose_device,
    command,
    command_line,
    commit,
    machine,
    make_envs,
    one_line_errors,
    set_up,
    slug,
    task_name,
)
from pi_stepnft.harness.storage import Prefixes, Rows, memory_gb

__all__ = [
    "Averages", "Batch", "Count", "CountOrZero", "Positive", "PositiveOrZero", "Prefixes", "RLArgs", "Rollout", "Rows", "Run",
    "RunArgs", "RunError", "Seconds", "Seed", "Share", "Size", "SizeOrZero", "TaskArgs", "Text", "TrainArgs", "Training", "Turn",
    "adapt", "check", "check_fit", "check_task", "choose_device", "command", "command_line", "commit", "env_options", "machine",
    "make_envs", "memory_gb", "one_line_errors", "parse", "ranks", "set_up", "slug", "task_name",
]
