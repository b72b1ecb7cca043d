"""docs/frameworks.md: the programs in examples/ that it names run as they stand there, and do what the page says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pi_stepnft.envs import vulkan

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "Stable-Baselines3": "stable_baselines3_ppo.py",
    "TorchRL": "torchrl_collector.py",
    "CleanRL": "cleanrl_ppo.py",
}

try:
    vulkan.check_driver(picture=False)
except vulkan.DriverError as error:
    pytest.skip(str(error), allow_module_level=True)

PACKAGES = {"Stable-Baselines3": "stable_baselines3", "TorchRL": "torchrl"}
CHECKS = {
    "Stable-Baselines3": """
    assert model.num_timesteps == 2_000 and len(model.ep_info_buffer) >= 38
    assert {episode["l"] for episode in model.ep_info_buffer} <= set(range(1, 51))
    assert any(episode["r"] > 0 for episode in model.ep_info_buffer)
""",
    "TorchRL": """
assert batch.batch_size == (4, 100) and env.batch_size == (4,)
ended, following, observation = batch["next", "done"][:, :-1, 0], batch["next", "observation"][:, :-1], batch["observation"][:, 1:]
assert ended.sum() >= 4
assert ((following == observation).all(-1) == ~ended).all()  # at an end the next observation is of a new episode
assert (batch["next", "steps"] == 1).all() and not batch["next", "lost"].any()
""",
    "CleanRL": """
assert (update + 1) * num_envs * num_steps == total_steps and envs.episode_count >= 40
assert max(envs.length_queue) == 50 and returns > 0
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("framework", CHECKS)
def test_a_program_runs(framework, tmp_path):
    if framework in PACKAGES:
        pytest.importorskip(PACKAGES[framework])
    program = tmp_path / "program.py"
    program.write_text((ROOT / "examples" / PROGRAMS[framework]).read_text() + CHECKS[framework])
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_page_names_every_program():
    page = (ROOT / "docs" / "frameworks.md").read_text()
    assert PROGRAMS.keys() == CHECKS.keys() and all(f"examples/{name}" in page for name in PROGRAMS.values())
