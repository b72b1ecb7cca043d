"""Lighter meshes for software rendering.

Three quarters of a software-rendered 96 px frame go into the Panda's 135 000 triangles, most of them smaller than a pixel. While
`light_meshes` is active, untextured mesh files with many triangles are replaced by simplified copies (quadric error, made once,
kept in the user's cache folder), and ManiSkill's floor, a flat grid of 20 000 triangles, by the two that show the same. Collision
shapes are never touched, so physics is exactly the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import sapien
from sapien.wrapper.actor_builder import ActorBuilder

MIN_TRIANGLES = 2000
"""Files with fewer triangles are left alone."""


def cache_dir() -> Path:
    """Where simplified meshes are kept: `$XDG_CACHE_HOME/pi-stepnft/meshes`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pi-stepnft" / "meshes"


def simplify(path: str, keep: float) -> str:
    """Path of a copy of the .glb file `path` with about `keep` (0 to 1) of its triangles; `path` itself where that is not wise."""
    import fast_simplification
    import trimesh

    source = Path(path)
    digest = hashlib.sha256(source.read_bytes() + f"{keep:.4f}".encode()).hexdigest()[:16]
    copy = cache_dir() / f"{source.stem}-{digest}.glb"
    if copy.exists():
        return str(copy)
    scene = trimesh.load(path, force="scene")
    meshes = list(scene.geometry.values())
    textured = any(getattr(getattr(m.visual, "material", None), "baseColorTexture", None) is not None for m in meshes)
    if textured or sum(len(m.faces) for m in meshes) < MIN_TRIANGLES:
        return path
    light = trimesh.Scene()
    for name, mesh in scene.geometry.items():
        # The files repeat each vertex per triangle; a simplifier needs them joined to see the surface.
        joined = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        joined.merge_vertices(merge_tex=True, merge_norm=True)
        if len(joined.faces) > 200:
            points, faces = fast_simplification.simplify(
                joined.vertices.astype(np.float32), joined.faces, target_reduction=1 - max(keep, 150 / len(joined.faces))
            )
            joined = trimesh.Trimesh(points, faces, process=False)
        # Flat shading, as in the original: one normal per triangle needs its own three vertices.
        flat = trimesh.Trimesh(joined.triangles.reshape(-1, 3), np.arange(3 * len(joined.faces)).reshape(-1, 3), process=False)
        flat.vertex_normals = np.repeat(joined.face_normals, 3, axis=0)
        flat.visual = trimesh.visual.TextureVisuals(material=mesh.visual.material)
        light.add_geometry(flat, geom_name=name, transform=scene.graph.get(scene.graph.geometry_nodes[name][0])[0])
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=copy.parent, suffix=".glb", delete=False) as file:
            file.write(light.export(file_type="glb"))
        os.replace(file.name, copy)  # atomic: several workers may write the same copy at once
    except OSError as error:
        warnings.warn(f"no lighter meshes, rendering is slower: {error}; give a folder of yours in XDG_CACHE_HOME", stacklevel=2)
        return path
    return str(copy)


def flat_grid_corners(vertices: np.ndarray) -> np.ndarray | None:
    """Rows of the four corners (left-low, right-low, left-high, right-high) of a level rectangle of many vertices (N, 3), or None.

    Texture coordinates that are linear over the rectangle are reproduced exactly by its two triangles.
    """
    low, high = vertices.min(0), vertices.max(0)
    if len(vertices) < MIN_TRIANGLES or low[2] != high[2]:
        return None
    corners = [np.flatnonzero((vertices[:, 0] == x) & (vertices[:, 1] == y)) for y in (low[1], high[1]) for x in (low[0], high[0])]
    return np.array([c[0] for c in corners]) if all(len(c) for c in corners) else None


@contextlib.contextmanager
def light_meshes(keep: float):
    """While active, SAPIEN scenes get simplified copies of heavy visuals. `keep` = 1 changes nothing."""
    if keep >= 1:
        yield
        return
    original, original_mesh = ActorBuilder.add_visual_from_file, sapien.render.RenderShapeTriangleMesh

    def add_visual_from_file(self, filename, *args, **kwargs):
        light = simplify(filename, keep) if str(filename).endswith(".glb") else filename
        return original(self, light, *args, **kwargs)

    def triangle_mesh(vertices, triangles, normals, uvs, material):
        if (corners := flat_grid_corners(vertices)) is not None:
            vertices, normals, uvs = vertices[corners], normals[corners], uvs[corners]
            triangles = np.array([[0, 1, 2], [1, 3, 2]])  # counter-clockwise from above
        return original_mesh(vertices=vertices, triangles=triangles, normals=normals, uvs=uvs, material=material)

    ActorBuilder.add_visual_from_file = add_visual_from_file
    sapien.render.RenderShapeTriangleMesh = triangle_mesh
    try:
        yield
    finally:
        ActorBuilder.add_visual_from_file = original
        sapien.render.RenderShapeTriangleMesh = original_mesh
