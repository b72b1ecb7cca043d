"""Facts about the model cards that checkpoints carry."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard

from pi_stepnft import policies
from pi_stepnft.harness.run import bundled_start
from pi_stepnft.policies.card import card
from pi_stepnft.policies.processor import NormStats, Processor, Tokenizer

SUCCESS = dict(success=0.5, interval=[0.43, 0.57], episodes=200)


@pytest.fixture
def policy():
    torch.manual_seed(0)
    policy = policies.Pi0(policies.Pi0Config.tiny(num_cameras=0, vlm_depth=1)).eval()
    stats = NormStats.identity(4)
    policy.processor = Processor(policy.config, Tokenizer(), stats, stats)
    policy.meta = dict(env_id="PickCube-v1", obs_mode="state", execute=4, sft=dict(seed=1, base="pretrained", **SUCCESS))
    return policy


def test_a_saved_policy_has_a_card_that_the_hub_reads(policy, tmp_path):
    policies.save(policy, tmp_path)
    found = ModelCard.load(tmp_path / "README.md")
    data = found.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("pi-stepnft", "apache-2.0", "robotics")
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("PickCube-v1", "success_rate", 0.5)
    for text in ("| success | 50.0 % [43.0, 57.0] of 200 episodes", "| made from | pretrained |", "| sft | seed 1, base `pre"):
        assert text in found.text
    policies.export(policy, tmp_path / "openpi", asset_id="lab/data")
    assert (tmp_path / "openpi" / "README.md").read_text() == (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", policies.bundled())
def test_what_ships_has_its_card(name):
    policy = policies.load(name)
    found = (policies.checkpoint.BUNDLED / name / "README.md").read_text()
    assert [*ModelCard(found).data.tags][3:] == [key for key, value in policy.meta.items() if isinstance(value, dict)]
    version = re.compile(r"π-StepNFT [\d.]+")
    assert version.sub("", found) == version.sub("", card(policy))


TRAINED = [name for name in policies.bundled() if name.endswith("-stepnft")]


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_policy_that_ships_does_better_than_its_start_and_is_none(name):
    config = policies.read_json(policies.checkpoint.BUNDLED / name / "config.json")
    meta, trained = config["meta"], config["meta"]["stepnft"]
    assert trained["base"] == bundled_start(meta["env_id"], meta["obs_mode"], config["type"]) and trained["base"] not in TRAINED
    assert trained["interval"][0] > meta["sft"]["interval"][1] and trained["episodes"] == 512
    assert re.fullmatch("[0-9a-f]{40}", trained["commit"])  # of code that can be looked at


def test_the_success_is_that_of_the_last_training(policy):
    policy.meta["stepnft"] = dict(iteration=3, command="python algos/stepnft_pi0.py --env-options 'a|b'", commit="0123")
    found = ModelCard(card(policy))
    assert found.data.eval_results is None and "| success | not measured" in found.text and "50.0 %" not in found.text
    assert "command `python algos/stepnft_pi0.py --env-options 'a\\|b'`, commit `0123` |" in found.text
    policy.meta["stepnft"] |= SUCCESS | dict(success=0.75, base="lerobot/pi0_base")
    data = ModelCard(card(policy)).data
    assert data.eval_results[0].metric_value == 0.75 and data.base_model == "lerobot/pi0_base"
    assert ModelCard(card(policy)).data.tags[-2:] == ["sft", "stepnft"]


@pytest.mark.parametrize("meta", [
    {}, dict(layout="openpi", asset_id="x"), dict(env_id="a: b\n- c", sft=dict(success="much", interval=3, episodes=None)),
    dict(stepnft=dict(success=0.5, interval=[0.1], episodes=3), env_options=["colour=red"], cameras=[]),
])
def test_whatever_a_policy_tells_of_itself_its_card_is_one(policy, meta):
    policy.meta = json.loads(json.dumps(meta))
    found = ModelCard(card(policy))
    assert found.data.library_name == "pi-stepnft" and found.data.eval_results is None
    assert found.data.license == ("other" if "layout" in meta else "apache-2.0")


def test_only_a_card_of_ours_is_written_over(policy, tmp_path):
    policies.save(policy, tmp_path)
    policy.meta["sft"]["success"] = 0.25
    policies.save(policy, tmp_path)
    assert "| success | 25.0 %" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# My robot\n")
    policies.save(policy, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My robot\n" and policies.load(tmp_path).meta == policy.meta
