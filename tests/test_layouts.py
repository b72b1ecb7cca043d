"""Facts about checkpoints of other projects: key layouts, statistics, prompts, the hub, export, and what is refused."""

import dataclasses
import json
import os
import shutil
from functools import partial

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pi_stepnft import policies
from pi_stepnft.envs.envhub import CAMERAS
from pi_stepnft.policies import CheckpointError, NormStats, Pi0, Pi0Config, Pi05, Pi05Config, Processor, Tokenizer, train_tokenizer
from pi_stepnft.policies.processor import TINY_TOKENIZER
from pi_stepnft.policies.weights import EXPERT, PALIGEMMA, Weights, canonical_name, published_name, tensor_listing

SMALL = dict(
    image_size=24, patch_size=12, num_cameras=3, vision_width=16, vision_depth=2, vision_mlp=24, vision_heads=2,
    vlm_width=24, vlm_depth=2, vlm_mlp=40, expert_width=16, expert_mlp=32, heads=4, kv_heads=1, head_dim=8,
    vocab_size=768, max_token_len=60, state_dim=5, action_dim=5, horizon=3,
)
UNSEEN = dict(head_dim=8, vision_heads=2)  # what shapes do not tell
REST = dict(horizon=3, max_token_len=60)  # what the configuration of a folder tells, if it has one
CLASSES = {"pi0": (Pi0, Pi0Config), "pi05": (Pi05, Pi05Config)}
TYPES = tuple(CLASSES)
STATS = "assets/some-lab/libero/norm_stats.json"


def make_policy(kind: str = "pi0", seed: int = 0, **overrides):
    torch.manual_seed(seed)
    model, config = CLASSES[kind]
    policy = model(config(**{**SMALL, **overrides}))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    rng = np.random.default_rng(seed)
    states, actions = rng.normal(2, 3, (50, 3)), rng.normal(-1, 2, (50, 4))
    policy.processor = Processor(policy.config, Tokenizer(), NormStats.from_data(states), NormStats.from_data(actions))
    return policy.eval()


def act(policy) -> np.ndarray:
    rng = np.random.default_rng(1)
    obs = {"image": rng.integers(0, 256, (2, 2, 30, 20, 3), dtype=np.uint8), "state": rng.normal(2, 3, (2, 3))}
    images, image_mask, tokens, token_mask, state = policy.processor(obs, ["pick the cube", "push"])
    noise = torch.randn(2, policy.config.horizon, 5, generator=torch.Generator().manual_seed(2))
    prefix = policy.encode_prefix(images, image_mask, tokens, token_mask)
    return policy.processor.unnormalize_actions(policy.sample(prefix, state, noise, num_steps=2), obs["state"]).numpy()


# -------------------------------------------------------------------- folders as other projects write them


def tensors_of(policy) -> dict[str, torch.Tensor]:
    """The weights under their published names, with the unused head that published files carry."""
    tensors = {published_name(name): tensor.clone() for name, tensor in policy.state_dict().items()}
    return {**tensors, f"{EXPERT}lm_head.weight": torch.zeros(768, 16)}


def renamed(tensors: dict, *replacements: tuple[str, str]) -> dict:
    for old, new in replacements:
        tensors = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    return tensors


EMBED = f"{PALIGEMMA}model.language_model.embed_tokens.weight"
HEAD = f"{PALIGEMMA}lm_head.weight"
KEY_LAYOUTS = {
    "openpi": lambda t: t,
    "openpi, embedding twice": lambda t: {**t, EMBED: t[HEAD], HEAD: torch.full_like(t[HEAD], 7.0)},
    "lerobot": lambda t: {f"model.{name}": tensor for name, tensor in t.items()},
    "lerobot, embedding only": lambda t: {f"model.{name}": tensor for name, tensor in renamed(t, (HEAD, EMBED)).items()},
    "transformers before 4.52": lambda t: {
        f"model.{name}": tensor
        for name, tensor in renamed(
            t,
            (f"{PALIGEMMA}model.language_model.", f"{PALIGEMMA}language_model.model."),
            (HEAD, f"{PALIGEMMA}language_model.lm_head.weight"),
            (f"{PALIGEMMA}model.", PALIGEMMA),
        ).items()
    },
    "no inner levels": lambda t: renamed(
        t, ("vision_model.", ""), (f"{PALIGEMMA}model.", PALIGEMMA), (f"{EXPERT}model.", EXPERT), (HEAD, EMBED)
    ),
    "with critics and buffers": lambda t: {
        **t,
        "value_head.mlp.0.weight": torch.zeros(2, 2),
        "noise_head.bias": torch.zeros(2),
        f"{PALIGEMMA}model.vision_tower.vision_model.embeddings.position_ids": torch.arange(4),
    },
}


def stats_json(policy, **changes) -> str:
    stats = {"state": policy.processor.state_stats.to_dict(), "actions": policy.processor.action_stats.to_dict()}
    for name, entry in changes.items():
        stats[name] = {**stats[name], **entry}
    return json.dumps({"norm_stats": stats})


def write_openpi(folder, policy, layout="openpi", asset="assets/some-lab/libero", tokenizer=True):
    (folder / asset).mkdir(parents=True)
    (folder / asset / "norm_stats.json").write_text(stats_json(policy))
    save_file(KEY_LAYOUTS[layout](tensors_of(policy)), folder / "model.safetensors")
    if tokenizer:
        shutil.copy(TINY_TOKENIZER, folder / "tokenizer.model")
    return folder


def write_shards(folder):
    """Split the weights of a folder in two."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in weight_map if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_tokenizer(folder):
    """A tokenizer.json of a few words."""
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "pick": 4, "the": 5, "cube": 6, "\n": 7, " ": 8}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "isolated")
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    model.save(str(folder / "tokenizer.json"))


def write_lerobot(folder, policy, steps=True, mode=None, relative=None, stats=None):
    """A lerobot folder: `steps` writes processor files, else the statistics lie among the weights as before 0.4."""
    folder.mkdir(parents=True, exist_ok=True)
    c, processor = policy.config, policy.processor
    mode = mode or ("QUANTILES" if c.type == "pi05" else "MEAN_STD")
    cameras = {f"observation.images.{n}": {"type": "VISUAL", "shape": [3, 24, 24]} for n in ("base", "left", "empty_0")}
    features = {**cameras, "observation.state": {"type": "STATE", "shape": [3]}}
    modes = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    config = {
        "type": c.type, "chunk_size": c.horizon, "tokenizer_max_length": c.max_token_len, "num_inference_steps": 4,
        "input_features": features, "output_features": {"action": {"type": "ACTION", "shape": [4]}},
        "normalization_mapping": modes, "min_period": 4e-3, "max_period": 4.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    stats = stats or {
        "observation.state": processor.state_stats.to_dict(),
        "action": {**processor.action_stats.to_dict(), "min": [-9.0] * 4, "max": [9.0] * 4},
    }
    flat = {f"{name}.{key}": torch.tensor(value) for name, entry in stats.items() for key, value in entry.items()}
    tensors = KEY_LAYOUTS["lerobot"](tensors_of(policy))
    if steps:
        state_file = "policy_preprocessor_step_5_normalizer_processor.safetensors"
        save_file(flat, folder / state_file)
        normalizer = {"registry_name": "normalizer_processor", "config": {"norm_map": modes}, "state_file": state_file}
        pipeline = [relative, normalizer] if relative else [normalizer]
        (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": pipeline}))
    else:
        for name, tensor in flat.items():
            feature, _, statistic = name.rpartition(".")
            prefix = "unnormalize_outputs" if feature == "action" else "normalize_inputs"
            tensors[f"{prefix}.buffer_{feature.replace('.', '_')}.{statistic}"] = tensor
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(TINY_TOKENIZER, folder / "tokenizer.model")
    return folder


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_every_key_layout_gives_the_same_policy(kind, layout, tmp_path):
    policy = make_policy(kind)
    loaded = policies.load(write_openpi(tmp_path / "p", policy, layout), **UNSEEN, **REST)
    assert type(loaded) is type(policy) and loaded.config == policy.config
    assert np.array_equal(act(loaded), act(policy)) and loaded.meta == {"layout": "openpi", "asset_id": "some-lab/libero"}


def test_shards_are_read_through_their_index(tmp_path):
    policy = make_policy()
    folder = write_shards(write_openpi(tmp_path / "p", policy))
    assert np.array_equal(act(policies.load(folder, **UNSEEN, **REST)), act(policy))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names model-00002-of-00002.safetensors, which .* lacks"):
        policies.load(folder)


@pytest.mark.parametrize("kind", TYPES)
def test_tensors_are_cast_on_the_way_and_sensitive_parts_stay_float32(kind, tmp_path):
    folder = write_openpi(tmp_path / "p", make_policy(kind))
    loaded = policies.load(folder, dtype=torch.bfloat16, **UNSEEN, **REST)
    reference = policies.load(folder, **UNSEEN, **REST).cast(torch.bfloat16)
    assert loaded.state_dict().keys() == reference.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        expected = reference.state_dict()[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert loaded.expert.dtype == torch.bfloat16 and loaded.action_in_proj.weight.dtype == torch.float32
    assert np.array_equal(act(loaded), act(reference))
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_names_of_differing_layers_share_an_entry():
    names = [f"a.layers.{i}.mlp.up_proj.weight" for i in (10, 2, 0)] + ["b.layers.3.norm.weight", "state_proj.bias"]
    assert tensor_listing(names) == "a.layers.{0,2,10}.mlp.up_proj.weight, b.layers.3.norm.weight, state_proj.bias"


def test_canonical_names_are_their_own_canonical_names():
    for kind in TYPES:
        for name in tensors_of(make_policy(kind)):
            assert canonical_name(name) == (None if name == f"{EXPERT}lm_head.weight" else name)


def test_cameras_that_are_never_there_can_be_left_out(tmp_path):
    policy = make_policy()
    fewer = policies.load(write_openpi(tmp_path / "p", policy), num_cameras=2, **UNSEEN, **REST)
    assert fewer.config.prefix_len == policy.config.prefix_len - 4 and np.allclose(act(fewer), act(policy), atol=1e-5)


# -------------------------------------------------------------------- statistics


def test_statistics_of_several_assets_are_chosen_by_name(tmp_path):
    policy = make_policy()
    folder = write_openpi(tmp_path / "p", policy)
    other = folder / "assets" / "droid"
    other.mkdir()
    (other / "norm_stats.json").write_text(stats_json(policy, actions={"mean": [9.0] * 4}))
    with pytest.raises(CheckpointError, match="several data sets; choose one with asset_id=: droid, some-lab/libero"):
        policies.load(folder, **UNSEEN, **REST)
    assert (policies.load(folder, asset_id="droid", **UNSEEN, **REST).processor.action_stats.mean == 9).all()
    with pytest.raises(CheckpointError, match="no statistics for asset_id 'aloha'; choose one of: droid, some-lab/libero"):
        policies.load(folder, asset_id="aloha", **UNSEEN, **REST)


def test_rl_checkpoints_keep_statistics_beside_the_weights(tmp_path):
    policy = make_policy("pi05")
    folder = write_openpi(tmp_path / "p", policy, asset="physical-intelligence/maniskill")
    loaded = policies.load(folder, **UNSEEN, **REST)
    assert loaded.meta["asset_id"] == "physical-intelligence/maniskill" and np.array_equal(act(loaded), act(policy))


def test_padding_is_cut_from_statistics_and_unused_ones_may_be_absent(tmp_path):
    policy = make_policy()
    state, stats = policy.processor.state_stats, policy.processor.action_stats
    padded = {name: value + [1e-10 if name == "q99" else 0.0] for name, value in stats.to_dict().items()}
    folder = write_openpi(tmp_path / "p", policy)
    changes = {"state": {"q01": None, "q99": None}, "actions": padded}
    (folder / STATS).write_text(stats_json(policy, **changes))
    with pytest.warns(UserWarning, match="statistics of actions are zero from dimension 4 on, which is taken for padding"):
        loaded = policies.load(folder, **UNSEEN, **REST)
    assert len(loaded.processor.action_stats) == 4 and np.array_equal(act(loaded), act(policy))
    assert np.allclose(loaded.processor.state_stats.q99, state.mean + state.std)


def test_other_statistics_can_be_given_or_none(tmp_path):
    policy = make_policy()
    folder = write_openpi(tmp_path / "p", policy)
    shutil.move(folder / STATS, tmp_path / "stats.json")
    with pytest.raises(CheckpointError, match="has no statistics: .* pass norm_stats="):
        policies.load(folder, **UNSEEN, **REST)
    assert np.array_equal(act(policies.load(folder, norm_stats=tmp_path / "stats.json", **UNSEEN, **REST)), act(policy))
    base = policies.load(folder, norm_stats="identity", **UNSEEN, **REST).processor
    assert torch.allclose(base.normalize_actions(np.full((1, 1, 5), 0.5)), torch.tensor(0.5))
    assert np.allclose(base.unnormalize_actions(np.full((1, 1, 5), 0.5)), 0.5, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("steps", [True, False])
def test_lerobot_folders_bring_sizes_cameras_and_statistics(kind, steps, tmp_path):
    policy = make_policy(kind)
    loaded = policies.load(write_lerobot(tmp_path / "p", policy, steps), **UNSEEN)
    assert loaded.config.num_steps == 4 and loaded.config.horizon == 3 and loaded.config.max_token_len == 60
    assert loaded.meta["cameras"] == [f"observation.images.{name}" for name in ("base", "left", "empty_0")]
    assert loaded.processor.state_stats.to_dict() == policy.processor.state_stats.to_dict()
    policy.processor.pad_state_bins = kind == "pi05"  # as lerobot before 0.5 prompted
    assert np.array_equal(act(loaded), act(policy))


def test_a_dimension_lerobot_never_saw_move_is_no_padding(tmp_path):
    policy = make_policy()
    still = {"mean": [1.0, 2.0, 0.0], "std": [1.0, 1.0, 0.0]}
    stats = {"observation.state": still, "action": policy.processor.action_stats.to_dict()}
    with pytest.warns(UserWarning, match="state dimensions 2 never varied"):
        assert len(policies.load(write_lerobot(tmp_path / "p", policy, stats=stats), **UNSEEN).processor.state_stats) == 3


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("mode", ["MEAN_STD", "QUANTILES", "MIN_MAX", "IDENTITY"])
def test_lerobot_modes_scale_as_they_say(kind, mode, tmp_path):
    policy = make_policy(kind)
    stats = {name: np.asarray(value) for name, value in policy.processor.action_stats.to_dict().items()}
    entry = {**{name: value.tolist() for name, value in stats.items()}, "min": [-9.0] * 4, "max": [7.0] * 4}
    state = {name: value[:3] for name, value in entry.items()}
    folder = write_lerobot(tmp_path / "p", policy, mode=mode, stats={"observation.state": state, "action": entry})
    processor = policies.load(folder, **UNSEEN).processor
    x = np.random.default_rng(0).normal(-1, 2, (2, 3, 4))
    expected = {
        "MEAN_STD": (x - stats["mean"]) / stats["std"],
        "QUANTILES": (x - stats["q01"]) / (stats["q99"] - stats["q01"]) * 2 - 1,
        "MIN_MAX": (x + 9) / 16 * 2 - 1,
        "IDENTITY": x,
    }[mode]
    normalised = processor.normalize_actions(x)
    assert np.allclose(normalised[..., :4], expected, atol=1e-4)
    assert np.allclose(processor.unnormalize_actions(normalised), x, atol=1e-5)


def test_lerobot_relative_actions_and_unpadded_prompts_come_with_the_newer_pipeline(tmp_path):
    policy = make_policy("pi05")
    config = {"enabled": True, "exclude_joints": ["gripper"], "action_names": ["x", "y", "z", "Gripper.pos"]}
    step = {"registry_name": "relative_actions_processor", "config": config}
    processor = policies.load(write_lerobot(tmp_path / "p", policy, relative=step), **UNSEEN).processor
    assert processor.relative == (0, 1, 2) and not processor.pad_state_bins
    config["enabled"] = False
    processor = policies.load(write_lerobot(tmp_path / "p", policy, relative=step), **UNSEEN).processor
    assert processor.relative == () and not processor.pad_state_bins


def edit(file, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


RELATIVE = {"enabled": True, "exclude_joints": ["gripper"], "action_names": ["x", "y", "z", "gripper"]}


def write_pipelines(folder):
    """The steps that lerobot's own pipelines have."""
    (normalizer,) = json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
    prompt = {"tokenizer_name": "google/paligemma-3b-pt-224", "max_length": 60, "padding_side": "right", "padding": "max_length"}
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "pi0_new_line_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "config": prompt},
        {"registry_name": "device_processor", "config": {"device": "cuda", "float_dtype": None}},
        {"registry_name": "relative_actions_processor", "config": {**RELATIVE, "enabled": False}},
        normalizer,
    ]
    after = [
        {**normalizer, "registry_name": "unnormalizer_processor"},
        {"registry_name": "absolute_actions_processor", "config": {"enabled": False}},
    ]
    for name, steps in (("pre", before), ("post", after)):
        (folder / f"policy_{name}processor.json").write_text(json.dumps({"name": f"policy_{name}processor", "steps": steps}))


def step(name, which="pre", **changes):
    """Changes a step's configuration."""
    def change(folder):
        edit(folder / f"policy_{which}processor.json", lambda p: next(
            s for s in p["steps"] if s["registry_name"] == f"{name}_processor")["config"].update(changes))
    return change


def config(**changes):
    return lambda folder: edit(folder / "config.json", lambda c: c.update(changes))


def steps(change, which="pre"):
    return lambda folder: edit(folder / f"policy_{which}processor.json", lambda p: change(p["steps"]))


MINE = {"registry_name": "my_rotation_processor", "config": {"degrees": 180}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ([config(adapt_to_pi_aloha=True), steps(lambda s: s.append(MINE))], "aloha is True .*, step 'my_rotation_processor'"),
        ([config(use_delta_joint_actions_aloha=True)], "use_delta_joint_actions_aloha is True"),
        ([config(n_obs_steps=2)], "n_obs_steps is 2"),
        ([config(image_resolution=[24, 48])], "pictures are fitted to .24, 48. .the vision tower takes 24"),
        ([config(n_action_steps=4)], "n_action_steps is 4, more than chunk_size 3"),
        ([step("normalizer", norm_map={"state": "MEAN_STD"})], "norm_map.state.* is 'state'; expected 'STATE'"),
        ([config(output_features={"action": {"type": "FORCE", "shape": [4]}})], "action.type is 'FORCE'; expected 'STATE'"),
        ([config(chunk_size="3")], "chunk_size is '3'; expected an integer"),
        ([step("normalizer", norm_map={"VISUAL": "MEAN_STD"})], "pictures are scaled by MEAN_STD"),
        ([step("normalizer", norm_map={"ACTION": "CUBE"})], "norm_map.ACTION is 'CUBE'; expected 'IDENTITY', 'MEAN_STD'"),
        ([step("unnormalizer", "post", norm_map={"ACTION": "MIN_MAX"})], "is scaled by MEAN_STD, but scaled back by MIN_MAX"),
        ([step("relative_actions", enabled=True)], "relative actions are made and not undone"),
        ([step("normalizer", normalize_observation_keys=["x"])], "normalize_observation_keys is .'x'.; expected None"),
        ([step("tokenizer", padding_side="left")], "padding_side is 'left'; expected 'right'"),
        ([steps(lambda s: s.reverse(), "post")], "the order of absolute_actions_processor, unnormalizer_processor"),
        ([steps(lambda s: s.append(s[-1]))], "another step 'normalizer_processor'"),
        ([steps(lambda s: s[-1].update(state_file="../stats.safetensors"))], "names '../stats.safetensors', outside its folder"),
        ([steps(lambda s: s.insert(0, 7))], "steps.0 is 7; expected an object"),
    ],
)
def test_what_would_change_observations_or_actions_in_lerobot_is_refused(changes, message, tmp_path):
    folder = write_lerobot(tmp_path / "p", make_policy())
    write_pipelines(folder)
    for change in changes:
        change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        policies.load(folder, **UNSEEN)
    assert "\n" not in str(caught.value)


def test_lerobots_own_settings_are_followed_or_told(tmp_path, recwarn):
    folder = write_lerobot(tmp_path / "p", make_policy())
    write_pipelines(folder)
    config(
        n_action_steps=2, adapt_to_pi_aloha=False, use_relative_actions=False, rtc_config={"enabled": False}, dtype="bfloat16",
        optimizer_lr=1e-5, max_state_dim=5, max_action_dim=5, image_resolution=[24, 24], time_sampling_beta_alpha=1.5, tags=None,
    )(folder)
    loaded = policies.load(folder, **UNSEEN)
    assert loaded.meta["execute"] == 2 and loaded.config.horizon == 3 and not recwarn
    assert policies.load(folder, horizon=1, **UNSEEN).meta["execute"] == 1
    config(
        time_sampling_beta_alpha=2.0, rtc_config={"enabled": True}, mystery=1, use_relative_actions=True,
        normalization_mapping={"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    )(folder)
    step("tokenizer", max_length=40, tokenizer_name="some/bert")(folder)
    edit(folder / "config.json", lambda c: c["input_features"].update({"observation.images.wrist": {"type": "VISUAL"}}))
    edit(folder / "config.json", lambda c: c.update(input_features=dict(reversed(c["input_features"].items()))))
    with pytest.warns(UserWarning) as told:
        assert policies.load(folder, **UNSEEN).config.max_token_len == 40
    (line,) = [str(warning.message) for warning in told]
    for note in (
        "rtc_config is not followed", "time_sampling_beta_alpha is not followed", "'mystery' is not known", "but the step's False",
        "normalization_mapping says MEAN_STD for VISUAL, but the step's IDENTITY is followed", "tokenizer 'some/bert'",
        "pictures are expected in the order observation.images.wrist, observation.images.left, observation.images.base",
    ):
        assert note in line, note


def test_relative_actions_without_their_step_come_from_the_configuration(tmp_path):
    folder = write_lerobot(tmp_path / "p", make_policy("pi05"))
    config(use_relative_actions=True, relative_exclude_joints=["grip", ""], action_feature_names=RELATIVE["action_names"])(folder)
    processor = policies.load(folder, **UNSEEN).processor
    assert processor.relative == (0, 1, 2) and not processor.pad_state_bins


def test_openpis_configuration_is_followed_or_told(tmp_path):
    folder = write_openpi(tmp_path / "p", make_policy("pi05"))
    content = dict(action_dim=5, action_horizon=4, max_token_len=50, discrete_state_input=False, pi05=True, precision="bfloat16")
    (folder / "config.json").write_text(json.dumps({**content, "mystery": 1}))
    with pytest.warns(UserWarning, match="'mystery' is not known"):
        c = policies.load(folder, **UNSEEN).config
    assert (c.horizon, c.max_token_len, c.discrete_state) == (4, 50, False)
    for change, message in ((dict(pi05=False), "says pi05: False"), (dict(action_dim=6), "action_dim 6 instead of 5")):
        (folder / "config.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=message):
            policies.load(folder, **UNSEEN)


@pytest.mark.parametrize("kind", TYPES)
def test_a_dimension_that_never_varied_is_named_and_blows_nothing_up(kind, tmp_path):
    policy = make_policy(kind)
    folder = write_openpi(tmp_path / "p", policy)
    still = {name: [*value[:2], 0.5 if name != "std" else 0.0, *value[3:]] for name, value in
             policy.processor.action_stats.to_dict().items()}
    (folder / STATS).write_text(stats_json(policy, state={name: value[:3] for name, value in still.items()}, actions=still))
    with pytest.warns(UserWarning, match="state dimensions 2 never varied in its data.*action dimensions 2 never varied"):
        processor = policies.load(folder, **UNSEEN, **REST).processor
    at_rest = {"pi0": 0.0, "pi05": -1.0}[kind]  # where openpi puts the value itself
    state = processor.normalize_state(np.array([[0.0, 0.0, 0.5], [0.0, 0.0, 0.6]]))
    assert state[:, 2] == pytest.approx([at_rest, at_rest + 0.1], abs=1e-6)
    actions = processor.unnormalize_actions(torch.full((1, 3, 5), 9.0))
    assert torch.allclose(actions[..., 2], torch.tensor(0.5), atol=1e-4) and actions.shape[-1] == 4
    assert processor.normalize_actions(np.full((1, 1, 4), 0.6))[0, 0, 2] == pytest.approx(at_rest + 0.1, abs=1e-6)


# -------------------------------------------------------------------- processor


def test_quantiles_map_onto_the_unit_range_and_back():
    processor = make_policy("pi05").processor
    stats = processor.action_stats
    ends = processor.normalize_actions(np.stack((stats.q01, stats.q99)))
    assert np.allclose(ends[:, :4], [[-1] * 4, [1] * 4], atol=1e-5) and (ends[:, 4:] == 0).all()
    actions = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    back = processor.unnormalize_actions(processor.normalize_actions(actions).numpy())
    assert isinstance(back, np.ndarray) and np.allclose(back, actions, atol=1e-5)


def test_state_stands_in_the_prompt_as_bins():
    processor, tokenizer = make_policy("pi05").processor, Tokenizer()
    state = torch.tensor([[-1.5, -1.0, 0.999, 0.0, 0.0]])  # three real dimensions, then padding
    tokens, mask = processor.tokenize(["Pick_the cube\n"], state)
    text = "Task: Pick the cube, State: -1 0 255;\nAction: "
    expected = [2, *tokenizer._model.encode(text)]
    assert tokens[0, mask[0]].tolist() == expected and (tokens[0, ~mask[0]] == 0).all()
    processor.pad_state_bins = True
    tokens, mask = processor.tokenize(["Pick the cube"], state)
    padded = text.replace("255", "255 128 128")
    assert tokens[0, mask[0]].tolist() == [2, *tokenizer._model.encode(padded)][: mask.sum()]
    with pytest.raises(ValueError, match="holds the state"):
        processor.tokenize(["Pick the cube"])


def test_without_discrete_state_the_prompt_is_that_of_pi0():
    processor = make_policy("pi05", discrete_state=False).processor
    tokens, mask = processor.tokenize(["pick the cube"])
    assert tokens[0, mask[0]].tolist() == Tokenizer().encode("pick the cube")


def test_relative_actions_are_offsets_from_the_state(tmp_path):
    policy = make_policy()
    folder = write_openpi(tmp_path / "p", policy)
    processor = policies.load(folder, relative=[0, 2], **UNSEEN, **REST).processor
    plain, state = policy.processor, np.array([[10.0, 20, 30], [1, 2, 3]])
    normalised = torch.randn(2, 3, 5)
    difference = processor.unnormalize_actions(normalised, state) - plain.unnormalize_actions(normalised)
    assert np.allclose(difference, [[[10, 0, 30, 0]] * 3, [[1, 0, 3, 0]] * 3], atol=1e-5)
    actions = np.random.default_rng(0).normal(size=(2, 3, 4))
    assert np.allclose(processor.unnormalize_actions(processor.normalize_actions(actions, state), state), actions, atol=1e-4)
    with pytest.raises(ValueError, match="relative to the state; pass the observation's state"):
        processor.unnormalize_actions(normalised)
    with pytest.raises(CheckpointError, match="dimensions of both the state"):
        policies.load(folder, relative=[3], **UNSEEN, **REST)


def test_processor_options_survive_our_own_checkpoints(tmp_path):
    policy = make_policy("pi05")
    policy.processor.relative, policy.processor.pad_state_bins = (0, 1), True
    policies.save(policy, tmp_path / "ours")
    loaded = policies.load(tmp_path / "ours", expect="pi05")
    assert loaded.processor.relative == (0, 1) and loaded.processor.pad_state_bins
    assert np.array_equal(act(loaded), act(policy))


def test_tokenizer_json_beside_the_weights_or_given(tmp_path):
    policy = make_policy()
    folder = write_openpi(tmp_path / "p", policy, tokenizer=False)
    with pytest.raises(CheckpointError, match="holds no tokenizer; pass tokenizer="):
        policies.load(folder, **UNSEEN, **REST)
    write_tokenizer(folder)
    loaded = policies.load(folder, **UNSEEN, **REST)
    assert loaded.processor.tokenizer.encode("pick the cube") == [2, 4, 8, 5, 8, 6, 7]
    given = policies.load(folder, tokenizer=TINY_TOKENIZER, **UNSEEN, **REST)
    assert given.processor.tokenizer.encode("pick the cube") == Tokenizer().encode("pick the cube")
    policies.save(loaded, tmp_path / "ours")
    assert policies.load(tmp_path / "ours").processor.tokenizer.encode("the cube") == [2, 5, 8, 6, 7]
    from transformers import AutoTokenizer

    policies.export(loaded, tmp_path / "lerobot", layout="lerobot")
    assert policies.load(tmp_path / "lerobot").processor.tokenizer.encode("the cube") == [2, 5, 8, 6, 7]
    assert AutoTokenizer.from_pretrained(tmp_path / "lerobot")("the cube")["input_ids"] == [2, 5, 8, 6]
    edit(folder / "tokenizer.json", lambda t: t["model"].update(unk_token="gone"))
    with pytest.raises(CheckpointError, match="tokenizer.json: .*UNK.*expected a sentencepiece .model or a tokenizer.json"):
        policies.load(folder, **UNSEEN, **REST)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json: .*expected a sentencepiece .model or a tokenizer.json"):
        policies.load(folder, **UNSEEN, **REST)


# -------------------------------------------------------------------- the hub


def test_hub_id_is_read_from_the_cache_and_its_absence_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'some-lab/pi0' is no folder here, not in the hub's cache, and .* out of reach") as e:
        policies.load("some-lab/pi0")
    assert "\n" not in str(e.value)
    policy, cached = make_policy(), tmp_path / "models--some-lab--pi0"
    write_openpi(cached / "snapshots" / "0123", policy)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    assert np.array_equal(act(policies.load("some-lab/pi0", **UNSEEN, **REST)), act(policy))


def test_only_needed_files_are_downloaded(tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    def download(repo, allow_patterns, ignore_patterns):
        needed = {
            "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
            "assets/a/norm_stats.json", "a/b/norm_stats.json", "policy_preprocessor.json", "tokenizer.model",
            "policy_preprocessor_step_5_normalizer_processor.safetensors",
        }
        others = {"README.md", "optimizer.pt", "pytorch_model.bin", "checkpoints/1/model.safetensors"}
        kept = filter_repo_objects(needed | others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert set(kept) == needed
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(policies.layouts, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="could not be downloaded: no route to host$"):
        policies.load("some-lab/pi0")


# -------------------------------------------------------------------- export


@pytest.mark.parametrize("kind", TYPES)
def test_exported_policy_acts_the_same_and_has_the_published_layout(kind, tmp_path):
    policy = make_policy(kind, max_token_len=50)
    policy.processor.relative = (0, 1)
    policies.export(policy, tmp_path / "out", asset_id="some-lab/libero")
    loaded = policies.load(tmp_path / "out")
    assert loaded.config == policy.config and np.array_equal(act(loaded), act(policy))
    assert loaded.processor.relative == (0, 1) and loaded.meta["asset_id"] == "some-lab/libero"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert stored == set(tensors_of(policy))
    stats = json.loads((tmp_path / "out" / STATS).read_text())["norm_stats"]
    assert stats["actions"]["q99"] == policy.processor.action_stats.to_dict()["q99"] and len(stats["state"]["mean"]) == 3
    assert json.loads((tmp_path / "out/config.json").read_text())["action_horizon"] == policy.config.horizon


def test_exported_precision_can_be_chosen(tmp_path):
    policy = make_policy()
    policies.export(policy, tmp_path, asset_id="a", dtype="bfloat16")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    with pytest.raises(CheckpointError, match="dtype is 'int4'"):
        policies.export(policy, tmp_path, asset_id="a", dtype="int4")
    for asset in ("", "/etc", "../up"):
        with pytest.raises(CheckpointError, match="asset_id is"):
            policies.export(policy, tmp_path, asset_id=asset)


@pytest.mark.parametrize("folder", ["file", "file/below", "n" * 300])
def test_where_no_folder_can_be_is_told_and_nothing_is_lost(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for write in (policies.save, partial(policies.export, layout="lerobot")):
        with pytest.raises(CheckpointError, match="not saved to") as caught:
            write(make_policy(), tmp_path / folder)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


# -------------------------------------------------------------------- export to lerobot


def with_statistics(policy, states, actions, **options):
    stats = NormStats.from_data(states, min_std=0), NormStats.from_data(actions, min_std=0)
    policy.processor = Processor(policy.config, Tokenizer(), *stats, **options)
    return policy


@pytest.mark.parametrize("kind, options", [("pi0", {}), ("pi05", {}), ("pi05", {"discrete_state": False})])
def test_exported_for_lerobot_is_read_back_to_the_same_policy(kind, options, tmp_path, recwarn):
    policy = make_policy(kind, **options)
    policy.meta = dict(env_id="PickCube-v1", execute=2, num_steps=10, sft={"seed": 1})
    policies.export(policy, tmp_path, layout="lerobot")
    names = [f"observation.images.{name}" for name in CAMERAS]
    loaded = policies.load(tmp_path)
    assert loaded.config == policy.config and loaded.meta == {**policy.meta, "cameras": names}
    assert np.array_equal(act(loaded), act(policy)) and not recwarn
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # lerobot goes on without the weights if one is missing
        assert set(file.keys()) == {f"model.{name}" for name in tensors_of(policy)}
    config(n_action_steps=3, num_inference_steps=4)(tmp_path)
    edited = policies.load(tmp_path)
    assert (edited.meta["execute"], edited.meta["num_steps"], edited.config.num_steps) == (3, 4, 4)
    (tmp_path / "pi_stepnft.json").unlink()  # as a folder that lerobot has trained on
    with pytest.warns(UserWarning, match="its prompts are those of the tokenizer"):
        theirs = policies.load(tmp_path, **UNSEEN)
    assert theirs.config == edited.config and np.allclose(act(theirs), act(policy), atol=1e-3)


@pytest.mark.parametrize("content, message", [
    ("{", "pi_stepnft.json is not readable JSON"),
    ("{}", "pi_stepnft.json has format_version None; expected 1"),
    ('{"format_version": 1, "type": "pi0", "model": {}}', "pi_stepnft.json: lacks the entry processor"),
])
def test_our_description_beside_lerobots_files_is_checked_as_any(content, message, tmp_path):
    policies.export(make_policy(), tmp_path, layout="lerobot")
    (tmp_path / "pi_stepnft.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        policies.load(tmp_path)


@pytest.mark.parametrize("kind", TYPES)
def test_lerobots_own_formulas_scale_as_we_do(kind, tmp_path):
    rng = np.random.default_rng(0)
    states, actions = rng.normal(2, 3, (50, 4)), rng.normal(-1, 0.01, (50, 4))
    states[:, 1], actions[:, 2] = 0.5, 0.25  # never varied
    policy = with_statistics(make_policy(kind), states, actions)
    policies.export(policy, tmp_path, layout="lerobot")
    steps = {}
    for which in ("pre", "post"):
        for entry in json.loads((tmp_path / f"policy_{which}processor.json").read_text())["steps"]:
            if "state_file" in entry:
                steps[which] = load_file(tmp_path / entry["state_file"])
                assert entry["config"]["eps"] == 0.0

    def bounds(stats, name):  # lerobot 0.6.1, normalize_processor.py
        if kind == "pi0":
            return stats[f"{name}.mean"], stats[f"{name}.std"]
        half = (stats[f"{name}.q99"] - stats[f"{name}.q01"]) / 2
        return stats[f"{name}.q01"] + half, half

    seen = torch.from_numpy(states[:7] + 0.1).float()
    center, scale = bounds(steps["pre"], "observation.state")
    assert torch.allclose((seen - center) / scale, policy.processor.normalize_state(seen)[:, :4], atol=1e-5)
    normalised = torch.randn(7, 3, 5)
    center, scale = bounds(steps["post"], "action")
    assert torch.allclose(normalised[..., :4] * scale + center, policy.processor.unnormalize_actions(normalised), atol=1e-6)


def test_relative_actions_are_exported_as_names_that_lerobot_leaves_out(tmp_path):
    rng = np.random.default_rng(0)
    policy = with_statistics(make_policy(), rng.normal(size=(50, 4)), rng.normal(size=(50, 4)), relative=(0, 2))
    policies.export(policy, tmp_path, layout="lerobot")
    assert policies.load(tmp_path).processor.relative == (0, 2)
    (tmp_path / "pi_stepnft.json").unlink()
    with pytest.warns(UserWarning, match="its prompts are those of the tokenizer"):  # a folder, and not PaliGemma
        assert policies.load(tmp_path, **UNSEEN).processor.relative == (0, 2)


def test_transformers_reads_the_tokenizer_that_is_exported_as_ours(tmp_path):
    from transformers import AutoTokenizer

    policies.export(make_policy(), tmp_path, layout="lerobot")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer()
    texts = ["pick up the red cube", "Über 12 µm: <s>weird</s> \t text  of any kind, -1 255 256", "", " ", "open drawer_1"]
    for text in [*texts, *train_tokenizer.sentences()[::100]]:
        clean = text.strip().replace("_", " ").replace("\n", " ")  # which lerobot leaves to the one who asks
        found = theirs([f"{clean}\n"], padding="max_length", max_length=400, truncation=True)
        length = sum(found["attention_mask"][0])
        assert found["input_ids"][0][:length] == ours.encode(text) and not any(found["input_ids"][0][length:]), text
    state = np.array([-1.5, 0.3, 0.999])
    assert theirs("Task: push, State: -1 166 255;\nAction: ")["input_ids"] == ours.encode("push", state)


@pytest.mark.parametrize("policy, options, message", [
    (lambda: make_policy(num_cameras=0), {}, "it acts without cameras"),
    (lambda: make_policy(rope_theta=500.0), {}, "rope_theta is 500"),
    (lambda: make_policy(), dict(cameras=["a", "b"]), "cameras are a, b; expected 3 different names"),
    (lambda: make_policy(), dict(cameras="top"), "cameras is 'top'; expected a list of 3 names"),
    (lambda: make_policy(), dict(layout="onnx"), "layout is 'onnx'; expected 'openpi' or 'lerobot'"),
    (lambda: make_policy(), dict(layout="openpi"), "asset_id is None"),
    (lambda: make_policy(), dict(dtype="int4"), "dtype is 'int4'"),
])
def test_what_lerobot_cannot_do_is_not_exported(policy, options, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        policies.export(policy(), tmp_path / "out", **{"layout": "lerobot", **options})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    (dict(pad_state_bins=True), "its prompt holds a padded state"),
    (dict(relative=(0,)), "it has 3 states, to be added to 4 relative actions"),
])
def test_prompts_and_relative_actions_that_lerobot_does_not_have_are_refused(change, message, tmp_path):
    policy = make_policy("pi05")
    vars(policy.processor).update(change)
    with pytest.raises(CheckpointError, match=message):
        policies.export(policy, tmp_path, layout="lerobot")


# -------------------------------------------------------------------- what is refused


def replace_weights(folder, *files: str) -> None:
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).write_bytes(b"anything")


def truncate(folder) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def rewrite(folder, change) -> None:
    tensors = tensors_of(make_policy())
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: replace_weights(f), "holds no model.safetensors but assets, tokenizer.model; give a folder"),
        (lambda f: replace_weights(f, "pytorch_model.bin"), "but pytorch_model.bin, a pickle, .* never read"),
        (lambda f: replace_weights(f, "full_weights.pt"), "but full_weights.pt, a pickle"),
        (lambda f: replace_weights(f, "adapter_model.safetensors", "adapter_config.json"), "a LoRA adapter without its base"),
        (lambda f: (replace_weights(f), (f / "params").mkdir()), "JAX parameters; convert them"),
        (truncate, "not a complete safetensors file"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec"), "not a complete safetensors"),
        (lambda f: save_file({"encoder.weight": torch.zeros(1)}, f / "model.safetensors"), "holds no π0 or π0.5 policy, but enc"),
        (lambda f: rewrite(f, lambda t: t["action_out_proj.bias"].fill_(float("nan"))), "NaN or infinite values in action_out_p"),
        (lambda f: rewrite(f, lambda t: t.pop("action_out_proj.bias")), "pi0 configuration: 1 missing: action_out_proj.bias"),
        (lambda f: rewrite(f, lambda t: t.update(other=torch.zeros(1))), "1 unexpected: other"),
        (
            lambda f: rewrite(f, lambda t: t.update({f"{EXPERT}model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(1)})),
            "LoRA factors such as",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({f"{EXPERT}model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)})),
            r"1 mis-shaped: .*layers.1.mlp.up_proj.weight \(2, 2\) instead of \(32, 16\)",
        ),
        (lambda f: (f / "config.json").write_text('{"type": "pi05"}'), "of type 'pi05', but the weights are those of pi0"),
        (lambda f: (f / "config.json").write_text('{"input_features": 3}'), "config.json: input_features is 3; expected an obj"),
        (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
        (lambda f: (f / STATS).write_text('{"norm_stats": {}}'), "norm_stats.json: lacks the entry state"),
        (
            lambda f: (f / STATS).write_text(stats_json(make_policy(), state={"std": None})),
            "state lacks std, by which pi0 policies are scaled",
        ),
        (lambda f: (f / STATS).write_text(stats_json(make_policy(), state={"std": [1e999] * 3})), "NaN, infinity"),
    ],
)
def test_wrong_files_are_refused_in_one_line(damage, message, tmp_path):
    folder = write_openpi(tmp_path / "p", make_policy())
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        policies.load(folder, **UNSEEN, **REST)
    assert "\n" not in str(caught.value)


def pipe(file) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def device(file) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


def directory(file) -> None:
    file.unlink()
    file.mkdir()


def write_twice(file) -> None:
    file.write_text(file.read_text().replace('"std":', '"mean": [9, 9, 9], "std":', 1))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: pipe(f / "model.safetensors"), "model.safetensors cannot be read: it is no regular file"),
        (lambda f: device(f / "model.safetensors"), "model.safetensors cannot be read: it is no regular file"),
        (lambda f: directory(f / "model.safetensors"), "model.safetensors cannot be read: it is a folder"),
        (lambda f: device(f / "tokenizer.model"), "tokenizer.model cannot be read: it is no regular file"),
        (lambda f: pipe(f / "tokenizer.model"), "tokenizer.model cannot be read: it is no regular file"),
        (lambda f: directory(f / "tokenizer.model"), "tokenizer.model cannot be read: it is a folder"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"x" * 300), "tokenizer.model.*expected a sentencepiece"),
        (lambda f: pipe(f / "config.json"), "config.json cannot be read: it is no regular file"),
        (lambda f: pipe(f / STATS), "norm_stats.json cannot be read: it is no regular file"),
        (lambda f: (f / STATS).write_text("[" * 100_000), "norm_stats.json is nested too deep"),
        (lambda f: (f / STATS).write_text(" " * (3 << 20)), "cannot be read: it has 3,145,728 bytes; expected at most"),
        (lambda f: (f / STATS).write_text('{"a": ' + "9" * 5000 + "}"), "norm_stats.json is not readable JSON"),
        (lambda f: (f / STATS).write_bytes(b'{"a": "\xff"}'), "norm_stats.json is not readable JSON"),
        (lambda f: (f / STATS).write_text(json.dumps(dict.fromkeys(map(str, range(20_000))))), "an object has 20,000 names"),
        (lambda f: write_twice(f / STATS), "norm_stats.json is not readable JSON .'mean' is there twice"),
        (lambda f: (f / STATS).write_text(stats_json(make_policy(), state={"std": ["1"] * 3})), "std.0 is '1'; expected a num"),
        (lambda f: (f / STATS).write_text(stats_json(make_policy(), state={"std": [10**400] * 3})), "expected a num|NaN, inf"),
        (lambda f: (f / STATS).write_text(stats_json(make_policy(), state={"mean": [1e300] * 3})), "NaN, infinity"),
        (lambda f: (f / STATS).write_text(stats_json(make_policy(), state={"q01": [99.0] * 3})), "a q01 above its q99"),
        (lambda f: (f / "config.json").write_text('{"action_horizon": 1e3}'), "action_horizon is 1000.0; expected an integer"),
        (lambda f: (f / "config.json").write_text('{"model": {"num_steps": 20000}}'), "num_steps is 20000; expected at most"),
        (lambda f: (f / "config.json").write_text('{"model": {"vlm_depth": 1000000}}'), "is 1000000; expected at most 256"),
        (lambda f: (f / "config.json").write_text('{"model": {"vlm_depth": 200}}'), "vlm_depth 200 instead of 2; use the"),
        (lambda f: rewrite(f, lambda t: t.update({"model.state_proj.bias": t["state_proj.bias"] + 1})), "state_proj.bias already"),
        (lambda f: rewrite(f, lambda t: t.update({"state_proj.bias": torch.ones(5).char()})), "as I8; expected one of"),
        (lambda f: rewrite(f, lambda t: t.update({f"{EXPERT}model.layers.x\ny.a": torch.zeros(1)})), "layers.x y.a"),
    ],
)
def test_damaged_files_are_refused_at_once_and_nothing_else_is_opened(damage, message, tmp_path):
    folder = write_openpi(tmp_path / "p", make_policy())
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        policies.load(folder, **UNSEEN, **REST)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", TYPES)
def test_every_size_has_a_range(kind):
    config = CLASSES[kind][1]
    for name in {field.name for field in dataclasses.fields(config)} - {"discrete_state"}:
        for value in (-1, 10**12, True, "8", None, [8], float("nan")):
            with pytest.raises(ValueError, match=f"{name} is .*; expected"):
                config.tiny(**{name: value})


@pytest.mark.parametrize("weight_map, message", [
    ({"a": "../model.safetensors"}, "names '../model.safetensors', outside its folder"),
    ({"a": 3}, "weight_map.a is 3; expected text"),
    ([], "weight_map is .*; expected an object"),
])
def test_shards_stay_in_their_folder(weight_map, message, tmp_path):
    folder = write_openpi(tmp_path / "p", make_policy())
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        policies.load(folder, **UNSEEN, **REST)


def test_a_trainings_folder_is_told_where_its_policy_is(tmp_path, monkeypatch):
    train = tmp_path / "outputs" / "train" / "x"
    newest = write_lerobot(train / "checkpoints" / "000200" / "pretrained_model", make_policy())
    shutil.copytree(newest.parent, train / "checkpoints" / "000100")
    for folder in (train, train / "checkpoints", newest.parent):
        with pytest.raises(CheckpointError, match="is a training's folder; its policy is .*/000200/pretrained_model$"):
            policies.load(folder)
    (train / "checkpoints" / "last").symlink_to("000100")
    for folder in (train, train / "checkpoints"):
        with pytest.raises(CheckpointError, match="its policy is .*/last/pretrained_model$"):
            policies.load(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(policies.layouts, "snapshot_download", lambda *args, **options: pytest.fail("the network was tried"))
    with pytest.raises(CheckpointError, match="'outputs/y' is neither a folder nor a bundled name .outputs holds train.; give"):
        policies.load("outputs/y")
    with pytest.raises(CheckpointError, match="'runs/y' is neither a folder"):
        policies.load("runs/y")


@pytest.mark.parametrize("kind, other", [TYPES, TYPES[::-1]])
def test_the_other_type_is_refused_where_one_is_expected(kind, other, tmp_path):
    folder = write_openpi(tmp_path / "p", make_policy(kind))
    assert policies.load(folder, expect=kind, **UNSEEN, **REST).config.type == kind
    with pytest.raises(CheckpointError, match=f"holds a {kind} policy; expected {other}"):
        policies.load(folder, expect=other, **UNSEEN, **REST)


def test_statistics_a_lerobot_policy_never_got_are_refused(tmp_path):
    policy = make_policy()
    stats = {"observation.state": {"mean": [float("inf")] * 3, "std": [float("inf")] * 3}}
    with pytest.raises(CheckpointError, match="observation.state: .*NaN, infinity.*; pass norm_stats="):
        policies.load(write_lerobot(tmp_path / "a", policy, steps=False, stats=stats), **UNSEEN)
    folder = write_lerobot(tmp_path / "b", policy, mode="QUANTILE10")
    with pytest.raises(CheckpointError, match="do not serve its mode QUANTILE10"):
        policies.load(folder, **UNSEEN)
    assert policies.load(folder, norm_stats="identity", **UNSEEN).config.horizon == 3


def test_extras_are_known_but_no_weights(tmp_path):
    folder = write_lerobot(tmp_path / "p", make_policy(), steps=False)
    weights = Weights([folder / "model.safetensors"])
    assert "normalize_inputs.buffer_observation_state.mean" in weights.extras
    assert not any("buffer" in name or name.startswith(f"{EXPERT}lm_head") for name in weights.shapes)
