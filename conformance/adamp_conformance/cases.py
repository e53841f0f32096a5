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
ONE_STEP = ("step",)

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
      purpose: what it is for, in words; `clauses` are the labels it tests.
      shape, layout: physical.
      gradient: makes the gradient from the parameter, both seen as (slices, rows, row length).
      weight: makes the parameter out of one that is uniform in [-1, 1), the default.
      moment: makes the first moment before the step from the parameter; small noise by default.
      exact: the decision involves exact arithmetic only, so that it is decided on the threshold too.
    """

    purpose: str
    clauses: tuple[str, ...]
    shape: tuple[int, ...]
    gradient: Gradient
    layout: Layout = Layout()  # noqa: RUF009 - frozen
    weight: Gradient | None = None
    moment: Gradient | None = None
    exact: bool = False


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
      modes: the modes that the case is run in.
      dtypes: the types that it is run in.
      labels: clauses that the case as a whole tests, besides those of its tensors.
    """

    id: str
    algorithm: str
    hyper: dict[str, Any]
    tensors: dict[str, Tensor]
    step: int = 0
    steps: int = 1
    modes: tuple[str, ...] = ONE_STEP
    dtypes: tuple[str, ...] = tuple(DTYPES)
    labels: tuple[str, ...] = ()

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
            name: self._gradient(name, f"{name}/g{index}", tensor.gradient, parameters[name])
            for name, tensor in self.tensors.items()
        }

    def carry(self, state: State, source: str, target: str) -> State:
        """A state as a framework with `target` weights holds it."""
        return state

    def _weight(self, name: str, dtype: str) -> np.ndarray:
        tensor = self.tensors[name]
        rows = tensor.layout.rows(tensor.shape)
        random = Random(f"{self.id}/{name}/p")
        cells = random.uniform(*_cells(rows))
        cells = cells if tensor.weight is None else tensor.weight(random, cells)
        return _physical(cells, rows, tensor.shape).astype(DTYPES[dtype])

    def _moments(self, moment: str, dtype: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.step == 0:
            return {name: np.zeros_like(x) for name, x in values.items()}
        return {
            name: self._gradient(name, f"{name}/{moment}", _MOMENTS[moment](tensor), values[name])
            for name, tensor in self.tensors.items()
        }

    def _gradient(self, name: str, stream: str, make: Gradient, value: np.ndarray) -> np.ndarray:
        rows = self.tensors[name].layout.rows(value.shape)
        cells = make(Random(f"{self.id}/{stream}"), _logical(value.astype(np.float64), rows))
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
        unit = p / _norm(p)
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


def nearly_orthogonal_layer(random: Random, p: np.ndarray) -> np.ndarray:
    """0.7 times the layer's threshold for delta = 0.1, no row below the channel's."""
    g = orthogonal_layer(random, p)
    sizes = [np.sqrt(np.sum(x * x, axis=(1, 2), keepdims=True)) for x in (g, p)]
    return g + 0.7 * 0.1 / np.sqrt(p[0].size) * sizes[0] / sizes[1] * p


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
    ("PROJ-1", "PROJ-2", "PROJ-5", "PROJ-6"),
    ("PROJ-1", "PROJ-3", "PROJ-5", "PROJ-6"),
    ("PROJ-2", "PROJ-3", "PROJ-7"),
)

VIEWS = {
    "channel": Tensor("every row is orthogonal: the channel view projects", CHANNEL, (8, 16), orthogonal_rows),
    "layer": Tensor("only the whole is orthogonal: the layer view projects", LAYER, (8, 16), orthogonal_layer),
    "none": Tensor("nothing is orthogonal: no projection, full decay", NONE, (8, 16), oblique_rows),
    "antiparallel": Tensor("a cosine has no sign: no projection", ("PROJ-1",), (8, 16), cosines(-0.5)),
    "maximum": Tensor(
        "one row in eight is above the threshold, the mean is below: catches a mean for the maximum",
        ("PROJ-2",),
        (8, 16),
        threshold_multiples(2.0, *[0.1] * 7),
    ),
    "radial-momentum": Tensor(
        "gradient orthogonal, momentum parallel: catches a test of the update instead of the gradient",
        ("PROJ-1",),
        (8, 16),
        orthogonal_rows,
        moment=parallel,
    ),
    "radial-gradient": Tensor(
        "gradient parallel, momentum orthogonal: catches the same from the other side",
        ("PROJ-1",),
        (8, 16),
        parallel,
        moment=scaled(4.0, orthogonal_rows),
    ),
    "scalar": Tensor("rank 0 is never projected", ("LAYOUT-4",), (), nothing),
    "vector": Tensor("rank 1 is never projected, not even where the gradient is zero", ("LAYOUT-4",), (16,), nothing),
}

SHAPES = {
    "kernel-3d": Tensor("rank 3, rows are dim 0", ("LAYOUT-1",), (4, 3, 5), orthogonal_rows),
    "kernel-4d": Tensor("rank 4, rows are dim 0", ("LAYOUT-1",), (4, 3, 3, 3), orthogonal_rows),
    "kernel-5d": Tensor("rank 5, layer view", ("LAYOUT-1",), (4, 2, 3, 2, 2), orthogonal_layer),
    "channel-last": Tensor("HWIO: rows are the last axis", ("LAYOUT-1",), (3, 3, 4, 8), orthogonal_rows, Layout(-1)),
    "channel-last-layer": Tensor("the same, layer view", ("LAYOUT-1",), (3, 3, 4, 8), orthogonal_layer, Layout(-1)),
    "two-channel-axes": Tensor(
        "attention kernel (in, heads, head_dim)", ("LAYOUT-1",), (8, 3, 4), orthogonal_rows, Layout((1, 2))
    ),
    "outer-channel-axes": Tensor(
        "channel axes around the row axis", ("LAYOUT-1",), (3, 8, 4), orthogonal_rows, Layout((0, -1))
    ),
    "batch": Tensor(
        "a stack of three layers: each decides alone",
        ("LAYOUT-2",),
        (3, 8, 16),
        per_slice(orthogonal_rows, oblique_rows, orthogonal_layer),
        Layout(1, batch=0),
    ),
    "batch-threshold": Tensor(
        "between the layer thresholds of a slice and of the whole tensor",
        ("PROJ-3", "LAYOUT-2"),
        (4, 8, 16),
        nearly_orthogonal_layer,
        Layout(1, batch=0),
    ),
    "batch-last": Tensor(
        "slices along the last axis",
        ("LAYOUT-2",),
        (16, 8, 2),
        per_slice(oblique_rows, orthogonal_rows),
        Layout(1, batch=-1),
    ),
    "batch-of-vectors": Tensor(
        "a stack of vectors is not projected", ("LAYOUT-2", "LAYOUT-4"), (3, 16), orthogonal_rows, Layout(1, batch=0)
    ),
    "view": Tensor(
        "a fused query-key-value weight, each third decides alone",
        ("LAYOUT-3",),
        (12, 16),
        per_slice(orthogonal_layer, orthogonal_rows, oblique_rows),
        Layout(1, batch=0, view=(3, 4, 16)),
    ),
    "exempt": Tensor("a bias of rank 2, exempted", ("LAYOUT-5",), (4, 16), nothing, Layout(None)),
    "row-1": Tensor(
        "rows of one element: only the layer view can pass", ("PROJ-1", "PROJ-3"), (16, 1), orthogonal_layer
    ),
    "row-2": Tensor("rows of two elements", ("PROJ-1",), (8, 2), orthogonal_rows),
    "one-row": Tensor("one row: both views are the same", ("PROJ-4",), (1, 32), orthogonal_rows),
    "row-4096": Tensor(
        "long rows: the length of the sums and of the threshold", ("PROJ-2", "PREC-4"), (2, 4096), orthogonal_rows
    ),
    "empty-rows": Tensor("no rows: nothing to do", ("EDGE-3",), (0, 4), noise),
    "empty-columns": Tensor("rows without elements: nothing to do", ("EDGE-3",), (4, 0), noise),
}

ZEROS = {
    "zero-gradient": Tensor("cosine 0: the channel view projects, decay is small", ("EDGE-1",), (8, 16), nothing),
    "zero-parameter": Tensor("cosine 0 and nothing to remove", ("EDGE-1",), (8, 16), noise, weight=nothing),
    "zero-row": Tensor(
        "one zero gradient row among orthogonal ones", ("EDGE-1",), (8, 16), first_row_times(0.0, orthogonal_rows)
    ),
    "zero-both": Tensor("nothing at all", ("EDGE-1",), (8, 16), nothing, weight=nothing, moment=nothing),
}

NON_FINITE = {
    "nan-gradient": Tensor(
        "a NaN stays in its element, and nothing projects", ("EDGE-2",), (8, 16), with_element(np.nan, orthogonal_rows)
    ),
    "inf-gradient": Tensor("so does an infinity", ("EDGE-2",), (8, 16), with_element(np.inf, orthogonal_rows)),
    "nan-parameter": Tensor(
        "a NaN weight stays in its element", ("EDGE-2",), (8, 16), noise, weight=with_element(np.nan, parallel)
    ),
    "inf-parameter": Tensor(
        "so does an infinite weight", ("EDGE-2",), (8, 16), noise, weight=with_element(np.inf, parallel)
    ),
    "nan-vector": Tensor("and a NaN in a tensor without rows", ("EDGE-2",), (16,), with_element(np.nan, noise)),
}

# For eps = 1e-4: norms around eps tell where eps stands in the cosine.
COSINE_EPS = {
    "tiny-parallel": Tensor(
        "parallel rows of norm 7 eps have cosine 1: catches a clamp of the product of the norms",
        ("PROJ-1",),
        (8, 16),
        parallel,
        weight=scaled(3e-4, parallel),
    ),
    "below-eps": Tensor(
        "parallel rows below eps count as orthogonal", ("PROJ-1",), (8, 16), parallel, weight=scaled(4e-6, parallel)
    ),
    "near-eps": Tensor(
        "1.1 times the threshold at norms of 10 eps: catches an eps added to the norms",
        ("PROJ-1",),
        (8, 16),
        scaled(4e-4, threshold_multiples(1.1)),
        weight=scaled(4e-4, parallel),
    ),
    "unit-vector-eps": Tensor(
        "projection of rows of norm eps: the eps in the unit vector counts",
        ("PROJ-5",),
        (8, 16),
        orthogonal_rows,
        weight=scaled(4e-5, parallel),
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
        exact=True,
    ),
    "on-both": Tensor(
        "one row: equals both thresholds", ("PROJ-2", "PROJ-3"), (1, 16), norm_16, weight=first_unit_vector, exact=True
    ),
    "below": Tensor("0.9 of the threshold", ("PROJ-2",), (8, 16), threshold_multiples(2.25)),
    "above": Tensor("1.1 of the threshold", ("PROJ-2",), (8, 16), threshold_multiples(2.75)),
    "straddling": Tensor(
        "within rounding of the threshold: either whole outcome is legal",
        ("PREC-8",),
        (8, 16),
        threshold_multiples(2.5, 0.1),
    ),
}

ESSENTIALS = {name: VIEWS[name] for name in ("channel", "layer", "none", "vector")}

SMALL_GRADIENTS = {
    name: Tensor(
        "gradients of the size of eps tell where eps stands in the denominator",
        ("ADAMP-4",),
        (8, 16),
        scaled(5e-5, make),
    )
    for name, make in (("small-channel", orthogonal_rows), ("small-none", oblique_rows))
}


def _trajectory(*makes: Gradient) -> dict[str, Tensor]:
    return {
        "kernel": Tensor("a convolution kernel", ("STATE-1",), (3, 3, 4, 8), makes[0], Layout(-1)),
        "dense": Tensor("a dense kernel", ("STATE-1",), (8, 16), makes[1]),
        "stack": Tensor("three layers", ("STATE-1",), (3, 8, 16), per_slice(*makes), Layout(1, batch=0)),
        "bias": Tensor("a bias", ("STATE-1",), (16,), noise),
    }


_ADAMP = {"lr": 0.05, "beta1": 0.9, "beta2": 0.999, "weight_decay": 2.0}
_SGDP = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2}
_RUN = ("STATE-1", "STATE-2")
_NEVER = ESSENTIALS | {"zero": ZEROS["zero-gradient"]}


def _adamp(name: str, tensors: dict[str, Tensor], *labels: str, step: int = 10, **hyper: Any) -> Case:
    return Case(f"adamp/{name}", "adamp", _ADAMP | hyper, tensors, step, labels=labels)


def _sgdp(name: str, tensors: dict[str, Tensor], *labels: str, step: int = 10, **hyper: Any) -> Case:
    return Case(f"sgdp/{name}", "sgdp", _SGDP | hyper, tensors, step, labels=labels)


def _run(case: Case) -> Case:
    """Many steps from the start, in the modes that need them."""
    return replace(case, step=0, steps=24, modes=SEVERAL_STEPS)


_IN_EVERY_DTYPE = (
    _adamp("views", VIEWS, "ADAMP-1", "ADAMP-2", "ADAMP-4", "ADAMP-5", "ADAMP-6", "PREC-6"),
    _adamp("zeros", ZEROS),
    _adamp("non-finite", NON_FINITE),
    _adamp("nesterov", ESSENTIALS, "ADAMP-3", nesterov=True),
    _adamp("first-step", _NEVER, "ADAMP-4", "ADAMP-6", "PREC-2", step=0, lr=0.5, weight_decay=0.0),
    _run(_adamp("run", _trajectory(orthogonal_rows, orthogonal_layer, oblique_rows), *_RUN)),
    _sgdp("views", VIEWS, "SGDP-1", "SGDP-2", "SGDP-3", "SGDP-4", "SGDP-5", "PREC-6"),
    _sgdp("zeros", ZEROS),
    _sgdp("non-finite", NON_FINITE),
    _sgdp("nesterov", ESSENTIALS, "SGDP-2", nesterov=True, dampening=0.25),
    _sgdp("projected-momentum", ESSENTIALS, "SGDP-3", project_momentum=True),
    _run(_sgdp("run", _trajectory(orthogonal_rows, orthogonal_layer, oblique_rows), *_RUN)),
)

# Layouts, coefficients and decisions, which half-precision tensors have computed in float32 as well.
_IN_WORKING_DTYPES = (
    _adamp("shapes", SHAPES),
    _adamp("second-step", ESSENTIALS, "ADAMP-4", "PREC-2", step=1, lr=0.5, beta1=0.999, beta2=0.9999),
    _adamp("millionth-step", ESSENTIALS, "ADAMP-3", "PREC-2", step=999_999, lr=0.5, beta2=0.9999, nesterov=True),
    _adamp("no-memory", ESSENTIALS, "ADAMP-1", "ADAMP-2", step=0, beta1=0.0, beta2=0.0),
    _adamp("eps", COSINE_EPS | SMALL_GRADIENTS, "ADAMP-4", step=0, lr=0.5, eps=1e-4, weight_decay=0.2),
    replace(_adamp("threshold", THRESHOLD, "STATE-2", delta=0.25), modes=("step", "purity")),
    _adamp("never-project", _NEVER, "PROJ-2", delta=0.0),
    _adamp("always-project", ESSENTIALS, "PROJ-7", delta=1e3, wd_ratio=0.5),
    _run(_adamp("nesterov-run", _trajectory(noise, orthogonal_rows, oblique_rows), *_RUN, nesterov=True)),
    _sgdp("shapes", SHAPES),
    _sgdp("first-step", ESSENTIALS, "SGDP-1", "PREC-2", step=0, dampening=0.99),
    _sgdp("no-momentum", ESSENTIALS, "SGDP-1", momentum=0.0),
    _sgdp("heavy-momentum", ESSENTIALS, "SGDP-4", "PREC-2", momentum=0.999, weight_decay=0.01),
    _sgdp("projected-momentum-nesterov", ESSENTIALS, "SGDP-3", project_momentum=True, nesterov=True),
    _sgdp("eps", COSINE_EPS, lr=0.5, eps=1e-4),
    replace(_sgdp("threshold", THRESHOLD, "STATE-2", delta=0.25), modes=("step", "purity")),
    _sgdp("never-project", _NEVER, "PROJ-2", delta=0.0),
    _sgdp("always-project", ESSENTIALS, "PROJ-7", delta=1e3, wd_ratio=0.5),
    _run(_sgdp("projected-run", _trajectory(noise, orthogonal_rows, oblique_rows), *_RUN, project_momentum=True)),
)

DESIGNED = (*_IN_EVERY_DTYPE, *(replace(case, dtypes=("float64", "float32")) for case in _IN_WORKING_DTYPES))
