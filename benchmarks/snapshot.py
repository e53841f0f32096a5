"""Times snapshots against copies of their file, and measures their memory: `python -m benchmarks.snapshot --help`."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from benchmarks import command
from benchmarks.command import Session, console
from benchmarks.parameter_lists import Shape, gpt2_small
from benchmarks.rounds import OURS, Entry, Work, compare, entry, fail, on_host, reason, take_turns
from benchmarks.tables import Columns, Page, Results

BACKENDS = {"torch": "torch", "keras": "tensorflow", "optax": "jax"}  # -> what holds the tensors
MOMENTS = {"adamp": 2, "sgdp": 1}
CACHES = ("warm", "cold")
REFERENCES = {"save": ("copy", "write"), "load": ("copy", "read")}
WORKS = ("copy", "write", "read", *REFERENCES)
LAYERS = 24
BLOCK = 1 << 20  # bytes that a copy moves at a time, as a snapshot does


def columns(run: Results, algorithm: str) -> Columns:
    """The columns of this benchmark: bytes per second, and the peak of memory above the model."""

    def peak(x: Results) -> str:
        return "" if x.get("peak_bytes") is None else f"{x['peak_bytes'] / run['largest_bytes']:.2f}"

    return [("GB/s", lambda x: f"{run['bytes'] / x['quartiles'][1] / 1e9:.2f}"), ("peak, tensors", peak)]


PAGE = Page(
    tool="snapshot",
    document="docs/benchmarks_snapshot.md",
    caption="Time of saving and loading a snapshot, relative to a copy of its file",
    measures=dict.fromkeys(MOMENTS, ("copy", "write", "read")),
    columns=columns,
)

_file = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--parameters", "counts", multiple=True, type=float, help="How many, roughly. Default: 1e8 and 1e9.")
@click.option("--backend", "backends", multiple=True, type=click.Choice(list(BACKENDS)), help="Default: all.")
@click.option("--algorithm", type=click.Choice(list(MOMENTS)), default="adamp", show_default=True)
@click.option("--cache", "caches", multiple=True, type=click.Choice(CACHES), help="Default: both, if memory suffices.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often each is timed.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False),
    help="On the disk to be measured, with room for the snapshot twice. Default: that of temporary files.",
)
@click.option("--json", "json_path", type=_file, help="Keep everything that was measured.")
@click.option("--markdown", "markdown_path", type=_file, help="A page with markers, to renew the tables between.")
@click.option("--plot", "plot_path", type=_file, help="Time over that of a copy, SVG or PNG.")
@click.option("--all", "everything", is_flag=True, help="All three files at their places in this repository.")
def main(
    counts: Sequence[float],
    backends: Sequence[str],
    algorithm: str,
    caches: Sequence[str],
    rounds: int,
    directory: str | None,
    everything: bool,
    **paths: Path | None,
) -> None:
    """Saves and loads a synthetic transformer of float32 in each backend, and copies its file, in turn.

    Each backend has a process of its own. Options repeat where they make a choice.
    """
    packages = [*BACKENDS.values(), "keras", "optax", "safetensors", "numpy", OURS]
    machine = command.environment("cpu", None, len(os.sched_getaffinity(0)), packages)
    session = Session(PAGE, machine, everything=everything, **paths)
    for count in counts or (1e8, 1e9):
        shapes = transformer(count)
        elements, largest = sum(map(math.prod, shapes)), 4 * max(map(math.prod, shapes))
        size = 4 * elements * (1 + MOMENTS[algorithm])
        for cache in caches or CACHES:
            model = f"{elements / 1e9:.3g} billion parameters, cache {cache}"
            # The model with a tensor and a gigabyte for the frameworks; a warm cache has the file, and what is written.
            needed = size + largest + (1 << 30) + (2 * size if cache == "warm" else 0)
            if needed > (free := _available()):
                session.skip(
                    model,
                    f"needs {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} are free",
                    "fewer --parameters",
                )
                continue
            entries: list[Entry] = []
            for backend in backends or BACKENDS:
                console.print(f"{model}, {backend} ...")
                entries += ask(backend, shapes, algorithm, cache == "warm", rounds, directory)
            compare(entries, {x["name"]: _measures(x["name"]) for x in entries})
            session.add(
                {
                    "model": model,
                    "dtype": "float32",
                    "tensors": len(shapes),
                    "elements": elements,
                    "bytes": size,
                    "largest_bytes": largest,
                    "rounds": rounds,
                    "contenders": entries,
                }
            )
    session.write()


def transformer(parameters: float, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """The shapes of GPT-2 with 24 layers, of the width at which it has so many parameters (a multiple of 8)."""
    of_width, of_square = vocabulary + context, 12 * LAYERS
    width = (math.sqrt(of_width**2 + 4 * of_square * parameters) - of_width) / (2 * of_square)
    return gpt2_small(max(8, round(width / 8) * 8), LAYERS, vocabulary, context)


def ask(
    backend: str, shapes: list[Shape], algorithm: str, warm: bool, rounds: int, directory: str | None
) -> list[Entry]:
    """Has a process of its own measure a backend.

    Args:
      backend: one of `BACKENDS`.
      shapes: of the parameters, as PyTorch has them.
      algorithm: "adamp" or "sgdp".
      warm: whether the operating system has the file in its cache.
      rounds: how often each is timed.
      directory: where the files go; None for that of temporary files.

    Returns:
      An entry for each of `WORKS`; all as failed if the process did not come to an end.
    """
    entries = [entry(f"{work}-{backend}", algorithm, OURS, BACKENDS[backend]) for work in WORKS]
    for kept in entries:
        kept["ours"] = _work(kept["name"]) in REFERENCES
    if entries[0]["status"] != "measured":
        return entries
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure, backend, shapes, entries, warm, rounds, directory).result()
        except Exception as error:  # among them BrokenProcessPool, where it was killed for memory
            for kept in entries:
                fail(kept, reason(error))
            return entries


def _work(name: str) -> str:
    return name.partition("-")[0]


def _measures(name: str) -> dict[str, str]:
    work, _, backend = name.partition("-")
    return {x: f"{x}-{backend}" for x in REFERENCES.get(work, ("copy",))}


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))


# --- in the process of a backend -------------------------------------------------------------------------------------

Make = Callable[[list[Shape], str], tuple[Callable[[Path], Any], Callable[[Path], Any]]]


def measure(
    backend: str, shapes: list[Shape], entries: list[Entry], warm: bool, rounds: int, directory: str | None
) -> list[Entry]:
    """Measures the memory of a second save and load, then the time of everything in further rounds.

    Args:
      backend, shapes, warm, rounds, directory: as for `ask`.
      entries: one for each of `WORKS`.

    Returns:
      The entries, with what was measured.
    """
    save, load = _MAKERS[backend](shapes, entries[0]["algorithm"])
    with tempfile.TemporaryDirectory(prefix="snapshot-", dir=directory) as folder:
        kept, saved, copied = (Path(folder, name) for name in ("kept", "saved", "copied"))
        buffer = memoryview(bytearray(os.urandom(BLOCK)))
        save(kept)
        load(kept)  # memory that is freed for the first time may stay with the allocator
        give_back()
        rest = anonymous()
        peaks = {}
        for name, work in {"save": partial(save, kept), "load": partial(load, kept)}.items():
            with peak_of_memory() as most:
                work()
            peaks[name] = max(0, most[0] - rest)
        works: dict[str, Work] = {
            "copy": lambda: copy(kept, copied, buffer),
            "write": lambda: write(copied, kept.stat().st_size, buffer),
            "read": lambda: read(kept, buffer),
            "save": lambda: save(saved),
            "load": lambda: load(kept),
        }

        def before() -> None:
            saved.unlink(missing_ok=True)
            copied.unlink(missing_ok=True)
            os.sync()
            if warm:
                read(kept, buffer)
            else:
                drop(kept)

        def start(kept_of: Entry) -> Work:
            work = _work(kept_of["name"])
            kept_of["peak_bytes"] = peaks.get(work)
            return works[work]

        take_turns(entries, start, rounds, on_host, before)
    return entries


def copy(source: Path, target: Path, buffer: memoryview) -> None:
    """Reads a file, writes its bytes to another and has them brought to the disk."""
    with open(source, "rb", buffering=0) as read_from, open(target, "xb", buffering=0) as file:
        while count := read_from.readinto(buffer):
            file.write(buffer[:count])
        os.fsync(file.fileno())


def write(target: Path, size: int, buffer: memoryview) -> None:
    """The half of a copy that writes."""
    with open(target, "xb", buffering=0) as file:
        while size > 0:
            size -= file.write(buffer[: min(size, len(buffer))])
        os.fsync(file.fileno())


def read(source: Path, buffer: memoryview) -> None:
    """The half of a copy that reads."""
    with open(source, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop(path: Path) -> None:
    """Has the operating system forget what it has read of a file, which is on the disk already."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def give_back() -> None:
    """Returns what nobody uses to the operating system, as far as the C library can (glibc)."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def anonymous() -> int:
    """Bytes of this process's memory that are no part of a file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))


@contextmanager
def peak_of_memory() -> Iterator[list[int]]:
    """A list whose only element becomes the most anonymous memory, in bytes, that a thread sees meanwhile."""
    most, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(5e-4):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


# --- models: every element is written, so that the memory is there ----------------------------------------------------


def _torch(shapes: list[Shape], algorithm: str) -> tuple[Callable[[Path], Any], Callable[[Path], Any]]:
    import torch

    from adamp_torch import SGDP, AdamP, load_snapshot, save_snapshot

    model = torch.nn.ParameterList([torch.nn.Parameter(torch.rand(shape)) for shape in shapes])
    kind: Any = AdamP if algorithm == "adamp" else SGDP
    optimizer = kind(model.named_parameters())
    for p in model:
        optimizer.state[p] = {"step": torch.tensor(1.0)} | {name: torch.rand_like(p) for name in kind.MOMENTS}
    return lambda path: save_snapshot(path, model, optimizer), lambda path: load_snapshot(path, model, optimizer)


def _keras(shapes: list[Shape], algorithm: str) -> tuple[Callable[[Path], Any], Callable[[Path], Any]]:
    os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"}
    import keras

    from adamp_tf import SGDP, AdamP, load_snapshot, save_snapshot

    class Weights(keras.layers.Layer):
        def build(self, _: Any) -> None:
            for i, shape in enumerate(shapes):
                self.add_weight(name=f"weight_{i}", shape=shape, initializer="zeros")

        def call(self, x: Any) -> Any:
            return x

    model = keras.Sequential([keras.Input((1,)), Weights()])
    model.compile(optimizer={"adamp": AdamP, "sgdp": SGDP}[algorithm](), loss="mse")
    model.optimizer.build(model.trainable_variables)
    for variable in (*model.variables, *model.optimizer.variables):
        if variable.ndim:
            variable.assign(keras.random.uniform(variable.shape))
    return lambda path: save_snapshot(path, model), lambda path: load_snapshot(path, model)


def _optax(shapes: list[Shape], algorithm: str) -> tuple[Callable[[Path], Any], Callable[[Path], Any]]:
    import jax

    from adamp_jax import adamp, load_snapshot, save_snapshot, sgdp
    from adamp_spec import AdamPHyper, SGDPHyper

    optimizer = adamp(1e-3) if algorithm == "adamp" else sgdp(1e-3)
    hyper = AdamPHyper(lr=1e-3) if algorithm == "adamp" else SGDPHyper(lr=1e-3)
    like = {f"weight_{i}": jax.ShapeDtypeStruct(shape, "float32") for i, shape in enumerate(shapes)}
    like_all = like, jax.eval_shape(optimizer.init, like)
    keys = iter(jax.random.split(jax.random.key(0), 4 * len(shapes)))
    held: list[Any] = [
        jax.tree.map(
            lambda x: jax.random.uniform(next(keys), x.shape) if x.ndim else jax.numpy.ones(x.shape, x.dtype), like_all
        )
    ]

    def load(path: Path) -> None:
        """Arrays of JAX cannot be overwritten: the old ones go first, and their shapes are enough to load new ones."""
        held.clear()
        restored = load_snapshot(path, *like_all)
        held.append(jax.block_until_ready((restored.params, restored.opt_state)))

    return lambda path: save_snapshot(path, held[0][0], held[0][1], hyper), load


_MAKERS: dict[str, Make] = {"torch": _torch, "keras": _keras, "optax": _optax}


if __name__ == "__main__":
    sys.exit(main())
