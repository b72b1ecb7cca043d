"""pi_stepnft/rlinf: its configurations fit the functions that take them, each other's sizes, and the settings that they say they
are. What runs inside RLinf is in benchmarks/rlinf_host.py, which makes the environment that it needs."""

import inspect
from pathlib import Path

import pytest
import yaml

from pi_stepnft.algos import stepnft_pi0 as program

FOLDER = Path(__file__).resolve().parents[1] / "pi_stepnft" / "rlinf"
GROUPS = program.Args(labels="group", group_size=16, noise_level=0.7, rollout_steps=32)  # a predictor is not offered there
SETTINGS = {"cpu": (1, vars(GROUPS)), "gpus": (8, program.PAPER["maniskill"]), "nodes": (32, program.PAPER["libero"])}


@pytest.fixture(params=SETTINGS)
def name(request):
    return request.param


@pytest.fixture
def cfg(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def test_there_is_a_check_for_every_configuration():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == SETTINGS.keys()


def test_the_functions_take_what_a_configuration_gives_them(cfg):
    for function, part in ((program.stepnft_loss, "loss"), (program.chunk_labels, "labels"), (program.ema_decay, "ema")):
        assert cfg["algorithm"][part].keys() <= inspect.signature(function).parameters.keys()


def test_every_worker_gets_whole_groups_and_whole_batches(name, cfg):
    workers, train, actor = SETTINGS[name][0], cfg["env"]["train"], cfg["actor"]
    envs, left = divmod(train["total_num_envs"], workers)
    assert left == 0 and envs % train["group_size"] == 0
    for part in ("train", "eval"):
        assert cfg["env"][part]["total_num_envs"] % workers == 0
        assert cfg["env"][part]["max_steps_per_rollout_epoch"] % actor["model"]["num_action_chunks"] == 0
    assert cfg["env"]["eval"]["max_steps_per_rollout_epoch"] >= train["max_episode_steps"]  # every evaluation is played to its end
    chunks = envs * train["rollout_epoch"] * train["max_steps_per_rollout_epoch"] // actor["model"]["num_action_chunks"]
    assert actor["global_batch_size"] % (actor["micro_batch_size"] * workers) == 0
    assert chunks % (actor["global_batch_size"] // workers) == 0


def test_a_configuration_has_the_settings_that_it_names(name, cfg):
    wanted = SETTINGS[name][1]
    algorithm, train, model, optim = cfg["algorithm"], cfg["env"]["train"], cfg["actor"]["model"], cfg["actor"]["optim"]
    ema = {f"ema_{key}": value for key, value in algorithm["ema"].items()}
    told = ema | algorithm["loss"] | dict(
        transitions=algorithm["transitions"], labels=algorithm["labels"]["kind"], mask_padding=algorithm["mask_padding"],
        update_epochs=algorithm["update_epoch"], group_size=train["group_size"], rollout_steps=train["max_steps_per_rollout_epoch"],
        noise_level=model["noise_level"], learning_rate=optim["lr"], warmup_iterations=optim["lr_warmup_steps"],
        iterations=cfg["runner"]["max_epochs"],
    )
    assert {key: value for key, value in told.items() if key in wanted} == {key: wanted[key] for key in told if key in wanted}
