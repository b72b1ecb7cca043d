"""A task of the user's own, in a folder of theirs: another robot, cameras and words, trained by the programs as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pi_stepnft import envs, harness, policies
from pi_stepnft.envs import demos, vulkan
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.maniskill import Camera, ManiSkillSpec
from pi_stepnft.envs.maniskill.cuda import CudaVecEnv
from pi_stepnft.envs.maniskill.env import ManiSkillEnv

try:
    vulkan.check_driver(picture=False)
except vulkan.DriverError as error:
    pytest.skip(str(error), allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
MODULE = '''
import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.building import actors, ground
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.pose import Pose

COLOURS = {"red": [1, 0, 0, 1], "blue": [0, 0, 1, 1]}


@register_env("TouchBall-v1", max_episode_steps=12)
class TouchBall(BaseEnv):
    """Fetch is to touch one of two balls; an episode says which."""

    SUPPORTED_ROBOTS = ["fetch", "panda_stick"]

    def __init__(self, *args, robot_uids="fetch", **kwargs):
        super().__init__(*args, robot_uids=robot_uids, **kwargs)

    @property
    def _default_sensor_configs(self):
        pose = sapien_utils.look_at([1.5, 0, 1.5], [0.5, 0, 0.6])
        return [CameraConfig("wall_camera", pose, 64, 64, 1.0, 0.01, 10)]

    @property
    def _default_human_render_camera_configs(self):
        return CameraConfig("render_camera", sapien_utils.look_at([2, 1, 2], [0, 0, 0.5]), 64, 64, 1.0, 0.01, 10)

    def _load_scene(self, options):
        ground.build_ground(self.scene)
        self.balls = [
            actors.build_sphere(self.scene, radius=0.08, color=color, name=name, body_type="kinematic", add_collision=False,
                                initial_pose=sapien.Pose([0, 0, 5]))
            for name, color in COLOURS.items()
        ]
        self.which = torch.zeros(self.num_envs, dtype=torch.long)

    def _initialize_episode(self, env_idx, options):
        self.agent.robot.set_pose(sapien.Pose())
        self.agent.reset(self.agent.keyframes["rest"].qpos)
        for ball, side in zip(self.balls, (-0.25, 0.25)):
            p = torch.rand(len(env_idx), 3) * 0.1 + torch.tensor([0.6, side, 0.6])
            ball.set_pose(Pose.create_from_pq(p))
        self.which[env_idx] = torch.randint(2, (len(env_idx),))

    def get_language_instruction(self, **kwargs):
        return [f"touch the {list(COLOURS)[i]} ball" for i in self.which]

    def evaluate(self):
        places = torch.stack([ball.pose.p for ball in self.balls], 1)[torch.arange(self.num_envs), self.which]
        return {"success": (self.agent.robot.links[-1].pose.p - places).norm(dim=1) < 0.1}

    def _get_obs_extra(self, info):
        return {}

    def _get_obs_sensor_data(self, *args):
        data = super()._get_obs_sensor_data(*args)
        if "segmentation" in self.obs_mode:  # a task that draws a part of the picture itself
            wall = data["wall_camera"]
            red = wall["segmentation"] == self.balls[0].per_scene_id[0]
            wall["rgb"][red.expand_as(wall["rgb"])] = 200
        return data
'''
TASK = "touch_ball:TouchBall-v1"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """On sys.path, as PYTHONPATH would have it, which workers take over."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "touch_ball.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def pool(folder):
    venv = envs.make(TASK, 4, num_workers=2, image_size=48, backend="cpu", chunk=4)
    yield venv
    venv.close()


def test_another_robot_and_its_own_cameras(pool):
    obs, _ = pool.reset(seed=0)
    assert pool.action_dim == 12 and pool.max_episode_steps == 12 and pool.spec.env_id == TASK  # arm, gripper, body, wheels
    assert pool.cameras == ("wall_camera", "fetch_head", "fetch_hand") and obs["image"].shape == (4, 3, 48, 48, 3)
    assert obs in pool.observation_space
    red = (obs["image"][:, 0, ..., 0] > 100) & (obs["image"][:, 0, ..., 2] < 60)
    assert (red.sum((1, 2)) > 10).all()  # where the task has put its camera, not where ours would be
    _, _, _, _, info = pool.step(np.zeros((4, 4, 12)))
    assert info["steps"].tolist() == [4] * 4


def test_every_episode_brings_its_instruction(pool):
    told = {}
    for first in (0, 4):
        obs, _ = pool.reset(seed=first)
        told |= {first + i: text for i, text in enumerate(pool.instructions)}
    assert set(told.values()) == {"touch the red ball", "touch the blue ball"}
    pool.reset(seed=[7, 7, 1, 0])
    assert pool.instructions == [told[7], told[7], told[1], told[0]] and pool.instruction == told[7]
    before = list(pool.instructions)
    other = next(seed for seed, text in told.items() if text != told[1])
    pool.reset(seed=np.full(4, other), options={"reset_mask": np.arange(4) == 2})
    assert pool.instructions == [*before[:2], told[other], before[3]]
    batched = CudaVecEnv(ManiSkillSpec(TASK, obs_mode="state", module="touch_ball"), 1, chunk=4, seed=0, backend="cpu")
    for seed, text in told.items():
        batched.reset(seed=seed)
        assert batched.instructions == [text]
    batched.close()


@pytest.mark.slow
def test_cameras_are_chosen_by_name_and_order_and_words_can_be_given(pool):
    options = dict(image_size=48, cameras="fetch_hand,wall_camera", instruction="touch something")
    venv = envs.make(TASK, 1, backend="cpu", **options)
    obs, _ = venv.reset(seed=3)
    assert venv.cameras == ("fetch_hand", "wall_camera") and venv.instruction == "touch something"
    np.testing.assert_array_equal(obs["image"][0], pool.reset(seed=3)[0]["image"][0][[2, 0]])
    venv.close()
    with pytest.raises(EnvError, match="has the cameras wall_camera, fetch_head, fetch_hand, not base_camera"):
        envs.make(TASK, 1, backend="cpu", cameras=["base_camera"])


@pytest.mark.slow
def test_a_robot_is_chosen_and_segmentation_is_for_the_task_alone(folder):
    options = dict(robot="panda_stick", control_mode="pd_joint_delta_pos", sim_obs_mode="rgb+segmentation", image_size=32)
    venv = envs.make(TASK, 1, backend="cpu", **options)
    obs, _ = venv.reset(seed=0)
    assert venv.action_dim == 7 and obs["image"].shape == (1, 1, 32, 32, 3) and obs["state"].shape == (1, 14)
    assert 4 < (obs["image"] == 200).all(-1).sum() < 100  # the ball, as the task has drawn it
    venv.close()


@pytest.mark.slow
def test_our_cameras_pose_is_only_for_tasks_that_have_a_base_camera(folder):
    env = ManiSkillEnv(ManiSkillSpec(TASK, robot="panda_stick", camera=Camera(), image_size=32))
    assert env.cameras == ("wall_camera",)
    env.close()


def test_what_is_wrong_with_an_own_task_is_told_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_tasks.py").write_text("import no_such_package")
    (tmp_path / "empty_tasks.py").write_text("")
    for env_id, told in [
        ("no_such_tasks:MyTask-v1", "no module named 'no_such_tasks'.*put its folder on PYTHONPATH"),
        ("broken_tasks:MyTask-v1", "no module named 'no_such_package', for the tasks of 'broken_tasks': install"),
        ("empty_tasks:TouchBal-v1", "empty_tasks registers no such task; did you mean TouchBall-v1"),
    ]:
        for call in (envs.check, lambda i: envs.make(i, 1, backend="cpu")):
            with pytest.raises(EnvError, match=told) as error:
                call(env_id)
            assert "\n" not in str(error.value)
    with pytest.raises(EnvError, match=f"no scripted expert for '{TASK}'.*--dataset"):
        demos.collect(tmp_path / "demos.h5", type("venv", (), dict(spec=ManiSkillSpec(TASK))), 1)


PROGRAM = """
from mani_skill.utils.registration import register_env
from touch_ball import TouchBall
from pi_stepnft import envs

venv = envs.make("TouchBall-v1", 1, obs_mode="state", backend="cpu")  # imported above: workers import its module too
print(venv.reset(seed=0)[0]["state"].shape)
venv.close()

@register_env("MyBall-v1", max_episode_steps=12)
class MyBall(TouchBall):
    pass

try:
    envs.make("MyBall-v1", 1, obs_mode="state", backend="cpu")
except envs.EnvError as error:
    print(error)
"""


def test_a_task_that_the_program_has_imported_and_one_that_it_registers_itself(folder, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "touch_ball.py").write_text(MODULE)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True)
    shape, told = done.stdout.splitlines()[-2:]
    assert shape == "(1, 30)" and "move it to a module, and call it my_module:MyBall-v1" in told, done.stderr


def test_a_policy_that_sees_fewer_cameras_is_told_in_one_line(pool):
    policy = policies.Pi0(policies.Pi0Config.tiny(num_cameras=1, image_size=48, vlm_depth=1, vision_depth=1))
    with pytest.raises(harness.RunError, match="mine takes 1 cameras, .* has wall_camera, fetch_head, fetch_hand: choose by"):
        harness.check_fit(policy, pool, "mine")


def test_an_own_task_is_trained(folder, tmp_path):
    torch.manual_seed(0)
    config = policies.Pi0Config.tiny(
        num_cameras=3, image_size=48, vlm_depth=2, vision_depth=1, state_dim=48, horizon=4, action_dim=16
    )
    policy = policies.Pi0(config)
    norms = policies.NormStats.identity(30), policies.NormStats.identity(12)
    policy.processor = policies.Processor(config, policies.Tokenizer(), *norms)
    policy.meta = dict(execute=4)  # as of others: what it was trained on is not known
    policies.save(policy, tmp_path / "start")
    arguments = (
        f"--env-id {TASK} --obs-mode rgb --checkpoint start --iterations 2 --num-envs 2 --rollout-epochs 1 --group-size 2 "
        "--labels binary --eval-episodes 2 --final-eval-episodes 2 --update-epochs 1 --num-minibatches 1 --num-threads 1 --no-video"
    )
    program = [sys.executable, ROOT / "algos" / "stepnft_pi0.py", *arguments.split()]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(folder)))
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert ":" not in run.name and result["after"]["episodes"] == 2
    meta = policies.load(run / "policy").meta
    assert (meta["env_id"], meta["obs_mode"], result["args"]["rollout_steps"]) == (TASK, "rgb", round(0.64 * 12))
