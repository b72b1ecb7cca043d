"""Simulators as equals: a small one of its own stands in the table beside the others. And which room imports which."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import toy_simulator

from pi_stepnft import envs
from pi_stepnft.envs import demos
from pi_stepnft.envs.base import EnvError
from pi_stepnft.envs.worker import Commands

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def toy(monkeypatch) -> str:
    monkeypatch.setitem(envs.SIMULATORS, "toy", toy_simulator.Toy())
    return "Point-v0"


@pytest.fixture
def pool(toy):
    venv = envs.make(toy, 4, num_workers=2, chunk=4, image_size=16)
    yield venv
    venv.close()


def test_a_simulator_in_one_file_runs_in_the_pool(pool):
    assert len(Path(toy_simulator.__file__).read_text().splitlines()) < 80
    obs, _ = pool.reset(seed=[1, 1, 2, 3])
    assert obs in pool.observation_space and (obs["image"] == 255).sum((1, 2, 3, 4)).tolist() == [2] * 4
    np.testing.assert_array_equal(obs["state"][0], obs["state"][1])
    assert pool.instructions == ["go to the goal"] * 4 and pool.render()[0].shape == (256, 256, 3)
    goals = np.array([np.random.default_rng(seed).uniform(-1, 1, (2, 2))[1] for seed in (1, 1, 2, 3)])
    far = -(-(np.abs(goals - obs["state"]).max(1) - 0.1) // 0.1)  # steps, at least
    steps = np.zeros(4, int)
    for _ in range(30):
        action = np.clip((goals - obs["state"]) / 0.1, -1, 1)
        obs, reward, terminated, truncated, info = pool.step(action[:, None])
        steps += info["steps"]
    assert terminated.all() and info["success"].all() and not truncated.any()
    assert (steps >= far).all() and (steps <= far + 1).all() and steps[0] == steps[1]


def test_equal_seeds_share_a_first_picture_within_a_task_alone():
    class Numbered:
        instruction, drawn = "", 0

        def __init__(self, task: str):
            self.task = task

        def reset(self, seed: int) -> None:
            self.seed = seed

        def observe(self, image: np.ndarray, state: np.ndarray) -> None:
            Numbered.drawn += 1
            state[:] = int(self.task), self.seed

    commands = Commands([Numbered(task) for task in "1122"], memory=0)
    commands.arrays = dict(image=np.zeros((4, 0)), state=np.zeros((4, 2)))
    commands.reset([(i, i, 7) for i in range(4)])
    assert commands.arrays["state"].tolist() == [[1, 7], [1, 7], [2, 7], [2, 7]] and Numbered.drawn == 2


def test_its_options_demonstrations_and_suites_need_nothing_more(toy, tmp_path):
    with pytest.raises(EnvError, match="Point-v0 has no option 'control_mode'.* there are image_size.*, speed$"):
        envs.make(toy, 1, control_mode="telepathy")
    with pytest.raises(EnvError, match="takes backend 'cpu'"):
        envs.make(toy, 1, backend="cuda")
    venv = envs.make(toy, 2, obs_mode="state", speed=0.2, instruction="there")
    data = demos.collect(tmp_path / "demos.h5", venv, 3, noise=0.2, progress=False)
    venv.close()
    assert len(data.start) == 3 and data.attrs["instruction"] == "there" and data.objects.shape[1:] == (1, 3)
    simulator = envs.simulator(toy)
    assert simulator.select(toy, ("id",), "rgb") == {toy: "id"} and simulator.task_of(toy) == toy
    with pytest.raises(EnvError, match="has no 'ood', it has: id"):
        simulator.select(toy, ("ood",), "rgb")


def test_what_a_program_defines_itself_is_not_found_by_workers(tmp_path):
    end = "envs.SIMULATORS['toy'] = Toy()\ntry:\n    envs.make('Point-v0', 1)\nexcept envs.EnvError as error:\n    print(error)\n"
    (tmp_path / "program.py").write_text(Path(toy_simulator.__file__).read_text() + end)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True)
    assert "define it in a module, not in the program itself" in done.stdout and done.stdout.count("\n") == 1, done.stderr


def test_ids_find_their_simulator_and_the_table_imports_none():
    ids = dict(maniskill=("PickCube-v1", "PickCube-v1/vision-table_color-1", "No-v1"), libero=("libero_10/3", "libero_goal_lan"))
    for name, found in ids.items():
        assert {envs.simulator(env_id) for env_id in found} == {envs.SIMULATORS[name]}
    code = "import sys; from pi_stepnft import envs; print({'sapien', 'mujoco', 'torch'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("env_id", "words"),
    [("PokeCube-v1", "poke cube"), ("FMBAssembly1Easy-v1", "fmb assembly 1 easy"), ("MS-AntRun-v1", "ms ant run"),
     ("UnitreeG1PlaceAppleInBowl-v1", "unitree g1 place apple in bowl"), ("my_tasks:MyPickCube-v1", "my pick cube"),
     ("PickCube-v1/semantic-object_color-2", "pick up the blue cube and move it to the goal")],
)
def test_instructions_are_words(env_id, words):
    assert envs.SIMULATORS["maniskill"].instruction(env_id) == words


# ------------------------------------------------------------------------------------------------------ which room imports which

ROOMS = "algos", "harness", "envs", "policies"


def modules() -> dict[str, Path]:
    """Every module of the package by its name, of all rooms."""
    found = {}
    for room in (*ROOMS, "pi_stepnft"):
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts if room == "pi_stepnft" else ("pi_stepnft", *parts))] = path
    return found


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports, those inside functions too; not those for a type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from statements(node)


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this package that one imports. `from package import module` counts as the module."""
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            found |= {whole if (whole := f"{base}.{alias.name}") in known else base for alias in node.names}
    return (found & known.keys()) - {name}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, path, known) for name, path in known.items()}


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    """A way that leads back to where it began, or None."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        found = next(filter(None, (walk(other, [*way, name]) for other in sorted(arrows[name]))), None)
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in arrows)), None)


def test_the_import_graph_has_no_circle_and_its_arrows_point_one_way():
    arrows = graph()
    assert "pi_stepnft.envs.maniskill.env" in arrows["pi_stepnft.envs.maniskill.simulator"]  # which a function imports
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]  # the test can see one
    assert circle(arrows) is None, " → ".join(circle(arrows))
    below = dict(algos=("harness", "envs", "policies"), harness=("envs", "policies"), envs=(), policies=())
    for name, others in arrows.items():
        room = name.split(".")[1] if "." in name else "pi_stepnft"
        for other in others - {"pi_stepnft"}:  # the package's own name and version
            if room in ROOMS:
                to = other.split(".")[1]
                assert to == room or to in below[room], f"{name} imports {other}"
            if room == "algos":
                assert not other.startswith("pi_stepnft.algos."), f"{name} imports {other}: an algorithm is read alone"
