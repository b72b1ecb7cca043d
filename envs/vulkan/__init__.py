"""The Vulkan driver behind ManiSkill: which one to use, and whether it works.

SAPIEN, ManiSkill's simulator, creates a Vulkan device for every task, in state mode too. On a machine without a GPU the
driver is Mesa's lavapipe (24.3 or newer), which `scripts/setup_vulkan.sh` installs. Nothing here imports SAPIEN into
the calling process.

    python -m pi_stepnft.envs.vulkan            # renders one picture; prints the driver (exit code 0) or what to do (exit code 1)
    python -m pi_stepnft.envs.vulkan --quick    # only creates the renderer: half a second
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

ICD_FOLDERS = ("/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/usr/share/vulkan/icd.d")
"""Where the Vulkan loader looks for drivers on Linux."""

USER_VARIABLES = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_LOADER_DRIVERS_SELECT")
"""The loader's own variables. Whoever sets one has chosen a driver, and it stays chosen."""

SETUP_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup_vulkan.sh"

PROBE = """
import sys
import sapien
device, picture = sapien.Device(sys.argv[1]), sys.argv[2] == "picture"
renderer = sapien.render.RenderSystem(device)
if picture:
    scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), renderer])
    scene.set_ambient_light([1.0, 1.0, 1.0])
    box = scene.create_actor_builder()
    box.add_box_visual(half_size=[0.5, 0.5, 0.5], material=[1.0, 0.0, 0.0])
    box.set_initial_pose(sapien.Pose([2.0, 0.0, 0.0]))
    box.build_static()
    camera = scene.add_camera("camera", 16, 16, 1.0, 0.1, 10.0)
    scene.update_render()
    camera.take_picture()
    red, green = camera.get_picture("Color")[8, 8, :2]
    if not red > green + 0.1:
        raise RuntimeError(f"a red box was rendered with red {red:.2f}, green {green:.2f}")
summary = sapien.render.get_device_summary().splitlines()
print(next((line[5:] for line in summary if line.startswith("GPU: ")), "unnamed device"))
"""
"""Runs in a process of its own, because a broken driver can end the process it is loaded into."""


class DriverError(RuntimeError):
    """No usable Vulkan driver. The message is one line and ends with what to do."""


def chosen_by_user() -> str | None:
    """The assignment, `NAME=value`, by which the environment already chooses a driver; None if it does not."""
    return next((f"{name}={os.environ[name]}" for name in USER_VARIABLES if os.environ.get(name)), None)


def nvidia_usable() -> bool:
    """Whether an NVIDIA GPU is visible and its Vulkan library is there: a container may have the first only."""
    return os.path.exists("/dev/nvidiactl") and any(map(ctypes.util.find_library, ("GLX_nvidia", "EGL_nvidia")))


def renders_on_gpu() -> bool:
    """Whether the driver that `ensure_driver` leaves in place is an NVIDIA GPU's."""
    return nvidia_usable() and not chosen_by_user()


def find_lavapipe() -> str | None:
    """The ICD file of Mesa's software driver for this processor, or None."""
    found = [path for folder in ICD_FOLDERS for path in sorted(Path(folder).glob("lvp_icd*.json"))]
    fits = [path for path in found if path.name in ("lvp_icd.json", f"lvp_icd.{platform.machine()}.json")]
    return str(fits[0]) if fits else None


def ensure_driver() -> str | None:
    """Choose the Vulkan driver for this process and its children; call it before SAPIEN is imported.

    Keeps whatever the user has set, and leaves the choice to the loader when an NVIDIA GPU can render. Otherwise points
    VK_DRIVER_FILES at lavapipe alone, so that Mesa's drivers for absent hardware cannot get in its way. Cheap, and
    never fails: whether the driver works is `check_driver`'s question.

    Returns the ICD file it chose, None if it changed nothing.
    """
    if chosen_by_user() or nvidia_usable():
        return None
    icd = find_lavapipe()
    if icd is not None:
        os.environ["VK_DRIVER_FILES"] = icd
    return icd


def install_command() -> str:
    """The command that installs a software Vulkan driver on this distribution."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    family = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    sudo = "" if os.geteuid() == 0 else "sudo "
    if family & {"debian", "ubuntu"}:
        if SETUP_SCRIPT.is_file():
            return f"{sudo}bash {SETUP_SCRIPT}"
        suite = "-t bookworm-backports " if release.get("VERSION_CODENAME") == "bookworm" else ""
        return f"{sudo}apt-get install {suite}mesa-vulkan-drivers libvulkan1 libx11-6"
    if family & {"fedora", "rhel"}:
        return f"{sudo}dnf install mesa-vulkan-drivers vulkan-loader libX11"
    if "arch" in family:
        return f"{sudo}pacman -S vulkan-swrast vulkan-icd-loader libx11"
    return "install Mesa's lavapipe 24.3 or newer and the Vulkan loader with this system's package manager"


def no_driver_message(reason: str = "") -> str:
    """One line for a user whose driver does not work: what is missing, why if known, and what to run."""
    chosen = chosen_by_user()
    if chosen is None or chosen == f"VK_DRIVER_FILES={find_lavapipe()}":
        chosen, advice = "", f"run: {install_command()}"
    else:
        chosen, advice = f" with {chosen}", "correct or unset it"
    because = f" ({reason})" if reason else ""
    return f"no usable Vulkan driver{chosen}{because}: ManiSkill needs one even in state mode; {advice}"


def is_driver_error(error: BaseException) -> bool:
    """Whether an error raised by SAPIEN or ManiSkill says that no Vulkan driver works."""
    signs = ("vk::", "Vulkan", "physical device", "rendering device", "render device", "libX11", "libGL")
    return isinstance(error, RuntimeError | ImportError | OSError) and any(sign in str(error) for sign in signs)


def check_driver(picture: bool = True, timeout: float = 120.0) -> str:
    """Prove in a process of its own that SAPIEN can render here; return the name of the rendering device.

    picture: render a red box and look at it (6 s on two cores), instead of only creating the renderer (0.5 s).
    timeout: seconds after which a driver counts as broken.

    Raises DriverError, in one line, if it cannot.
    """
    if importlib.util.find_spec("sapien") is None:
        raise DriverError(f"SAPIEN is not installed here; run: {sys.executable} -m pip install mani-skill")
    ensure_driver()
    device = "cuda" if renders_on_gpu() else "cpu"
    command = [sys.executable, "-c", PROBE, device, "picture" if picture else "create"]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise DriverError(no_driver_message(f"no answer from it in {timeout:g} s")) from None
    if probe.returncode < 0:
        raise DriverError(no_driver_message(f"it crashed with {signal.Signals(-probe.returncode).name}"))
    if probe.returncode:
        last = probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"]
        raise DriverError(no_driver_message(last[-1].removeprefix("RuntimeError: ")))
    return probe.stdout.strip().splitlines()[-1]


def main() -> int:
    unknown = [argument for argument in sys.argv[1:] if argument != "--quick"]
    if unknown:
        print(f"error: unknown argument {unknown[0]!r}; usage: python -m pi_stepnft.envs.vulkan [--quick]", file=sys.stderr)
        return 1
    try:
        name = check_driver(picture="--quick" not in sys.argv[1:])
    except DriverError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Vulkan driver works: {name}, {chosen_by_user() or 'chosen by the Vulkan loader'}")
    return 0
