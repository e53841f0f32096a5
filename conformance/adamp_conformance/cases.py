"""The designed cases: each tensor is built for a purpose, and the purpose names the mistakes that it catches.

A case is one set of hyperparameters and a handful of tensors, so that a compiled implementation compiles
once for all of them. Data come from the raw bits of a generator, the same on every platform.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adamp_conformance.adapter import DTYPES, MOMENTS, Parameter, State
from adamp_spec import Layout, Rows

SEVERAL_STEPS = ("shadow", "resume", "purity", "transplant")
EXACT = "comparison"  # the flag of tensors whose decision involves exact arithmetic only

# (random, p) -> g, both arrays of shape (slices, rows, row length) in float64
Gradient = Callable[["Random", np.ndarray], np.ndarray]


class Random:
    """Numbers in [-1, 1) from the raw bits of PCG64, whose stream NumPy guarantees."""

    def __init__(self, name: str) -> None:
        self.bits = np.random.PCG64(zlib.crc32(name.encode()))

    def uniform(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        raw = np.asarray(self.bits.random_raw(count), np.uint64).reshape(shape)
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


@dataclass(frozen=True)
class Tensor:
    """One tensor of a case.

    Attributes:
      purpose: what it is for, in words; `clauses` are the labels it tests, `flags` the mistakes that it is for
        (tables of `spec/mutants.toml`).
      shape, layout: physical.
      gradient: makes the gradient from the parameter, both seen as (slices, rows, row length).
      weight: makes the parameter out of one that is uniform in [-1, 1), the default.
      moment: makes the first moment before the step from the parameter; small noise by default.
      twin: another tensor of the case and a permutation of axes; this one holds the same numbers, transposed.
      undecided: within rounding of a threshold on purpose.
    """

    purpose: str
    clauses: tuple[str, ...]
    shape: tuple[int, ...]
    gradient: Gradient
    layout: Layout = Layout()  # noqa: RUF009 - frozen
    weight: Gradient | None = None
    moment: Gradient | None = None
    flags: tuple[str, ...] = ()
    twin: tuple[str, tuple[int, ...]] | None = None
    undecided: bool = False

    @property
    def exact(self) -> bool:
        """Whether the decision involves exact arithmetic only, so that it is decided on the threshold too."""
        return EXACT in self.flags


@dataclass(frozen=True)
class Case:
    """A problem to put to every implementation.

    Attributes:
      id: permanent name.
      algorithm: `adamp` or `sgdp`.
      hyper: hyperparameters that differ from the defaults.
      tensors: name -> tensor.
      step: steps taken before the case; above 0 the moments start filled.
      steps: steps to take.
      folder: where under `spec/vectors` the case is frozen, one vector per tensor; None where it is not.
      modes: the modes, besides judging its frozen vectors, that the case is run in.
      dtypes: the types that it is run in.
      labels, flags: clauses and mistakes that the case as a whole tests, besides those of its tensors.
    """

    id: str
    algorithm: str
    hyper: dict[str, Any]
    tensors: dict[str, Tensor]
    step: int = 0
    steps: int = 1
    folder: str | None = "core"
    modes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)
    labels: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def clauses(self) -> tuple[str, ...]:
        """Labels of SPEC.md that the case tests."""
        return tuple(sorted({*self.labels, *(clause for tensor in self.tensors.values() for clause in tensor.clauses)}))

    @property
    def exact(self) -> frozenset[str]:
        return frozenset(name for name, tensor in self.tensors.items() if tensor.exact)

    def layouts(self, weights: str) -> dict[str, Layout]:
        """The layout of each parameter as stored by a framework with such `weights`."""
        return {name: tensor.layout for name, tensor in self.tensors.items()}

    def parameters(self, dtype: str, weights: str) -> dict[str, Parameter]:
        """The initial parameters, as `Adapter.create` takes them."""
        return {name: Parameter(self._weight(name, dtype), tensor.layout) for name, tensor in self.tensors.items()}

    def initial(self, dtype: str, weights: str) -> State:
        """The state before the first step."""
        values = {name: parameter.value for name, parameter in self.parameters(dtype, weights).items()}
        return State(
            self.step, values, {moment: self._moments(moment, dtype, values) for moment in MOMENTS[self.algorithm]}
        )

    def gradients(self, index: int, parameters: Mapping[str, np.ndarray], weights: str) -> dict[str, np.ndarray]:
        """The gradients of step `index`, made for the parameters as they are then."""
        return {
            name: self._from_parameter(name, f"g{index}", lambda tensor: tensor.gradient, value)
            for name, value in parameters.items()
        }

    def carry(self, state: State, source: str, target: str) -> State:
        """A state as a framework with `target` weights holds it."""
        return state

    def _weight(self, name: str, dtype: str) -> np.ndarray:
        tensor, twin = self.tensors[name], self.tensors[name].twin
        if twin:
            return np.transpose(self._weight(twin[0], dtype), twin[1]).copy()
        rows = tensor.layout.rows(tensor.shape)
        random = Random(f"{self.id}/{name}/p")
        cells = random.uniform(*_cells(rows))
        cells = cells if tensor.weight is None else tensor.weight(random, cells)
        return _physical(cells, rows, tensor.shape).astype(DTYPES[dtype])

    def _moments(self, moment: str, dtype: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.step == 0:
            return {name: np.zeros_like(x) for name, x in values.items()}
        return {name: self._from_parameter(name, moment, _MOMENTS[moment], value) for name, value in values.items()}

    def _from_parameter(
        self, name: str, stream: str, recipe: Callable[[Tensor], Gradient], value: np.ndarray
    ) -> np.ndarray:
        """A gradient or a moment of the parameter `value`."""
        tensor, twin = self.tensors[name], self.tensors[name].twin
        if twin:
            there = np.transpose(value, np.argsort(twin[1]))
            return np.transpose(self._from_parameter(twin[0], stream, recipe, there), twin[1]).copy()
        rows = tensor.layout.rows(value.shape)
        make = recipe(tensor)
        cells = make(Random(f"{self.id}/{name}/{stream}"), _logical(value.astype(np.float64), rows))
        return _physical(cells, rows, value.shape).astype(value.dtype)


def _order(rows: Rows) -> tuple[int, ...]:
    return rows.batch + rows.channel + rows.row


def _cells(rows: Rows) -> tuple[int, int, int]:
    """(slices, rows per slice, row length)."""
    return int(np.prod([rows.shape[axis] for axis in rows.batch], dtype=int)), rows.count, rows.length


def _logical(x: np.ndarray, rows: Rows) -> np.ndarray:
    return x.reshape(rows.shape).transpose(_order(rows)).reshape(_cells(rows))


def _physical(cells: np.ndarray, rows: Rows, shape: tuple[int, ...]) -> np.ndarray:
    order = _order(rows)
    permuted = cells.reshape([rows.shape[axis] for axis in order])
    return permuted.transpose(np.argsort(order)).reshape(shape)


# Gradients. In the comments, "cosine" is between gradient and parameter.


def noise(random: Random, p: np.ndarray) -> np.ndarray:
    return random.uniform(*p.shape)


def scaled(scale: float, make: Gradient = noise) -> Gradient:
    return lambda random, p: scale * make(random, p)


def nothing(random: Random, p: np.ndarray) -> np.ndarray:
    return np.zeros_like(p)


def parallel(random: Random, p: np.ndarray) -> np.ndarray:
    return p.copy()


def cosines(*wanted: float) -> Gradient:
    """Rows with the given cosines, repeated in turn; row norms differ."""

    def make(random: Random, p: np.ndarray) -> np.ndarray:
        cosine = np.resize(np.asarray(wanted), p.shape[1])[None, :, None]
        unit = p / np.maximum(_norm(p), 1e-300)  # a zero row has no direction
        across = random.uniform(*p.shape)
        across -= unit * np.sum(across * unit, axis=2, keepdims=True)
        across /= np.maximum(_norm(across), 1e-300)  # rows of one element have no other direction
        size = 2.0 + random.uniform(p.shape[0], p.shape[1], 1)
        return size * (cosine * unit + np.sqrt(1 - cosine**2) * across)

    return make


def threshold_multiples(*multiples: float) -> Gradient:
    """Rows with cosines that are multiples of the channel threshold for delta = 0.1."""
    return lambda random, p: cosines(*(x * 0.1 / np.sqrt(p.shape[2]) for x in multiples))(random, p)


orthogonal_rows = threshold_multiples(0.3, -0.3, 0.1)
oblique_rows = cosines(0.5)


def orthogonal_layer(random: Random, p: np.ndarray) -> np.ndarray:
    """No row is orthogonal, all of them together are."""
    g = cosines(0.5, -0.5)(random, p)
    for slice_g, slice_p in zip(g, p, strict=True):
        dots = np.sum(slice_g * slice_p, axis=1)
        slice_g[dots < 0] *= np.sum(dots[dots > 0]) / -np.sum(dots[dots < 0])
    return g


def layer_at(delta: float) -> Gradient:
    """Rows with cosines around 0.5 and -0.5; the cosine of the whole is the layer's threshold for `delta`."""

    def make(random: Random, p: np.ndarray) -> np.ndarray:
        g = orthogonal_layer(random, p)
        cosine = delta / np.sqrt(p[0].size)
        sizes = [np.sqrt(np.sum(x * x, axis=(1, 2), keepdims=True)) for x in (g, p)]
        return g + cosine / np.sqrt(1 - cosine**2) * sizes[0] / sizes[1] * p

    return make


def per_slice(*makes: Gradient) -> Gradient:
    """Another gradient for each slice, in turn."""

    def make(random: Random, p: np.ndarray) -> np.ndarray:
        return np.concatenate([makes[i % len(makes)](random, p[i : i + 1]) for i in range(p.shape[0])])

    return make


def with_element(value: float, make: Gradient) -> Gradient:
    """One element replaced."""

    def changed(random: Random, p: np.ndarray) -> np.ndarray:
        g = make(random, p)
        g[0, 0, 0] = value
        return g

    return changed


def first_row_times(factor: float, make: Gradient) -> Gradient:
    def changed(random: Random, p: np.ndarray) -> np.ndarray:
        g = make(random, p)
        g[:, 0] *= factor
        return g

    return changed


def _norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(x * x, axis=2, keepdims=True))


def norm_16(random: Random, p: np.ndarray) -> np.ndarray:
    """Rows of sixteen integers, the first of them 1, whose squares sum to 256: every operation is exact."""
    return np.broadcast_to([1.0] + [5.0] * 4 + [3.0] * 3 + [4.0] * 8, p.shape).copy()


def first_unit_vector(random: Random, p: np.ndarray) -> np.ndarray:
    """Rows (1, 0, 0, ...): the cosine with `norm_16` is 1/16, the channel threshold for delta = 0.25."""
    return np.broadcast_to(np.arange(p.shape[2]) == 0, p.shape).astype(np.float64)


_MOMENTS: dict[str, Callable[[Tensor], Gradient]] = {
    "m": lambda tensor: tensor.moment or scaled(0.5),
    "v": lambda tensor: lambda random, p: 0.5 + 0.25 * random.uniform(*p.shape),
}

CHANNEL, LAYER, NONE = (
    ("PROJ-1", "PROJ-2", "PROJ-5", "PROJ-6", "PROJ-7"),
    ("PROJ-1", "PROJ-3", "PROJ-4", "PROJ-5", "PROJ-6", "PROJ-7"),
    ("PROJ-2", "PROJ-3", "PROJ-7"),
)

VIEWS = {
    "channel": Tensor(
        "every row is orthogonal: the channel view projects",
        CHANNEL,
        (4, 8),
        orthogonal_rows,
        flags=("projection", "view-choice", "decay-ratio"),
    ),
    "layer": Tensor(
        "only the whole is orthogonal: the layer view projects",
        LAYER,
        (4, 8),
        orthogonal_layer,
        flags=("projection", "view-choice", "decay-ratio"),
    ),
    "none": Tensor(
        "nothing is orthogonal: no projection, full decay",
        NONE,
        (4, 8),
        oblique_rows,
        flags=("view-choice", "decay-ratio"),
    ),
    "antiparallel": Tensor(
        "a cosine has no sign: no projection", ("PROJ-1",), (4, 8), cosines(-0.5), flags=("cosine",)
    ),
    "maximum": Tensor(
        "one row in four is above the threshold, the mean is below: catches a mean for the maximum",
        ("PROJ-2",),
        (4, 8),
        threshold_multiples(2.0, 0.1, 0.1, 0.1),
        flags=("row-reduction",),
    ),
    "last-row": Tensor(
        "only the last row is above the threshold: every row counts",
        ("PROJ-2",),
        (4, 8),
        threshold_multiples(0.1, 0.1, 0.1, 8.0),
        flags=("row-reduction",),
    ),
    "radial-momentum": Tensor(
        "gradient orthogonal, momentum parallel: catches a test of the update instead of the gradient",
        ("PROJ-1",),
        (4, 8),
        orthogonal_rows,
        moment=parallel,
        flags=("tested-vector",),
    ),
    "radial-gradient": Tensor(
        "gradient parallel, momentum orthogonal: catches the same from the other side",
        ("PROJ-1",),
        (4, 8),
        parallel,
        moment=scaled(4.0, orthogonal_rows),
        flags=("tested-vector",),
    ),
    "loud": Tensor(
        "a large gradient, orthogonal: the cosine is free of scale",
        ("PROJ-1",),
        (4, 8),
        scaled(1e3, orthogonal_rows),
        flags=("cosine",),
    ),
    "quiet": Tensor(
        "a small gradient, oblique: the cosine is free of scale",
        ("PROJ-1",),
        (4, 8),
        scaled(1e-3, oblique_rows),
        flags=("cosine",),
    ),
    "heavy": Tensor(
        "a large weight, orthogonal: the cosine is free of scale",
        ("PROJ-1",),
        (4, 8),
        orthogonal_rows,
        weight=scaled(1e3, parallel),
        flags=("cosine",),
    ),
    "light": Tensor(
        "a small weight, oblique: the cosine is free of scale",
        ("PROJ-1",),
        (4, 8),
        oblique_rows,
        weight=scaled(1e-3, parallel),
        flags=("cosine",),
    ),
    "scalar": Tensor("rank 0 is never projected", ("LAYOUT-4",), (), nothing, flags=("vectors",)),
    "vector": Tensor(
        "rank 1 is never projected, not even where the gradient is zero",
        ("LAYOUT-4",),
        (8,),
        nothing,
        flags=("vectors",),
    ),
}

SHAPES = {
    "kernel-3d": Tensor("rank 3, rows are dim 0", ("LAYOUT-1",), (4, 3, 5), orthogonal_rows, flags=("channel-axis",)),
    "kernel-4d": Tensor(
        "a convolution kernel as PyTorch stores it: OIHW, rows are dim 0",
        ("LAYOUT-1",),
        (4, 3, 2, 3),
        orthogonal_rows,
        flags=("channel-axis",),
    ),
    "kernel-4d-hwio": Tensor(
        "the same kernel as Keras and Flax store it: HWIO, rows are the last axis",
        ("LAYOUT-1",),
        (2, 3, 3, 4),
        orthogonal_rows,
        Layout(-1),
        flags=("channel-axis",),
        twin=("kernel-4d", (2, 3, 1, 0)),
    ),
    "kernel-maximum": Tensor(
        "one row in four is above the threshold, the mean is below",
        ("PROJ-2",),
        (4, 3, 2, 3),
        threshold_multiples(2.0, 0.1, 0.1, 0.1),
        flags=("row-reduction",),
    ),
    "kernel-last-row": Tensor(
        "only the last row is above the threshold",
        ("PROJ-2",),
        (4, 3, 2, 3),
        threshold_multiples(0.1, 0.1, 0.1, 8.0),
        flags=("row-reduction",),
    ),
    "kernel-5d": Tensor(
        "rank 5, layer view", ("LAYOUT-1",), (4, 2, 2, 2, 2), orthogonal_layer, flags=("channel-axis",)
    ),
    "kernel-layer": Tensor(
        "a convolution kernel that only the layer view projects: OIHW",
        ("LAYOUT-1",),
        (4, 3, 2, 3),
        orthogonal_layer,
        flags=("channel-axis",),
    ),
    "kernel-layer-hwio": Tensor(
        "the same kernel: HWIO",
        ("LAYOUT-1",),
        (2, 3, 3, 4),
        orthogonal_layer,
        Layout(-1),
        flags=("channel-axis",),
        twin=("kernel-layer", (2, 3, 1, 0)),
    ),
    "dense": Tensor(
        "a dense kernel as PyTorch stores it: (out, in)",
        ("LAYOUT-1",),
        (5, 8),
        orthogonal_rows,
        flags=("channel-axis",),
    ),
    "dense-transposed": Tensor(
        "the same kernel as Keras and Flax store it: (in, out)",
        ("LAYOUT-1",),
        (8, 5),
        orthogonal_rows,
        Layout(-1),
        flags=("channel-axis",),
        twin=("dense", (1, 0)),
    ),
    "two-channel-axes": Tensor(
        "attention kernel (in, heads, head_dim)",
        ("LAYOUT-1",),
        (8, 3, 4),
        orthogonal_rows,
        Layout((1, 2)),
        flags=("channel-axis",),
    ),
    "outer-channel-axes": Tensor(
        "channel axes around the row axis",
        ("LAYOUT-1",),
        (3, 8, 2),
        orthogonal_rows,
        Layout((0, -1)),
        flags=("channel-axis",),
    ),
    "batch": Tensor(
        "a stack of three layers: each decides alone",
        ("LAYOUT-2",),
        (3, 4, 8),
        per_slice(orthogonal_rows, oblique_rows, orthogonal_layer),
        Layout(1, batch=0),
        flags=("batch-axis",),
    ),
    "batch-threshold": Tensor(
        "between the layer thresholds of a slice and of the whole tensor",
        ("PROJ-3", "LAYOUT-2"),
        (4, 4, 8),
        layer_at(0.07),
        Layout(1, batch=0),
        flags=("batch-axis", "threshold"),
    ),
    "batch-row-threshold": Tensor(
        "rows at 0.7 of their threshold: the number of slices does not enter",
        ("PROJ-2", "LAYOUT-2"),
        (4, 4, 8),
        threshold_multiples(0.7),
        Layout(1, batch=0),
        flags=("batch-axis", "threshold"),
    ),
    "batch-last": Tensor(
        "slices along the last axis",
        ("LAYOUT-2",),
        (8, 4, 2),
        per_slice(oblique_rows, orthogonal_rows),
        Layout(1, batch=-1),
        flags=("batch-axis",),
    ),
    "batch-of-vectors": Tensor(
        "a stack of vectors, each orthogonal to its gradient, is not projected",
        ("LAYOUT-2", "LAYOUT-4"),
        (3, 8),
        orthogonal_layer,
        Layout(1, batch=0),
        flags=("vectors",),
    ),
    "batch-of-frozen-vectors": Tensor(
        "a stack of vectors without gradient is not projected",
        ("LAYOUT-2", "LAYOUT-4"),
        (3, 8),
        nothing,
        Layout(1, batch=0),
        flags=("vectors",),
    ),
    "view": Tensor(
        "a fused query-key-value weight, each third decides alone",
        ("LAYOUT-3",),
        (12, 8),
        per_slice(orthogonal_layer, orthogonal_rows, oblique_rows),
        Layout(1, batch=0, view=(3, 4, 8)),
        flags=("view",),
    ),
    "view-rows": Tensor(
        "a view that splits the rows of the stored shape",
        ("LAYOUT-3",),
        (2, 16),
        orthogonal_rows,
        Layout(0, view=(4, 8)),
        flags=("view",),
    ),
    "exempt": Tensor("a bias of rank 2, exempted", ("LAYOUT-5",), (4, 8), nothing, Layout(None), flags=("exemption",)),
    "exempt-orthogonal": Tensor(
        "an exempted kernel with orthogonal rows",
        ("LAYOUT-5",),
        (4, 8),
        orthogonal_rows,
        Layout(None),
        flags=("exemption",),
    ),
    "row-1": Tensor(
        "rows of one element: only the layer view can pass",
        ("PROJ-1", "PROJ-3"),
        (16, 1),
        orthogonal_layer,
        flags=("view-choice",),
    ),
    "row-2": Tensor("rows of two elements", ("PROJ-1",), (4, 2), orthogonal_rows, flags=("threshold",)),
    "row-3": Tensor(
        "rows of three elements, 0.93 of their threshold: catches a length that is one off",
        ("PROJ-2",),
        (5, 3),
        threshold_multiples(0.93),
        flags=("threshold",),
    ),
    "one-row": Tensor("one row: both views are the same", ("PROJ-4",), (1, 32), orthogonal_rows, flags=("projection",)),
    "short-rows": Tensor(
        "many short rows, 0.9 of the channel threshold: far above the threshold of the whole",
        ("PROJ-2",),
        (16, 2),
        threshold_multiples(0.9),
        flags=("threshold", "view-choice"),
    ),
    "layer-threshold": Tensor(
        "many short rows, the whole at 0.7 of its threshold",
        ("PROJ-3",),
        (16, 2),
        layer_at(0.07),
        flags=("threshold",),
    ),
    "above-layer-threshold": Tensor(
        "many short rows, the whole at twice its threshold but below the channel's",
        ("PROJ-3",),
        (16, 2),
        layer_at(0.2),
        flags=("threshold",),
    ),
}

LONG_ROWS = {
    "row-2048": Tensor(
        "long rows: the length of the sums and of the threshold",
        ("PROJ-2", "PREC-4"),
        (2, 2048),
        orthogonal_rows,
        flags=("sums",),
    ),
    "row-2048-none": Tensor(
        "long rows, 3 times the threshold",
        ("PROJ-2", "PREC-4"),
        (2, 2048),
        threshold_multiples(3.0),
        flags=("threshold",),
    ),
}

EMPTY = {
    "empty-rows": Tensor("no rows: nothing to do", ("EDGE-3",), (0, 4), noise, flags=("empty",)),
    "empty-columns": Tensor("rows without elements: nothing to do", ("EDGE-3",), (4, 0), noise, flags=("empty",)),
    "empty-stack": Tensor(
        "a stack of no layers: nothing to do",
        ("EDGE-3", "LAYOUT-2"),
        (0, 4, 8),
        noise,
        Layout(1, batch=0),
        flags=("empty",),
    ),
    "empty-vector": Tensor("a vector without elements: nothing to do", ("EDGE-3",), (0,), noise, flags=("empty",)),
}

ZEROS = {
    "zero-gradient": Tensor(
        "cosine 0: the channel view projects, decay is small", ("EDGE-1",), (4, 8), nothing, flags=("zeros",)
    ),
    "zero-parameter": Tensor(
        "cosine 0 and nothing to remove", ("EDGE-1",), (4, 8), noise, weight=nothing, flags=("zeros",)
    ),
    "zero-row": Tensor(
        "one zero gradient row among orthogonal ones",
        ("EDGE-1",),
        (4, 8),
        first_row_times(0.0, orthogonal_rows),
        flags=("zeros",),
    ),
    "zero-parameter-row": Tensor(
        "one zero row in the parameter, the others orthogonal to the gradient",
        ("EDGE-1",),
        (4, 8),
        orthogonal_rows,
        weight=first_row_times(0.0, parallel),
        flags=("zeros",),
    ),
    "zero-both": Tensor(
        "nothing at all", ("EDGE-1",), (4, 8), nothing, weight=nothing, moment=nothing, flags=("zeros",)
    ),
}

NON_FINITE = {
    "nan-gradient": Tensor(
        "a NaN stays in its element, and nothing projects",
        ("EDGE-2",),
        (4, 8),
        with_element(np.nan, orthogonal_rows),
        flags=("non-finite",),
    ),
    "inf-gradient": Tensor(
        "so does an infinity", ("EDGE-2",), (4, 8), with_element(np.inf, orthogonal_rows), flags=("non-finite",)
    ),
    "nan-parameter": Tensor(
        "a NaN weight stays in its element",
        ("EDGE-2",),
        (4, 8),
        noise,
        weight=with_element(np.nan, parallel),
        flags=("non-finite",),
    ),
    "inf-parameter": Tensor(
        "so does an infinite weight",
        ("EDGE-2",),
        (4, 8),
        noise,
        weight=with_element(np.inf, parallel),
        flags=("non-finite",),
    ),
    "nan-moment": Tensor(
        "a NaN in the moment, the gradient orthogonal: the projection spreads it over its row, not further",
        ("EDGE-2",),
        (4, 8),
        orthogonal_rows,
        moment=with_element(np.nan, noise),
        flags=("non-finite",),
    ),
    "inf-vector": Tensor(
        "an infinity in a tensor without rows", ("EDGE-2",), (8,), with_element(np.inf, noise), flags=("non-finite",)
    ),
    "nan-vector": Tensor(
        "and a NaN in a tensor without rows", ("EDGE-2",), (8,), with_element(np.nan, noise), flags=("non-finite",)
    ),
}

# Small weights and gradients: subnormal in float16, and in float32 and bfloat16, where they may count as zero.
UNDERFLOW = {
    f"{what}-{size}": Tensor(
        f"{purpose} of {scale:g}",
        ("PREC-5",),
        (4, 8),
        scaled(scale),
        weight=scaled(scale, parallel) if what == "both" else None,
        moment=scaled(scale),
        flags=("underflow",),
    )
    for size, scale in (("half", 4e-6), ("single", 4e-39))
    for what, purpose in (("gradient", "gradient and momentum"), ("both", "gradient, momentum and weight"))
}

# For eps = 1e-4: norms around eps tell where eps stands in the cosine.
COSINE_EPS = {
    "tiny-parallel": Tensor(
        "parallel rows of norm 5 eps have cosine 1: catches a clamp of the product of the norms",
        ("PROJ-1",),
        (4, 8),
        parallel,
        weight=scaled(3e-4, parallel),
        flags=("cosine-eps",),
    ),
    "below-eps": Tensor(
        "parallel rows below eps count as orthogonal",
        ("PROJ-1",),
        (4, 8),
        parallel,
        weight=scaled(4e-6, parallel),
        flags=("cosine-eps",),
    ),
    "near-eps": Tensor(
        "1.1 times the threshold at norms of 10 eps: catches an eps added to the norms",
        ("PROJ-1",),
        (4, 8),
        scaled(4e-4, threshold_multiples(1.1)),
        weight=scaled(4e-4, parallel),
        flags=("cosine-eps",),
    ),
    "unit-vector-eps": Tensor(
        "projection of rows of norm eps: the eps in the unit vector counts",
        ("PROJ-5",),
        (4, 8),
        orthogonal_rows,
        weight=scaled(4e-5, parallel),
        flags=("radial-eps",),
    ),
    "unit-vector-eps-layer": Tensor(
        "the same in the layer view",
        ("PROJ-5",),
        (4, 8),
        orthogonal_layer,
        weight=scaled(2e-5, parallel),
        flags=("radial-eps",),
    ),
}

# For delta = 0.25.
THRESHOLD = {
    "on-threshold": Tensor(
        "the cosine equals the channel threshold exactly: catches <= for <",
        ("PROJ-2",),
        (4, 16),
        norm_16,
        weight=first_unit_vector,
        flags=(EXACT,),
    ),
    "on-both": Tensor(
        "one row: equals both thresholds",
        ("PROJ-2", "PROJ-3"),
        (1, 16),
        norm_16,
        weight=first_unit_vector,
        flags=(EXACT,),
    ),
    "below": Tensor("0.9 of the threshold", ("PROJ-2",), (4, 8), threshold_multiples(2.25), flags=("threshold",)),
    "above": Tensor(
        "1.1 of the threshold", ("PROJ-1", "PROJ-2"), (4, 8), threshold_multiples(2.75), flags=("threshold", "cosine")
    ),
}

# For delta = 0.25 too: rounding may take the tests either way.
UNDECIDED = {
    "channel": Tensor(
        "within rounding of the channel threshold: either whole outcome is legal",
        ("PREC-8",),
        (4, 8),
        threshold_multiples(2.5, 0.1),
        undecided=True,
    ),
    "layer": Tensor("within rounding of the layer threshold", ("PREC-8",), (4, 8), layer_at(0.25), undecided=True),
    "both": Tensor(
        "one row within rounding of the thresholds of both views",
        ("PREC-8",),
        (1, 8),
        threshold_multiples(2.5),
        undecided=True,
    ),
    "one-slice": Tensor(
        "only the first of two slices is undecided",
        ("PREC-8", "LAYOUT-2"),
        (2, 4, 8),
        per_slice(threshold_multiples(2.5, 0.1), oblique_rows),
        Layout(1, batch=0),
        undecided=True,
    ),
}

# What the plainest case of each algorithm is for, whatever the branch.
_ADAMP_FLAGS = (
    "first-moment",
    "second-moment",
    "adamp-nesterov",
    "bias-correction",
    "momentum-buffer",
    "rounding",
    "step-size",
    "weight-decay",
    "working-type",
)
_SGDP_FLAGS = (
    "momentum",
    "momentum-buffer",
    "rounding",
    "sgdp-decay",
    "sgdp-nesterov",
    "step-size",
    "weight-decay",
    "working-type",
)

ESSENTIALS = {name: VIEWS[name] for name in ("channel", "layer", "none", "vector")}

SMALL_GRADIENTS = {
    name: Tensor(
        "gradients of the size of eps tell where eps stands in the denominator",
        ("ADAMP-4",),
        (4, 8),
        scaled(5e-5, make),
        flags=("denominator-eps",),
    )
    for name, make in (("small-channel", orthogonal_rows), ("small-none", oblique_rows))
}

# The projection of a heavy momentum on a light parameter: <u, q> u is finite, <p, q> / |p|^2 is not.
HEAVY = {
    "heavy-momentum": Tensor(
        "momentum 1e36, rows of norm 1e-8: the coefficient <p, q> / |p|^2 would overflow, the update does not",
        ("PROJ-5", "PROJ-6"),
        (4, 8),
        scaled(1e-8, orthogonal_rows),
        weight=scaled(5e-9, parallel),
        moment=scaled(1e44, parallel),
        flags=("overflow",),
    ),
    "heavy-momentum-layer": Tensor(
        "the same in the layer view",
        ("PROJ-5", "PROJ-6"),
        (4, 8),
        scaled(1e-8, orthogonal_layer),
        weight=scaled(5e-9, parallel),
        moment=scaled(1e44, parallel),
        flags=("overflow",),
    ),
}


def _trajectory(*makes: Gradient) -> dict[str, Tensor]:
    return {
        "kernel": Tensor("a convolution kernel", ("STATE-1",), (3, 3, 4, 8), makes[0], Layout(-1)),
        "dense": Tensor("a dense kernel", ("STATE-1",), (8, 16), makes[1]),
        "stack": Tensor("three layers", ("STATE-1",), (3, 8, 16), per_slice(*makes), Layout(1, batch=0)),
        "bias": Tensor("a bias", ("STATE-1",), (16,), noise),
    }


# From zero moments: what a first step does, and what it leaves for the second.
BEGINNING = {
    "channel": Tensor("four steps, channel view", ("STATE-1",), (4, 8), orthogonal_rows, flags=("state",)),
    "layer": Tensor("four steps, layer view", ("STATE-1",), (4, 8), orthogonal_layer, flags=("state",)),
    "none": Tensor("four steps, no projection", ("STATE-1",), (4, 8), oblique_rows, flags=("state",)),
    "vector": Tensor("four steps of a bias", ("STATE-1",), (8,), noise, flags=("state",)),
}

_ADAMP = {"lr": 0.05, "beta1": 0.9, "beta2": 0.999, "weight_decay": 2.0}
_SGDP = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2}
_ANY_STEP = ("STATE-3", "PREC-1", "PREC-3", "PREC-6", "PREC-7")
_RUN = ("STATE-1", "STATE-2")
_NEVER = ESSENTIALS | {"zero": ZEROS["zero-gradient"]}
_WORKING = ("float64", "float32")


def _adamp(name: str, tensors: dict[str, Tensor], *labels: str, step: int = 10, **hyper: Any) -> Case:
    return Case(f"adamp/{name}", "adamp", _ADAMP | hyper, tensors, step, labels=labels)


def _sgdp(name: str, tensors: dict[str, Tensor], *labels: str, step: int = 10, **hyper: Any) -> Case:
    return Case(f"sgdp/{name}", "sgdp", _SGDP | hyper, tensors, step, labels=labels)


def _for(case: Case, *flags: str) -> Case:
    """Says which mistakes all tensors of a case are for."""
    return replace(case, flags=flags)


def _in(folder: str, case: Case) -> Case:
    return replace(case, folder=folder)


def _run(case: Case) -> Case:
    """Many steps from the start, in the modes that need them."""
    return replace(case, step=0, steps=24, folder=None, modes=SEVERAL_STEPS)


def _beginning(case: Case) -> Case:
    """Four steps from the start, frozen."""
    return replace(case, step=0, steps=4, folder="multistep")


def _undecided(case: Case) -> Case:
    return replace(case, folder="ambiguous", modes=("purity",))


_IN_EVERY_DTYPE = (
    _for(_adamp("views", VIEWS, "ADAMP-1", "ADAMP-2", "ADAMP-4", "ADAMP-5", "ADAMP-6", *_ANY_STEP), *_ADAMP_FLAGS),
    _in("edge", _adamp("zeros", ZEROS)),
    _in("edge", _adamp("non-finite", NON_FINITE)),
    _in("edge", _adamp("underflow", UNDERFLOW)),
    _for(_adamp("nesterov", ESSENTIALS, "ADAMP-3", nesterov=True), "adamp-nesterov"),
    _for(
        _adamp("first-step", _NEVER, "ADAMP-4", "ADAMP-6", "PREC-2", step=0, lr=0.5, weight_decay=0.0),
        "bias-correction",
        "rounding",
    ),
    _run(_adamp("run", _trajectory(orthogonal_rows, orthogonal_layer, oblique_rows), *_RUN)),
    _for(_sgdp("views", VIEWS, "SGDP-1", "SGDP-2", "SGDP-3", "SGDP-4", "SGDP-5", *_ANY_STEP), *_SGDP_FLAGS),
    _in("edge", _sgdp("zeros", ZEROS)),
    _in("edge", _sgdp("non-finite", NON_FINITE)),
    _in("edge", _sgdp("underflow", UNDERFLOW)),
    _for(_sgdp("nesterov", ESSENTIALS, "SGDP-2", nesterov=True, dampening=0.25), "sgdp-nesterov", "dampening"),
    _for(_sgdp("projected-momentum", ESSENTIALS, "SGDP-3", project_momentum=True), "momentum-buffer"),
    _run(_sgdp("run", _trajectory(orthogonal_rows, orthogonal_layer, oblique_rows), *_RUN)),
)

# Layouts, coefficients and decisions, which half-precision tensors have computed in float32 as well.
_IN_WORKING_DTYPES = (
    _adamp("shapes", SHAPES),
    _in("large", _adamp("long-rows", LONG_ROWS)),
    _in("edge", _adamp("empty", EMPTY)),
    _for(
        _adamp("second-step", ESSENTIALS, "ADAMP-4", "PREC-2", step=1, lr=0.5, beta1=0.999, beta2=0.9999),
        "coefficients",
        "bias-correction",
    ),
    _for(
        _adamp("millionth-step", ESSENTIALS, "ADAMP-3", "PREC-2", step=999_999, lr=0.5, beta2=0.9999, nesterov=True),
        "coefficients",
    ),
    _for(
        _adamp("no-memory", ESSENTIALS, "ADAMP-1", "ADAMP-2", "HYPER-1", step=0, beta1=0.0, beta2=0.0),
        "first-moment",
        "second-moment",
        "step-size",
    ),
    _adamp("eps", COSINE_EPS | SMALL_GRADIENTS, "ADAMP-4", step=0, lr=0.5, eps=1e-4, weight_decay=0.2),
    _adamp("threshold", THRESHOLD, delta=0.25),
    _undecided(_adamp("undecided", UNDECIDED, "STATE-2", delta=0.25)),
    _for(_adamp("never-project", _NEVER, "PROJ-2", "HYPER-1", delta=0.0), "view-choice"),
    _for(_adamp("always-project", ESSENTIALS, "PROJ-7", delta=1e3, wd_ratio=0.5), "decay-ratio"),
    _for(_adamp("full-decay", ESSENTIALS, "ADAMP-5", lr=0.5, weight_decay=2.0, wd_ratio=1.0), "weight-decay"),
    _for(_adamp("no-rate", ESSENTIALS, "ADAMP-6", "HYPER-1", lr=0.0), "step-size", "weight-decay"),
    _run(_adamp("nesterov-run", _trajectory(noise, orthogonal_rows, oblique_rows), *_RUN, nesterov=True)),
    _beginning(_adamp("beginning", BEGINNING, "ADAMP-1", "ADAMP-2", "ADAMP-4", "ADAMP-6")),
    _beginning(_adamp("nesterov-beginning", BEGINNING, "ADAMP-3", nesterov=True)),
    _sgdp("shapes", SHAPES),
    _in("large", _sgdp("long-rows", LONG_ROWS)),
    _in("edge", _sgdp("empty", EMPTY)),
    _for(_sgdp("first-step", ESSENTIALS, "SGDP-1", "PREC-2", step=0, dampening=0.99), "dampening", "coefficients"),
    _for(_sgdp("dampening", ESSENTIALS, "SGDP-1", dampening=0.5), "dampening", "sgdp-decay"),
    _for(_sgdp("full-dampening", ESSENTIALS, "SGDP-1", "HYPER-1", dampening=1.0), "dampening"),
    _for(_sgdp("no-momentum", ESSENTIALS, "SGDP-1", "HYPER-1", momentum=0.0), "momentum"),
    _for(
        _sgdp("heavy-momentum", ESSENTIALS, "SGDP-4", "PREC-2", momentum=0.999, weight_decay=0.01),
        "coefficients",
        "sgdp-decay",
    ),
    _for(
        _sgdp("projected-momentum-nesterov", ESSENTIALS, "SGDP-3", project_momentum=True, nesterov=True),
        "momentum-buffer",
    ),
    _sgdp("eps", COSINE_EPS, lr=0.5, eps=1e-4),
    _sgdp("threshold", THRESHOLD, delta=0.25),
    _undecided(_sgdp("undecided", UNDECIDED, "STATE-2", delta=0.25, project_momentum=True)),
    _for(_sgdp("never-project", _NEVER, "PROJ-2", "HYPER-1", delta=0.0), "view-choice"),
    _for(_sgdp("always-project", ESSENTIALS, "PROJ-7", delta=1e3, wd_ratio=0.5), "decay-ratio"),
    _for(_sgdp("full-decay", ESSENTIALS, "SGDP-4", lr=0.5, weight_decay=0.2, wd_ratio=1.0), "weight-decay"),
    _in("edge", _sgdp("overflow", HEAVY, lr=1e-30, eps=1e-12, weight_decay=0.0)),
    _run(_sgdp("projected-run", _trajectory(noise, orthogonal_rows, oblique_rows), *_RUN, project_momentum=True)),
    _beginning(_sgdp("beginning", BEGINNING, "SGDP-1", "SGDP-4", "SGDP-5", dampening=0.25)),
    _beginning(_sgdp("nesterov-beginning", BEGINNING, "SGDP-2", nesterov=True)),
    _beginning(_sgdp("projected-beginning", BEGINNING, "SGDP-3", project_momentum=True)),
)

DESIGNED = (*_IN_EVERY_DTYPE, *(replace(case, dtypes=_WORKING) for case in _IN_WORKING_DTYPES))
