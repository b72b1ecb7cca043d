"""benchmarks/compare.py on stand-ins for the algorithms: order, failures, resuming, and the arithmetic of its report."""

import fcntl
import importlib
import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402

from pi_stepnft import harness  # noqa: E402
from pi_stepnft.algos import stepnft_pi0  # noqa: E402

OVERVIEW = "docs/compare.md"
MARKED = "before\n\n<!-- results: {} -->\n\nold\n\n<!-- end of results -->\n\nafter\n"

# What an algorithm file does as far as compare.py can tell: it fails with seed 2, and with --wait it stops after its checkpoint.
ALGORITHM = """
import argparse, json, pathlib, shlex, sys, time
parser = argparse.ArgumentParser()
for name in ("--env-id", "--obs-mode", "--resume"):
    parser.add_argument(name)
parser.add_argument("--seed", type=int)
parser.add_argument("--iterations", type=int, default=120)
parser.add_argument("--max-minutes", type=float, default=24.0)
parser.add_argument("--num-threads", type=int, default=0)
parser.add_argument("--eval-seed", type=int, default=7)
parser.add_argument("--wait", action="store_true")
args = parser.parse_args()
run = pathlib.Path(args.resume or f"runs/fake-{args.env_id.replace('/', '-')}-{args.obs_mode}-{args.seed}-{time.time_ns()}")
given = json.loads((run / "args.json").read_text()) if args.resume else vars(args)
if given["seed"] == 2:
    print("line of progress\\r" * 30)
    sys.exit("error: no luck")
run.mkdir(parents=True, exist_ok=True)
(run / "args.json").write_text(json.dumps(given | {"max_minutes": args.max_minutes}))
try:
    (run / "checkpoints" / "last" / "policy").mkdir(parents=True, exist_ok=True)
    if not args.resume:
        meta = dict(fake=dict(command="python " + shlex.join(sys.argv)), seed=1)
        (run / "checkpoints" / "last" / "policy" / "config.json").write_text(json.dumps(dict(meta=meta)))
    (run / "checkpoints" / "last" / "training.json").write_text(json.dumps({"progress": {"trained_s": 360.0}}))
    time.sleep(60 * args.wait)
except KeyboardInterrupt:
    (run / "stopped").touch()
    sys.exit("interrupted")
outcome = dict(success=0.5, interval=[0.4, 0.6], episodes=100)
(run / "result.json").write_text(json.dumps(dict(
    command="python " + shlex.join(sys.argv), env_id=given["env_id"], obs_mode=given["obs_mode"], seed=given["seed"],
    checkpoint="start", env_steps=1000, training_minutes=1.0, before=outcome, after=outcome, args=given | vars(args),
    curve=[dict(env_steps=x, minutes=x / 1000, success=0.5) for x in (0, 1000)],
)))
"""

# algos/evaluate.py as far as compare.py can tell: fails with one episode, and counts how often it was called.
EVALUATE = """
import json, pathlib, sys
episodes, output = (sys.argv[sys.argv.index(name) + 1] for name in ("--episodes", "--output"))
if episodes == "1":
    sys.exit("error: one episode")
pathlib.Path(output).mkdir(parents=True, exist_ok=True)
with open("calls", "a") as file:
    print(*sys.argv[1:], file=file)
outcome = lambda p: dict(success=p, interval=[p - 0.1, p + 0.1], episodes=int(episodes))
row = lambda kind, name, before, after: dict(kind=kind, name=name, policies=dict(before=outcome(before), after=outcome(after)))
(pathlib.Path(output) / "results.json").write_text(json.dumps(dict(rows=[
    row("environment", "T/semantic-a-1", 0.9, 0.9), row("family", "semantic", 0.2, 0.4), row("family", "execution", 0.3, 0.7),
    row("ood", "OOD mean", 0.25, 0.55),
])))
"""


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    for folder in ("algos", "docs/notebook", "benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "algos" / "fake.py").write_text(ALGORITHM)
    (tmp_path / "algos" / "evaluate.py").write_text(EVALUATE)
    for page, name in ((OVERVIEW, "overview"), (compare.PAGE, "every run")):
        (tmp_path / page).write_text(MARKED.format(name))
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    return tmp_path


def fake(seed: int = 1, extra: str = "") -> compare.Job:
    return compare.Job("fake", "fake", "Task-v1", "state", seed, extra)


def result(success: list[float], *, seed: int = 1, algorithm: str = "ppo", steps: int = 1000, **more) -> dict:
    """A result with an evaluation every `steps` environment steps, a minute each."""
    outcome = lambda p: dict(success=p, interval=[p - 0.1, p + 0.1], episodes=100)
    curve = [dict(env_steps=i * steps, minutes=i, success=p) for i, p in enumerate(success)]
    return dict(
        command=f"python algos/{algorithm}.py --seed {seed}", env_id="Task-v1", obs_mode="state", seed=seed, checkpoint="start",
        env_steps=steps * (len(success) - 1), training_minutes=len(success) - 1, before=outcome(success[0]),
        after=outcome(success[-1]), args=dict(seed=seed, max_minutes=24.0), curve=curve,
    ) | more


def store(root: Path, label: str, r: dict, folder: str = "") -> None:
    compare.write(root / "benchmarks" / "results" / folder / f"{label}-{r['env_id']}-{r['obs_mode']}-{r['seed']}.json", r)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


# ---------------------------------------------------------------------------------------------------------------- the plan


def test_everything_runs_with_the_first_seed_before_the_second(root):
    for name in ("other_pi05", "stepnft_pi0"):
        shutil.copy(root / "algos" / "fake.py", root / "algos" / f"{name}.py")
    jobs = compare.plan(compare.Args(["fake", "other-pi05"], ["A-v1", "B-v1"], seeds=[1, 2], ablations=["loss-wmse"]))
    assert [job.name for job in jobs] == [
        f"{label}-{task}-state-{seed}"
        for seed in (1, 2)
        for task in ("A-v1", "B-v1")
        for label in ("fake", "other-pi05", "stepnft-loss-wmse")
    ]
    ablation = f"python algos/stepnft_pi0.py --env-id A-v1 --obs-mode state --seed 1 --loss wmse {compare.SHORT}"
    assert jobs[2].command == ablation and [job.target.parent.name for job in jobs[:3]] == ["results", "results", "ablations"]


def test_runs_of_so_many_iterations_are_named_by_them(root):
    (job,) = compare.plan(compare.Args(["fake"], iterations=60, extra="--wait"))
    assert job.name == "fake-60-PickCube-v1-state-1" and job.command.endswith("--seed 1 --iterations 60 --max-minutes 0 --wait")


def test_an_algorithm_under_other_settings_has_a_name_of_its_own(root):
    shutil.copy(root / "algos" / "fake.py", root / "algos" / "nft.py")
    (job,) = compare.plan(compare.Args(["nft-paper"], iterations=60))
    assert job.name == "nft-paper-60-PickCube-v1-state-1"
    settings = compare.OTHERS["nft-paper"][1] + " --iterations 60 --max-minutes 0"
    assert job.command == f"python algos/nft.py --env-id PickCube-v1 --obs-mode state --seed 1 {settings}"


def test_names_fit_the_results_that_are_there(monkeypatch):
    monkeypatch.setattr(compare, "ROOT", ROOT)
    for name in ("stepnft", "ppo", "ppo_pi0"):  # as in --algos, or as its file was once called
        (job,) = compare.plan(compare.Args([name], iterations=60, extra="--no-video"))
        assert compare.status(job) == "done"


def test_tuning_gives_every_algorithm_its_trials_on_other_episodes(root, monkeypatch):
    counts = {name: len(set(trials)) for name, trials in compare.TRIALS.items()}
    assert counts == dict(stepnft=4, ppo=4, grpo=4, nft=9, rft=9, critic=4)  # docs/notebook/comparison.md says why
    monkeypatch.setattr(compare, "TRIALS", dict(fake=["", "--rate 1e-5"], other=["--rate 2", "--noise 0.5", "--rate 3"]))
    shutil.copy(root / "algos" / "fake.py", root / "algos" / "other.py")
    jobs = compare.plan(compare.Args(["fake", "other", "other-pi05"], tuning=True))
    assert "algos/other.py --policy pi05 --env-id" in jobs[2].command
    assert [job.label for job in jobs] == [
        "fake-default", "other-rate-2", "other-pi05-rate-2", "fake-rate-1e-5", "other-noise-0.5", "other-pi05-noise-0.5",
        "other-rate-3", "other-pi05-rate-3",
    ]
    assert all("--eval-seed 1000000000" in job.command and job.target.parent.name == "tuning" for job in jobs)


@pytest.mark.parametrize(
    "args, message",
    [
        (compare.Args(["nothing"]), "no algos/nothing.py"),
        (compare.Args(ablations=["loss-typo"]), "no ablation stepnft-loss-typo"),
        (compare.Args(["fake"], tuning=True, ablations=[]), "--tuning"),
        (compare.Args(["fake"], tuning=True), "no TRIALS for fake"),
        (compare.Args(["nft-paper"], tuning=True), "no TRIALS for nft-paper"),
    ],
)
def test_unknown_names_end_in_one_line(root, args, message):
    shutil.copy(root / "algos" / "fake.py", root / "algos" / "nft.py")
    with pytest.raises(SystemExit, match=message):
        compare.plan(args)


def test_every_ablation_and_trial_is_valid_and_changes_something():
    def arguments(module, extra: str):
        args = tyro.cli(module.Args, args=shlex.split(extra))
        harness.check(args)
        if hasattr(module, "check"):
            module.check(args)
        return args

    for label, extra in compare.ABLATIONS.items():
        args = arguments(stepnft_pi0, extra)
        assert (asdict(args) == asdict(stepnft_pi0.Args())) == (label == "stepnft-default"), extra
    for algorithm, trials in [*compare.TRIALS.items(), *((algorithm, [extra]) for algorithm, extra in compare.OTHERS.values())]:
        module = importlib.import_module(f"pi_stepnft.{compare.program(algorithm)[:-3].replace('/', '.')}")
        tried = [asdict(arguments(module, f"{extra} {compare.TUNING}")) for extra in trials]
        assert all(one != other for one, other in itertools.combinations(tried, 2)), algorithm
    offline = ("sft", "pretrain", "evaluate")
    online = {path.stem.partition("_")[0] for path in (ROOT / "algos").glob("*.py")} - set(offline)
    assert online == set(compare.TRIALS)


# ---------------------------------------------------------------------------------------------------------------- the runs


def test_a_failed_run_does_not_stop_the_others(root):
    jobs = [fake(seed) for seed in (1, 2, 3)]
    failed = compare.run_all(jobs)
    assert list(failed) == ["fake-Task-v1-state-2"]
    assert "exit status 1" in failed["fake-Task-v1-state-2"] and "error: no luck" in failed["fake-Task-v1-state-2"]
    assert len(failed["fake-Task-v1-state-2"].splitlines()) <= 16  # the end of its output, of more than thirty lines
    assert [compare.status(job) for job in jobs] == ["done", "missing", "done"]
    assert compare.read(jobs[2].target)["seed"] == 3


def test_a_finished_run_is_not_repeated_until_its_file_is_deleted(root, capsys):
    compare.run_all([fake()])
    compare.run_all([fake()])
    assert len(list(root.glob("runs/fake-*"))) == 1
    compare.run_all([fake(extra="--max-minutes 1")])
    assert len(list(root.glob("runs/fake-*"))) == 1 and "by another command" in capsys.readouterr().out
    fake().target.unlink()
    compare.run_all([fake()])
    assert len(list(root.glob("runs/fake-*"))) == 2


def interrupt(job: compare.Job, monkeypatch) -> Path:
    """Start a job and interrupt it once it has a checkpoint; returns its run folder."""

    def sleep(seconds):
        if list(compare.ROOT.glob("runs/fake-*/checkpoints/last/training.json")):
            raise KeyboardInterrupt
        time.sleep(seconds)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as the program does: in the background it may be ignored
    with monkeypatch.context() as patch:
        patch.setattr(compare, "time", SimpleNamespace(sleep=sleep))
        with pytest.raises(KeyboardInterrupt):
            compare.run_all([job])
    signal.signal(signal.SIGINT, before)
    (run,) = compare.ROOT.glob("runs/fake-*")
    return run


def test_an_interrupted_run_is_gone_on_with_under_its_own_limits(root, monkeypatch):
    job = fake(extra="--wait --iterations 20 --max-minutes 10 --num-threads 3")
    run = interrupt(job, monkeypatch)
    assert (run / "stopped").exists(), "the run was told to stop, and had time to"
    assert compare.status(job) == f"interrupted (runs/{run.name})"
    compare.run(job)
    (again,) = root.glob("runs/fake-*")
    stored = compare.read(job.target)
    assert again == run and stored["command"] == job.command
    # 6 of the 10 minutes were used before the checkpoint
    assert stored["resumed_by"].endswith(f"--resume runs/{run.name} --iterations 20 --max-minutes 4.00 --num-threads 3")
    assert stored["args"]["max_minutes"] == 10
    # a second interruption must not count from the 4 minutes that the first resumption wrote to args.json
    assert compare.read(run / "args.json")["max_minutes"] == 4


def test_the_second_resumption_counts_from_the_first_limit(root, monkeypatch):
    job = fake(extra="--wait --max-minutes 10")
    interrupt(job, monkeypatch)
    compare.write(job.state, compare.interrupted(job))  # as the first resumption notes it
    (run,) = root.glob("runs/fake-*")
    (run / "args.json").write_text(json.dumps(compare.read(run / "args.json") | {"max_minutes": 4.0}))
    assert "4.00" in compare.resume_arguments(job, compare.interrupted(job))


def test_a_run_by_other_arguments_is_not_gone_on_with(root, monkeypatch):
    interrupt(fake(extra="--wait"), monkeypatch)
    assert compare.status(fake()) == "missing"
    compare.run(fake())
    assert len(list(root.glob("runs/fake-*"))) == 2 and "resumed_by" not in compare.read(fake().target)


def test_runs_that_begin_side_by_side_are_told_apart(root):
    jobs = [compare.Job(f"fake-{n}", "fake", "suite/3", "state", 1, f"--iterations {n}") for n in (20, 30)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(compare.run, jobs))
    for job, n in zip(jobs, (20, 30)):
        assert job.target.name == f"fake-{n}-suite-3-state-1.json" and compare.read(job.target)["args"]["iterations"] == n
    assert [r["label"] for r in compare.load(root / "benchmarks" / "results")] == ["fake-20", "fake-30"]


def test_a_state_that_notes_another_job_s_run_is_not_followed(root, monkeypatch):
    run, job = interrupt(fake(extra="--wait"), monkeypatch), fake(extra="--iterations 20")
    compare.write(job.state, {"command": job.command, "run": str(run.relative_to(root))})
    assert compare.status(job) == "missing"


def test_what_ended_after_this_program_did_is_collected(root, monkeypatch):
    job = fake(extra="--wait")
    run = interrupt(job, monkeypatch)
    (run / "result.json").write_text(json.dumps(result([0.5, 0.6]) | {"command": job.command}))
    compare.run(job)
    assert compare.read(job.target)["curve"][-1]["success"] == 0.6


def test_out_of_distribution_after_the_run_and_later(root):
    compare.run_all([fake()])
    failed = compare.run_all([fake()], ood=8)
    assert "its folder under runs/ is gone" in failed["fake-Task-v1-state-1"] and "ood" not in compare.read(fake().target)
    (run,) = root.glob("runs/fake-*")
    (run / "policy").mkdir()
    assert "exit status 1" in compare.run_all([fake()], ood=1)["fake-Task-v1-state-1"]
    for _ in range(2):  # what is there is not evaluated again
        assert compare.run_all([fake()], ood=8) == {}
    (call,) = (root / "calls").read_text().splitlines()
    assert call.startswith(f"start {run}/policy --labels before after --suites ood --episodes 8")
    ood = compare.read(fake().target)["ood"]
    assert ood["success"] == 0.55 and ood["before"]["success"] == 0.25 and ood["episodes_per_variant"] == 8
    assert len(list(root.glob("runs/fake-*"))) == 1, "the run is not repeated"
    rows = [cells(row) for row in compare.out_of_distribution(compare.load(fake().target.parent)).splitlines()]
    assert rows[0] == ["", "seed", "semantic, %", "execution, %", "mean of families, %", "episodes per variant"]
    assert rows[2] == ["fake", "1", "20.0 → 40.0 [30.0, 50.0]", "30.0 → 70.0 [60.0, 80.0]", "25.0 → 55.0 [45.0, 65.0]", "8"]
    compare.report()
    assert "Out of distribution, before → after:" in (root / compare.PAGE).read_text()
    assert "| 50.0 [40.0, 60.0] | 50.0 [40.0, 60.0] | 25.0 → 55.0 [45.0, 65.0] |" in (root / OVERVIEW).read_text()


def test_two_programs_do_not_run_the_same_job(root):
    fake().state.parent.mkdir(parents=True)
    with open(fake().state.with_suffix(".log"), "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert compare.run_all([fake()]) == {"fake-Task-v1-state-1": "another process is at it"}
    assert not list(root.glob("runs/fake-*"))


def test_the_program(root):
    """From the command line: what is there is reported although a run failed, and SIGTERM ends it with its run."""
    program, _ = (shutil.copy(ROOT / "benchmarks" / name, root / "benchmarks" / name) for name in ("compare.py", "pages.py"))
    call = [sys.executable, program, "--algos", "fake", "--tasks", "Task-v1", "--seeds", "2", "3"]
    dry = subprocess.run([*call, "--dry-run"], capture_output=True, text=True, check=True)
    assert "fake-Task-v1-state-3: missing" in dry.stdout and not list(root.glob("runs/fake-*"))
    ended = subprocess.run(call, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.endswith(f"fake-Task-v1-state-2: exit status 1; the end of {root}"
                                                           "/runs/compare/fake-Task-v1-state-2.log:\n")
    assert "| fake | 3 |" in (root / compare.PAGE).read_text()
    waiting = subprocess.Popen([*call[:-2], "4", "--extra=--wait"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(root.glob("runs/fake-Task-v1-state-4-*/checkpoints/last/training.json")):
        assert waiting.poll() is None
        time.sleep(0.1)
    waiting.send_signal(signal.SIGTERM)
    assert "goes on from the last checkpoint" in waiting.communicate(timeout=60)[1]
    assert waiting.returncode == 1 and list(root.glob("runs/fake-Task-v1-state-4-*/stopped"))


# -------------------------------------------------------------------------------------------------------------- the report


def test_summary_of_three_seeds(root):
    more = dict(parameters_trained=1234567, forward_passes=4)
    for seed, success, memory in ((1, [0.5, 0.79, 0.8], 1.0), (2, [0.5, 0.9, 0.7], 3.0), (3, [0.5, 0.6, 0.75], 2.0)):
        store(root, "ppo", result(success, seed=seed, peak_memory_gb=memory, **more))
    row = cells(compare.summary(compare.load(root / "benchmarks" / "results")).splitlines()[2])
    assert row[:5] == ["ppo", "1, 2, 3", "50.0", "75.0 (70.0–80.0)", "–"]
    assert row[5:] == ["2 (1–2), 2 of 3 seeds", "1.5 (1.0–2.0), 2 of 3 seeds", "3.00", "1,234,567", "4"]


def test_what_is_not_measured_is_a_dash_and_what_is_is_not():
    old = result([0.5, 0.6]) | {"label": "ppo"}
    assert cells(compare.summary([old]).splitlines()[2]) == ["ppo", "1", "50.0", "60.0", "–", "–", "–", "–", "–", "–"]
    new = old | {"ood": dict(success=0.0), "peak_memory_gb": 0.5, "parameters_trained": 10, "forward_passes": 1}
    assert cells(compare.summary([new]).splitlines()[2])[4:] == ["0.0", "–", "–", "0.50", "10", "1"]
    row = cells(compare.each_run([old]).splitlines()[2])
    assert row == ["ppo", "1", "50.0 [40.0, 60.0]", "60.0 [50.0, 70.0]", "–", "1", "1.0"]


def test_first_evaluation_at_80_percent():
    curve = result([0.5, 0.79, 0.8, 0.6, 0.9])["curve"]
    assert compare.first_at(curve, "env_steps") == 2000 and compare.first_at(curve, "minutes") == 2
    assert compare.first_at(curve[:2], "minutes") is None
    assert compare.first_at(result([0.8, 0.9])["curve"], "env_steps") == 0


def test_mean_curve_interpolates_and_ends_with_the_shortest():
    curves = [result([0.0, 0.2, 0.4])["curve"], result([0.2, 0.6], steps=1500)["curve"]]
    x, mean, low, high = compare.mean_curve(curves, "env_steps")
    np.testing.assert_allclose(x, [0, 1000, 1500])
    np.testing.assert_allclose(mean, [10, (20 + 20 + 40 * 2 / 3) / 2, 45])
    np.testing.assert_allclose([low, high], [[0, 20, 30], [20, 20 + 40 * 2 / 3, 60]])


def test_t_interval_from_three_seeds_on():
    curves = [result([0.5, p])["curve"] for p in (0.4, 0.5, 0.6)]
    _, mean, low, high = compare.mean_curve(curves, "minutes")
    half = 4.303 * 10 / np.sqrt(3)  # Student's t for two degrees of freedom, 97.5 %
    np.testing.assert_allclose([mean, low, high], [[50, 50], [50, 50 - half], [50, 50 + half]], rtol=1e-3)


def test_report_separates_algorithms_ablations_and_trials(root):
    store(root, "ppo", result([0.5, 0.7], seed=1, note="on a slow machine"))
    store(root, "stepnft", result([0.5, 0.9], seed=1, algorithm="stepnft_pi0", note="on a slow machine"))
    store(root, "stepnft", result([0.5, 0.8], seed=2, algorithm="stepnft_pi0", args=dict(seed=2, max_minutes=26.0)))
    for seed, after in ((1, 0.6), (2, 0.7)):
        wmse = result([0.5, after], seed=seed, command=f"python algos/stepnft_pi0.py --seed {seed} --loss wmse")
        store(root, "stepnft-loss-wmse", wmse, folder="ablations")
    store(root, "ppo-lr", result([0.5, 0.4], command="python algos/ppo.py --learning-rate 1"), folder="tuning")
    (root / "benchmarks" / "results" / "other.json").write_text('{"median": 1}')
    compare.report()
    text = (root / OVERVIEW).read_text()
    assert [cells(row)[:3] for row in text.splitlines() if row.startswith("| Task")] == [
        ["Task-v1, state", "ppo", "1"], ["Task-v1, state", "stepnft", "2"],
    ]
    assert "| stepnft | 2 | 50.0 | 85.0 (80.0–90.0) |" in text
    text = (root / compare.PAGE).read_text()
    assert text.startswith("before\n\n<!-- ") and text.endswith(" -->\n\nafter\n") and "old" not in text
    first, ablations, tuning = text.replace("Tuning trials", "Ablations").split("Ablations, ")
    labels = lambda part: [cells(row)[0] for row in part.splitlines() if row.startswith("|")]
    assert labels(first) == ["", "---", "ppo", "stepnft", "", "---", "ppo", "stepnft", "stepnft"]
    assert labels(ablations) == ["", "---", "stepnft-loss-wmse"]
    row = next(cells(row) for row in ablations.splitlines() if row.startswith("| stepnft-loss-wmse"))
    assert row[1:] == ["1, 2", "50.0 [40.0, 60.0]", "60.0 [50.0, 70.0]; 70.0 [60.0, 80.0]", "65.0"]
    assert labels(tuning) == ["", "---", "ppo-lr"]
    assert "`max_minutes` is 26.0 for stepnft 2, else 24.0." in text
    assert "\n\nppo 1, stepnft 1: on a slow machine.\n\n" in text
    wmse = "python algos/stepnft_pi0.py --seed {} --loss wmse"
    assert text.split("```")[1].split("\n")[1:-1] == [
        "python algos/ppo.py --seed 1", "python algos/stepnft_pi0.py --seed 1", "python algos/stepnft_pi0.py --seed 2",
        wmse.format(1), wmse.format(2), "python algos/ppo.py --learning-rate 1",
    ]
    assert sorted(path.name for path in (root / "docs" / "images").iterdir()) == [
        "ablations_Task-v1_state.png", "comparison_Task-v1_state.png",
    ]
    compare.report()
    assert (root / compare.PAGE).read_text() == text


def test_report_of_nothing(root):
    compare.report()
    assert all("No result yet." in (root / page).read_text() for page in (OVERVIEW, compare.PAGE))
