"""How a child process starts that runs this very code: a worker of the pool, a reader of demonstrations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BOOT = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]  # not the working directory, which may hold a json.py
import json, signal
for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they go to the whole group, and are the parent's to handle; it ends its children
    signal.signal(getattr(signal, name), signal.SIG_IGN)
folder, path, module, *descriptors = sys.argv[1:]
path = json.loads(path)
sys.path[:] = [folder, *path]
import pi_stepnft
sys.path[:] = path
import importlib
importlib.import_module(module).main(*map(int, descriptors))
"""
"""The same code and the same modules as the parent's, wherever either was found."""


def start(module: str, *descriptors: int, env: dict[str, str] | None = None) -> subprocess.Popen:
    """A process that calls the module's `main` with these descriptors, which it inherits; env: on top of this environment."""
    import pi_stepnft

    folder = str(Path(pi_stepnft.__file__).resolve().parents[1])
    path = json.dumps([entry or os.getcwd() for entry in sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", BOOT, folder, path, module, *map(str, descriptors)],
        pass_fds=descriptors, stdin=subprocess.DEVNULL, env=os.environ | (env or {}),
    )
