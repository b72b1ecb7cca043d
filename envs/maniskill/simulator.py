"""ManiSkill as `envs.make` and evaluation see it: options and tasks. Imports no simulator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pi_stepnft.envs import base
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.maniskill import experts, plate, tasks, variants


@dataclass(frozen=True)
class Camera:
    """A fixed base camera. Eye and target in metres in the world frame (robot base at x = −0.615), vertical field of view in rad.

    The default looks at the work area from the front and above, so closely that a 4 cm cube is 9 px wide in a 96 px picture; in
    ManiSkill's own view (fov π/2) it is 3 px.
    """

    __pydantic_config__ = dict(extra="forbid")
    eye: tuple[float, float, float] = (0.55, 0.0, 0.42)
    target: tuple[float, float, float] = (0.0, 0.0, 0.08)
    fov: Annotated[float, Field(gt=0, lt=3.14)] = 0.6


@dataclass(frozen=True)
class ManiSkillSpec(base.Spec):
    control_mode: str = "pd_ee_delta_pose"
    """One of the robot's; the action space has its bounds."""
    reward_mode: Literal["sparse", "dense", "normalized_dense", "none"] = "sparse"
    robot: str | None = None
    """Such as "panda_stick", "xarm6_robotiq" or "fetch"; None: the task's own."""
    camera: Camera | None = None
    """Where the base camera stands and what it sees; None: the task's own."""
    cameras: tuple[str, ...] | str | None = None
    """Names of the cameras, in the order of the pictures, also of those that the robot carries ("hand_camera"), as "one,other" too;
    None: all."""
    sim_obs_mode: str = "rgb"
    """ManiSkill's own mode behind obs_mode "rgb": a task that reads other textures itself needs e.g. "rgb+segmentation". Pictures
    are handed out alone."""
    task_size: bool = False
    """Draw the pictures as large as the task has them, and fit them into squares of image_size with black bars, as openpi does. For
    tasks that insist on their size."""
    joints: Annotated[int, Field(ge=1)] | None = None
    """The state is the robot's first so many joint positions, rad and m; None: all that robot and task tell."""
    binary_gripper: bool = False
    """An action's last number is not the gripper's target, but says whether it is to be open: above 0.5 yes (1), else no (−1)."""
    mesh_keep: Annotated[float, Field(gt=0, le=1)] = 0.06
    """Share of the robot's visual triangles that software rendering keeps (1: all)."""
    fast_control: bool = True
    """Use the controller, success check and observation without torch, where they reproduce the simulator's own."""
    module: str | None = None
    """What a worker imports first: the module that registers the task. Default: the one in the id, or that of the task's class."""
    kwargs: dict = field(default_factory=dict)
    """More keyword arguments for the simulator's own constructor."""

    death: ClassVar[str] = "a broken Vulkan driver or too little memory; check the driver with: python -m pi_stepnft.envs.vulkan"
    internal: ClassVar[tuple[str, ...]] = (*base.Spec.internal, "module")

    def __post_init__(self) -> None:
        if isinstance(self.cameras, str):
            object.__setattr__(self, "cameras", tuple(self.cameras.split(",")))
        if "rgb" not in self.sim_obs_mode.split("+"):
            raise EnvError(f"sim_obs_mode must hold rgb, as in 'rgb+segmentation', got {self.sim_obs_mode!r}")

    def create(self, slot: int, num_envs: int) -> Any:
        from pi_stepnft.envs.maniskill.env import ManiSkillEnv

        return ManiSkillEnv(self)


class ManiSkill(base.Simulator):
    Spec = ManiSkillSpec
    packages = "mani-skill", "sapien"

    def knows(self, env_id: str) -> bool:
        """All that no other simulator does: a message about an unknown task is about ManiSkill's."""
        return True

    def check(self, env_id: str) -> None:
        tasks.check(env_id)

    def spec(self, env_id: str, **options: Any) -> ManiSkillSpec:
        """In obs_mode "rgb" the tasks that ship with ManiSkill are seen by `Camera()`, those of the user's own by their cameras."""
        if plate.knows(env_id):
            options = plate.options(env_id, options)
        elif ":" not in env_id and options.get("obs_mode", "rgb") == "rgb":
            options.setdefault("camera", Camera())
        options.setdefault("module", tasks.module_of(env_id))
        spec = super().spec(env_id, **options)
        tasks.check(env_id, spec.robot)
        return spec

    def instruction(self, env_id: str) -> str:
        return tasks.instruction(env_id)

    def expert(self, env_id: str) -> None:
        tasks.check(env_id)
        experts.make(env_id)

    def task_of(self, env_id: str) -> str:
        return plate.MAIN if env_id in plate.VARIANTS else variants.task_of(env_id)

    def variants(self, env_id: str) -> dict[str, str]:
        if env_id == plate.MAIN:
            return plate.VARIANTS
        return {name: variants.family(name) for name in variants.variants(env_id)}

    def on_gpu(self) -> bool:
        return tasks.gpu_simulation()

    def batched(self, spec: ManiSkillSpec, num_envs: int, *, chunk: int, seed: int) -> Any:
        from pi_stepnft.envs.maniskill.cuda import CudaVecEnv

        return CudaVecEnv(spec, num_envs, chunk=chunk, seed=seed)
