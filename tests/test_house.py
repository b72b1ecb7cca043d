"""The house: what an algorithm file may hold, what a new one costs, and the one name that an installation adds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALGOS = ROOT / "algos"
RL = ("stepnft_pi0", "stepnft_pi05", "ppo", "grpo", "nft", "rft", "critic")
SHORT = (
    "--env-id PickCube-v1 --obs-mode state --iterations 2 --num-envs 4 --group-size 4 --rollout-epochs 1 --rollout-steps 8 "
    "--eval-episodes 2 --final-eval-episodes 4 --num-threads 1 --no-video"
).split()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def train(command: list, cwd: Path, **environment: str) -> dict:
    """A short training in a process of its own; returns its result.json."""
    command = [*map(str, command), *SHORT]
    done = subprocess.run(command, cwd=cwd, env=dict(os.environ, **environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (cwd / "runs").glob("*/result.json")
    return json.loads(result.read_text())


def test_the_two_texts_of_stepnft_differ_in_one_declared_block():
    begin, end = "# What differs between stepnft_pi0.py and stepnft_pi05.py", "# End of what differs."
    texts = [(ALGOS / f"stepnft_{policy}.py").read_text() for policy in ("pi0", "pi05")]
    parts = [re.split(f"{begin}.*\n|{end}", text) for text in texts]
    assert [len(part) for part in parts] == [3, 3]
    assert parts[0][0] == parts[1][0] and parts[0][2] == parts[1][2]
    names = [[line.split(" = ")[0] for line in part[1].split("\n") if line] for part in parts]
    assert names[0] == names[1] and all(name.isupper() for name in names[0]) and len(names[0]) <= 6


def test_an_algorithm_file_is_the_algorithm():
    assert len(lines(ALGOS / "stepnft_pi0.py")) <= 490
    assert sum(len(lines(path)) for path in ALGOS.glob("*.py")) <= 3600
    for name in RL:
        text = lines(ALGOS / f"{name}.py")
        main = next(i for i, line in enumerate(text) if line.startswith("def main("))
        rollout = next(i for i, line in enumerate(text) if "# ---" in line and "rollout" in line)
        assert 0 < rollout - main <= 40, name


def test_a_new_algorithm_is_one_short_file(tmp_path):
    assert len(lines(ROOT / "tests" / "reinforce.py")) <= 230
    result = train([sys.executable, ROOT / "tests" / "reinforce.py"], tmp_path)
    assert (result["algorithm"], result["iterations"], result["forward_passes"]) == ("reinforce_pi0", 2, 1)
    assert result["env_steps"] > 0 and len(result["curve"]) == 2


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pi_stepnft", "algos", "harness", "envs", "policies"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_the_wheel_adds_one_name_and_works_beside_a_project_with_rooms_of_the_same_names(installed, tmp_path):
    assert {path.name for path in installed.iterdir()} - {"bin"} == {"pi_stepnft", next(installed.glob("*.dist-info")).name}
    for name in ("envs", "policies"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("theirs = True\n")
    program = """
import envs, policies
assert envs.theirs and policies.theirs
from pi_stepnft import envs, policies
print(envs.__file__)"""
    environment = dict(os.environ, PYTHONPATH=f"{installed}:{tmp_path}")
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert found.stdout.strip() == str(installed / "pi_stepnft" / "envs" / "__init__.py")
    result = train([installed / "bin" / "stepnft-pi0"], tmp_path, PYTHONPATH=environment["PYTHONPATH"])
    assert result["command"].startswith("stepnft-pi0 --env-id") and result["commit"] is None


def test_a_file_of_a_checkout_runs_that_checkouts_code_whatever_is_installed(installed, tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(installed))
    done = subprocess.run([sys.executable, ALGOS / "stepnft_pi0.py", "--env-id", "PokeCube-v1"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert "python algos/sft.py --env-id PokeCube-v1" in done.stderr  # an installation would name its console command
