"""One control step of LIBERO's robot (robosuite's OSC_POSE, Panda with its gripper) in NumPy on MuJoCo's own arrays.

robosuite evaluates the whole dynamics three times in every step of the physics, of which there are 25 in a control step, and looks
everything up by name. Here positions and velocities are evaluated once, and the equations are those of operational space control
(Khatib, IEEE J. Robotics and Automation 3, 1987): with J the Jacobian (6, 7) of the gripper's site, M the mass matrix of the arm's
seven joints, A = J M⁻¹ Jᵀ, e the error of position and of orientation, and ẋ the velocity,

    F = (A_pos⁻¹ (kp e_pos − kd ẋ_pos), A_rot⁻¹ (kp e_rot − kd ẋ_rot))
    a = 10 (q₀ − q) − 2 √10 q̇                       posture, in the null space of the task
    τ = Jᵀ (F − A⁻¹ J a) + M a + bias                (Nᵀ M a = M a − Jᵀ A⁻¹ J a with N = 1 − M⁻¹ Jᵀ A⁻¹ J)

`tests/test_libero.py` holds the states to robosuite's own.
"""

from __future__ import annotations

import mujoco
import numpy as np
from robosuite.controllers.osc import OperationalSpaceController
from robosuite.models.grippers import PandaGripper
from robosuite.utils import transform_utils
from scipy.linalg.lapack import dposv

POSTURE_STIFFNESS = 10.0  # 1 / s², robosuite's


def _run(indexes: list[int]) -> slice:
    """Successive indexes as a slice, which gives a view where a list gives a copy."""
    start, stop = indexes[0], indexes[-1] + 1
    assert list(indexes) == list(range(start, stop)), f"{indexes} are not successive"
    return slice(start, stop)


def supported(base) -> bool:
    """Whether `base`, a robosuite environment, has the robot and the controller that `Stepper` reproduces."""
    (robot, *others), c = base.robots, base.robots[0].controller
    return (
        not others and type(robot.gripper) is PandaGripper and type(c) is OperationalSpaceController
        and c.impedance_mode == "fixed" and c.use_ori and c.use_delta and c.uncoupling
        and all(x is None for x in (c.interpolator_pos, c.interpolator_ori, c.position_limits, c.orientation_limits))
    )


class Stepper:
    """Does what `base.step` does to the simulation, and tells success. The controller's goals stay in robosuite's objects, so that
    both can be called in turn."""

    def __init__(self, base, moment):
        """moment: robosuite's only observable, whose clock says when observations are taken."""
        self.base, self.moment = base, moment
        self.robot = robot = base.robots[0]
        self.model, self.data = base.sim.model._model, base.sim.data._data
        self.substeps = int(base.control_timestep / base.model_timestep)
        self.site = base.sim.model.site_name2id(robot.controller.eef_name)
        self.q, self.v = (_run(indexes) for indexes in (robot.controller.qpos_index, robot.controller.qvel_index))
        self.arm, self.fingers = _run(robot._ref_joint_actuator_indexes), _run(robot._ref_joint_gripper_actuator_indexes)
        self.low, self.high = self.model.actuator_ctrlrange[self.arm].T.copy()
        low, high = self.model.actuator_ctrlrange[self.fingers].T
        self.finger_middle, self.finger_half = 0.5 * (low + high), 0.5 * (high - low)
        self._jacobian = np.zeros((6, self.model.nv))
        self._mass = np.zeros((self.model.nv, self.model.nv))
        # MuJoCo 3.4 changed the arguments.
        modern = tuple(map(int, mujoco.__version__.split(".")[:2])) >= (3, 4)
        self._mass_arguments = (self.model, self.data, self._mass) if modern else (self.model, self._mass, self.data.qM)

    def step(self, action: np.ndarray) -> bool:
        """Execute one action (7,) in [-1, 1] for 1/20 s; returns success."""
        if not self.robot.controller.new_update:
            # The first step after a reset: robosuite's controller still has the pose of before the initial state was set.
            return bool(self.base.step(action)[2])
        base, model, data, gripper = self.base, self.model, self.data, self.robot.gripper
        base.timestep += 1
        closing = np.array([-1.0, 1.0]) * gripper.speed * np.sign(action[6])
        fingers = gripper.current_action
        for i in range(self.substeps):
            mujoco.mj_step1(model, data)
            if i == 0:
                self._set_goal(action)
            data.ctrl[self.arm] = self._torques()
            fingers = np.minimum(np.maximum(fingers + closing, -1.0), 1.0)
            data.ctrl[self.fingers] = self.finger_middle + self.finger_half * fingers
            mujoco.mj_step2(model, data)
            self.moment.update(base.model_timestep, base._obs_cache)
        gripper.current_action = fingers
        base.cur_time += base.control_timestep
        base._post_process()
        return bool(base._check_success())

    def _set_goal(self, action: np.ndarray) -> None:
        """The goal is so far from where the site is now; without a turn, the former orientation stays the goal."""
        c = self.robot.controller
        delta = c.scale_action(action[:6])
        c.goal_pos = self.data.site_xpos[self.site] + delta[:3]
        if delta[3:].any():
            turn = transform_utils.quat2mat(transform_utils.axisangle2quat(delta[3:]))  # rounded to single precision
            c.goal_ori = turn @ self.data.site_xmat[self.site].reshape(3, 3)

    def _torques(self) -> np.ndarray:
        """Torques (7,) of the arm's motors, N m, for the present state."""
        model, data, c = self.model, self.data, self.robot.controller
        mujoco.mj_jacSite(model, data, self._jacobian[:3], self._jacobian[3:], self.site)
        mujoco.mj_fullM(*self._mass_arguments)
        J, M = self._jacobian[:, self.v], self._mass[self.v, self.v]
        q, v = data.qpos[self.q], data.qvel[self.v]
        error = np.empty(6)
        error[:3] = c.goal_pos - data.site_xpos[self.site]
        turn = c.goal_ori @ data.site_xmat[self.site].reshape(3, 3).T  # from here to the goal
        error[3:] = 0.5 * (turn[2, 1] - turn[1, 2]), 0.5 * (turn[0, 2] - turn[2, 0]), 0.5 * (turn[1, 0] - turn[0, 1])
        wish = c.kp * error - c.kd * (J @ v)
        posture = POSTURE_STIFFNESS * (c.initial_joint - q) - 2 * POSTURE_STIFFNESS**0.5 * v
        A = J @ dposv(M, J.T)[1]
        force = -dposv(A, J @ posture)[1]
        force[:3] += dposv(A[:3, :3], wish[:3])[1]
        force[3:] += dposv(A[3:, 3:], wish[3:])[1]
        torques = J.T @ force + M @ posture + data.qfrc_bias[self.v]
        return np.minimum(np.maximum(torques, self.low), self.high)
