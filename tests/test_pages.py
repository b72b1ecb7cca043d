"""User pages and benchmarks/results/ say the same: tables are those that pages.py writes, percentages of sentences have a file."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import pages  # noqa: E402

NUMBER = r"[+−]?\d+(?:\.\d+)?"
# "85.9, 83.0 and 82.8 %", "+4.0 points [−5.5, +13.5]", "70 to 80 %"
PERCENT = re.compile(rf"((?:{NUMBER}(?:,|,? and|,? to|–| →) ?)*{NUMBER})(?:\s?%|\spoints?\b)(?:\s\[({NUMBER}), ({NUMBER})\])?")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def percentages(text: str) -> set[str]:
    """Of a page's sentences, and of tables that are not generated."""
    found = PERCENT.findall(FENCE.sub("", pages.MARKED.sub("", text)))
    return {number for groups in found for group in groups for number in re.findall(NUMBER, group)}


def wrong(page: Path, root: Path = ROOT) -> list[str]:
    """What a page says that no file does."""
    text, results = page.read_text(), root / "benchmarks" / "results"
    said = [] if pages.fill(text, pages.TABLES, results) == text else ["a table is not the files': python benchmarks/pages.py"]
    for row in re.findall(r"^\|.*%.*\|$", FENCE.sub("", pages.MARKED.sub("", text)), re.MULTILINE):
        said.append(f"a table between no marks: {row}")
    figures = pages.FIGURES.get(str(page.relative_to(root)), {})
    for number in sorted(percentages(text)):
        if number in figures:
            decimals = len(number.partition(".")[2])
            value = f"{pages.look_up(results, *figures[number]):.{decimals}f}"
            if value != number.replace("−", "-").removeprefix("+"):
                said.append(f"{number}: {'/'.join(figures[number])} says {value}")
        elif number not in pages.LEVELS:
            said.append(f"{number} % is declared nowhere")
    return said + [f"{number} % is declared, and nowhere said" for number in figures.keys() - percentages(text)]


@pytest.mark.parametrize("page", pages.user_pages(), ids=lambda page: page.name)
def test_a_page_says_what_the_files_say(page):
    assert wrong(page) == []


def test_every_table_stands_somewhere_and_every_figure_has_its_page():
    marked = [name for page in pages.user_pages() for name in pages.MARKED.findall(page.read_text())]
    assert sorted(marked) == sorted(pages.TABLES)
    assert all((ROOT / page).exists() for page in pages.FIGURES)


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """A copy of pages and files, with a sentence of figures of its own."""
    for folder in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("images", "notebook"))
    shutil.copy(ROOT / "README.md", tmp_path)
    made = dict(rows=[dict(name="new", before=0.5, after=0.6, difference=0.1, interval=[-0.1, 0.2])])
    (tmp_path / "benchmarks" / "results" / "made.json").write_text(json.dumps(made))
    with open(tmp_path / "docs" / "data.md", "a") as page:
        page.write("\nSuccess is 50.0 and 60.0 %, +10.0 points [−10.0, +20.0].\n")
    places = {"50.0": "before", "60.0": "after", "+10.0": "difference", "−10.0": "interval/0", "+20.0": "interval/1"}
    figures = {number: ("made.json", f"rows/new/{place}") for number, place in places.items()}
    monkeypatch.setitem(pages.FIGURES, "docs/data.md", figures)
    return tmp_path


@pytest.mark.parametrize("name, before, after, told", [
    ("README.md", "| `make run` | ", "| `make run` | 1", "a table is not"),
    ("docs/data.md", "is 50.0 and 60.0 %", "is 50.0 and 61.0 %", "61.0 % is declared nowhere"),
    ("docs/data.md", "[−10.0, +20.0]", "[−10.0, +21.0]", "+21.0 % is declared nowhere"),
    ("docs/data.md", "+10.0 points", "about ten", "+10.0 % is declared, and nowhere said"),
    ("docs/train.md", "All files", "Success rose by 7 %. All files", "7 % is declared nowhere"),
    ("docs/train.md", "All files", "Success is\n12.5 to 20 %. All files", "12.5 % is declared nowhere"),
    ("docs/data.md", "| a LeRobot folder", "| success, % | 3 |\n| a LeRobot folder", "a table between no marks"),
])  # fmt: skip
def test_a_page_that_is_changed_alone_is_found(copied, name, before, after, told):
    page = copied / name
    assert wrong(page, copied) == [] and before in page.read_text()
    page.write_text(page.read_text().replace(before, after, 1))
    assert any(told in line for line in wrong(page, copied))


@pytest.mark.parametrize("file, place, page, told", [
    (pages.TABLES["headline"].rows[0][-1], ("after", "success"), "README.md", "a table is not"),
    ("made.json", ("rows", 0, "after"), "docs/data.md", "60.0: made.json/rows/new/after says 65.0"),
    ("overlap.json", ("rows", 0, "overlapped_s"), "docs/scaling.md", "a table is not"),
])  # fmt: skip
def test_a_file_that_is_changed_alone_is_found(copied, file, place, page, told):
    path = next((copied / "benchmarks" / "results").glob(file))
    content = inner = json.loads(path.read_text())
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] += 0.05
    path.write_text(json.dumps(content))
    assert any(told in line for line in wrong(copied / page, copied))
    pages.write(copied)
    assert not any("a table" in line for line in wrong(copied / page, copied))


def test_a_table_without_its_files_is_an_error(copied):
    with pytest.raises(pages.PageError, match="no training in .*nothing"):
        pages.Runs(("a",), [("b", "nothing-*.json")])(copied / "benchmarks" / "results")
    with pytest.raises(pages.PageError, match="no table 'other'; there are headline"):
        pages.fill("<!-- results: other --><!-- end of results -->", pages.TABLES, copied)


def test_a_row_averages_the_seeds_of_its_glob(tmp_path):
    for seed, success, commit in ((1, 0.7, "a" * 40), (2, 0.8, "b" * 40 + "-dirty")):
        outcome = lambda p: dict(success=p, interval=[p - 0.1, p + 0.1])
        (tmp_path / f"new-Task-v1-rgb-{seed}.json").write_text(json.dumps(dict(
            curve=[], env_id="Task-v1", obs_mode="rgb", seed=seed, before=outcome(0.5), after=outcome(success),
            env_steps=1000 * seed, training_minutes=20.0, commit=commit)))
    table = pages.Runs(("what",), [("new", "new-*.json"), ("one", "new-*-2.json")])
    assert table(tmp_path).splitlines()[2:] == [
        "| new | 50.0 | 75.0 (70.0–80.0) | 2 (1–2) | 20 | aaaaaaa, bbbbbbb-dirty |",
        "| one | 50.0 [40.0, 60.0] | 80.0 [70.0, 90.0] | 2 | 20 | bbbbbbb-dirty |",
    ]
