"""lerobot's PyTorch π0 and π0.5 at any size and with a policy's weights, for the benchmarks that compare with them.

The networks run as published: `modeling_pi0.py`, `modeling_pi05.py`, `pi_gemma.py` and what they compute with are imported
unmodified from the pinned release. Only their surroundings (configuration and hub classes, the processor, real-time chunking,
which need Python 3.12 and a dozen packages) are replaced by empty stand-ins, and the sizes, which lerobot hard-codes, are set
on the way into the constructors of its layers.
"""

import importlib
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

LEROBOT = "0.6.1"
"""release compared with; its networks ask for transformers 5.4 or 5.5. Releases before 0.5 need a patched transformers that is
no package"""
ROOT = Path(__file__).resolve().parents[1]
OURS = ("torch==2.13.0", "gymnasium", "numpy", "pydantic", "safetensors", "sentencepiece", "tyro")
"""what our policies and the benchmarks need, but for transformers"""
REQUIREMENTS = (*OURS, "transformers==5.5.4", "draccus")
"""what lerobot's two networks, our policies and the benchmarks need, and no more"""


def own_requirements() -> list[str]:
    """What this project needs."""
    own = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)[1]
    return re.findall(r'"(.+?)"', own)


def whole_lerobot() -> tuple[str, ...]:
    """What lerobot's policies and its evaluation need, and this project: lerobot's ranges, but for torch and torchvision."""
    return (*REQUIREMENTS, *own_requirements(), "torchvision", "numpy<2.3", "draccus<0.12", "einops<0.9", "datasets<5",
            "pandas<3", "pyarrow", "av<16", "jsonlines", "opencv-python-headless<4.14", "huggingface-hub<2", "termcolor")


def run_in_venv(
    folder: Path, requirements: tuple[str, ...] = REQUIREMENTS, python: str = sys.executable, bare: str = f"lerobot=={LEROBOT}"
) -> None:
    """Return if this interpreter is that of the virtual environment; else make it, run this command there, and exit.

    python: the interpreter that the environment is made by. bare: the package compared with, installed without what its metadata
    ask for.
    """
    folder = folder.resolve()
    inside = folder / "bin" / "python"
    if Path(sys.prefix).resolve() == folder:
        return
    if not (folder / ".installed").exists():
        print(f"installing {bare} and {', '.join(requirements)} into {folder}", flush=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [inside, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements], check=True)
        # lerobot's metadata ask for Python 3.12; of what is imported here nothing does.
        subprocess.run([*pip, "--no-deps", "--ignore-requires-python", bare], check=True)
        (folder / ".installed").touch()
    raise SystemExit(subprocess.run([inside, *sys.argv]).returncode)


class StandIn(types.ModuleType):
    """A module whose every name is an empty class."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def modelling(name: str) -> types.ModuleType:
    """lerobot's module `modeling_{name}`, name "pi0" or "pi05"."""
    root = Path(importlib.util.find_spec("lerobot").submodule_search_locations[0])
    for package in ("policies", "policies/rtc", "policies/pi0", "policies/pi05"):  # without running their __init__
        module = types.ModuleType("lerobot." + package.replace("/", "."))
        module.__path__ = [str(root / package)]
        sys.modules.setdefault(module.__name__, module)
    for stand_in in (
        "configs", "policies.pretrained", "policies.rtc.modeling_rtc", "policies.pi0.configuration_pi0",
        "policies.pi05.configuration_pi05",
    ):
        sys.modules.setdefault(f"lerobot.{stand_in}", StandIn(f"lerobot.{stand_in}"))
    return importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")


def sizes(module: types.ModuleType, c):
    """A context in which lerobot's module `modeling_pi0` or `modeling_pi05` builds its networks in the sizes of a configuration
    of ours, in place of those that its code has."""

    def gemma_sizes(variant: str):
        width, mlp = (c.vlm_width, c.vlm_mlp) if variant == "gemma_2b" else (c.expert_width, c.expert_mlp)
        return module.GemmaConfig(width, c.vlm_depth, mlp, c.heads, c.kv_heads, c.head_dim)

    return mock.patch.multiple(
        module, get_gemma_config=gemma_sizes,
        **layers(module, c, "PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"),
    )


def layers(module: types.ModuleType, c, paligemma: str, expert: str) -> dict:
    """The module's constructors of these two names, but of networks in the sizes that its code does not take from a table."""
    build_paligemma, build_expert = getattr(module, paligemma), getattr(module, expert)

    def sized_paligemma(config):
        config.projection_dim = config.vision_config.projection_dim = c.vlm_width
        config.text_config.vocab_size = c.vocab_size
        for theirs, size in dict(
            hidden_size=c.vision_width, num_hidden_layers=c.vision_depth, intermediate_size=c.vision_mlp,
            num_attention_heads=c.vision_heads, patch_size=c.patch_size, image_size=c.image_size,
        ).items():
            setattr(config.vision_config, theirs, size)
        return build_paligemma(config)

    def sized_expert(config):
        config.vocab_size = c.vocab_size  # of a head that is not used
        return build_expert(config)

    return {paligemma: sized_paligemma, expert: sized_expert}


def lerobot_network(policy, train_expert_only: bool = False):
    """lerobot's `PI0Pytorch` or `PI05Pytorch` of this policy's type, sizes and weights, float32, in eval mode."""
    from pi_stepnft.policies.checkpoint import published_name

    c = policy.config
    if c.heads != 8:
        raise ValueError(f"heads is {c.heads}; lerobot's networks have 8 fixed in the code that computes a loss")
    module = modelling(c.type)
    config = SimpleNamespace(
        paligemma_variant="gemma_2b", action_expert_variant="gemma_300m", dtype="float32",
        image_resolution=(c.image_size, c.image_size),
        freeze_vision_encoder=train_expert_only, train_expert_only=train_expert_only, compile_model=False, rtc_config=None,
        max_state_dim=c.state_dim, max_action_dim=c.action_dim, chunk_size=c.horizon, num_inference_steps=c.num_steps,
        min_period=c.min_period, max_period=c.max_period,
    )
    with sizes(module, c):
        network = {"pi0": "PI0Pytorch", "pi05": "PI05Pytorch"}[c.type]
        network = getattr(module, network)(config)

    def level(name: str) -> str:  # releases of transformers differ in this level of the vision tower
        return name.replace("vision_tower.vision_model.", "vision_tower.")

    ours = {level(published_name(name)): tensor for name, tensor in policy.state_dict().items()}
    embedding = ours["paligemma_with_expert.paligemma.lm_head.weight"]
    ours["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = embedding
    names = {level(name): name for name in network.state_dict()}
    if surplus := sorted(ours.keys() - names.keys() - {"paligemma_with_expert.paligemma.lm_head.weight"}):
        raise ValueError(f"lerobot's network has no {', '.join(surplus)}")
    weights = {names[name]: tensor for name, tensor in ours.items() if name in names}
    missing, _ = network.load_state_dict(weights, strict=False)
    if missing := set(missing) - {"paligemma_with_expert.gemma_expert.lm_head.weight"}:
        raise ValueError(f"our policy has no {', '.join(sorted(missing))}")
    return network.eval()


def lerobot_inputs(policy, inputs: dict) -> tuple:
    """The positional arguments that its `forward` and `sample_actions` begin with; π0.5 takes no state."""
    observation = (
        list(inputs["images"].unbind(dim=1)), list(inputs["image_mask"].unbind(dim=1)), inputs["tokens"], inputs["token_mask"],
    )
    return observation if policy.config.type == "pi05" else (*observation, inputs["state"])
