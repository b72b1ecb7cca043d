"""The Vulkan driver: a user's choice stands, and a missing or broken driver is told in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pi_stepnft.envs import vulkan

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No driver chosen, no GPU, and only `tmp_path` searched for drivers."""
    for name in vulkan.USER_VARIABLES:
        monkeypatch.setenv(name, "")  # also restores what ensure_driver sets
        monkeypatch.delenv(name)
    monkeypatch.setattr(vulkan, "nvidia_usable", lambda: False)
    monkeypatch.setattr(vulkan, "ICD_FOLDERS", (str(tmp_path),))
    return tmp_path


def icd_file(folder: Path, name: str, library: str = "libvulkan_lvp.so") -> str:
    path = folder / name
    icd = {"api_version": "1.3.0", "library_path": library}
    path.write_text(json.dumps({"ICD": icd, "file_format_version": "1.0.0"}))
    return str(path)


@pytest.mark.parametrize("name", vulkan.USER_VARIABLES)
def test_what_the_user_chose_is_never_overridden(clean, monkeypatch, name):
    icd_file(clean, "lvp_icd.json")
    monkeypatch.setenv(name, "/chosen/by/user.json")
    before = dict(os.environ)
    assert vulkan.ensure_driver() is None
    assert dict(os.environ) == before


def test_lavapipe_is_chosen_alone_for_this_process_and_its_children(clean):
    icd_file(clean, "radeon_icd.json")
    lavapipe = icd_file(clean, "lvp_icd.json")
    assert vulkan.ensure_driver() == lavapipe == os.environ["VK_DRIVER_FILES"]
    code = "import os; print(os.environ['VK_DRIVER_FILES'])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.strip() == lavapipe


def test_lavapipe_of_another_processor_is_not_chosen(clean, monkeypatch):
    monkeypatch.setattr(vulkan.platform, "machine", lambda: "x86_64")
    icd_file(clean, "lvp_icd.i686.json")
    assert vulkan.ensure_driver() is None
    own = icd_file(clean, "lvp_icd.x86_64.json")
    assert vulkan.ensure_driver() == own


def test_a_gpu_that_can_render_keeps_the_loaders_choice(clean, monkeypatch):
    icd_file(clean, "lvp_icd.json")
    monkeypatch.setattr(vulkan, "nvidia_usable", lambda: True)
    assert vulkan.ensure_driver() is None
    assert "VK_DRIVER_FILES" not in os.environ


def test_choosing_a_driver_does_not_import_sapien():
    code = "import sys; from envs import vulkan; vulkan.ensure_driver(); sys.exit('sapien' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_this_machine_can_render():
    assert vulkan.check_driver(picture=False)


def test_a_missing_driver_is_one_line_that_names_the_users_variable(clean, monkeypatch):
    monkeypatch.setenv("VK_DRIVER_FILES", "/nonexistent")
    with pytest.raises(vulkan.DriverError) as error:
        vulkan.check_driver(picture=False)
    assert len(str(error.value).splitlines()) == 1
    assert "VK_DRIVER_FILES=/nonexistent" in str(error.value) and "unset it" in str(error.value)


def test_a_broken_lavapipe_is_one_line_that_names_the_command(clean):
    icd_file(clean, "lvp_icd.json", library=str(clean / "no_such_library.so"))
    with pytest.raises(vulkan.DriverError) as error:
        vulkan.check_driver(picture=False)
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).endswith(f"run: {vulkan.install_command()}")


def test_a_driver_that_crashes_or_hangs_does_not_take_the_caller_along(clean, monkeypatch):
    monkeypatch.setattr(vulkan, "PROBE", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(vulkan.DriverError, match="crashed with SIGSEGV"):
        vulkan.check_driver()
    monkeypatch.setattr(vulkan, "PROBE", "import time; time.sleep(60)")
    with pytest.raises(vulkan.DriverError, match="no answer"):
        vulkan.check_driver(timeout=0.5)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("vk::createInstanceUnique: ErrorIncompatibleDriver", True),
        ('Failed to find a supported physical device "cpu"', True),
        ("failed to find a rendering device", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_driver_errors_of_sapien_are_told_from_others(message, expected):
    assert vulkan.is_driver_error(RuntimeError(message)) is expected
