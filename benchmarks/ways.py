"""What the benchmarks of Optax and of Keras share: tensors as both lay them out, contenders, and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.parameter_lists import MODELS as ALL_MODELS
from benchmarks.parameter_lists import Shape
from benchmarks.rounds import OURS, Entry, entry
from benchmarks.tables import Columns, Results

# Those whose every matrix is a kernel: a list of shapes does not tell an embedding from one.
MODELS: dict[str, Callable[[], list[Shape]]] = {x: ALL_MODELS[x] for x in ("resnet50", "vit-b-16")}

# By algorithm: what ratios are of, in the same framework and way of execution, and then our own.
MEASURES = {"adamp": ("adamw", "lamb"), "sgdp": ("sgd",)}
OPTIMIZERS = {x: algorithm for algorithm, measures in MEASURES.items() for x in (*measures, algorithm)}

# A learning rate this small leaves the parameters, and with them every decision, as they are in any number of steps.
LEARNING_RATE, WEIGHT_DECAY, MOMENTUM = 1e-9, 0.01, 0.9

# A first step on these comes before the first that is timed: what a process does once is not the first contender's.
REHEARSAL: list[Shape] = [(3, 2), (3,)]

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Contender:
    """An optimizer, in one way of execution."""

    optimizer: str
    way: str

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.way}"

    @property
    def measures(self) -> dict[str, str]:
        """Heading -> name of what ratios are of."""
        return {x: Contender(x, self.way).name for x in MEASURES[OPTIMIZERS[self.optimizer]]}

    def entry(self, *packages: str) -> Entry:
        """What is kept of it; `packages` bring the optimizers that are not ours, and the way."""
        own = [OURS] if self.optimizer in MEASURES else []
        return entry(self.name, OPTIMIZERS[self.optimizer], *own, *packages) | asdict(self)


def contenders(ways: Iterable[str]) -> dict[str, Contender]:
    """All optimizers in each of some ways, by name."""
    return {x.name: x for way in ways for x in (Contender(optimizer, way) for optimizer in OPTIMIZERS)}


def channels_last(shapes: Iterable[Shape]) -> dict[str, Shape]:
    """Shapes of PyTorch's parameters as Keras and Flax have them, by a path that tells the optimizers their layout.

    Kernels get their channel axis behind the others, (in, out) and (height, width, in, out). Class tokens and
    positional embeddings stay (1, n, width), and are called embeddings: one row each.
    """
    found = {}
    for i, shape in enumerate(shapes):
        kind = {2: "kernel", 3: "embeddings", 4: "kernel"}.get(len(shape), "bias")
        found[f"layer_{i}/{kind}"] = (*shape[2:], shape[1], shape[0]) if kind == "kernel" else shape
    return found


def make_arrays(shapes: Iterable[Shape]) -> tuple[Arrays, Arrays]:
    """Random parameters and gradients, by path; in every other tensor of rank 2 and more orthogonal in each row."""
    generator = np.random.default_rng(0)
    params, grads = {}, {}
    for i, (path, shape) in enumerate(channels_last(shapes).items()):
        p, g = (generator.standard_normal(shape, np.float32) for _ in range(2))
        if len(shape) > 1 and i % 2 == 0:
            rows = tuple(range(len(shape)))[: -1 if path.endswith("kernel") else None]
            g -= p * ((g * p).sum(rows, keepdims=True) / (p * p).sum(rows, keepdims=True))
        params[path], grads[path] = p, g
    return params, grads


def compiled_costs(compiled: Any, elements: int) -> dict[str, float]:
    """What XLA says of a program that JAX has compiled, bytes accessed in units of a float32 for each element."""
    return {
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "accesses": compiled.cost_analysis()["bytes accessed"] / elements / 4,
        "fusions": compiled.as_text().count(" fusion("),
    }


def columns(run: Results, algorithm: str) -> Columns:
    """Columns of the first step, and of what XLA says where it says it."""
    plain = MEASURES[algorithm][0]
    firsts = {x["name"]: x.get("first_seconds") for x in run["contenders"]}

    def over_plain(x: Results) -> str:
        first = firsts.get(Contender(plain, x["way"]).name)
        return f"{x['first_seconds'] / first:.2f}" if first else ""

    shown: Columns = [("first step, s", lambda x: f"{x['first_seconds']:.2f}"), (f"first / {plain}", over_plain)]
    if any("fusions" in x for x in run["contenders"]):
        shown += [
            ("temporary MiB", lambda x: f"{x['temporary_bytes'] / 2**20:.0f}" if "fusions" in x else ""),
            ("accesses", lambda x: f"{x['accesses']:.1f}" if "fusions" in x else ""),
            ("fusions", lambda x: str(x["fusions"]) if "fusions" in x else ""),
        ]
    return shown


def run_of(model: str, shapes: list[Shape], rounds: int, entries: list[Entry]) -> Results:
    """What the JSON file holds of a run."""
    return {
        "model": model,
        "dtype": "float32",
        "tensors": len(shapes),
        "elements": sum(int(np.prod(shape)) for shape in shapes),
        "rounds": rounds,
        "contenders": entries,
    }
