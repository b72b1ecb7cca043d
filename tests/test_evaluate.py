"""Evaluation: its statistics, its report, and the program on the real simulator, in a real browser."""

import ast
import csv
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from xml.etree import ElementTree

import chromium
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import tyro
from scipy.stats import binomtest, t
from test_main import checkpoints, one_thread, only_run, refusal, run  # noqa: F401 (two are fixtures)

from pi_stepnft import envs
from pi_stepnft.algos import evaluate
from pi_stepnft.harness import charts, evaluation, films, report
from pi_stepnft.harness.evaluation import Evaluation
from pi_stepnft.harness.statistics import compare, over_seeds, rate_interval, summarise, wilson

TASK = "PickCube-v1"
SFT = "pi0-tiny-pickcube-state"
VARIANT = f"{TASK}/execution-robot_noise-2"


def outcome(success) -> Evaluation:
    success = np.array(success, bool)
    return Evaluation(success, np.where(success, 20, 50), envs.EVAL_SEED + np.arange(len(success)))


# ----------------------------------------------------------------------------------------------------------- lost episodes


class Mortal:
    """Environments that succeed in two chunks, and lose whom `losses` names, (seed, how often)."""

    num_envs, action_dim, max_episode_steps, tasks, instructions = 4, 2, 8, ["task"] * 4, ["do it"] * 4

    def __init__(self, losses: dict[int, int]):
        self.losses = dict(losses)

    def reset(self, *, seed, options):
        self.seeds, self.running, self.taken = seed, options["reset_mask"].copy(), np.zeros(4, int)
        return {"state": np.zeros((4, 1))}, {}

    def step(self, chunk):
        steps = np.where(self.running, chunk.shape[1], 0)
        self.taken += steps
        lost = np.array([r and self.losses.get(int(s), 0) > 0 for r, s in zip(self.running, self.seeds)])
        for seed in self.seeds[lost]:
            self.losses[int(seed)] -= 1
        success = ~lost & (self.taken >= 4)
        self.running &= ~(success | lost)
        return {"state": np.zeros((4, 1))}, None, success, lost, dict(success=success, steps=steps * ~lost, lost=lost)


def test_lost_episodes_are_played_again_and_never_count_as_failures():
    act = lambda obs, text, turns: np.tile(np.arange(1, 3)[:, None], (len(text), 1, 2))
    plain, flaky = (
        evaluation.evaluate(Mortal(losses), act, 10, execute=2, seed=100)
        for losses in ({}, {101: 1, 102: 2, 109: 1})
    )
    assert (plain.repeated, flaky.repeated) == (0, 4)
    for result in (plain, flaky):
        assert result.success.all() and (result.steps == 4).all() and result.seeds.tolist() == list(range(100, 110))
        assert (result.actions[:, :4, 0] == [1, 2, 1, 2]).all() and not result.actions[:, 4:].any()
    with pytest.raises(envs.EnvError, match="seed 103 lost its worker 3 times"):
        evaluation.evaluate(Mortal({103: 3}), act, 4, execute=2, seed=100)


def test_an_episode_has_its_noise_whatever_is_played_beside_it():
    """Two policies share the noise of every episode, however soon others of theirs end."""

    class Policy(torch.nn.Module):
        config = SimpleNamespace(horizon=3, action_dim=2)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def act(self, obs, instructions, num_steps, noise):
            return noise.numpy()

    act = evaluation.by_ode(Policy(), 4)
    turns = np.array([[100, 0], [101, 0], [102, 0], [101, 1]])
    together = act({}, ["go"] * 4, turns)
    assert np.array_equal(together[[1, 3]], act({}, ["go"] * 2, turns[[1, 3]])) and abs(together.mean()) < 0.7
    assert len(np.unique(together)) == together.size


def test_a_policy_that_has_diverged_says_so():
    """Actions that are no numbers end an episode as a failure; where there are no others there is nothing to report."""
    bad = lambda obs, text, turns: np.where(np.isin(turns[:, 0], seeds)[:, None, None], np.nan, np.ones((len(text), 2, 2)))
    seeds = [101, 105]
    result = evaluation.evaluate(Mortal({}), bad, 8, execute=2, seed=100)
    assert result.success.tolist() == [True, False, True, True, True, False, True, True] and result.broken == 2
    seeds = range(100, 108)
    with pytest.raises(envs.EnvError, match="diverged"):
        evaluation.evaluate(Mortal({}), bad, 8, execute=2, seed=100)


# ------------------------------------------------------------------------------------------------------------- the statistics


@pytest.mark.parametrize("episodes, p, q", [(100, 0.5, 0.7), (30, 0.9, 0.95), (12, 0.5, 0.5)])
def test_one_environment_is_compared_by_the_exact_mcnemar_test(episodes, p, q):
    rng = np.random.default_rng(episodes)
    a, b = (rng.random((1, episodes)) < rate for rate in (p, q))
    found = compare(b, a, [Fraction(1)])
    won, lost = int((b & ~a).sum()), int((a & ~b).sum())
    assert found.p == pytest.approx(binomtest(won, won + lost).pvalue)
    assert found.difference == pytest.approx((won - lost) / episodes)
    assert found.interval[0] < found.difference < found.interval[1]


def test_several_environments_are_compared_by_flipping_the_signs_of_seeds():
    """By hand: differences 2, 1, 1 have the sums ±4, ±2, ±2, 0 with a chance of 1/8 each but 0, which has 2/8."""
    baseline = np.zeros((2, 4), bool)
    success = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool)
    found = compare(success, baseline, [Fraction(1, 2)] * 2)
    assert found.difference == 0.5 and found.p == 2 / 8
    success[1, 2], baseline[1, 2] = False, True  # the third seed now has −1: the sum is 2
    assert compare(success, baseline, [Fraction(1, 2)] * 2).p == 6 / 8
    assert compare(success, success, [Fraction(1, 2)] * 2).p == 1


def test_a_comparison_of_equals_is_no_certainty():
    same = np.ones((1, 10), bool)
    low, high = compare(same, same, [Fraction(1)]).interval
    assert low < 0 < high


def test_the_interval_of_one_environment_is_wilsons():
    success = np.arange(40)[None] < 13
    assert rate_interval(success, np.ones(1)) == pytest.approx((13 / 40, *wilson(13, 40)))
    assert rate_interval(np.ones((1, 9), bool), np.ones(1))[1:] == pytest.approx(wilson(9, 9))


def test_episodes_of_one_seed_count_as_one_where_they_end_alike():
    rng = np.random.default_rng(0)
    once = rng.random((1, 60)) < 0.5
    alike, apart = np.repeat(once, 8, axis=0), rng.random((8, 60)) < 0.5
    width = lambda success: np.diff(rate_interval(success, np.full(8, 1 / 8))[1:])[0]
    assert width(alike) == pytest.approx(np.diff(wilson(once.sum(), 60))[0], rel=0.02)
    assert width(apart) < 0.5 * width(alike)


@pytest.mark.parametrize("variants", [1, 10])
def test_the_intervals_cover_what_they_should(variants):
    """95 % of them hold the true rate and the true difference, for outcomes that depend on the seed."""
    rng, n = np.random.default_rng(variants), 400
    weights, covered = [Fraction(1, variants)] * variants, np.zeros(2)
    for _ in range(n):
        difficulty = rng.normal(size=(1, 100))
        a, b = ((difficulty + rng.normal(size=(variants, 100)) < threshold) for threshold in (0, 0.74161))  # 50 and 70 %
        _, low, high = rate_interval(a, np.array(weights, float))
        least, most = compare(b, a, weights).interval
        covered += low <= 0.5 <= high, least <= 0.2 <= most
    assert (covered / n > 0.92).all() and (covered / n < 0.98).all()


FAMILIES = {
    TASK: "id", f"{TASK}/vision-a-1": "vision", f"{TASK}/vision-a-2": "vision", f"{TASK}/execution-b-1": "execution"
}


def made_up(labels=("SFT", "StepNFT"), episodes=40) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {label: {env: rng.random(episodes) < 0.3 + 0.2 * i for env in FAMILIES} for i, label in enumerate(labels)}


def test_families_weigh_alike_whatever_their_size():
    rates = dict(zip(FAMILIES, (0.9, 0.2, 0.4, 0.7)))
    outcomes = {"a": {env: np.arange(10) < 10 * rate for env, rate in rates.items()}}
    outcomes["b"] = {env: np.arange(10) < 10 * rate - 1 for env, rate in rates.items()}
    rows = summarise(outcomes, FAMILIES)
    found = {row["name"]: row["policies"]["a"]["success"] for row in rows}
    assert found == pytest.approx({**rates, "vision": 0.3, "execution": 0.7, "OOD mean": 0.5})
    assert all(row["policies"]["b"]["difference"] == pytest.approx(-0.1) for row in rows)
    assert "p" not in rows[0]["policies"]["a"]
    only = summarise({"a": {TASK: outcomes["a"][TASK]}}, FAMILIES)
    assert [row["name"] for row in only] == [TASK]


def drawn(rng, *algorithms: tuple[str, int, float], variants: int = 1, episodes: int = 100) -> tuple[dict, dict, dict]:
    """Outcomes, families and groups of made-up trainings: name, how many, mean skill. Skill varies by training, seeds are hard or
    not, and a training has its own luck with each."""
    families = {f"{TASK}/vision-a-{i}": "vision" for i in range(1, variants + 1)}
    difficulty, outcomes, groups = rng.normal(size=episodes), {}, {}
    for name, number, mean in algorithms:
        groups[name] = [f"{name} {i}" for i in range(number)]
        for label in groups[name]:
            skill = mean + 0.2 * rng.normal()
            outcomes[label] = {env: difficulty + rng.normal(size=episodes) < skill for env in families}
    return outcomes, families, groups


def test_trainings_and_episodes_are_both_left_to_chance():
    """By hand, for one environment: the variance of seeds and of trainings, each over its number, and their degrees of freedom."""
    outcomes, families, groups = drawn(np.random.default_rng(0), ("A", 3, 0.0), ("B", 2, 0.5), ("C", 1, 0.2))
    row = over_seeds(summarise(outcomes, families), outcomes, groups)[0]
    a, b, c = (np.stack([outcomes[label][row["name"]] for label in groups[name]]) for name in "ABC")
    shares = [(x.var(ddof=1) / len(x), len(x) - 1) for x in (b.mean(0) - a.mean(0), b.mean(1), a.mean(1))]
    error = sum(s for s, _ in shares) ** 0.5
    freedom = error**4 / sum(s**2 / n for s, n in shares)
    found, difference = row["policies"]["B"], b.mean() - a.mean()
    assert found["difference"] == pytest.approx(difference) and found["success"] == pytest.approx(b.mean())
    assert found["difference_interval"] == pytest.approx([difference + s * t.ppf(0.975, freedom) * error for s in (-1, 1)])
    assert found["p"] == pytest.approx(2 * t.sf(abs(difference) / error, freedom))
    assert "difference" not in row["policies"]["A"]
    assert row["policies"]["C"]["interval"] == pytest.approx(wilson(c.sum(), c.size))  # of a single training: its own
    outcomes = dict.fromkeys(outcomes, {row["name"]: np.ones(100, bool)})
    row = over_seeds(summarise(outcomes, families), outcomes, groups)[0]
    assert row["policies"]["B"]["p"] is row["policies"]["B"]["difference_interval"] is None  # where nothing varies


def test_algorithms_that_do_not_differ_seldom_seem_to():
    rng, n, missed = np.random.default_rng(1), 200, 0
    for _ in range(n):
        outcomes, families, groups = drawn(rng, ("A", 3, 0.0), ("B", 3, 0.0), variants=3, episodes=60)
        low, high = over_seeds(summarise(outcomes, families), outcomes, groups)[-1]["policies"]["B"]["difference_interval"]
        missed += not low <= 0 <= high
    assert missed / n < 0.08


# ---------------------------------------------------------------------------------------------------------------- the choices


def test_suites_name_environments_families_and_variants():
    maniskill = envs.simulator(TASK)
    everything = maniskill.select(TASK, ("id", "ood"), "rgb")
    assert list(everything) == [TASK, *maniskill.variants(TASK)] and everything[VARIANT] == "execution"
    blind = maniskill.select(TASK, ("id", "ood"), "state")
    assert set(everything) - set(blind) == set(maniskill.select(TASK, ("vision",), "rgb"))
    assert maniskill.select(TASK, ("execution-robot_noise-2", "id"), "state") == {VARIANT: "execution", TASK: "id"}
    with pytest.raises(envs.EnvError, match="PickCube-v1 has no 'odd'"):
        maniskill.select(TASK, ("id", "odd"), "rgb")
    with pytest.raises(envs.EnvError, match="PokeCube-v1 has no 'ood'"):
        maniskill.select("PokeCube-v1", ("id", "ood"), "rgb")


def test_checkpoints_go_by_their_runs():
    labels = evaluate.default_labels(("pi0-tiny-pickcube-rgb", "runs/ppo-1/policy", "runs/nft-1/rollout_policy", "there/sft/"))
    assert labels == ["pi0-tiny-pickcube-rgb", "ppo-1", "nft-1 (θ_old)", "sft"]
    assert evaluate.default_labels(("a/sft", "b/sft")) == ["a/sft", "b/sft"]


def test_repeated_labels_are_numbered():
    assert evaluate.numbered(("SFT", "PPO", "NFT", "PPO")) == ["SFT", "PPO 1", "NFT", "PPO 2"]


def test_films_show_the_first_episodes_and_the_best_and_worst():
    result = outcome([0, 1, 1, 1, 0, 0])
    result.steps = np.array([50, 30, 12, 20, 50, 50])
    together, best = evaluate.choose_films(TASK, "id", {"a": result}, 2, 2)
    assert together[2] == [("a", "a", [0, 1])]
    assert [numbers for _, _, numbers in best[2]] == [[2, 3], [0, 4]]
    assert [len(film[2]) for film in evaluate.choose_films(TASK, "id", {"a": outcome([1, 1])}, 0, 2)] == [1]


def test_the_digest_is_of_what_a_policy_does(checkpoints, tmp_path):  # noqa: F811
    copy = shutil.copytree(checkpoints["state"], tmp_path / "copy")
    assert evaluate.digest(copy) == evaluate.digest(checkpoints["state"]) != evaluate.digest(checkpoints["rgb"])
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert evaluate.digest(copy) != evaluate.digest(checkpoints["state"])


# ----------------------------------------------------------------------------------------------------------------- the report


def made_up_results(labels=("SFT", "StepNFT")) -> dict:
    return dict(
        env_id=TASK, obs_mode="rgb", episodes=40, eval_seed=envs.EVAL_SEED, num_envs=40, date="2026-01-31",
        command="python algos/evaluate.py a b", rows=summarise(made_up(labels), FAMILIES), versions=dict(python="3.11"),
        checkpoints=[dict(label=label, checkpoint=f"runs/{i}") for i, label in enumerate(labels)],
    )


def test_markdown_has_a_row_per_family_and_variant():
    text = report.markdown(made_up_results())
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert [row for row in rows if row not in ("", "---")] == [
        "In distribution", "Vision", "Execution", "OOD mean", "a, mild", "a, strong", "b, mild"
    ]
    results = made_up_results()
    policy = results["rows"][0]["policies"]["StepNFT"]
    assert f"{100 * policy['success']:.1f} [{100 * policy['interval'][0]:.1f}, " in text
    assert f"{100 * policy['difference']:+.1f}".replace("-", "−") in text and report.p_value(policy["p"]) in text


def test_the_page_needs_nothing_else_and_believes_no_label(tmp_path):
    film = report.Film(tmp_path / "film.mp4", "<i>title</i>", "caption")
    film.path.write_bytes(b"film")
    curve = [dict(env_steps=n, success=0.5, episodes=8) for n in (0, 1000, 3000)]
    page = report.html(made_up_results(("<b>&", "B")), {"B": curve}, [film])
    assert "<i>title" not in page and "<b>&<" not in page and "&lt;b&gt;&amp;" in page
    for source in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert source.startswith("data:")
    assert "http" not in page and "url(" not in page and "@import" not in page and "<script" not in page
    assert "Learning curves" in page and "Learning curves" not in report.html(made_up_results(), {}, [])


def test_charts_of_a_page_are_the_same_every_time_and_keep_to_themselves():
    label = 'a" id="b" $x^2$ <b>'
    draw = lambda: charts.bars([(label, [charts.Bar(label, 0, 0.5, (0.4, 0.6), "50.0"), charts.Bar("B", 1, 0.0, None, "0.0")])])
    chart = draw() + charts.curves([(label, 0, [dict(env_steps=n, success=0.5, episodes=8) for n in (0, 1000)])])
    assert draw() in chart and "http" not in chart and "url(" not in chart and "#" not in chart  # neither ids nor fixed colours
    root = ElementTree.fromstring(f"<page>{chart}</page>")
    assert not any("id" in element.attrib for element in root.iter())
    assert label in [text.text for text in root.iter("text")] and [t.text for t in root.iter("title")] == [label, "B", label]


def test_a_report_takes_seeds_of_an_algorithm_together():
    def grouped(labels: tuple[str, ...], groups: str) -> dict:
        results = made_up_results(labels)
        for checkpoint, group in zip(results["checkpoints"], groups):
            checkpoint["group"] = group
        return results | dict(group_rows=over_seeds(results["rows"], made_up(labels), report.groups(results)))

    results = grouped(("SFT", "A 1", "A 2"), "SAA")
    assert report.groups(results) == {"S": ["SFT"], "A": ["A 1", "A 2"]}
    policy = results["group_rows"][0]["policies"]["A"]
    mean = f"{100 * policy['success']:.1f} [{100 * policy['interval'][0]:.1f}, "
    text, page = report.markdown(results), report.html(results, {}, [])
    assert text.index("| A − S |") < text.index(mean) < text.index("### Each checkpoint") < text.index("A 2 − SFT")
    assert "Means over trainings, A (2)" in text and mean.split()[0] in page and "Each checkpoint" in page
    assert 'var(--c1)"></span>A 2' in page and "var(--c2)" not in page  # one colour for the seeds of an algorithm
    text = report.markdown(grouped(("A 1", "A 2", "SFT"), "AAS"))
    assert "SFT − A 1" not in text and "| S − A |" in text  # one training is no baseline


def test_the_documented_table_is_the_measured_one():
    root = Path(__file__).parents[1]
    results = json.loads((root / "benchmarks" / "results" / "evaluate" / "PickCube-v1-rgb.json").read_text())
    table = report.markdown(results).split("### ")[0].split("\n\n")[1]
    assert table in (root / "docs" / "notebook" / "evaluate.md").read_text() and table.count("\n") == 6
    assert results["episodes"] == 100 and [len(members) for members in report.groups(results).values()] == [3, 3, 1]


def test_films_beyond_the_budget_are_named_instead(tmp_path):
    shown = [report.Film(tmp_path / f"{size}.mp4", f"film {size}", "") for size in (50, 80, 40)]
    for film, size in zip(shown, (50, 80, 40)):
        film.path.write_bytes(bytes(size))
    with mock.patch.object(report, "VIDEO_BUDGET", 100):
        page = report.html(made_up_results(), {}, shown)
    assert page.count("<video") == 2 and "film 40" in page and "film 80" not in page and "80.mp4" in page


def test_a_film_is_what_browsers_play(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [films.Episode(i, rng.integers(0, 255, (length, 64, 64, 3), np.uint8), i == 0) for i, length in enumerate((5, 9))]
    films.write(tmp_path / "film.mp4", "do this", [("one", (0, 114, 178), episodes), ("other", (230, 159, 0), episodes[:1])])
    details = iio.immeta(tmp_path / "film.mp4", plugin="FFMPEG")
    assert details["codec"] == "h264" and details["pix_fmt"].startswith("yuv420p")
    frames = iio.imread(tmp_path / "film.mp4", plugin="FFMPEG")
    assert len(frames) == 9 + 30 and frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    edge = (films.GAP + 30, 2 * films.STRIP + 1)  # x, y on the first tile's upper edge
    assert np.abs(frames[8, edge[1], edge[0]].astype(int) - films.GREEN).max() < 40
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("side", [1, 224])  # the smallest picture that there is, and that of a report
def test_captions_of_a_film_keep_apart(tmp_path, side):
    from PIL import ImageDraw

    boxes = {}  # by picture, of which each has a canvas of its own
    original = ImageDraw.ImageDraw.text

    def text(draw, xy, text, fill, font, anchor):
        left, top, right, bottom = draw.textbbox(xy, text, font, anchor)
        assert 0 <= left and right <= draw.im.size[0] and bottom <= draw.im.size[1], text
        boxes.setdefault(draw, []).append((text, left, top, right, bottom))
        original(draw, xy, text, fill, font, anchor=anchor)

    frames = [np.zeros((length, side, side, 3), np.uint8) for length in (3, 30, 101)]
    tiles = [films.Episode(1_100_000_012 + i, frames[i], success) for i, success in enumerate((True, False, None))]
    with mock.patch.object(ImageDraw.ImageDraw, "text", text):
        rows = [("PickCube-v1, after 120 iterations", (0, 114, 178), tiles[i:]) for i in (0, 2)]
        films.write(tmp_path / "film.mp4", "do this", rows)
    blank, *pictures = boxes.values()  # with the instruction and the titles
    assert len(pictures) == 101 and {text for text, *_ in pictures[-1]} >= {"success, step 2", "replay differs, step 100"}
    for picture in pictures:
        drawn = sorted(blank + picture)
        for i, (one, left, top, right, bottom) in enumerate(drawn):
            for other, x0, y0, x1, y1 in drawn[i + 1 :]:
                assert x1 <= left or right <= x0 or y1 <= top or bottom <= y0, f"{one!r} over {other!r}"


# ----------------------------------------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, evaluations): a short training run from the bundled policy, and every evaluation that it made."""
    folder, made = tmp_path_factory.mktemp("training"), []

    def spy(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    original = evaluation.evaluate
    arguments = "--obs-mode state --num-envs 8 --rollout-epochs 1 --group-size 4 --iterations 1 --final-eval-episodes 12 "
    arguments += "--labels binary --learning-rate 6e-4 --warmup-iterations 0 --num-threads 1 --no-video --rollout-steps 16"
    with mock.patch("pi_stepnft.harness.run.evaluate", spy):
        run("stepnft_pi0", *arguments.split(), cwd=folder)
    return only_run(folder), made


@pytest.fixture(scope="module")
def arguments(trained):
    policy = trained[0] / "policy"
    return [SFT, policy, "--labels", "SFT", "StepNFT", "--suites", "id", "execution-robot_noise-2", "--num-envs", 8,
            "--episodes", 12, "--video-episodes", 1, "--render-best-of", 1, "--num-threads", 1]


@pytest.fixture(scope="module")
def evaluated(arguments, tmp_path_factory):
    """(folder that the program ran in, its output folder, the replays of its films)."""
    folder, replays = tmp_path_factory.mktemp("evaluation"), []

    def spy(*args, **kwargs):
        replays.extend(replay(*args, **kwargs))
        return replays[-len(args[1]) :]

    replay = films.replay
    with mock.patch.object(films, "replay", spy):
        run("evaluate", *arguments, cwd=folder)
    return folder, only_run(folder), replays


def read_outcomes(output: Path) -> dict[tuple[str, str], Evaluation]:
    rows: dict[tuple[str, str], list] = {}
    with open(output / "outcomes.csv") as file:
        for row in csv.DictReader(file):
            rows.setdefault((row["checkpoint"], row["environment"]), []).append(row)
    column = lambda table, name: np.array([int(row[name]) for row in table])
    return {key: Evaluation(column(t, "success") == 1, column(t, "steps"), column(t, "seed")) for key, t in rows.items()}


def test_training_and_the_program_evaluate_alike(trained, evaluated):
    """Episode by episode, before and after; and so do the figures of the run's result.json."""
    folder, (before, after, _) = trained
    found, result = read_outcomes(evaluated[1]), json.loads((folder / "result.json").read_text())
    rows = {row["name"]: row["policies"] for row in json.loads((evaluated[1] / "results.json").read_text())["rows"]}
    for label, expected, key in (("SFT", before, "before"), ("StepNFT", after, "after")):
        for name in ("success", "steps", "seeds"):
            assert (getattr(found[label, TASK], name) == getattr(expected, name)).all()
        assert rows[TASK][label]["success"] == result[key]["success"]
        assert rows[TASK][label]["interval"] == pytest.approx(result[key]["interval"])
    assert 0 < before.success.sum() < 12  # something to agree on
    assert (before.steps != after.steps).any()


def test_everything_is_written(evaluated):
    _, output, _ = evaluated
    found = read_outcomes(output)
    assert set(found) == {(label, env) for label in ("SFT", "StepNFT") for env in (TASK, VARIANT)}
    assert all(len(result.seeds) == 12 and result.seeds[0] == envs.EVAL_SEED for result in found.values())
    results = json.loads((output / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == [TASK, VARIANT, "execution"]
    assert results["command"].startswith("python ") and "--labels SFT StepNFT" in results["command"]
    assert {"torch", "mani-skill", "python"} <= set(results["versions"])
    for label in ("SFT", "StepNFT"):
        assert found[label, TASK].success.mean() == results["rows"][0]["policies"][label]["success"]
    assert "| In distribution |" in (output / "table.md").read_text()
    page = (output / "report.html").read_text()
    assert page.count("<video") == len(list((output / "videos").iterdir())) == 4 and "Learning curves" in page
    assert len(page) < 15_000_000


def test_films_repeat_the_evaluated_episodes(evaluated):
    """Actions alone, without the policy, lead to the same end in the same number of steps."""
    _, output, replays = evaluated
    found = read_outcomes(output)
    assert len(replays) >= 6
    first = replays[0]
    assert first.seed == envs.EVAL_SEED and len(first.frames) == found["SFT", TASK].steps[0] + 1
    assert all(episode.success is not None for episode in replays)
    assert all(episode.frames.std() > 5 for episode in replays)


def test_what_is_there_is_not_repeated(arguments, evaluated, trained, tmp_path, capsys):
    folder, output, _ = evaluated
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.suffix in (".npz", ".mp4")}
    with mock.patch.object(envs, "make", side_effect=AssertionError("nothing is left to simulate")):
        run("evaluate", *arguments, cwd=folder)
    assert only_run(folder) == output and times == {path: path.stat().st_mtime_ns for path in times}

    # other weights, seeds or numbers of episodes are another matter
    for more in (["--eval-seed", 7], ["--episodes", 4], ["--execute", 3]):
        with mock.patch.object(envs, "make", side_effect=envs.EnvError("to be simulated")), pytest.raises(SystemExit) as stop:
            run("evaluate", *arguments, *more, "--output", output, cwd=folder)
        assert stop.value.code == 1 and "error: to be simulated\n" in capsys.readouterr().err


def test_an_interruption_keeps_what_is_complete(arguments, evaluated, tmp_path):
    output = shutil.copytree(evaluated[1], tmp_path / "output")
    described = json.loads((output / "results.json").read_text())["checkpoints"]
    (lost,) = (output / "episodes").glob(f"*robot_noise*{described[1]['sha256'][:12]}.npz")
    lost.unlink()
    for name in ("report.html", "outcomes.csv"):
        (output / name).unlink()
    with mock.patch.object(envs, "make", side_effect=KeyboardInterrupt), pytest.raises(SystemExit) as stop:
        run("evaluate", *arguments, "--output", output, cwd=tmp_path)
    assert stop.value.code == 130
    assert {env for _, env in read_outcomes(output)} == {TASK} and "<video" in (output / "report.html").read_text()
    run("evaluate", *arguments, "--output", output, cwd=tmp_path)
    whole = read_outcomes(output)
    for key, expected in read_outcomes(evaluated[1]).items():
        assert (whole[key].success == expected.success).all() and (whole[key].steps == expected.steps).all()


@pytest.mark.skipif(chromium.EXECUTABLE is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_the_report_in_a_browser(evaluated):
    """Opened as a file: no error, the charts in their places, light and dark, on a phone too, and a film that plays."""
    _, output, _ = evaluated
    with chromium.Page() as page:
        widths, backgrounds, paints, heights = [], [], [], []
        for width, scheme in ((1200, "light"), (390, "dark")):
            page.look(width, 844, scheme, mobile=width < 500)
            page.open(output / "report.html")
            widths.append(page.evaluate("document.documentElement.scrollWidth") - width)
            backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            paints.append(page.evaluate("getComputedStyle(document.querySelector('.bar path')).fill"))
            heights += page.evaluate("[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)")
            chart = "document.querySelector('svg.chart')"
            bars = page.evaluate(f"[...{chart}.querySelectorAll('.bar')].map(bar => bar.getBoundingClientRect().width)")
            whole = page.evaluate(f"{chart}.querySelector('.plot').getBoundingClientRect().width")
            results = json.loads((output / "results.json").read_text())
            rates = [row["policies"][label]["success"] for row in report.headline(results["rows"]) for label in ("SFT", "StepNFT")]
            assert bars == pytest.approx([rate * whole for rate in rates], abs=1)
        assert widths == [0, 0]  # nothing sticks out
        assert backgrounds == ["rgb(255, 255, 255)", "rgb(21, 24, 27)"]
        assert paints == ["rgb(0, 114, 178)", "rgb(61, 155, 216)"]
        assert min(heights) > 10 and max(heights) < 25  # legible, on a phone too
        assert page.evaluate("document.querySelectorAll('.curve').length") == 1
        for number in range(page.evaluate("document.querySelectorAll('video').length")):
            played = page.evaluate(f"""(async () => {{
                const video = document.querySelectorAll('video')[{number}]
                await video.play()
                const start = performance.now()
                while (video.currentTime < 0.3 && performance.now() - start < 30000) await new Promise(r => setTimeout(r, 50))
                return [video.currentTime, video.videoWidth, video.videoHeight]
            }})()""")
            assert played[0] >= 0.3 and min(played[1:]) > 200
        assert page.errors == []


@pytest.mark.skipif(chromium.EXECUTABLE is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_the_browser_would_have_told(tmp_path):
    (tmp_path / "bad.html").write_text("<script>console.error('odd'); missing()</script><img src='nowhere.png'>")
    with chromium.Page() as page:
        page.open(tmp_path / "bad.html")
        assert len(page.errors) >= 3


def test_help_explains_every_option(monkeypatch, capsys):
    """As that of the training files, but for the checkpoints, which go by their place."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        tyro.cli(evaluate.Args, args=["--help"])
    text = capsys.readouterr().out
    classes = [node for node in ast.parse(Path(evaluate.__file__).read_text()).body if isinstance(node, ast.ClassDef)]
    (definition,) = (node for node in classes if node.name == "Args")
    for option, docstring in zip(definition.body[::2], definition.body[1::2], strict=True):
        assert option.target.id == "checkpoints" or f"--{option.target.id.replace('_', '-')}" in text
        assert docstring.value.value.splitlines()[0] in text
