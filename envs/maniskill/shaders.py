"""Leaner shaders for software rendering.

SAPIEN lights every pixel of its "minimal" shader pack by an environment map as well, of which it samples two directions, a table,
and the background. ManiSkill's table-top tasks have no such map: it is black, and all of that adds zero, at more than a quarter of
what a software-rendered 96 px frame costs. While `lean_shaders` is active, cameras get copies of the installed shaders without it,
and `tests/test_envs.py` holds their pictures to be the same to the last bit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sapien

from pi_stepnft.envs.maniskill.meshes import cache_dir

PACKS = ("common", "minimal")
CUTS = {
    "gbuffer.frag": ("vec3 wnormal = ", "color += sceneBuffer.ambientLight", ""),
    "composite0.frag": ("float depth = ", "outColor.rgb = ", "vec3 bg = vec3(0);\n  "),
}
"""Per file of the minimal pack what goes: all from the first text up to the second; and what stands there instead."""


@functools.cache
def lean_pack() -> Path | None:
    """Folder of the leaner pack, made at the first use.

    None where the installed shaders are not the ones that `CUTS` knows, or where the cache cannot be written.
    """
    source = Path(sapien.__file__).parent / "vulkan_shader"
    cut = {}
    for name, (start, end, instead) in CUTS.items():
        text = (source / "minimal" / name).read_text() if (source / "minimal" / name).exists() else ""
        if text.count(start) != 1 or text.count(end) != 1:
            return None
        cut[name] = text[: text.index(start)] + instead + text[text.index(end) :]
    files = {path.relative_to(source): path.read_bytes() for pack in PACKS for path in sorted((source / pack).iterdir())}
    files |= {Path("minimal", name): text.encode() for name, text in cut.items()}
    folder = cache_dir().parent / "shaders" / hashlib.sha256(b"".join(files.values())).hexdigest()[:16]
    if not folder.exists():
        with contextlib.suppress(OSError):  # another worker was first, or the cache cannot be written
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as new:
                for path, content in files.items():
                    (Path(new) / "pack" / path).parent.mkdir(parents=True, exist_ok=True)
                    (Path(new) / "pack" / path).write_bytes(content)
                os.rename(Path(new) / "pack", folder)
    return folder / "minimal" if folder.exists() else None


@contextlib.contextmanager
def lean_shaders(software: bool) -> Iterator[None]:
    """While active, new cameras with SAPIEN's minimal shaders get the leaner ones, until a scene gets an environment map.

    software: whether the processor renders; a GPU does not mind the full ones.
    """
    if not software:
        yield
        return
    shader_dir, environment_map, lean = sapien.render.set_camera_shader_dir, sapien.Scene.set_environment_map, lean_pack()

    def set_camera_shader_dir(name: str) -> None:
        shader_dir(str(lean) if lean and name == "minimal" else name)

    def set_environment_map(scene: sapien.Scene, cubemap) -> None:
        nonlocal lean
        lean = None
        environment_map(scene, cubemap)

    sapien.render.set_camera_shader_dir, sapien.Scene.set_environment_map = set_camera_shader_dir, set_environment_map
    try:
        yield
    finally:
        sapien.render.set_camera_shader_dir, sapien.Scene.set_environment_map = shader_dir, environment_map
