"""Files of others: read in a process of their own, and believed only as far as what is in them goes.

Libraries that meet a damaged file can crash (libhdf5 does), so a child process reads; one that dies is one line in the parent. What
is read goes into temporary files, whose descriptors the child inherits, episode by episode: neither process holds it all in memory.
Nothing of a user's files is unpickled, and nothing that a file names is opened outside its folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import signal
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from pi_stepnft.envs import child
from pi_stepnft.envs.base import EnvError, fit

COLUMNS = dict(image=np.uint8, state=np.float32, action=np.float32, objects=np.float32, told=np.int32)
"""What is kept of each row. image (cameras, H, W, 3); told: which of the instructions."""

PACKED = 1032
"""How many times larger than what is stored an array can be: the most that deflate, the strongest of HDF5's filters, achieves."""

PATIENCE = 20
"""s of computing, with neither an array nor a picture nor an episode to show for it, after which a reader ends: HDF5 goes in
circles in some damaged files. A slow disk costs no computing."""

ROOM = 2**26
"""bytes that HDF5 may take beside four times the arrays of an episode, the last copy of which goes to the policy: in a damaged file
it can ask for any number"""

MAX_PIXELS = 4096 * 2304
"""of a picture: what a camera delivers, and no more than a damaged header may ask memory for"""


@contextlib.contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Names the place in whatever h5py, json, pyarrow, NumPy and the decoders raise over a damaged file."""
    try:
        yield
    except EnvError:
        raise
    except KeyError as error:
        raise EnvError(f"{place} lacks {str(error).splitlines()[0]}") from None
    except Exception as error:  # each library has its own, and they let those of Python's through that damage leads to
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise EnvError(f"{place} cannot be read as demonstrations: {reason}") from None


# ------------------------------------------------------------------------------------------------------------------- two processes


def gather(source: Callable[..., Iterable[dict | None]], path: Path, options: dict, **how: Any) -> dict[str, Any]:
    """Run `source(path, **options)`, a generator of episodes, in a child process and join what it yields, as `join` says.

    Returns the columns (N, …) by name, image mapped into memory from an unnamed file; "start" (E,), "instructions", "cameras",
    "attrs", and "failed", the number of episodes that were left out.
    """
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(tempfile.TemporaryFile()) for name in COLUMNS}
        pipe, end = Pipe()
        process = child.start(__name__, end.fileno(), *(file.fileno() for file in files.values()))
        end.close()
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # recv tells
                pipe.send((source, path, options, how))
            status, result = pipe.recv()
        except (EOFError, OSError):
            code = process.wait()
            if code == -signal.SIGPROF:
                raise EnvError(f"{path} is damaged: reading it came to no end") from None
            by = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
            raise EnvError(f"{path} is damaged, or there is too little memory: reading it crashed ({by})") from None
        finally:
            process.kill()
            process.wait()
            pipe.close()
        if status == "error":
            raise EnvError(result)
        shapes = result.pop("shapes")
        for name, dtype in COLUMNS.items():
            if name == "image" and math.prod(shapes[name]):
                result[name] = np.asarray(np.memmap(files[name], dtype, "r+", shape=shapes[name]))
            else:
                files[name].seek(0)
                result[name] = np.fromfile(files[name], dtype).reshape(shapes[name])
    return result


def alive() -> None:
    """Say that there is progress: the clock of a process that reads starts anew."""
    if signal.getitimer(signal.ITIMER_PROF)[0]:
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)


def allow(size: int, anew: bool = False) -> None:
    """Let a process that reads take so many bytes more than it was allowed to, or, anew, than it has."""
    if signal.getitimer(signal.ITIMER_PROF)[0]:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if anew:
            soft = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[5])
        if soft != resource.RLIM_INFINITY:
            soft += size
            resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main(pipe: int, *columns: int) -> None:
    """The child's side. Descriptors of the pipe and of the files for the columns."""
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)  # a signal then, which ends it
    line = Connection(pipe)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # what the libraries print of a damaged file; all that counts goes through the pipe
    source, path, options, how = line.recv()
    try:
        files = {name: os.fdopen(descriptor, "wb") for name, descriptor in zip(COLUMNS, columns, strict=True)}
        with naming(path):
            answer = "ok", join(path, until_gone(line, source(path, **options)), files, **how)
    except EnvError as error:
        answer = "error", " ".join(str(error).splitlines())
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        line.send(answer)
    os._exit(0)  # nothing is left to save, and libraries that have met a damaged file may crash as they end


def until_gone(line: Connection, episodes: Iterable) -> Iterator:
    """The episodes, as long as there is somebody to read them for."""
    for episode in episodes:
        if line.poll():  # the parent says no more: its end is closed
            os._exit(1)
        alive()
        yield episode


def join(path: Path, episodes: Iterable[dict | None], files: dict, *, expected: dict, rotate: bool = False,
         image_size: int | None = None) -> dict[str, Any]:
    """Append the columns of all episodes to `files`, and return what there is to know about them.

    An episode is None, a failure, which is left out; or a dictionary of "state" (T, S), "action" (T, A), perhaps "objects"
    (T, objects, 3), "image": {camera: (T, H, W, 3)} or, already joined, (T, cameras, H, W, 3) with their names in "cameras",
    "instruction": a text, or one per row, and perhaps "attrs".
    """
    shapes: dict[str, tuple] = {}
    lengths, texts, attrs, failed = [], {}, {}, 0
    cameras: tuple[str, ...] | None = None
    for number, episode in enumerate(episodes):
        if episode is None:
            failed += 1
            continue
        for name, value in episode.get("attrs", {}).items():
            if attrs.setdefault(name, value) != value:
                raise EnvError(f"{path} mixes {name} {attrs[name]!r} and {value!r}")
            if name in expected and value not in (expected[name], expected[name].rpartition(":")[2]):  # it knows no module:Task-v1
                raise EnvError(f"{path} was made for {name} {value!r}, not {expected[name]!r}")
        which, T = f"of episode {number}", len(episode["action"])
        if not T:
            continue
        image, names = episode["image"], tuple(episode.get("cameras", episode["image"]))
        if (cameras := names if cameras is None else cameras) != names:
            raise EnvError(f"{path}: cameras {which} are {', '.join(names)}, before {', '.join(cameras)}")
        if isinstance(image, dict):
            image = _stack(path, which, T, image, rotate, image_size)
        told = episode["instruction"]
        told = [texts.setdefault(text, len(texts)) for text in ([told] * T if told is None or isinstance(told, str) else told)]
        rows = dict(episode, image=image, told=told)
        rows.setdefault("objects", np.zeros((T, 0, 3)))  # privileged: not in others' files
        for name, dtype in COLUMNS.items():
            value = np.asarray(rows[name], dtype)
            if len(value) != T:
                raise EnvError(f"{path}: {T} actions {which}, {len(value)} rows of {name}")
            if name in ("state", "action"):
                value = value.reshape(T, -1)  # LeRobot stores 1-dim vectors as numbers
            if value.shape[1:] != shapes.setdefault(name, value.shape[1:]):
                raise EnvError(f"{path}: {name} {which} has shape {value.shape[1:]}, before {shapes[name]}")
            if dtype == np.float32 and not np.isfinite(value).all():
                raise EnvError(f"{path}: {name} {which} holds NaN or infinity")
            try:
                files[name].write(np.ascontiguousarray(value).data)
                files[name].flush()
            except OSError as error:
                raise EnvError(f"no room in the folder for temporary files ({error.strerror}) for what is read of {path}: name a "
                               "larger one in the variable TMPDIR") from None
        lengths.append(T)
    if not lengths:
        raise EnvError(f"{path} holds no successful episode" + (f": all {failed} are marked as failures" if failed else ""))
    shapes = {name: (sum(lengths), *shape) for name, shape in shapes.items()}
    return dict(shapes=shapes, start=np.cumsum([0, *lengths[:-1]]), instructions=list(texts), cameras=cameras, attrs=attrs,
                failed=failed)


def _stack(path: Path, which: str, T: int, image: dict[str, np.ndarray], rotate: bool, size: int | None) -> np.ndarray:
    """Pictures of several cameras as one array (T, cameras, H, W, 3)."""
    if not image:
        return np.zeros((T, 0, 0, 0, 3), np.uint8)
    for name, images in image.items():
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise EnvError(f"{path}: pictures {which}, {name}, are {images.dtype} {images.shape}, not uint8 (T, H, W, 3): "
                           "choose other cameras")
        if len(images) != T:
            raise EnvError(f"{path}: {T} actions {which}, {len(images)} pictures of {name}")
    sizes = {images.shape[1:3] for images in image.values()}
    if len(sizes) > 1 and not size:
        raise EnvError(f"{path} has cameras of {' and '.join(map(str, sorted(sizes)))} pixels: give image_size")
    turned = (images[:, ::-1, ::-1] if rotate else images for images in image.values())
    return np.stack([fit(images, size, square=len(sizes) > 1) for images in turned], 1)


# ------------------------------------------------------------------------------------------------------------ files, paths and JSON


def regular(file: Path) -> Path:
    """The file, if it is one: to open a pipe may wait for ever, and a device may never end."""
    alive()
    with naming(file):
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise EnvError(f"{file} is not a file")
    return file


def inside(folder: Path, name: str, place: str) -> Path:
    """The file of that name in the folder. A link may lead elsewhere, as in the cache of a download: a name must not."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise EnvError(f"{place} leads out of the dataset's folder: {name!r}")
    return folder / name


def filled(folder: Path, template: str, place: str, **fields: int | str) -> Path:
    """The file in the folder that a template names, `{name}` and `{name:03d}` replaced. `str.format` would reach attributes."""
    pattern = re.compile(rf"\{{({'|'.join(fields)})(?::0?(\d)d)?\}}")
    if set("{}") & set(pattern.sub("", template)):
        raise EnvError(f"{place} may hold {', '.join(map('{{{}}}'.format, fields))} alone, not {template!r}")
    return inside(folder, pattern.sub(lambda match: str(fields[match[1]]).zfill(int(match[2] or 0)), template), place)


def load_json(file: Path) -> dict:
    with naming(file):
        if isinstance(content := json.loads(regular(file).read_text()), dict):
            return content
        raise EnvError(f"{file} holds no JSON object")


def entry(content: dict, name: str, kind: type | tuple[type, ...], place: str | Path, default: Any = ...) -> Any:
    """A value of a JSON object, which is of that kind, or the default where it is absent or null."""
    value = content.get(name)
    if value is None:
        if default is ...:
            raise EnvError(f"{place} lacks {name}")
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise EnvError(f"{place}: {name} must be {' or '.join(k.__name__ for k in kinds)}, not {value!r:.40}")
    return value


# --------------------------------------------------------------------------------------------------------------------------- HDF5


@contextlib.contextmanager
def hdf5(file: Path) -> Iterator[h5py.File]:
    with naming(file):
        allow(ROOM, anew=True)
        with h5py.File(regular(file)) as opened:
            yield opened


def has(group: h5py.Group, name: str) -> bool:
    """Whether the group holds that entry itself: a link may lead into another file."""
    link = group.get(name, getlink=True)
    if link is not None and not isinstance(link, h5py.HardLink):
        raise EnvError(f"{group.file.filename}: {group.name.rstrip('/')}/{name} is a link, which is not followed")
    return link is not None


def member(group: h5py.Group, name: str, advice: str = "") -> h5py.Group | h5py.Dataset:
    if not isinstance(group, h5py.Group):
        raise EnvError(f"{group.file.filename}: {group.name} is not a group{advice}")
    if not has(group, name):
        raise EnvError(f"{group.file.filename} lacks {group.name.rstrip('/')}/{name}{advice}")
    return group[name]


def members(group: h5py.Group, names: Iterable[str]) -> Iterator[tuple[str, h5py.Group | h5py.Dataset]]:
    """Name and member in turn: episodes, each of which has its own room in memory."""
    for name in names:
        allow(ROOM, anew=True)
        yield name, member(group, name)


def array(group: h5py.Group, name: str, advice: str = "") -> np.ndarray:
    """A dataset of numbers, which must not claim to be larger than what is stored of it."""
    alive()
    dataset = member(group, name, advice)
    place = f"{group.file.filename}: {group.name.rstrip('/')}/{name}"
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "biuf" or not dataset.shape:
        raise EnvError(f"{place} is not an array of numbers{advice}")
    if dataset.is_virtual or dataset.external:
        raise EnvError(f"{place} lies in another file, which is not opened")
    filters = dataset.chunks and dataset.id.get_create_plist().get_nfilters()
    stored, there = dataset.id.get_storage_size(), os.path.getsize(group.file.filename)
    size = max(math.prod(shape) for shape in (dataset.shape, dataset.chunks or ())) * dataset.dtype.itemsize
    if math.prod(dataset.shape) and (stored > there or size > stored * (PACKED if filters else 1)):
        raise EnvError(f"{place} claims {size / 1e6:.1f} MB, more than the file holds: it is damaged or incomplete")
    allow(4 * size)
    return dataset[()]


def arrays(group: h5py.Group) -> list[np.ndarray]:
    """All arrays below a group, in the order in which they were recorded."""
    if not isinstance(group, h5py.Group):
        raise EnvError(f"{group.file.filename}: {group.name} is not a group")
    inner = ((name, member(group, name)) for name in group)
    return [leaf for name, it in inner for leaf in (arrays(it) if isinstance(it, h5py.Group) else [array(group, name)])]


def numbered(names: Iterable[str], prefix: str) -> list[str]:
    """Those that are the prefix and a number, in the order of the numbers."""
    return sorted((n for n in names if re.fullmatch(rf"{prefix}\d{{1,18}}", n)), key=lambda n: int(n[len(prefix) :]))


def attribute(opened: h5py.HLObject, name: str) -> Any:
    """A number, a text or a tuple of texts; None where there is none, or something else."""
    value = opened.attrs.get(name)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return tuple(text for text in value if isinstance(text, str))
    value = value.item() if isinstance(value, np.generic) else value
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    return value if isinstance(value, (str, int, float)) else None


def pick(known: Sequence[str], chosen: Sequence[str] | None, place: str | Path) -> list[str]:
    """The chosen ones of the cameras that there are, or all of them: those that stand first, those on a wrist (left, right) then.

    A camera is chosen by its name or by the last part of it, which is what LeRobot's `observation.images.top` is called by.
    """
    if chosen is None:
        return sorted(known, key=place_of)
    found = [next((name for name in known if camera in (name, name.rpartition(".")[2])), None) for camera in chosen]
    if None in found:
        raise EnvError(f"{place} has the cameras {', '.join(known) or 'none'}, not {chosen[found.index(None)]}")
    return found


def place_of(camera: str) -> int:
    """Where a camera is by its name: 0 beside the robot, 1 on its (left) wrist, 2 on its right one: π0's order."""
    return 1 + ("right" in camera) if re.search("wrist|hand|gripper", camera.lower()) else 0
