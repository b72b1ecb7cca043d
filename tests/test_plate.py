"""RLinf's PutOnPlateInScene25, the paper's ManiSkill task, with assets of our own (tests/plate_assets.py).

ManiSkill and RLinf read where their assets are as they are imported, so all of this runs in a process of its own, which also keeps
the renderer's shaders from test to test.
"""

import csv
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import plate_assets
import pytest

from pi_stepnft import envs
from pi_stepnft.envs import vulkan
from pi_stepnft.envs.maniskill import plate
from pi_stepnft.harness.statistics import summarise

if importlib.util.find_spec("rlinf") is None:
    pytest.skip(f"the tasks' code is missing: {plate.PACKAGES}", allow_module_level=True)
try:
    vulkan.check_driver(picture=False)
except vulkan.DriverError as error:
    pytest.skip(str(error), allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the assets are, and where the programs run; named in the environment, for processes that start from now on."""
    folder = tmp_path_factory.mktemp("plate")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in plate_assets.write(folder).items():
            patch.setenv(name, value)
        yield folder


@pytest.fixture(scope="module")
def there(folder):
    """`there(function, …)`: its result in the process that has the assets."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), os.chdir, (folder,)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def test_the_paper_s_variants_and_their_families():
    families = envs.simulator(plate.MAIN).variants(plate.MAIN)
    assert list(families.values()) == ["vision"] * 5 + ["semantic"] * 5 + ["execution"] * 3
    for env_id in families:
        assert envs.simulator(env_id).task_of(env_id) == plate.MAIN


# ------------------------------------------------------------------------------------------------------------------ one environment

made = {}


def environment(env_id: str = plate.MAIN, **options):
    """In the process `there`: a task's environment, made once."""
    from pi_stepnft.envs.maniskill.env import ManiSkillEnv

    key = env_id, repr(options)
    if key not in made:
        made[key] = ManiSkillEnv(envs.simulator(env_id).spec(env_id, image_size=SIZE, **options))
    return made[key]


def observed(env) -> tuple[np.ndarray, np.ndarray]:
    image, state = np.zeros((1, SIZE, SIZE, 3), np.uint8), np.zeros(env.state_dim, np.float32)
    env.observe(image, state)
    return image[0].astype(int), state


def start(env_id: str, seed: int) -> dict:
    """What an episode begins with, and after six steps of rest."""
    env = environment(env_id)
    env.reset(seed)
    base = env.base
    thing, = (base.objs_carrot[base.carrot_names[i]] for i in base.select_carrot_ids)
    image, state = observed(env)
    clean = image
    if hasattr(base, "overlay_texture_mix_ratio"):
        base.overlay_texture_mix_ratio = 0
        clean = observed(env)[0]
        del base.overlay_texture_mix_ratio
    before = thing.pose.p[0].numpy().copy()
    env.step(np.zeros((6, 7), np.float32))
    return dict(
        image=image, clean=clean, state=state, told=env.instruction, limit=env.max_episode_steps,
        moved=thing.pose.p[0].numpy() - before,
        ids={name: int(getattr(base, f"select_{name}_ids")[0]) for name in ("carrot", "plate", "overlay", "pos", "quat", "extra")
             if hasattr(base, f"select_{name}_ids")},
        alone="rlinf" not in sys.modules and "ray" not in sys.modules,
    )


def test_an_episode_of_the_main_task(there):
    first, again, other = (there(start, plate.MAIN, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first["image"], again["image"])
    assert first["ids"] == again["ids"] != other["ids"]
    assert first["limit"] == 80 and first["state"].shape == (8,) and first["alone"]
    names = list(plate_assets.THINGS)
    for episode in (first, other):
        assert episode["told"] == f"put {names[episode['ids']['carrot']]} on plate"
        assert episode["ids"]["carrot"] < 16 and episode["ids"]["overlay"] < 16  # those for training
        bar = SIZE // 8  # above and below the 480 × 640 picture
        assert not episode["image"][:bar].any() and not episode["image"][-bar:].any()
        inside = episode["image"][bar:-bar]
        table = 255 * (0.35 + 0.3 * plate_assets.colour(episode["ids"]["overlay"], 21))
        assert 0.4 < (abs(inside - table).max(-1) < 2).mean() < 0.95  # the rest is the wall, the plate, the thing and the arm
        plate_seen = (inside[..., 0] > 150) & (inside[..., 1:].max(-1) < 100)
        assert plate_seen.sum() > 20
    assert there(start, plate.MAIN, 3)["ids"] == first["ids"]


def test_every_variant_changes_what_it_says(there):
    before, changed = there(start, plate.MAIN, 3), {}
    for env_id in plate.VARIANTS:
        name = env_id.removeprefix(plate.PREFIX).removesuffix("-v1")
        episode = there(start, env_id, 3)
        ids, told = episode["ids"], episode["told"]
        sentence = f"put {plate_assets.THINGS[ids['carrot']]} on {plate_assets.PLATES[ids['plate']]}"
        assert (told == sentence) == (name != "Instruct")
        assert (ids["carrot"] >= 16) == (name in ("Carrot", "MultiCarrot"))
        assert (ids["plate"] > 0) == (name in ("Plate", "MultiPlate"))
        assert (ids["overlay"] >= 16) == (name == "VisionImage") or name == "MultiPlate"  # that one has all tables
        np.testing.assert_equal(np.allclose(episode["state"], before["state"], atol=1e-6), name != "EEPose")
        jumped = np.linalg.norm(episode["moved"][:2]) > 0.05
        assert jumped == (name == "PositionChangeTo")
        changed[name] = abs(episode["image"] - episode["clean"]).max(-1)[SIZE // 8 : -SIZE // 8]  # grey levels
    for kind, share in (("Texture", (0.03, 0.5)), ("Whole", (0.9, 1))):  # plate, thing and arm; all of the picture
        mild, strong = (changed[f"Vision{kind}{strength}"] for strength in ("03", "05"))
        assert share[0] < (strong > 5).mean() <= share[1] and 5 < mild[strong > 5].mean() < strong[strong > 5].mean()


def test_success_is_the_thing_resting_on_the_plate(there):
    assert there(put_on_plate, 0.0) == (True, 1.0)
    assert there(put_on_plate, 0.2) == (False, 0.0)


def put_on_plate(beside: float) -> tuple[bool, float]:
    """Put the thing so far beside the plate's middle, m, just above it, and wait for 20 steps. Returns (success, summed reward)."""
    import sapien

    env = environment()
    env.reset(3)
    base = env.base
    thing = base.objs_carrot[base.carrot_names[base.select_carrot_ids[0]]]
    target = base.objs_plate[base.plate_names[0]]
    with env._mode():
        p = target.pose.sp.p
        base.agent.robot.set_qpos(base.agent.robot.get_qpos() * 0)  # out of the way
        thing.set_pose(sapien.Pose([p[0], p[1] + beside, p[2] + 0.04]))
    reward, terminated, truncated, steps = env.step(np.zeros((20, 7), np.float32))
    assert terminated == (steps < 20) and not truncated
    return env.success, reward


def test_pictures_are_fitted_as_the_policies_processor_does_it(there):
    """480 × 640 to a square, on black: what the checkpoints were trained with."""
    import torch

    from pi_stepnft.policies.processor import resize_with_padding

    whole, seen = there(whole_picture, 3)
    assert whole.shape == (480, 640, 3)
    expected = resize_with_padding(torch.from_numpy(whole).permute(2, 0, 1)[None], SIZE)[0].permute(1, 2, 0).numpy()
    assert abs(expected.astype(int) - seen).max() <= 1


def whole_picture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    env = environment()
    env.reset(seed)
    with env._mode():
        return env.base._get_obs_sensor_data()["3rd_view_camera"]["rgb"][0].numpy(), observed(env)[0]


def gripper(share: float) -> float:
    """Where a finger is, m, after ten steps with this as the action's last number."""
    env = environment()
    env.reset(3)
    env.step(np.tile(np.array([0, 0, 0.02, 0, 0, 0, share], np.float32), (10, 1)))
    return float(observed(env)[1][6])


def test_the_gripper_is_open_above_a_half(there):
    assert there(gripper, 0.6) == pytest.approx(0.038, abs=1e-3) and there(gripper, 0.4) == pytest.approx(0.015, abs=1.5e-3)


def grasps() -> list[tuple[bool, bool]]:
    """What the environment and the WidowX's own code say of a thing between the fingers: not yet closed, closed, opened."""
    import sapien
    from mani_skill.agents.robots.widowx.widowx import WidowX250S

    env = environment()
    env.reset(3)
    base, told = env.base, []
    thing = base.objs_carrot[base.carrot_names[base.select_carrot_ids[0]]]
    with env._mode():
        qpos = base.agent.robot.get_qpos().clone()
        qpos[:, 6:] = 0.0176  # so near to the thing that it is held before it falls
        base.agent.robot.set_qpos(qpos)
        thing.set_pose(base.agent.robot.links_map["ee_gripper_link"].pose.sp * sapien.Pose([-0.02, 0, 0]))
    for share, steps in ((1, 0), (0, 3), (1, 3)):
        env.step(np.tile(np.array([0, 0, 0, 0, 0, 0, share], np.float32), (steps, 1)))
        with env._mode():
            told.append((bool(base.agent.is_grasping(thing)), bool(WidowX250S.is_grasping(base.agent, thing))))
    return told


def test_a_grasp_is_told_as_the_widowx_tells_it(there):
    told = there(grasps)
    assert all(ours == theirs for ours, theirs in told) and [ours for ours, _ in told] == [False, True, False]


def batched(seed: int) -> tuple[dict, dict, list]:
    """An episode of the batched back end, here of one environment, and the same episode of the other."""
    from pi_stepnft.envs.maniskill.cuda import CudaVecEnv

    env = environment()
    venv = CudaVecEnv(env.spec, 1, chunk=5, seed=0, backend="cpu")
    actions = np.random.default_rng(0).normal(0, 0.02, (5, 7)).astype(np.float32)
    env.reset(seed)
    obs, _ = venv.reset(seed=seed)
    pairs = [(observed(env), (obs["image"][0, 0], obs["state"][0])), (env.instruction, venv.instruction)]
    env.step(actions)
    obs, *_ = venv.step(actions[None])
    pairs += [(observed(env), (obs["image"][0, 0], obs["state"][0])), (env.render(), venv.render()[0])]
    venv.close()
    return pairs


def test_the_batched_simulation_has_the_same_episodes(there):
    first, told, then, shown = there(batched, 5)
    assert told[0] == told[1]
    for (image, state), (same, too) in (first, then):
        np.testing.assert_allclose(state, too, atol=1e-5)
        assert (abs(image - same.astype(int)) > 2).mean() < 0.001
    assert shown[0].shape == (256, 256, 3) and (abs(shown[0].astype(int) - shown[1]) > 2).mean() < 0.001


# --------------------------------------------------------------------------------------------------------------------- the programs

OPTIONS = "num_workers=0 max_episode_steps=6"


def save_policy(name: str) -> None:
    import torch

    from pi_stepnft import policies

    torch.manual_seed(0)
    config = policies.Pi0Config.tiny(
        num_cameras=1, image_size=SIZE, vlm_depth=2, vision_depth=1, state_dim=16, horizon=4, action_dim=16
    )
    policy = policies.Pi0(config)
    deviation = policies.NormStats(np.zeros(7), np.array([0.01] * 6 + [1]), -np.ones(7), np.ones(7))
    policy.processor = policies.Processor(config, policies.Tokenizer(), policies.NormStats.identity(8), deviation)
    policy.meta = dict(env_id=plate.MAIN, obs_mode="rgb", execute=3, env_options=OPTIONS.split())
    policies.save(policy, name)


def run(program: str, arguments: str) -> None:
    """A program of algos/, in the process `there`, where the shaders are."""
    import importlib

    from pi_stepnft import harness

    module = importlib.import_module(f"pi_stepnft.algos.{program}")
    sys.argv = [program, *arguments.split()]
    module.main(harness.parse(module.Args, module.__doc__, getattr(module, "PAPER", None)))


def test_means_are_the_paper_s():
    """Those of π0 with π-StepNFT (arXiv 2603.02083, table 2), from variants that each have their family's."""
    published = dict(vision=691, semantic=491, execution=331)  # of 1000
    families = envs.simulator(plate.MAIN).select(plate.MAIN, ["ood"], "rgb")
    rows = summarise({"policy": {name: np.arange(1000) < published[family] for name, family in families.items()}}, families)
    means = {row["family"]: row["policies"]["policy"]["success"] for row in rows if row["kind"] != "environment"}
    assert {name: round(100 * x, 1) for name, x in means.items()} == dict(vision=69.1, semantic=49.1, execution=33.1, ood=50.4)


@pytest.fixture(scope="module")
def trained(there, folder) -> Path:
    """The policy after two iterations."""
    there(save_policy, "start")
    train = (
        f"--env-id {plate.MAIN} --obs-mode rgb --checkpoint start --iterations 2 --num-envs 2 --rollout-epochs 1 --group-size 2 "
        "--labels binary --eval-episodes 2 --final-eval-episodes 2 --update-epochs 1 --num-minibatches 1 --num-threads 1 --no-video"
    )
    there(run, "stepnft_pi0", f"{train} --env-options {OPTIONS}")
    (done,) = (folder / "runs").glob("stepnft*")
    result = json.loads((done / "result.json").read_text())
    assert result["after"]["episodes"] == 2
    return done / "policy"


def evaluated(there, folder: Path, policy: Path, suites: str) -> list[str]:
    """The environments that an evaluation has been in."""
    there(run, "evaluate", f"{policy} --suite {suites} --episodes 1 --num-threads 1 --no-video --output out")
    results = json.loads((folder / "out" / "results.json").read_text())
    played = [row["name"] for row in results["rows"] if row["kind"] == "environment"]
    with open(folder / "out" / "outcomes.csv") as file:
        assert all(int(row["steps"]) == 6 for row in csv.DictReader(file))
    return played


def test_training_then_evaluation_in_variants_of_each_family(there, folder, trained):
    named = [f"{plate.PREFIX}{name}-v1" for name in ("VisionWhole05", "MultiPlate", "EEPose")]
    assert evaluated(there, folder, trained, " ".join(["id", *named])) == [plate.MAIN, *named]


@pytest.mark.slow
def test_the_whole_evaluation(there, folder, trained):
    assert evaluated(there, folder, trained, "id vision semantic execution") == [plate.MAIN, *plate.VARIANTS]


# -------------------------------------------------------------------------------------------------------------- what can be missing


CHECK = """
from pi_stepnft import envs
try:
    envs.check("PutOnPlateInScene25Main-v3")
except envs.EnvError as error:
    print(error)
"""


def test_missing_downloads_are_told_in_one_line(tmp_path):
    empty = dict(MANISKILL_ASSET_DIR=f"{tmp_path}/a", MS_ASSET_DIR=f"{tmp_path}/b")
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=os.environ | empty)
    told = done.stdout
    assert told.count("\n") == 1, done.stderr
    for name, place in (("widowx250s", "robots/widowx"), ("bridge_v2_real2sim", "tasks/bridge_v2_real2sim_dataset")):
        assert f"in {tmp_path}/b/data/{place} (python -m mani_skill.utils.download_asset -y {name})" in told
    assert f"in {tmp_path}/a/carrot (hf download RLinf/maniskill_assets --repo-type dataset --local-dir {tmp_path}/a" in told


def test_a_missing_wheel_an_unknown_name_and_a_mode_without_pictures_are_told_in_one_line(monkeypatch):
    with pytest.raises(envs.EnvError, match="unknown task 'PutOnPlateInScene25Main-v1'; did you mean .*PutOnPlateInScene25Main-v3"):
        envs.check("PutOnPlateInScene25Main-v1")
    with pytest.raises(envs.EnvError, match="obs_mode must be 'rgb', got 'state'"):
        envs.make(plate.MAIN, 1, obs_mode="state")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(envs.EnvError, match=re.escape(plate.PACKAGES)):
        plate.register.__wrapped__()
