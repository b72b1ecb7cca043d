"""The program that fuzzes the loaders finds nothing in some seconds, and tells of each thing that a loader must not do."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from pi_stepnft import envs
from pi_stepnft.envs import child, datasets

pytest.importorskip("pyarrow")
PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz.py"
pytestmark = pytest.mark.slow


def test_loaders_of_damaged_files(tmp_path):
    command = [sys.executable, str(PROGRAM), "--minutes", "0.3", "--seed", "5", "--output", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    kinds = json.loads((tmp_path / "out.json").read_text())["kinds"]
    assert len(kinds) > 10 and all(row["cases"] and row["outcomes"]["loaded"] and not row["failures"] for row in kinds.values())


def refuse(text: str) -> None:
    raise envs.EnvError(text)


def read_elsewhere(path: Path, **options) -> list[dict]:
    open("/etc/hostname").close()
    return []


@pytest.mark.parametrize(
    "load, told",
    [
        (lambda f: {}["x"], "raised KeyError('x') in <lambda>"),
        (lambda f: refuse("two\nlines"), "EnvError: two; lines"),
        (lambda f: open("/etc/passwd"), "open /etc/passwd; loaded"),
        (lambda f: (f / "new").touch(), "case/new; loaded"),
        (lambda f: os.listdir("/etc"), "os.listdir /etc"),
        (lambda f: subprocess.run(["/bin/true"]), "subprocess.Popen /bin/true"),
        (lambda f: np.memmap(f / ".." / "outside"), "/outside"),
        (lambda f: os.kill(os.getpid(), signal.SIGTERM), "died: status -15"),
        (lambda f: time.sleep(60), "hung"),
        (lambda f: np.ones(4 * 10**7), "MB of memory for 0.00 MB of files"),
        (lambda f: datasets.read(f), "other, open /etc/hostname; EnvError"),  # by the reader
    ],
)
def test_what_a_loader_must_not_do(load, told, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("fuzz", PROGRAM)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    for module, name in ((child, "start"), (tempfile, "tempdir"), (sys, "path")):
        monkeypatch.setattr(module, name, getattr(module, name))  # the program changes them
    monkeypatch.setattr(datasets, "episodes", read_elsewhere)
    monkeypatch.chdir(tmp_path)
    fuzz.LIMIT = 5
    fuzz.KINDS["bad"] = (lambda f: (f / "a.json").write_text("{}"), load)
    with pytest.raises(SystemExit) as ended:
        fuzz.main(fuzz.Args(only=("bad:1",), output=str(tmp_path / "out.json")))
    assert ended.value.code and told in capsys.readouterr().out and list(tmp_path.glob("runs/fuzz/*/bad-1"))
