"""A guard on learning: success rises within minutes. And benchmarks/holds.py, which tells whether a longer run's result holds."""

import json
import sys
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
from test_main import one_thread, run  # noqa: F401 (the first is a fixture)

from pi_stepnft.harness import evaluation
from pi_stepnft.harness.statistics import compare

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import holds  # noqa: E402


# In the stored runs PPO, whose critic learns first, is back at its start after 10 to 20 iterations and above it after 30.
@pytest.mark.slow
@pytest.mark.parametrize("program, iterations", [("stepnft_pi0", 15), ("ppo", 30)])
def test_success_rises(program, iterations, tmp_path):
    """The plain command, cut short. The gain is paired: the same 1024 held-out episodes, with the same noise, before and after."""
    made, original = [], evaluation.evaluate

    def spy(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    options = f"--env-id PickCube-v1 --obs-mode state --iterations {iterations} --max-minutes 0 --eval-every 0 --no-video "
    options += "--final-eval-episodes 1024"
    with mock.patch("pi_stepnft.harness.run.evaluate", spy):
        run(program, *options.split(), cwd=tmp_path)
    before, after = made[:2]  # of StepNFT the rollout policy's follows
    assert len(before.seeds) == 1024 and (before.seeds == after.seeds).all()
    gain = compare(after.success[None], before.success[None], [Fraction(1)])
    print(f"{program}: {before} → {after}; gain {100 * gain.difference:+.1f} points {100 * gain.interval[0]:+.1f} to "
          f"{100 * gain.interval[1]:+.1f}")
    assert gain.interval[0] > 0


def result(before: float, after: float, **more) -> dict:
    outcome = lambda p: dict(success=p, interval=[p - 0.04, p + 0.04], episodes=512)
    return dict(before=outcome(before), after=outcome(after), iterations=120, training_minutes=20.0, commit="a" * 40) | more


def test_a_result_holds_if_it_is_no_worse_than_what_is_stored():
    stored = [result(0.33, after, commit=None) for after in (0.70, 0.73)]
    good, lines = holds.verdict(result(0.34, 0.67), stored)
    assert good and lines[1] == "after: 67.0 [63.0, 71.0] %, within the stored 66.0 to 77.0 %"
    assert lines[2] == "iterations: 120 in 20 min on commit aaaaaaa; stored: 120 in 20 min on commit –, 120 in 20 min on commit –"
    assert holds.verdict(result(0.34, 0.65), stored)[0] is False
    good, lines = holds.verdict(result(0.34, 0.80), stored)
    assert good and "above the stored" in lines[1]
    assert holds.verdict(result(0.20, 0.72), stored)[0] is False  # another start is another experiment


def test_the_newest_run_is_compared_with_the_stored_ones_of_its_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["holds.py"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: no result at runs/"):
        holds.main()
    stored = json.loads(next((ROOT / "benchmarks" / "results").glob("stepnft-PickCube-v1-state-*.json")).read_text())
    for name, after in (("old", 0.1), ("new", stored["after"]["success"])):
        (tmp_path / "runs" / name).mkdir(parents=True)
        kind = dict(algorithm="stepnft_pi0", env_id="PickCube-v1", obs_mode="state", before=stored["before"])
        (tmp_path / "runs" / name / "result.json").write_text(json.dumps(result(0.5, after) | kind))
    assert holds.main() == 0
    assert capsys.readouterr().out.startswith("runs/new/result.json, compared with stepnft-PickCube-v1-state-1.json")
    monkeypatch.setattr(sys, "argv", ["holds.py", "--result", "runs/old/result.json"])
    assert holds.main() == 1 and "DOES NOT HOLD" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["holds.py", "--stored", "none-*.json"])
    with pytest.raises(SystemExit, match="nothing is stored as benchmarks/results/none-"):
        holds.main()
