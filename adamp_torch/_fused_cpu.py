"""The fused path on the CPU: kernels that numba compiles, for all tensors of a step at once.

Slices whose rows lie one after another in memory are cut into tiles. A first pass over `p` and `g` adds up what the
decisions need, a second reads and writes everything once. A slice of a single tile is done in one go, while it is
in the cache. A third pass is for slices that are projected as a layer, or in rows longer than a tile: there `<p, q>`
spans tiles. Sums are formed in an order that the number of threads does not change.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from adamp_spec import Rows, one_minus_power
from adamp_torch._paths import PROCESS, Batch, is_plain

TILE = 1 << 15  # elements; what a tile holds of all tensors fits into a second-level cache
SHARE = 1 << 18  # elements that a thread takes at once
WAVE = 1 << 16  # elements per thread between a first and a second look at them
BLOCK = 1 << 9  # elements that are added up in the working dtype, in the order that the compiler likes best
ROWS = 1 << 8  # sums of rows that are added up in double, likewise


def adamp(batches: list[Batch], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Steps parameters that are `knows`n. `found_inf` must be None: on the CPU it is read before."""
    assert found_inf is None

    def scalars(t: int, lr: float, options: dict[str, Any]) -> AdamPScalars:
        beta1, beta2 = options["beta1"], options["beta2"]
        return AdamPScalars(
            step_size=lr / float(one_minus_power(beta1, t)),
            beta1=beta1,
            gain1=1 - beta1,
            beta2=beta2,
            gain2=1 - beta2,
            per_sqrt_bc2=float(one_minus_power(beta2, t)) ** -0.5,
            eps=options["eps"],
            nesterov=options["nesterov"],
        )

    _step(batches, grad_scale, scalars, lambda options: options["weight_decay"])


def sgdp(batches: list[Batch], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Steps parameters that are `knows`n. `found_inf` must be None: on the CPU it is read before."""
    assert found_inf is None

    def scalars(t: int, lr: float, options: dict[str, Any]) -> SGDPScalars:
        return SGDPScalars(
            step_size=lr,
            momentum=options["momentum"],
            gain=1 - options["dampening"],
            nesterov=options["nesterov"],
            project_momentum=options["project_momentum"] and not options["nesterov"],
        )

    _step(batches, grad_scale, scalars, lambda options: options["weight_decay"] / (1 - options["momentum"]))


def knows(tensors: tuple[Any, ...]) -> bool:
    """Whether a parameter can be stepped here, given with its gradient, moments and rows.

    It can where all are of one dtype and the moments lie in memory as the parameter does: densely, with slices, rows
    and elements from the outermost to the innermost. (So are PyTorch's own weights, channels_last ones included.)
    """
    param, grad, *moments, rows = tensors
    if not is_plain(param) or grad.dtype != param.dtype:
        return False
    for moment in moments:
        if moment.dtype != param.dtype or not _same_strides(param, moment):
            return False
    return _sizes(param.shape, param.stride(), rows) is not None


def _same_strides(x: Tensor, y: Tensor) -> bool:
    if x.stride() == y.stride():
        return True
    return all(a == b for a, b, n in zip(x.stride(), y.stride(), x.shape, strict=True) if n > 1)


@lru_cache(maxsize=1 << 16)
def _sizes(shape: torch.Size, strides: tuple[int, ...], rows: Rows) -> tuple[int, int, int] | None:
    """Slices, rows per slice, elements per row, as memory has them; no rows where nothing is ever projected."""
    order = sorted((axis for axis, n in enumerate(shape) if n > 1), key=lambda axis: -strides[axis])
    dense = 1
    for axis in reversed(order):
        if strides[axis] != dense and 0 not in shape:
            return None
        dense *= shape[axis]
    if not rows.projects:
        return (1, 0, shape.numel())
    if rows.shape != shape:
        if order != sorted(order):
            return None
        order = list(range(len(rows.shape)))
    kinds = [0 if axis in rows.batch else 1 if axis in rows.channel else 2 for axis in order if rows.shape[axis] > 1]
    if kinds != sorted(kinds):
        return None
    return (dense // (rows.count * rows.length), rows.count, rows.length)


class Plan(NamedTuple):
    """How tensors are cut and who does what when.

    Attributes:
      tiles: int64, (n, 3): tensor, first element, end. First those that can be done in one go: of tensors that are
        never projected, and slices of one tile.
      whole: how many these are.
      slices: int64, (slices, 2): first tile and end, counted from `whole`, of each slice of several tiles.
      jobs: int64, (jobs, 3), in the order in which they are to be begun: first tile, end, and the wave that they
        belong to; those that can be done in one go belong to none and come last, as a wave that does not exist.
      waves: int64, (waves, 3): first slice, end, jobs. What these have read is still in a cache when the second pass
        reads it again.
    """

    tiles: np.ndarray
    whole: int
    slices: np.ndarray
    jobs: np.ndarray
    waves: np.ndarray


@lru_cache(maxsize=64)
def _plan(sizes: tuple[tuple[int, int, int], ...], threads: int) -> Plan:
    whole, parts, ends = [np.empty((0, 3), np.int64)], [np.empty((0, 3), np.int64)], [np.zeros(1, np.int64)]
    for tensor, (slices, rows, length) in enumerate(sizes):
        size = max(rows, 1) * length
        if rows and length <= TILE:
            cuts = np.arange(0, size, TILE // length * length)
        elif rows:
            cuts = np.add.outer(np.arange(0, size, length), np.arange(0, length, TILE)).ravel()
        else:
            cuts = np.arange(0, size, TILE)
        first = np.add.outer(np.arange(slices) * size, cuts)
        end = np.add.outer(np.arange(slices) * size, np.append(cuts[1:], size)[: len(cuts)])
        tiles = np.stack([np.full(first.size, tensor), first.ravel(), end.ravel()], axis=1)
        if rows and len(cuts) > 1:
            ends.append(sum(map(len, parts)) + len(cuts) * np.arange(1, slices + 1))
            parts.append(tiles)
        else:
            whole.append(tiles)
    tiles = np.concatenate(whole + parts)
    edges: list[int] = np.concatenate(ends).tolist()
    n, done = sum(map(len, whole)), np.append(0, np.cumsum(tiles[:, 2] - tiles[:, 1]))

    def jobs(first: int, end: int, wave: int) -> list[list[int]]:
        marks = np.arange(done[first], done[end], SHARE)
        bounds = np.unique(np.append(np.searchsorted(done[first:end], marks), end - first)) + first
        return [[a, b, wave] for a, b in pairwise(bounds.tolist())]

    in_order: list[list[int]] = []
    waves: list[list[int]] = []
    elements = done[n + np.array(edges)]
    start = 0
    while start < len(edges) - 1:
        stop = int(np.searchsorted(elements, elements[start] + threads * WAVE, "right")) - 1
        stop = max(stop, start + 1)
        own = jobs(n + edges[start], n + edges[stop], len(waves))
        in_order += own
        waves.append([start, stop, len(own)])
        start = stop
    in_order += jobs(0, n, len(waves))
    return Plan(
        tiles,
        n,
        np.array(list(pairwise(edges)), np.int64).reshape(-1, 2),
        np.array(in_order, np.int64).reshape(-1, 3),
        np.array(waves, np.int64).reshape(-1, 3),
    )


def _step(
    batches: list[Batch],
    grad_scale: Tensor | None,
    scalars: Callable[[int, float, dict[str, Any]], AdamPScalars | SGDPScalars],
    decay: Callable[[dict[str, Any]], float],
) -> None:
    """Tables of what there is to do, then the passes.

    Args:
      batches: what to step.
      grad_scale: what the gradients have been multiplied by.
      scalars: the numbers of the elementwise update at step `t`.
      decay: the decay per unit of learning rate.
    """
    work: dict[torch.dtype, list[tuple[list[Tensor], tuple[int, int, int], int]]] = {}
    numbers: list[AdamPScalars | SGDPScalars] = []
    shared: list[tuple[float, ...]] = []
    for batch in batches:
        if not batch.params:
            continue
        options = batch.options
        torch._foreach_add_(batch.steps, torch.tensor(1.0, device="cpu"), alpha=1)  # of a number it makes many tensors
        counts = torch.stack(batch.steps).tolist()
        lr = float(options["lr"])
        factor = (-1.0 if options["maximize"] else 1.0) / (1.0 if grad_scale is None else float(grad_scale))
        factors = [1 - lr * decay(options) * ratio for ratio in (1, options["wd_ratio"])]  # PROJ-7
        line = {}
        for t in dict.fromkeys(counts):
            line[t] = len(numbers)
            numbers.append(scalars(int(t), lr, options))
            shared.append((factor, options["delta"], options["eps"], *factors))
        for param, grad, t, rows, *moments in zip(
            batch.params, batch.grads, counts, batch.rows, *batch.moments, strict=True
        ):
            if not _same_strides(param, grad):
                grad = torch.empty_like(param).copy_(grad)
            sizes = _sizes(param.shape, param.stride(), rows)
            assert sizes is not None, "it is known"
            work.setdefault(param.dtype, []).append(([param, grad, *moments], sizes, line[t]))
    for dtype, items in work.items():
        tensors, sizes_of, lines = zip(*items, strict=True)
        _passes(
            numbers[0],
            _STORAGE[dtype],
            tensors,
            sizes_of,
            np.array(lines, np.int64),
            np.array(numbers),
            np.array(shared),
        )


def _passes(
    kind: Any, like: np.ndarray, tensors: Sequence[list[Tensor]], sizes: Any, lines: Any, numbers: Any, shared: Any
) -> None:
    tiles, whole, slices, jobs, waves = _plan(sizes, torch.get_num_threads())
    pointers = np.array([[x.data_ptr() for x in some] for some in tensors])
    geometry = np.array(sizes, np.int64)
    work = (kind, like, pointers, geometry, lines, numbers, shared, tiles, whole)
    sums = np.empty((len(tiles) - whole, 4))
    modes, norms, dots = np.zeros(len(sums), np.int8), np.empty(len(sums)), np.empty(len(sums))
    _in_threads(
        len(jobs),
        _take_jobs,
        *work,
        slices,
        sums,
        modes,
        norms,
        dots,
        jobs,
        waves,
        waves[:, 2].copy(),
        np.zeros(1, np.int64),
    )
    if (modes >= _LAYER).any():
        _join_dots(geometry, tiles, whole, slices, modes, dots)
        _in_threads(len(tiles), _third_pass, *work, modes, norms, dots, np.zeros(1, np.int64))


def _in_threads(jobs: int, kernel: Callable[..., None], *arguments: Any) -> None:
    """Runs a kernel on as many threads as PyTorch's own operations use; among themselves they share out the jobs.

    They are PyTorch's own threads where these can be had. Others would have to be woken, and to share the cores with
    PyTorch's, which stay awake for a while after each operation.
    """
    errors: list[BaseException] = []

    def run(_: object = None) -> None:
        try:
            try:
                room = _rooms.pop()
            except IndexError:
                room = np.empty((3, ROWS)), np.empty(TILE, np.float32), np.empty(TILE, np.float64)
            kernel(*arguments, room)
            _rooms.append(room)
        except BaseException as error:  # C, which may have called this, lets none through
            errors.append(error)

    threads = torch.get_num_threads() if jobs > 1 else 1  # a team of another size would have to be made
    if threads > 1 and _OPENMP and os.getpid() == PROCESS:
        _OPENMP(_BODY(run), None, threads, 0)
    else:
        others = [_pool(os.getpid(), threads - 1).submit(run) for _ in range(threads - 1)]
        run()
        for other in others:
            other.result()
    if errors:
        raise errors[0]


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _openmp() -> Any:
    """What GCC compiles a parallel region to, if PyTorch has brought a library that has it."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, TypeError):  # the latter on Windows
        return None
    function.argtypes, function.restype = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function


_OPENMP = _openmp()


@lru_cache(maxsize=1)
def _pool(pid: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of its parent do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="adamp")


_rooms: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
"""What a thread writes down: sums of rows, and a row of each working dtype. These are free at the moment."""


# The kernels. `like` is an array that stands for a dtype: that in which memory is read.

# bfloat16 and float16 as bits, told apart by their sign.
_STORAGE: dict[torch.dtype, np.ndarray] = {
    torch.float64: np.empty(0, np.float64),
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}
_PLAIN, _CHANNEL, _LAYER, _LONG_CHANNEL = range(4)  # the last two need <p, q> from other tiles


class AdamPScalars(NamedTuple):
    """The numbers of AdamP's elementwise update."""

    step_size: float
    beta1: float
    gain1: float
    beta2: float
    gain2: float
    per_sqrt_bc2: float
    eps: float
    nesterov: bool


class SGDPScalars(NamedTuple):
    """The numbers of SGDP's elementwise update."""

    step_size: float
    momentum: float
    gain: float
    nesterov: bool
    project_momentum: bool


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """The decorator: IEEE division, no lock held, and a cache on disk wherever there is a place for one."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(nogil=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            return njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


_summed = _compiled(fastmath={"reassoc", "nsz", "contract"})  # NaN and inf as ever
_exact = _compiled(fastmath={"contract"})  # a product may go into a sum unrounded


_intrinsic: Callable[[Any], Any] = intrinsic


def _llvm(argument: types.Type, result: types.Type, build: Callable[[Any, Any], Any]) -> Any:
    """A function that is a few instructions of LLVM."""

    @intrinsic
    def function(typingctx: Any, x: Any) -> Any:
        return result(argument), lambda context, builder, signature, arguments: build(builder, arguments[0])

    return function


_pointer = _llvm(types.intp, types.voidptr, lambda b, x: b.inttoptr(x, cgutils.voidptr_t))
_bits = _llvm(types.float32, types.uint32, lambda b, x: b.bitcast(x, ir.IntType(32)))
_float = _llvm(types.uint32, types.float32, lambda b, x: b.bitcast(x, ir.FloatType()))
_from_half = _llvm(types.int16, types.float32, lambda b, x: b.fpext(b.bitcast(x, ir.HalfType()), ir.FloatType()))
_to_half = _llvm(types.float32, types.int16, lambda b, x: b.bitcast(b.fptrunc(x, ir.HalfType()), ir.IntType(16)))


@_intrinsic
def _fetch_add(typingctx, address, x):
    """Adds to the integer at an address; what it was. Other threads see what was written before."""

    def build(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), build


def _load(x: np.ndarray, i: int) -> float:
    """Element `i` in the working dtype."""
    raise NotImplementedError


def _store(x: np.ndarray, i: int, value: float) -> None:
    """Writes an element, rounded to nearest even (PREC-6)."""
    raise NotImplementedError


def _cast(x: float, like: np.ndarray) -> float:
    """A number in the working dtype."""
    raise NotImplementedError


@overload(_load)
def _load_of(x, i):
    if x.dtype == types.uint16:
        return lambda x, i: _float(types.uint32(x[i]) << types.uint32(16))
    if x.dtype == types.int16:
        return lambda x, i: _from_half(x[i])
    return lambda x, i: x[i]


@overload(_store)
def _store_of(x, i, value):
    if x.dtype == types.uint16:

        def bfloat16(x, i, value):
            bits = _bits(value)
            up = types.uint32(0x7FFF) + ((bits >> types.uint32(16)) & types.uint32(1))
            rounded = (bits + up) >> types.uint32(16)
            x[i] = types.uint16(0x7FC0) if value != value else types.uint16(rounded)

        return bfloat16
    if x.dtype == types.int16:

        def float16(x, i, value):
            x[i] = _to_half(value)

        return float16

    def same(x, i, value):
        x[i] = value

    return same


@overload(_cast)
def _cast_of(x, like):
    if like.dtype == types.float64:
        return lambda x, like: x
    return lambda x, like: np.float32(x)


def _of_working(room: tuple[np.ndarray, np.ndarray, np.ndarray], like: np.ndarray) -> np.ndarray:
    """The room for a row in the working dtype."""
    raise NotImplementedError


@overload(_of_working)
def _of_working_of(room, like):
    if like.dtype == types.float64:
        return lambda room, like: room[2]
    return lambda room, like: room[1]


def _scalars(kind: Any, x: np.ndarray, like: np.ndarray) -> Any:
    """A line of numbers as scalars of the working dtype."""
    raise NotImplementedError


def _direction(h: Any, g: float, m: float, v: float) -> tuple[float, float, float]:
    """m', v', q of one element."""
    raise NotImplementedError


@overload(_scalars)
def _scalars_of(kind, x, like):
    if kind.instance_class is AdamPScalars:
        return lambda kind, x, like: AdamPScalars(
            _cast(x[0], like),
            _cast(x[1], like),
            _cast(x[2], like),
            _cast(x[3], like),
            _cast(x[4], like),
            _cast(x[5], like),
            _cast(x[6], like),
            x[7] != 0,
        )
    return lambda kind, x, like: SGDPScalars(
        _cast(x[0], like), _cast(x[1], like), _cast(x[2], like), x[3] != 0, x[4] != 0
    )


@overload(_direction)
def _direction_of(h, g, m, v):
    if h.instance_class is AdamPScalars:

        def adamp(h, g, m, v):
            m = h.beta1 * m + h.gain1 * g  # ADAMP-1
            v = h.beta2 * v + h.gain2 * (g * g)  # ADAMP-2
            n = h.beta1 * m + h.gain1 * g if h.nesterov else m  # ADAMP-3
            return m, v, n / (np.sqrt(v) * h.per_sqrt_bc2 + h.eps)  # ADAMP-4

        return adamp

    def sgdp(h, g, m, v):
        m = h.momentum * m + h.gain * g  # SGDP-1
        return m, v, g + h.momentum * m if h.nesterov else m  # SGDP-2

    return sgdp


def _keep(h: Any, m: np.ndarray, v: np.ndarray, i: int, values: tuple[float, float], q: float) -> None:
    """Stores the moments of an element; `q` as projected."""
    raise NotImplementedError


@overload(_keep)
def _keep_of(h, m, v, i, values, q):
    if h.instance_class is AdamPScalars:

        def adamp(h, m, v, i, values, q):
            _store(m, i, values[0])
            _store(v, i, values[1])

        return adamp

    def sgdp(h, m, v, i, values, q):
        _store(m, i, q if h.project_momentum else values[0])  # SGDP-3

    return sgdp


@_exact
def _tensors(like, pointers, tile):
    """The elements of a tile: p, g, m, v; SGDP's v is its m, which is neither read nor written as such."""
    start, n = tile[1] * like.itemsize, tile[2] - tile[1]
    p = carray(_pointer(pointers[0] + start), n, like.dtype)
    g = carray(_pointer(pointers[1] + start), n, like.dtype)
    m = carray(_pointer(pointers[2] + start), n, like.dtype)
    v = carray(_pointer(pointers[-1] + start), n, like.dtype)
    return p, g, m, v


@_summed
def _add_products(p, g, factor):
    pp = gg = gp = _cast(0.0, p)
    for i in range(p.size):
        x, y = _load(p, i), _load(g, i) * factor
        pp += x * x
        gg += y * y
        gp += x * y
    return np.float64(pp), np.float64(gg), np.float64(gp)


@_exact
def _add(total, rest, x):
    """`total + rest + x` without losing what is rounded off."""
    new = total + x
    part = new - total
    rest += (total - (new - part)) + (x - part)
    return new, rest if rest == rest else 0.0  # inf - inf


@_exact
def _products(p, g, factor):
    """|p|^2, |g|^2 and <g, p> of a row or of a piece of one."""
    if p.size <= BLOCK:
        return _add_products(p, g, factor)
    pp = gg = gp = pp_rest = gg_rest = gp_rest = 0.0
    for i in range(0, p.size, BLOCK):
        a, b, c = _add_products(p[i : i + BLOCK], g[i : i + BLOCK], factor)
        pp, pp_rest = _add(pp, pp_rest, a)
        gg, gg_rest = _add(gg, gg_rest, b)
        gp, gp_rest = _add(gp, gp_rest, c)
    return pp + pp_rest, gg + gg_rest, gp + gp_rest


@_exact
def _orthogonal(pp, gg, gp, eps, threshold):
    """PROJ-1, PROJ-2; NaN is not below."""
    return abs(gp) / max(np.sqrt(gg), eps) / max(np.sqrt(pp), eps) < threshold


@_exact
def _count(rows, eps, threshold):
    """How many rows are not nearly orthogonal."""
    others = 0
    for i in range(rows.shape[1]):
        others += not _orthogonal(rows[0, i], rows[1, i], rows[2, i], eps, threshold)
    return others


@_summed
def _add_rows(rows):
    pp = gg = gp = 0.0
    for i in range(rows.shape[1]):
        pp += rows[0, i]
        gg += rows[1, i]
        gp += rows[2, i]
    return pp, gg, gp


@_exact
def _statistics(p, g, factor, length, eps, threshold, room):
    """Of some rows: how many are not nearly orthogonal, and the sums of |p|^2, |g|^2, <g, p>."""
    others = 0
    pp = gg = gp = pp_rest = gg_rest = gp_rest = 0.0
    for a in range(0, p.size, length * room.shape[1]):
        n = min((p.size - a) // length, room.shape[1])
        for k in range(n):
            i = a + k * length
            room[0, k], room[1, k], room[2, k] = _products(p[i : i + length], g[i : i + length], factor)
        others += _count(room[:, :n], eps, threshold)
        x, y, z = _add_rows(room[:, :n])
        pp, pp_rest = _add(pp, pp_rest, x)
        gg, gg_rest = _add(gg, gg_rest, y)
        gp, gp_rest = _add(gp, gp_rest, z)
    return others, pp + pp_rest, gg + gg_rest, gp + gp_rest


@_summed
def _add_dot(h, p, g, m, v, factor):
    dot = 0.0
    for i in range(p.size):
        _, _, q = _direction(h, _load(g, i) * factor, _load(m, i), _load(v, i))
        dot += np.float64(_load(p, i)) * np.float64(q)
    return dot


@_exact
def _dot(h, p, g, m, v, factor):
    """<p, q>, with nothing written."""
    dot = rest = 0.0
    for i in range(0, p.size, BLOCK):
        j = i + BLOCK
        dot, rest = _add(dot, rest, _add_dot(h, p[i:j], g[i:j], m[i:j], v[i:j], factor))
    return dot + rest


@_exact
def _update(h, p, g, m, v, factor, decay):
    for i in range(p.size):
        m1, v1, q = _direction(h, _load(g, i) * factor, _load(m, i), _load(v, i))
        _keep(h, m, v, i, (m1, v1), q)
        _store(p, i, _load(p, i) * decay - h.step_size * q)  # ADAMP-5, ADAMP-6, SGDP-4, SGDP-5


@_exact
def _update_along(h, p, g, m, v, factor, decay, norm, part):
    """The same, with `part` times the unit vector `p / norm` taken out of `q`."""
    for i in range(p.size):
        x = _load(p, i)
        m1, v1, q = _direction(h, _load(g, i) * factor, _load(m, i), _load(v, i))
        q -= part * (x / norm)  # PROJ-6
        _keep(h, m, v, i, (m1, v1), q)
        _store(p, i, x * decay - h.step_size * q)


@_summed
def _move_on(h, p, g, m, v, factor, q):
    """Stores the moments and, in `q`, the direction; <p, p> and <p, q>."""
    pp = dot = 0.0
    for i in range(p.size):
        x = np.float64(_load(p, i))
        m1, v1, q1 = _direction(h, _load(g, i) * factor, _load(m, i), _load(v, i))
        _keep(h, m, v, i, (m1, v1), m1)
        q[i] = q1
        pp += x * x
        dot += x * np.float64(q1)
    return pp, dot


@_exact
def _update_rows(h, p, g, m, v, factor, decay, length, eps, q):
    """The same, each row along itself; `q` is room for one row."""
    for a in range(0, p.size, length):
        end = a + length
        if length <= BLOCK:
            pp, dot = _move_on(h, p[a:end], g[a:end], m[a:end], v[a:end], factor, q[:length])
        else:
            pp = dot = pp_rest = dot_rest = 0.0
            for i in range(a, end, BLOCK):
                j = min(i + BLOCK, end)
                x, y = _move_on(h, p[i:j], g[i:j], m[i:j], v[i:j], factor, q[i - a : j - a])
                pp, pp_rest = _add(pp, pp_rest, x)
                dot, dot_rest = _add(dot, dot_rest, y)
            pp, dot = pp + pp_rest, dot + dot_rest
        norm = np.sqrt(pp) + eps  # PROJ-5
        _leave(h, p[a:end], m[a:end], q[:length], decay, _cast(norm, p), _cast(dot / norm, p))


@_exact
def _leave(h, p, m, q, decay, norm, part):
    for i in range(p.size):
        x = _load(p, i)
        q1 = q[i] - part * (x / norm)
        _keep_projected(h, m, i, q1)
        _store(p, i, x * decay - h.step_size * q1)


def _keep_projected(h: Any, m: np.ndarray, i: int, q: float) -> None:
    """Stores the projected direction as momentum, where that is asked for."""
    raise NotImplementedError


@overload(_keep_projected)
def _keep_projected_of(h, m, i, q):
    if h.instance_class is AdamPScalars:
        return lambda h, m, i, q: None

    def sgdp(h, m, i, q):
        if h.project_momentum:
            _store(m, i, q)  # SGDP-3

    return sgdp


@_exact
def _take_jobs(
    kind,
    like,
    pointers,
    sizes,
    lines,
    numbers,
    shared,
    tiles,
    whole,
    slices,
    sums,
    modes,
    norms,
    dots,
    jobs,
    waves,
    missing,
    taken,
    room,
):
    """Jobs in their order, until none is left. `missing` counts, per wave, jobs and then the decision.

    A thread takes its second look at tiles that it has looked at itself: they are in its own core's cache. It waits
    only for jobs of earlier waves than that of its own latest job, which other threads have begun already.
    """
    mine = np.empty(len(jobs), np.int64)
    again = seen = 0
    while True:
        k = _fetch_add(taken.ctypes.data, 1)
        wave = len(waves) + 2
        if k < len(jobs):
            first, end, wave = jobs[k]
            _first_pass(kind, like, pointers, sizes, lines, numbers, shared, tiles, whole, sums, room, first, end)
            if wave < len(waves):
                mine[seen] = k
                seen += 1
                if _fetch_add(missing[wave:].ctypes.data, -1) == 1:
                    own = slices[waves[wave, 0] : waves[wave, 1]]
                    _decide_slices(sizes, lines, shared, tiles, whole, own, sums, modes, norms)
                    _fetch_add(missing[wave:].ctypes.data, -1)
        while again < seen:
            first, end, before = jobs[mine[again]]
            if before == wave:
                break
            if _fetch_add(missing[before:].ctypes.data, 0) >= 0:
                if before == wave - 1:
                    break
                continue
            _second_pass(
                kind, like, pointers, sizes, lines, numbers, shared, tiles, whole, modes, dots, room, first, end
            )
            again += 1
        if k >= len(jobs):
            return


@_exact
def _first_pass(kind, like, pointers, sizes, lines, numbers, shared, tiles, whole, sums, room, first, end):
    """What can be done in one go; of all other tiles the sums."""
    for k in range(first, end):
        t = tiles[k, 0]
        rows, length = sizes[t, 1], sizes[t, 2]
        p, g, m, v = _tensors(like, pointers[t], tiles[k])
        h = _scalars(kind, numbers[lines[t]], like)
        scale, delta, eps, decay, less_decay = shared[lines[t]]
        factor, decay, less_decay = _cast(scale, p), _cast(decay, p), _cast(less_decay, p)
        if rows == 0:
            _update(h, p, g, m, v, factor, decay)
            continue
        length = min(length, p.size)  # a piece of a longer row is judged with the others
        others, pp, gg, gp = _statistics(p, g, factor, length, eps, delta / np.sqrt(length), room[0])
        if k >= whole:
            sums[k - whole, 0], sums[k - whole, 1], sums[k - whole, 2], sums[k - whole, 3] = others, pp, gg, gp
        elif others == 0:
            _update_rows(h, p, g, m, v, factor, less_decay, length, eps, _of_working(room, p))
        elif _orthogonal(pp, gg, gp, eps, delta / np.sqrt(p.size)):  # PROJ-3
            norm, dot = np.sqrt(pp) + eps, _dot(h, p, g, m, v, factor)
            _update_along(h, p, g, m, v, factor, less_decay, _cast(norm, p), _cast(dot / norm, p))
        else:
            _update(h, p, g, m, v, factor, decay)


@_exact
def _decide_slices(sizes, lines, shared, tiles, whole, slices, sums, modes, norms):
    """How each tile of each slice is stepped, and along which norm."""
    for s in range(len(slices)):
        first, end = slices[s]
        t = tiles[whole + first, 0]
        rows, length = sizes[t, 1], sizes[t, 2]
        _, delta, eps, _, _ = shared[lines[t]]
        pieces = -(-length // TILE)  # of a row; the sums of a row in one piece are decided already
        others = 0
        pp = gg = gp = pp_rest = gg_rest = gp_rest = 0.0
        for row in range(first, end, pieces):
            a = b = c = a_rest = b_rest = c_rest = 0.0
            for k in range(row, row + pieces):
                a, a_rest = _add(a, a_rest, sums[k, 1])
                b, b_rest = _add(b, b_rest, sums[k, 2])
                c, c_rest = _add(c, c_rest, sums[k, 3])
            a, b, c = a + a_rest, b + b_rest, c + c_rest
            if pieces > 1:
                others += not _orthogonal(a, b, c, eps, delta / np.sqrt(length))
                norms[row : row + pieces] = np.sqrt(a) + eps
            else:
                others += sums[row, 0]
            pp, pp_rest = _add(pp, pp_rest, a)
            gg, gg_rest = _add(gg, gg_rest, b)
            gp, gp_rest = _add(gp, gp_rest, c)
        pp, gg, gp = pp + pp_rest, gg + gg_rest, gp + gp_rest
        if others == 0:
            modes[first:end] = _CHANNEL if pieces == 1 else _LONG_CHANNEL
        elif _orthogonal(pp, gg, gp, eps, delta / np.sqrt(rows * length)):
            modes[first:end] = _LAYER
            norms[first:end] = np.sqrt(pp) + eps
        else:
            modes[first:end] = _PLAIN


@_exact
def _second_pass(kind, like, pointers, sizes, lines, numbers, shared, tiles, whole, modes, dots, room, first, end):
    """The step, and where it must wait for `<p, q>`, this of the tile."""
    for k in range(first, end):
        t = tiles[k, 0]
        p, g, m, v = _tensors(like, pointers[t], tiles[k])
        h = _scalars(kind, numbers[lines[t]], like)
        scale, _, eps, decay, less_decay = shared[lines[t]]
        factor = _cast(scale, p)
        if modes[k - whole] == _PLAIN:
            _update(h, p, g, m, v, factor, _cast(decay, p))
        elif modes[k - whole] == _CHANNEL:
            _update_rows(h, p, g, m, v, factor, _cast(less_decay, p), sizes[t, 2], eps, _of_working(room, p))
        else:
            dots[k - whole] = _dot(h, p, g, m, v, factor)


@_exact
def _join_dots(sizes, tiles, whole, slices, modes, dots):
    """Gives each tile the sum over its row or slice."""
    for s in range(len(slices)):
        first, end = slices[s]
        if modes[first] < _LAYER:
            continue
        length = sizes[tiles[whole + first, 0], 2]
        pieces = end - first if modes[first] == _LAYER else -(-length // TILE)
        for row in range(first, end, pieces):
            dot = rest = 0.0
            for k in range(row, row + pieces):
                dot, rest = _add(dot, rest, dots[k])
            dots[row : row + pieces] = dot + rest


@_exact
def _third_pass(kind, like, pointers, sizes, lines, numbers, shared, tiles, whole, modes, norms, dots, taken, room):
    """The step of what has waited."""
    while True:
        k = whole + _fetch_add(taken.ctypes.data, 1)
        if k >= len(tiles):
            return
        if modes[k - whole] >= _LAYER:
            t = tiles[k, 0]
            p, g, m, v = _tensors(like, pointers[t], tiles[k])
            h = _scalars(kind, numbers[lines[t]], like)
            scale, _, _, _, less_decay = shared[lines[t]]
            norm, part = norms[k - whole], dots[k - whole] / norms[k - whole]
            _update_along(h, p, g, m, v, _cast(scale, p), _cast(less_decay, p), _cast(norm, p), _cast(part, p))
