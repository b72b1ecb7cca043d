"""What every run needs and no algorithm is: evaluation and its statistics, reports, films, storage of rollouts."""

from pi_stepnft.harness.storage import Rows, memory_gb

__all__ = ["Rows", "memory_gb"]
