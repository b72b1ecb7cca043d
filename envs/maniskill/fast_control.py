"""ManiSkill's delta end-effector control and grasp check for one CPU scene, in NumPy.

ManiSkill steps one environment and a thousand by the same batched torch code; for one environment on a CPU that code takes 2.9 ms
a control step, and the functions below 0.6 ms (PickCube-v1, one core, physics included). They do the same arithmetic on single
poses, and replace ManiSkill's only where its controller is exactly the one they reproduce; `tests/test_envs.py` holds both to the
same states.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers.base_controller import CombinedController
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController
from mani_skill.agents.controllers.pd_joint_pos import PDJointPosMimicController
from mani_skill.agents.robots.panda.panda import Panda
from mani_skill.agents.robots.widowx.widowx import WidowX250S


def _turn(angles: np.ndarray) -> sapien.Pose:
    """Rotations by angles (3,) (rad) about x, then the new y, then the new z, as a pose."""
    q, half = np.zeros((3, 4), np.float32), angles / 2
    q[:, 0] = np.cos(half)
    q[0, 1], q[1, 2], q[2, 3] = np.sin(half)
    return sapien.Pose(q=q[0]) * sapien.Pose(q=q[1]) * sapien.Pose(q=q[2])


def _delta_pose_arm(arm: PDEEPoseController) -> Callable[[np.ndarray], None] | None:
    """`set_action` of ManiSkill's `pd_ee_delta_pose` arm on single poses, or None where the configuration differs from it."""
    c = arm.config
    if not (c.use_delta and c.normalize_action) or c.use_target or c.interpolate:
        return None
    if c.frame != "root_translation:root_aligned_body_rotation":
        return None
    low, high = arm.action_space_low[:3].numpy(), arm.action_space_high[:3].numpy()
    middle, half_range = 0.5 * (high + low), 0.5 * (high - low)
    rot_scale = np.float32(c.rot_lower)
    ik = arm.kinematics
    to_model, to_joints = ik.pmodel_active_joint_indices.numpy(), ik.pmodel_controlled_joint_indices.numpy()
    free_joints = ik.qmask.numpy()
    articulation, root, ee = arm.articulation._objs[0], arm.root_link._objs[0], arm.ee_link._objs[0]
    joints = [joint._objs[0] for joint in arm.joints]
    drive = list(arm.active_joint_indices.numpy())

    def set_action(action: np.ndarray) -> None:
        delta = middle + half_range * np.minimum(np.maximum(action[:3], -1), 1)
        rotation = action[3:6]
        norm = np.sqrt(rotation.dot(rotation))
        rotation = rotation * (rot_scale if norm <= 1 else rot_scale / norm)
        current = root.entity_pose.inv() * ee.entity_pose
        target = sapien.Pose(current.p + delta, (_turn(rotation) * sapien.Pose(q=current.q)).q)
        qpos = articulation.qpos
        result, success, _ = ik.pmodel.compute_inverse_kinematics(
            ik.end_link_idx, target, initial_qpos=qpos[to_model], active_qmask=free_joints, max_iterations=100
        )
        # ManiSkill holds the current joint positions where the solver finds none.
        goal = np.asarray(result, np.float32)[to_joints] if success else qpos[drive]
        for joint, q in zip(joints, goal.tolist(), strict=True):
            joint.set_drive_target(q)

    return set_action


def _mimic_gripper(gripper: PDJointPosMimicController) -> Callable[[np.ndarray], None] | None:
    """`set_action` of ManiSkill's two-finger gripper on plain numbers, or None where the configuration differs from it."""
    c = gripper.config
    if c.use_delta or c.interpolate or not c.normalize_action or len(gripper.joints) != 2:
        return None
    low, high = float(gripper.action_space_low[0]), float(gripper.action_space_high[0])
    multiplier, offset = float(gripper._multiplier[0]), float(gripper._offset[0])
    control = gripper.joints[int(gripper.mimic_control_joint_indices[0])]._objs[0]
    mimic = gripper.joints[int(gripper.mimic_joint_indices[0])]._objs[0]

    def set_action(action: np.ndarray) -> None:
        q = 0.5 * (high + low) + 0.5 * (high - low) * min(max(float(action[0]), -1.0), 1.0)
        control.set_drive_target(q)
        mimic.set_drive_target(q * multiplier + offset)

    return set_action


def make_set_action(agent) -> Callable[[np.ndarray], None] | None:
    """A function that sets one action (A,) in [-1, 1] on `agent`, or None where only ManiSkill's own code knows how."""
    controller = agent.controller
    if type(controller) is not CombinedController:
        return None
    parts: list[tuple[slice, Callable]] = []
    for name, part in controller.controllers.items():
        fast = {PDEEPoseController: _delta_pose_arm, PDJointPosMimicController: _mimic_gripper}.get(type(part))
        set_part = fast(part) if fast else None
        if set_part is None:
            return None
        parts.append((slice(*controller.action_mapping[name]), set_part))

    def set_action(action: np.ndarray) -> None:
        for columns, set_part in parts:
            set_part(action[columns])

    return set_action


def make_is_grasping(agent) -> Callable | None:
    """`is_grasping(object, min_force, max_angle)` with one pass over the contacts, or None for other robots than Panda and WidowX,
    whose code is the same."""
    if getattr(type(agent), "is_grasping", None) not in (Panda.is_grasping, WidowX250S.is_grasping):
        return None
    scene = agent.scene
    # (finger, which way it opens along its own y axis)
    fingers = [(agent.finger1_link._objs[0], 1.0), (agent.finger2_link._objs[0], -1.0)]

    def is_grasping(object, min_force: float = 0.5, max_angle: float = 85) -> torch.Tensor:
        target = object._bodies[0].entity
        impulses = [np.zeros(3), np.zeros(3)]
        touched = [False, False]
        for contact in scene.px.get_contacts():
            first, second = contact.bodies[0].entity, contact.bodies[1].entity
            if first != target and second != target:
                continue
            for i, (finger, _) in enumerate(fingers):
                if finger.entity == first or finger.entity == second:
                    sign = 1.0 if finger.entity == first else -1.0
                    impulses[i] += sign * np.sum([point.impulse for point in contact.points], axis=0)
                    touched[i] = True
        if not all(touched):
            return torch.tensor([False])
        for impulse, (finger, sign) in zip(impulses, fingers, strict=True):
            force = impulse / scene.px.timestep
            size = np.linalg.norm(force)
            opening = sign * finger.entity_pose.to_transformation_matrix()[:3, 1]
            cosine = np.clip(opening @ force / max(size, 1e-12), -1, 1)
            if size < min_force or np.rad2deg(np.arccos(cosine)) > max_angle:
                return torch.tensor([False])
        return torch.tensor([True])

    return is_grasping
