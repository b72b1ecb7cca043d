"""Storage of rollouts: rows of stored batches without a second copy, and a look at how much memory is in use."""

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pi_stepnft.policies.pi0 import Inputs, Pi0, Prefix


class Rows:
    """Prefixes or inputs of batches stored one after another, on `device`; rows of any of them are selected by one index.

    Batches are never joined as a whole: at 3 B parameters the prefixes of an iteration fill the memory once, not twice.
    """

    def __init__(self, device: torch.device | str):
        self.device = device
        self.batches: list[Prefix | Inputs] = []

    def append(self, batch: Prefix | Inputs) -> None:
        self.batches.append(batch.to(self.device))

    def __getitem__(self, rows: Tensor) -> Prefix | Inputs:
        """Rows (M,) int64, counted through all batches in their order -> one batch of M, where the rows are stored."""
        rows = rows.to(self.device)
        ends = torch.tensor([len(batch) for batch in self.batches], device=self.device).cumsum(0)
        which = torch.bucketize(rows, ends, right=True)  # (M,) batch of each row
        order = which.argsort(stable=True)
        first, parts = 0, []
        for i, n in zip(*(x.tolist() for x in which.unique(return_counts=True))):
            parts.append(self.batches[i][rows[order[first : first + n]] - (ends[i] - len(self.batches[i]))])
            first += n
        return type(parts[0]).cat(parts)[order.argsort()]


class Prefixes(Rows):
    """The prefixes of an iteration's chunks, kept on the device or in host memory, or their inputs, to be encoded again.

    cache: "device", "cpu", or "off" for inputs, which take less room, and which a VLM that is trained itself needs.
    """

    def __init__(self, cache: str, device: torch.device | str):
        super().__init__(device if cache == "device" else "cpu")
        self.target, self.encoded = device, cache != "off"

    def remember(self, inputs: Sequence[Tensor], prefix: Prefix) -> None:
        """Another batch: its inputs (images, image_mask, tokens, token_mask), and the prefix that was made of them."""
        self.append(prefix if self.encoded else Inputs(*inputs))

    def recall(self, policy: Pi0, rows: Tensor) -> Prefix:
        """The prefixes of rows (M,) int64 as `policy` sees them, on the device."""
        batch = self[rows].to(self.target)
        return batch if self.encoded else policy.encode_prefix(*batch)


def memory_gb(device: torch.device) -> float:
    """On CUDA the peak of the memory allocated since the last call; elsewhere the memory the process holds now, in GB."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except OSError:  # no Linux: the largest resident set so far, which macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
