"""Damage to files: bytes at random, and what the format's own library can write. Equal generators make equal damage."""

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = ["", "x", "3", "a\nb\r\x85c", "\0", "é" * 5000, "{0.__class__}", "../outside", "/dev/zero", "os:x"]
NUMBERS = [0, 1, -1, 3, 255, 2**31, -(2**63), 10**6, 10**12, 0.5, -1e308, 1e-300, float("nan"), float("inf")]
VALUES = [None, True, *NUMBERS, 10**400, *TEXTS, "\ud800", [], [1], [None], ["x", 2], [[1.0]], {}, {"a": 1}, [0] * 10**5]
ARRAYS = [np.zeros(0), np.zeros((5, 7)), np.full((5, 7), np.nan), np.zeros((5, 32, 32, 3), np.uint8), np.zeros(5, "S3"), 2**40,
          np.ones((3, 7), np.complex64), np.zeros((5, 7), [("a", "f4")]), "text", '{"language_instruction": 1}', ["a", "b"]]
DEEP = "[" * 10**5 + "]" * 10**5


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def spoil_json(file: Path, draw: random.Random, outside: str) -> None:
    """Another entry in a JSON file, in the header of a safetensors file, in the first line of several."""
    data = file.read_bytes()
    begin, end = 0, len(data.splitlines()[0]) if file.suffix == ".jsonl" else len(data)
    if file.suffix == ".safetensors":
        begin, end = 8, 8 + int.from_bytes(data[:8], "little")
    tree = [json.loads(data[begin:end])]
    (holder, key), (other, name) = draw.choices(list(places(tree)), k=2)
    way = draw.choice(["value"] * 4 + ["near", "swap", "drop", "more", "twice", "deep"])
    if way == "drop":
        del holder[key]
    elif way == "more" and isinstance(holder[key], dict):
        holder[key]["more"] = draw.choice(VALUES)
    elif way == "swap":
        holder[key], other[name] = json.loads(json.dumps([other[name], holder[key]]))
    elif way == "near" and isinstance(holder[key], (int, float)):
        holder[key] += draw.choice([-1, 1, 1000])
    elif way != "twice":
        holder[key] = "DEEP" if way == "deep" else draw.choice([*VALUES, outside])
    text = "".join(map(json.dumps, tree)).replace('"DEEP"', DEEP)
    new = (text.replace(f'"{key}": ', f'"{key}": 1, "{key}": ', 1) if way == "twice" else text).encode()
    file.write_bytes((len(new).to_bytes(8, "little") if begin else b"") + new + data[end:])


def spoil_hdf5(file: Path, draw: random.Random, outside: str) -> None:
    with h5py.File(file, "a") as opened:
        names: list[str] = []
        opened.visit(names.append)
        at = opened[draw.choice(names)]
        parent, name, old = at.parent, at.name, at[()] if isinstance(at, h5py.Dataset) else np.zeros((5, 7))
        if draw.random() < 0.3:
            at = draw.choice([at, parent])
            at.attrs[draw.choice([*at.attrs, "format", "num_samples", "steps"])] = draw.choice(ARRAYS)
            return
        if draw.random() < 0.9:
            del parent[name]
        virtual = h5py.VirtualLayout((5, 7), "f4")
        virtual[:] = h5py.VirtualSource(outside, "x", (5, 7))
        new = draw.choice([*ARRAYS, old[:-1], old[..., None], old[:0], old.T, old.astype("f2"), old.astype("u1"),
                           h5py.SoftLink("/"), h5py.SoftLink(parent.name), h5py.ExternalLink(outside, "/"),
                           h5py.ExternalLink("../outside", "/")])
        claimed = draw.choice([(10**12, 7), (2**60, 7), (10**8,)])
        draw.choice([
            *[lambda: parent.__setitem__(draw.choice([name, name, f"{parent.name}/more"]), new)] * 6,
            lambda: parent.create_dataset(name, (5, 7), "f4", external=[(outside, 0, 140)]),
            lambda: parent.create_dataset(name, claimed, "f4", chunks=(10, *claimed[1:]), compression="gzip"),
            lambda: parent.create_dataset(name, data=old, chunks=True, compression="gzip", shuffle=True, fletcher32=True),
            lambda: parent.create_virtual_dataset(name, virtual), lambda: parent.create_group(name), lambda: None,
        ])()


def spoil_parquet(file: Path, draw: random.Random, outside: str) -> None:
    table = pq.read_table(file)
    n, names, name = len(table), table.column_names, draw.choice(table.column_names)
    pictures = [dict(bytes=None, path=text) for text in (*TEXTS, outside)] + [dict(bytes=b"\x89PNG\r\n\x1a\n", path="")]
    cell = draw.choice([None, True, b"\xff", [1.0], [[1]], *NUMBERS, *TEXTS, *pictures])
    column = draw.choice([[cell] * n, [[1.0]] * (n - 1) + [[]]])
    table = draw.choice([
        *[lambda: table.set_column(names.index(name), name, pa.array(column))] * 6, lambda: table.append_column(name, table[name]),
        lambda: table.drop_columns([name]), lambda: table.slice(1), lambda: table.slice(0, 0),
        lambda: pa.concat_tables([table] * 2), lambda: table.take(draw.sample(range(n), n)),
        lambda: table.rename_columns(draw.sample(names, len(names))),
    ])()
    pq.write_table(table, file, compression=draw.choice(["snappy", "gzip", "zstd", "none"]))


def spoil_bytes(file: Path, draw: random.Random, outside: str) -> None:
    data = bytearray(file.read_bytes())
    head = min(len(data), 8 + int.from_bytes(data[:8], "little")) if file.suffix == ".safetensors" else len(data)
    at, size = draw.randrange(head), draw.choice([1, 2, 4, 8, 64])
    number = draw.choice([2**63 - 1, 2**64 - 1, 2**31, 2**20, 1, 0]).to_bytes(8, draw.choice(["little", "big"]))
    new = draw.choice([number[:size], number[-size:], draw.randbytes(size), data[:at][-size:], outside.encode()])
    way = draw.choice(["flip"] * 4 + ["replace"] * 3 + ["insert", "cut", "double"])
    if way == "flip":
        for _ in range(draw.choice([1, 1, 20])):
            data[draw.randrange(head)] ^= 1 << draw.randrange(8)
    elif way == "cut":
        del data[draw.randrange(len(data)) :]
    elif way == "double":
        data += data
    else:
        data[at : at + (len(new) if way == "replace" else 0)] = new
    file.write_bytes(data)


def spoil_whole(file: Path, draw: random.Random, outside: str) -> None:
    other = draw.choice(sorted(path for path in file.parent.iterdir() if path.is_file())).read_bytes()
    file.unlink()
    draw.choice([lambda: None, file.touch, file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"),
                 lambda: file.symlink_to(file.name), lambda: file.write_bytes(other), lambda: file.write_bytes(DEEP.encode())])()


WAYS = {".json": spoil_json, ".jsonl": spoil_json, ".safetensors": spoil_json, ".h5": spoil_hdf5, ".hdf5": spoil_hdf5,
        ".parquet": spoil_parquet}


def spoil(folder: Path, draw: random.Random, outside: str) -> None:
    """Damage one file of a folder, or two. outside: path of a file that nothing in the folder has a right to."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not any(map(Path.is_symlink, path.parents)))
    names = sorted({file.name for file in files})
    for name in draw.choices(names, k=draw.choice([1, 1, 1, 2])):
        file = draw.choice([file for file in files if file.name == name])
        with contextlib.suppress(Exception):  # what a library, or the damage before, does not permit is not done
            draw.choice([*[WAYS.get(file.suffix, spoil_bytes)] * 5, *[spoil_bytes] * 4, spoil_whole])(file, draw, outside)
    for manifest in folder.glob("checkpoints/0*/manifest.json") if draw.random() < 0.7 else ():  # as if it had been saved like this
        with contextlib.suppress(Exception):
            names = json.loads(manifest.read_text())["sha256"]
            digests = {name: hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() for name in names}
            manifest.write_text(json.dumps(dict(iteration=1, sha256=digests)))
