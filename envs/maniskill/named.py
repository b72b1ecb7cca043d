"""`PickNamedCube-v1`: ManiSkill's PickCube with a red and a blue cube, of which each episode's sentence names one.

Which one is in the sentence alone: neither state nor picture tells. The control, `--env-options 'kwargs={"exchanged": true}'`: each
sentence names the other cube, and success stays with the drawn one. A policy that reads fails there, one that does not succeeds as
often as before. Docs: docs/notebook/language.md.
"""

from __future__ import annotations

import sapien
import torch
from mani_skill.envs.tasks.tabletop.pick_cube import PickCubeEnv
from mani_skill.envs.utils import randomization
from mani_skill.utils.building import actors
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.pose import Pose

COLORS = "red", "blue"
GAP = 0.08  # m between the cubes' centres at least: a finger of the open hand fits between them
TRIES = 32  # places drawn for the second cube; half of them or more are clear


@register_env("PickNamedCube-v1", max_episode_steps=50)
class PickNamedCube(PickCubeEnv):
    SUPPORTED_REWARD_MODES = ("sparse", "none")

    def __init__(self, *args, exchanged: bool = False, **kwargs):
        """exchanged: the sentence names the cube that is not meant."""
        self.exchanged = exchanged
        super().__init__(*args, **kwargs)

    def _load_scene(self, options: dict) -> None:
        super()._load_scene(options)
        side = dict(half_size=self.cube_half_size, initial_pose=sapien.Pose([0, 5, self.cube_half_size]))
        self.cubes = self.cube, actors.build_cube(self.scene, color=[0, 0, 1, 1], name="blue_cube", **side)
        self.meant = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)  # (B,) index of COLORS and of cubes

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict) -> None:
        super()._initialize_episode(env_idx, options)
        b = len(env_idx)
        with torch.device(self.device):
            p = self.cube.pose.p[env_idx]  # (b, 3)
            places = torch.rand((b, TRIES, 2)) * 2 * self.cube_spawn_half_size - self.cube_spawn_half_size
            places += torch.tensor(self.cube_spawn_center)
            first = ((places - p[:, None, :2]).norm(dim=2) >= GAP).int().argmax(1)
            p[:, :2] = places[torch.arange(b), first]
            self.cubes[1].set_pose(Pose.create_from_pq(p, randomization.random_quaternions(b, lock_x=True, lock_y=True)))
            self.meant[env_idx] = torch.randint(2, (b,))

    def get_language_instruction(self, **kwargs) -> list[str]:
        named = self.meant ^ 1 if self.exchanged else self.meant
        return [f"pick up the {COLORS[i]} cube and move it to the goal" for i in named]

    def evaluate(self) -> dict[str, torch.Tensor]:
        """As PickCube's, of the cube that is meant; is_grasped (B, 2) is of both, since it is observed."""
        goal, rows = self.goal_site.pose.p, torch.arange(self.num_envs, device=self.device)
        away = torch.stack([torch.linalg.norm(goal - cube.pose.p, axis=1) for cube in self.cubes], 1)[rows, self.meant]
        placed, static = away <= self.goal_thresh, self.agent.is_static(0.2)
        grasped = torch.stack([self.agent.is_grasping(cube) for cube in self.cubes], 1)
        return dict(success=placed & static, is_obj_placed=placed, is_robot_static=static, is_grasped=grasped)

    def _get_obs_extra(self, info: dict) -> dict[str, torch.Tensor]:
        """PickCube's, with both cubes where it has one, the red one first."""
        tcp, goal = self.agent.tcp_pose, self.goal_site.pose.p
        obs = dict(is_grasped=info["is_grasped"], tcp_pose=tcp.raw_pose, goal_pos=goal)
        if "state" in self.obs_mode:
            for color, cube in zip(COLORS, self.cubes):
                p = cube.pose.p
                obs |= {f"{color}_pose": cube.pose.raw_pose, f"tcp_to_{color}": p - tcp.p, f"{color}_to_goal": goal - p}
        return obs
