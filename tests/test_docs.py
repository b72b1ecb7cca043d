"""README.md and docs/: links and anchors resolve, commands name programs and options that exist, user pages stay short."""

import ast
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USER = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = sorted((ROOT / "docs" / "notebook").glob("*.md"))
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
ALGORITHMS = "stepnft", "ppo", "grpo", "nft", "rft", "critic", "sft"
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PROGRAM = r"(?:algos|benchmarks|examples)/\w+\.py"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------------------------------------- links


@lru_cache
def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


def broken(path: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text()))
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or anchor and anchor not in anchors(file):
            found.append(link)
    return found


@pytest.mark.parametrize("path", [*USER, *NOTEBOOK, *OTHERS], ids=name)
def test_links_and_anchors_resolve(path):
    assert broken(path) == []


def test_every_picture_is_shown():
    pictures = {path.name for folder in ("docs/images", "videos") for path in (ROOT / folder).iterdir()}
    shown = set(re.findall(r"(?:images|videos)/([\w.-]+)", "\n".join(path.read_text() for path in [*USER, *NOTEBOOK])))
    assert pictures == shown


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`, three\n"
                    "[a](page.md#one-two-three) [b](page.md#four) [c](none.md)\n```\n# five\n[d](e.md)\n```\n[f](#five)")
    assert broken(page) == ["page.md#four", "none.md", "#five"]


def test_the_site_shows_every_page_and_leads_from_installing_to_a_task_of_ones_own():
    listed = set(re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text())) - {"index.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in [*USER[1:], *NOTEBOOK]}
    way = ["README.md", "docs/install.md", "docs/train.md", "docs/compare.md", "docs/environments.md"]
    for here, following in zip(way, way[1:]):
        text = (ROOT / here).read_text()
        assert f"({following})" in text if here == "README.md" else f"({Path(following).name})" in text.split("Next: ")[-1]


# ---------------------------------------------------------------------------------------------------------------- commands


def classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}


def options(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> set[str]:
    """Options of a dataclass and of those it is derived from: --name, of a switch --no-name too, and aliases."""
    found = set()
    for base in node.bases:
        found |= options(known[base.attr if isinstance(base, ast.Attribute) else base.id], known)
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            option = field.target.id.replace("_", "-")
            annotation = ast.unparse(field.annotation)
            found |= {f"--{option}", *re.findall(r"'(--[\w-]+)'", annotation)}
            found |= {f"--no-{option}"} if "bool" in annotation else set()
    return found


@lru_cache
def program_options(program: str) -> set[str]:
    found, text = classes(ROOT / program), (ROOT / program).read_text()
    if "Args" not in found:  # argparse, or sys.argv
        return {"--help", *re.findall(r"[\"'](--[\w-]+)", text)}
    return {"--help"} | options(found["Args"], classes(ROOT / "harness" / "args.py") | found)


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """The programs that a page's code starts, each with its arguments; what a page sets by NAME="…" is put in."""
    text = path.read_text()
    variables = dict(re.findall(r"\b([A-Z]+)=\"([^\"]*)\"", text))
    code = [*FENCE.findall(text), *re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    found = []
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        for program, rest in re.findall(rf"(?:python|torchrun [^#]*?) ({PROGRAM})([^#;|]*)", line):
            for variable, value in variables.items():
                rest = rest.replace(f"${variable}", value)
            found.append((program, shlex.split(rest)))
    return found


def unknown(program: str, arguments: list[str]) -> list[str]:
    if not (ROOT / program).is_file():
        return [program]
    given = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    return [option for option in given if option not in program_options(program)]


@pytest.mark.parametrize("path", USER, ids=name)
def test_commands_name_programs_and_options_that_exist(path):
    wrong = {f"{program} {option}" for program, arguments in commands(path) for option in unknown(program, arguments)}
    assert wrong == set()


def test_a_command_that_does_not_work_is_found():
    assert sum(len(commands(path)) for path in USER) > 60
    assert unknown("algos/nothing.py", []) == ["algos/nothing.py"]
    given = ["--no-video", "--num-envs", "4", "--group-size=4", "--no-seed", "--critic-warmup"]
    assert unknown("algos/stepnft_pi0.py", given) == ["--no-seed", "--critic-warmup"]
    assert unknown("algos/evaluate.py", ["--suite", "id", "--suites", "ood"]) == []


def test_targets_and_modules_exist():
    text = "\n".join(path.read_text() for path in USER)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)) <= targets
    for module in set(re.findall(r"python -m (pi_stepnft\.[\w.]+)", text)):
        rooms = module.split(".")[1:]
        folders = [ROOT / "pi_stepnft" / Path(*rooms), ROOT / Path(*rooms)]
        assert any((folder / "__main__.py").is_file() or folder.with_suffix(".py").is_file() for folder in folders), module


# ------------------------------------------------------------------------------------------------------------------ length


def test_user_pages_are_short():
    assert sum(len(re.sub(r"<!--.*?-->", "", path.read_text()).split()) for path in USER) <= 10_000
    for algorithm in ALGORITHMS:
        assert len((ROOT / "docs" / f"{algorithm}.md").read_text().splitlines()) <= 150, algorithm
