# mypy: disable-error-code="no-untyped-def, misc"
"""The fused path on CUDA: kernels that Triton compiles, for all tensors and all groups of a step at once.

A step is four launches at most. `statistics` adds up what the decisions need, over `p` and `g`; `decide` makes them, on
the device; `update` reads and writes everything once; and it runs again for slices whose `<p, q>` spans tiles, those
that are projected as a layer or in rows longer than a tile. What the device knows ends it at once elsewhere.

A slice (SPEC: LAYOUT-2) is cut into tiles: of some rows, or of a part of one. Sums are formed within a tile in the
working dtype, across tiles in double, in an order that only shapes decide. What AdamP and SGDP differ in is a
denominator, and numbers, which come in a record per tensor. To be read beside `_projection.py`.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from adamp_spec import Rows, one_minus_power
from adamp_torch._base import working_dtype
from adamp_torch._paths import Batch, is_plain

TILE = 4096  # elements

# --- what the kernels read: tables of 8-byte integers -----------------------------------------------------------------

# A tensor: pointers, then numbers in double.
P, G, M, V, STEP, LR_POINTER, LR_IS_DOUBLE, *_numbers = map(tl.constexpr, range(26))
LR, LOG1, LOG2, CORRECTION1, CORRECTION2, EPS, DECAY, WD_RATIO, *_numbers = _numbers
BETA1, OF_G, NESTEROV, NESTEROV_OF_G, BETA2, OF_GG, SIGN, KEEP_PROJECTED, *_numbers = _numbers
CHANNEL_THRESHOLD, LAYER_THRESHOLD, _end = _numbers
RECORD_SIZE = _end
# Its shape: rows in a slice, elements in a row, the axes that index either, and where these stand among all axes.
ROWS, LENGTH, ROW_AXES, COLUMN_AXES, AXES, SHAPE_SIZE = map(tl.constexpr, range(6))
# An axis: its size, and its strides in p, g, m and v.
STRIDE, AXIS_SIZE = tl.constexpr(1), tl.constexpr(5)
# A slice: where it begins in p, g, m and v, its first tile, tiles in all, tiles in each row.
FIRST, TILES, SEGMENTS, SLICE_SIZE = map(tl.constexpr, range(4, 8))
# A tile: its tensor, its slice, its first row and column, its kind. The first kinds are for rows that lie one after
# another in memory; the others, a quarter of the size, are for elements at any strides.
TENSOR, SLICE, ROW, COLUMN, KIND, TILE_SIZE = map(tl.constexpr, range(6))
DENSE_KINDS, KINDS = tl.constexpr(4), tl.constexpr(6)
ROWS_OF_KIND = tl.constexpr((1, 4, 16, 64, 1, 16))

# --- what they hand on ------------------------------------------------------------------------------------------------

# Per tile, each in a plane of its own: how many rows fail the channel test, and the sums of `_projection.Sums`.
FAILURES, PP, GG, GP, PQ, SUMS = map(tl.constexpr, range(6))
# Per slice: the view that is projected.
NEITHER, CHANNEL, LAYER = map(tl.constexpr, range(3))
# Per tensor, in double.
ETA, STEP_SIZE, INVERSE_ROOT, COEFFICIENTS = map(tl.constexpr, range(4))

BLOCK = tl.constexpr(2048)  # partial sums that are added at once


@triton.jit
def _number(tensor, column: tl.constexpr):
    return tl.load((tensor + column).to(tl.pointer_type(tl.float64), bitcast=True))


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _divide(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _orthogonal(pp, gg, gp, threshold, eps):
    """The test of PROJ-1 to PROJ-3, for rows of these sums; NaN is not below."""
    cosine = _divide(_divide(tl.abs(gp), tl.maximum(_sqrt(gg), eps)), tl.maximum(_sqrt(pp), eps))
    return cosine < threshold


@triton.jit
def _total(sums, count):
    """The sum of `count` partial sums, in double."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, count, BLOCK):
        total += tl.load(sums + i + lanes, mask=i + lanes < count, other=0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _along(index, axes, count, column: tl.constexpr):
    """Where the elements lie that `index` numbers along `count` axes, innermost first."""
    offset = tl.zeros_like(index)
    for _ in range(count):
        size = tl.load(axes)
        offset += index % size * tl.load(axes + STRIDE + column)
        index = index // size
        axes += AXIS_SIZE
    return offset


@triton.jit
def _coordinates(tile, shape, K: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr):
    """Rows and columns of a tile of kind `K`, counted from its first; which of them exist; the length of a row."""
    DOWN: tl.constexpr = ROWS_OF_KIND.value[K]
    ACROSS: tl.constexpr = (TILE if K < DENSE_KINDS else TILE // 4) // DOWN
    rows, columns = tl.arange(0, DOWN)[:, None], tl.arange(0, ACROSS)[None, :]
    length = tl.load(shape + LENGTH).to(tl.int32)
    if K < DENSE_KINDS:
        length = tl.multiple_of(length, ALIGN)  # without such hints there are no loads of 16 bytes
    rows_left = tl.minimum(tl.load(shape + ROWS) - tl.load(tile + ROW), TILE).to(tl.int32)
    columns_left = tl.minimum(tl.load(shape + LENGTH) - tl.load(tile + COLUMN), TILE).to(tl.int32)
    if K < DENSE_KINDS:
        columns_left = tl.multiple_of(columns_left, ALIGN)
    return rows, columns, (rows < rows_left) & (columns < columns_left), length


@triton.jit
def _elements(
    tensor, slice, shape, axes, tile, rows, columns, length, column: tl.constexpr, DTYPE: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Pointers to elements of a tile in one of p, g, m and v, as `column` says."""
    start = tl.load(tensor + column).to(tl.pointer_type(DTYPE)) + tl.load(slice + column)
    first_row, first_column = tl.load(tile + ROW), tl.load(tile + COLUMN)
    if K < DENSE_KINDS:
        start += first_row * tl.load(shape + LENGTH) + first_column
        return tl.multiple_of(start, 16) + (rows * length + columns)
    else:
        axes += AXIS_SIZE * tl.load(shape + AXES)
        row_axes = tl.load(shape + ROW_AXES)
        down = _along(first_row + rows, axes, row_axes, column)
        axes += AXIS_SIZE * row_axes
        return start + down + _along(first_column + columns, axes, tl.load(shape + COLUMN_AXES), column)


@triton.jit(do_not_specialize=["tiles_in_all"])
def statistics(
    table, tiles, slices, shapes, axes, sums, tiles_in_all, grad_scale, found_inf,
    DTYPES: tl.constexpr, WORK: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The partial sums of one tile that are sums over `p` and `g`, and its rows that fail the channel test."""
    if tl.load(found_inf) != 0:
        return
    number = tl.program_id(0)
    tile = tiles + TILE_SIZE * number
    slice = slices + SLICE_SIZE * tl.load(tile + SLICE)
    index = tl.load(tile + TENSOR)
    tensor, shape = table + RECORD_SIZE * index, shapes + SHAPE_SIZE * index
    eps, threshold = _number(tensor, EPS).to(WORK), _number(tensor, CHANNEL_THRESHOLD).to(WORK)
    scale = _divide(_number(tensor, SIGN).to(WORK), tl.load(grad_scale).to(WORK))
    for k in tl.static_range(KINDS):
        if tl.load(tile + KIND) == k:
            rows, columns, exists, length = _coordinates(tile, shape, k, TILE, ALIGN)
            p_at = _elements(tensor, slice, shape, axes, tile, rows, columns, length, P, DTYPES[0], k)
            g_at = _elements(tensor, slice, shape, axes, tile, rows, columns, length, G, DTYPES[1], k)
            p, g = tl.load(p_at, exists, 0).to(WORK), tl.load(g_at, exists, 0).to(WORK) * scale
            pp, gg, gp = tl.sum(p * p, 1), tl.sum(g * g, 1), tl.sum(g * p, 1)
            passes = _orthogonal(pp, gg, gp, threshold, eps)
            tl.store(sums + FAILURES * tiles_in_all + number, tl.sum(1 - passes.to(WORK), 0))
            tl.store(sums + PP * tiles_in_all + number, tl.sum(pp, 0))
            tl.store(sums + GG * tiles_in_all + number, tl.sum(gg, 0))
            tl.store(sums + GP * tiles_in_all + number, tl.sum(gp, 0))


@triton.jit(do_not_specialize=["tensors", "tiles_in_all"])
def decide(
    table, tiles, slices, shapes, sums, views, coefficients, tensors, tiles_in_all, found_inf
):  # fmt: skip
    """The coefficients of one tensor, or the view that one slice is projected in (PROJ-4)."""
    if tl.load(found_inf) != 0:
        return
    index = tl.program_id(0)
    if index < tensors:
        _coefficients(table + RECORD_SIZE * index, coefficients + COEFFICIENTS * index)
    else:
        index -= tensors
        slice = slices + SLICE_SIZE * index
        of_tensor = tl.load(tiles + TILE_SIZE * tl.load(slice + FIRST) + TENSOR)
        tensor, shape = table + RECORD_SIZE * of_tensor, shapes + SHAPE_SIZE * of_tensor
        first, count, eps = sums + tl.load(slice + FIRST), tl.load(slice + TILES), _number(tensor, EPS)
        pp, gg, gp = (
            _total(first + PP * tiles_in_all, count),
            _total(first + GG * tiles_in_all, count),
            _total(first + GP * tiles_in_all, count),
        )
        if tl.load(slice + SEGMENTS) > 1:
            failures = _failing_rows(first, tiles_in_all, tl.load(shape + ROWS), tl.load(slice + SEGMENTS), tensor)
        else:
            failures = _total(first + FAILURES * tiles_in_all, count)
        layer = _orthogonal(pp, gg, gp, _number(tensor, LAYER_THRESHOLD), eps)  # PROJ-3
        tl.store(views + index, tl.where(failures == 0, CHANNEL, tl.where(layer, LAYER, NEITHER)))


@triton.jit
def _coefficients(tensor, coefficients):
    """What depends on the step and on the learning rate, either of which may be on the device only (PREC-2)."""
    eta = _number(tensor, LR)
    pointer = tl.load(tensor + LR_POINTER)
    if pointer != 0:
        if tl.load(tensor + LR_IS_DOUBLE) != 0:
            eta = tl.load(pointer.to(tl.pointer_type(tl.float64)))
        else:
            eta = tl.load(pointer.to(tl.pointer_type(tl.float32))).to(tl.float64)
    correction1, correction2 = _number(tensor, CORRECTION1), _number(tensor, CORRECTION2)
    pointer = tl.load(tensor + STEP)
    if pointer != 0:
        step = tl.load(pointer.to(tl.pointer_type(tl.float32))) + 1
        tl.store(pointer.to(tl.pointer_type(tl.float32)), step)
        correction1 = _one_minus_exp(step.to(tl.float64) * _number(tensor, LOG1))
        correction2 = _one_minus_exp(step.to(tl.float64) * _number(tensor, LOG2))
    tl.store(coefficients + ETA, eta)
    tl.store(coefficients + STEP_SIZE, eta / correction1)
    tl.store(coefficients + INVERSE_ROOT, 1 / tl.sqrt(correction2))


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x < 0, without cancellation: what rounding does to the power, its logarithm undoes."""
    power = tl.exp(x)
    return tl.where(power < 0.5, 1 - power, tl.where(power == 1, -x, (1 - power) * x / tl.log(power)))


@triton.jit
def _failing_rows(sums, tiles_in_all, count, segments, tensor):
    """How many rows that span several tiles fail the channel test (PROJ-2)."""
    DOWN: tl.constexpr = 128
    ACROSS: tl.constexpr = BLOCK // DOWN
    eps, threshold = _number(tensor, EPS), _number(tensor, CHANNEL_THRESHOLD)
    failures = tl.zeros([DOWN], tl.float64)
    for row in range(0, count, DOWN):
        rows = row + tl.arange(0, DOWN)
        pp = tl.zeros([DOWN, ACROSS], tl.float64)
        gg = tl.zeros([DOWN, ACROSS], tl.float64)
        gp = tl.zeros([DOWN, ACROSS], tl.float64)
        for column in range(0, segments, ACROSS):
            columns = column + tl.arange(0, ACROSS)
            exists = (rows < count)[:, None] & (columns < segments)[None, :]
            place = sums + rows[:, None] * segments + columns[None, :]
            pp += tl.load(place + PP * tiles_in_all, exists, 0).to(tl.float64)
            gg += tl.load(place + GG * tiles_in_all, exists, 0).to(tl.float64)
            gp += tl.load(place + GP * tiles_in_all, exists, 0).to(tl.float64)
        passes = _orthogonal(tl.sum(pp, 1), tl.sum(gg, 1), tl.sum(gp, 1), threshold, eps)
        failures += 1 - passes.to(tl.float64)
    return tl.sum(failures, 0)


@triton.jit(do_not_specialize=["tiles_in_all", "decided"])
def update(
    table, tiles, slices, shapes, axes, sums, views, coefficients, tiles_in_all, decided, grad_scale, found_inf,
    DTYPES: tl.constexpr, WORK: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
    ADAMP: tl.constexpr, EXACT: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Steps the elements of one tile, or adds up its `<p, q>` if that sum spans tiles; `AGAIN` steps these then.

    Where the moments are stored as they are computed (`EXACT`) they are stored the first time, and read again.
    """
    if tl.load(found_inf) != 0:
        return
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # begins with what `statistics` has left in the cache
    tile = tiles + TILE_SIZE * number
    of_slice = tl.load(tile + SLICE)
    slice = slices + SLICE_SIZE * of_slice
    view = tl.load(views + of_slice, of_slice < decided, NEITHER)
    segments = tl.load(slice + SEGMENTS)
    at_once = (view == NEITHER) | ((view == CHANNEL) & (segments == 1))
    if AGAIN:  # noqa: SIM102 - `and` would make a value of the constant
        if at_once:
            return
    index = tl.load(tile + TENSOR)
    tensor, shape = table + RECORD_SIZE * index, shapes + SHAPE_SIZE * index
    coefficients += COEFFICIENTS * index
    eps = _number(tensor, EPS).to(WORK)
    beta1 = _number(tensor, BETA1).to(WORK)
    nesterov = _number(tensor, NESTEROV) != 0
    keep = _number(tensor, KEEP_PROJECTED) != 0
    scale = _divide(_number(tensor, SIGN).to(WORK), tl.load(grad_scale).to(WORK))
    ratio = tl.where(view == NEITHER, 1.0, _number(tensor, WD_RATIO)).to(WORK)  # PROJ-7
    decay = 1 - tl.load(coefficients + ETA).to(WORK) * _number(tensor, DECAY).to(WORK) * ratio
    if AGAIN:
        of_row = tl.load(tile + ROW) * segments
        first = tl.load(slice + FIRST) + tl.where(view == LAYER, 0, of_row)
        count = tl.where(view == LAYER, tl.load(slice + TILES), segments)
        norm = tl.sqrt(_total(sums + PP * tiles_in_all + first, count)).to(WORK) + eps
        dot = _total(sums + PQ * tiles_in_all + first, count).to(WORK)
        projected = view != NEITHER
        store_moments = keep if EXACT else projected
    else:
        projected = (view == CHANNEL) & at_once
        store_moments = (view == view) if EXACT else at_once
    for k in tl.static_range(KINDS):
        if tl.load(tile + KIND) == k:
            rows, columns, exists, length = _coordinates(tile, shape, k, TILE, ALIGN)
            p_at = _elements(tensor, slice, shape, axes, tile, rows, columns, length, P, DTYPES[0], k)
            g_at = _elements(tensor, slice, shape, axes, tile, rows, columns, length, G, DTYPES[1], k)
            m_at = _elements(tensor, slice, shape, axes, tile, rows, columns, length, M, DTYPES[2], k)
            kept: tl.constexpr = AGAIN and EXACT
            p = tl.load(p_at, exists, 0, eviction_policy="evict_first").to(WORK)
            m = tl.load(m_at, exists, 0, eviction_policy="evict_first").to(WORK)
            if not kept:
                g = tl.load(g_at, exists, 0, eviction_policy="evict_first").to(WORK) * scale
                m = beta1 * m + _number(tensor, OF_G).to(WORK) * g  # ADAMP-1, SGDP-1
            q = m
            if nesterov:
                if kept:
                    g = tl.load(g_at, exists, 0, eviction_policy="evict_first").to(WORK) * scale
                q = beta1 * m + _number(tensor, NESTEROV_OF_G).to(WORK) * g  # ADAMP-3, SGDP-2
            if ADAMP:
                v_at = _elements(tensor, slice, shape, axes, tile, rows, columns, length, V, DTYPES[3], k)
                v = tl.load(v_at, exists, 0, eviction_policy="evict_first").to(WORK)
                if not kept:
                    v = _number(tensor, BETA2).to(WORK) * v + _number(tensor, OF_GG).to(WORK) * (g * g)  # ADAMP-2
                    if store_moments:
                        tl.store(v_at, v, exists, eviction_policy="evict_first")
                q = _divide(q, _sqrt(v) * tl.load(coefficients + INVERSE_ROOT).to(WORK) + eps)  # ADAMP-4
            if not AGAIN:
                dot = tl.sum(p * q, 1)
                norm = (_sqrt(tl.sum(p * p, 1)) + eps)[:, None]
                tl.store(sums + PQ * tiles_in_all + number, tl.sum(dot, 0))
                dot = dot[:, None]
            if projected:
                q -= _divide(dot, norm) * _divide(p, norm)  # PROJ-5, PROJ-6
            if store_moments:
                tl.store(m_at, tl.where(keep, q, m), exists, eviction_policy="evict_first")
            if AGAIN or at_once:
                p = p * decay - tl.load(coefficients + STEP_SIZE).to(WORK) * q  # ADAMP-5, ADAMP-6, SGDP-4, SGDP-5
                tl.store(p_at, p, exists, eviction_policy="evict_first")


# --- what the host makes of a step ------------------------------------------------------------------------------------


class Geometry:
    """How the elements of one tensor, its gradient and its moments lie in memory.

    Attributes:
      rows, length: of one slice; a tensor that is not projected is a slice of one row.
      offsets: where each slice begins, of shape (slices, 4), in elements of p, g, m and v.
      row_axes, column_axes: size and four strides of each axis that indexes rows or columns, the innermost first.
      projects: whether it can be projected.
    """

    def __init__(self, rows: Rows, strides: Sequence[tuple[int, ...]]) -> None:
        axes = [(size, *(s[i] for s in strides)) for i, size in enumerate(rows.shape)]
        batch, channel, row = rows.batch, rows.channel, rows.row
        if not rows.projects:
            batch, channel, row = (), (), tuple(range(len(axes)))
        self.projects = rows.projects
        self.row_axes, self.column_axes = (_merge([axes[i] for i in x]) for x in (channel, row))
        self.rows, self.length = (math.prod(axis[0] for axis in x) for x in (self.row_axes, self.column_axes))
        self.offsets = np.zeros((1, 4), np.int64)
        for size, *stride in _merge([axes[i] for i in batch]):
            self.offsets = (np.arange(size)[:, None, None] * np.array(stride) + self.offsets).reshape(-1, 4)

    def is_dense(self, align: int) -> bool:
        """Whether rows lie one after another, each at a multiple of `align` elements."""

        def lies(axes: list[tuple[int, ...]], stride: int) -> bool:
            return not axes or (len(axes) == 1 and set(axes[0][1:]) == {stride})

        return (
            self.length % align == 0
            and lies(self.column_axes, 1)
            and lies(self.row_axes, self.length)
            and not (self.offsets % align).any()
        )


def _merge(axes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The axes in the order of memory, innermost first; those that continue each other are made one."""
    merged: list[tuple[int, ...]] = []
    for size, *strides in sorted((axis for axis in axes if axis[0] != 1), key=lambda axis: axis[1:]):
        if merged and all(outer == inner * merged[-1][0] for outer, inner in zip(strides, merged[-1][1:], strict=True)):
            merged[-1] = (merged[-1][0] * size, *merged[-1][1:])
        else:
            merged.append((size, *strides))
    return merged


@lru_cache(maxsize=1 << 16)
def _geometry(rows: Rows, shape: torch.Size, strides: tuple[tuple[int, ...], ...]) -> Geometry | None:
    """None where the layout's view is none of these strides."""
    if shape != rows.shape:
        try:
            strides = tuple(torch.empty_strided(shape, s, device="meta").view(rows.shape).stride() for s in strides)
        except RuntimeError:
            return None
    return Geometry(rows, strides)


def _geometry_of(tensors: Sequence[Tensor], rows: Rows) -> Geometry | None:
    """Of `(param, grad, *moments)`; SGDP's one moment stands for two."""
    p, g, m, v = (*tensors, tensors[-1])[:4]
    return _geometry(rows, p.shape, (p.stride(), g.stride(), m.stride(), v.stride()))


_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def knows(x: tuple[Any, ...]) -> bool:
    """Whether the kernels can step `(param, grad, *moments, rows)`."""
    *tensors, rows = x
    plain = all(
        is_plain(x)
        and x.device == tensors[0].device
        and x.layout is torch.strided
        and x.dtype in _TYPES
        and not x.is_neg()
        for x in tensors
    )
    return plain and _geometry_of(tensors, rows) is not None


def adamp(batches: list[Batch], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Steps parameters on one device that `knows` all of, unless `found_inf` is not 0.

    Where `found_inf` is given, step counters move to the device, the only one to know whether a step is taken.

    Raises:
      RuntimeError: a CUDA graph is being captured, and no step with these very tensors has gone before.
    """
    _step(batches, grad_scale, found_inf, _adamp_numbers)


def sgdp(batches: list[Batch], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """As `adamp`."""
    _step(batches, grad_scale, found_inf, _sgdp_numbers)


Numbers = Callable[[dict[str, Any]], dict[tl.constexpr, float]]


def _adamp_numbers(options: dict[str, Any]) -> dict[tl.constexpr, float]:
    beta1, beta2 = options["beta1"], options["beta2"]
    own = {BETA1: beta1, OF_G: 1 - beta1, NESTEROV_OF_G: 1 - beta1, BETA2: beta2, OF_GG: 1 - beta2}
    return own | {LOG1: _log(beta1), LOG2: _log(beta2), DECAY: options["weight_decay"]}


def _sgdp_numbers(options: dict[str, Any]) -> dict[tl.constexpr, float]:
    mu = options["momentum"]
    own = {BETA1: mu, OF_G: 1 - options["dampening"], NESTEROV_OF_G: 1.0, LOG1: -math.inf, LOG2: -math.inf}
    keep = options["project_momentum"] and not options["nesterov"]
    return own | {DECAY: options["weight_decay"] / (1 - mu), KEEP_PROJECTED: keep}


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


_correction = lru_cache(maxsize=1 << 12)(one_minus_power)


class Plan:
    """What depends on shapes only: tables on the device.

    Attributes:
      tables: tiles, slices, shapes, axes, as the kernels name them. What can be projected stands first.
      roots: the square roots of the lengths of a row and of a slice, of shape (tensors, 2).
      tiles, slices: how many tiles there are, how many tiles and how many slices that can be projected.
      last: the tensors' records as they were last uploaded, and where.
    """

    def __init__(self, geometries: Sequence[Geometry], dense: Sequence[bool], tile: int, device: torch.device) -> None:
        shapes: list[tuple[int, ...]] = []
        axes: list[tuple[int, ...]] = []
        slices, tiles = [np.zeros((0, SLICE_SIZE.value), np.int64)], [np.zeros((0, TILE_SIZE.value), np.int64)]
        self.tiles = self.decided_tiles = self.decided_slices = 0
        for x in geometries:
            shapes.append((x.rows, x.length, len(x.row_axes), len(x.column_axes), len(axes)))
            axes += (*x.row_axes, *x.column_axes)
        at = 0
        for i in sorted(range(len(geometries)), key=lambda i: not geometries[i].projects):
            x = geometries[i]
            cut, segments = _cut(x, dense[i], tile)
            count = len(x.offsets) if len(cut) else 0
            own = np.arange(count)[:, None]
            rest = [self.tiles, len(cut), segments] + own * [len(cut), 0, 0]
            slices.append(np.hstack([x.offsets[:count], rest]))
            tiles.append(np.hstack([np.repeat([0, at] + own * [0, 1] + [i, 0], len(cut), 0), np.tile(cut, (count, 1))]))
            at += count
            self.tiles += count * len(cut)
            if x.projects:
                self.decided_tiles, self.decided_slices = self.tiles, at
        self.roots = np.sqrt([[max(x.length, 1), max(x.rows * x.length, 1)] for x in geometries])
        arrays = (np.concatenate(tiles), np.concatenate(slices), np.array(shapes), np.array(axes))
        self.tables = [_upload(array.astype(np.int64), device) for array in arrays]
        self.last: tuple[bytes, Tensor] | None = None

    def upload(self, records: np.ndarray, device: torch.device) -> Tensor:
        """The records on the device; those of the last step where nothing has changed, as in a captured one."""
        content = records.tobytes()
        if self.last is None or self.last[0] != content:
            self.last = content, _upload(records.view(np.int64), device)
        if _is_capturing(device):
            _captured.append((self, self.last))
        return self.last[1]


_captured: list[Any] = []  # what CUDA graphs read, which must stay where it is


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    if _is_capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured, but the last fused step was not one with these tensors and options: take "
            "such a step first, and keep the gradients in place with zero_grad(set_to_none=False)"
        )
    on_host = torch.from_numpy(array)
    return (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)


def _cut(geometry: Geometry, dense: bool, tile: int) -> tuple[np.ndarray, int]:
    """First row, first column and kind of each tile of a slice; tiles in each row."""
    kinds = range(DENSE_KINDS.value) if dense else range(DENSE_KINDS.value, KINDS.value)
    sizes = {k: (ROWS_OF_KIND.value[k], (tile if dense else tile // 4) // ROWS_OF_KIND.value[k]) for k in kinds}
    kind = max((k for k in kinds if geometry.length <= sizes[k][1]), default=kinds[0])
    down, across = sizes[kind]
    rows, columns = np.arange(0, geometry.rows, down), np.arange(0, geometry.length, across)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    return np.pad(grid, ((0, 0), (0, 1)), constant_values=kind), len(columns)


@lru_cache(maxsize=64)
def _plan(geometries: tuple[Geometry, ...], aligned: bytes, align: int, tile: int, device: torch.device) -> Plan:
    dense = [bool(whole) and x.is_dense(align) for x, whole in zip(geometries, aligned, strict=True)]
    return Plan(geometries, dense, tile, device)


def _step(batches: list[Batch], grad_scale: Tensor | None, found_inf: Tensor | None, numbers: Numbers) -> None:
    batches = [batch for batch in batches if batch.params]
    if not batches:
        return
    device = batches[0].params[0].device
    by_dtypes: dict[tuple[torch.dtype, ...], list[tuple[Batch, bool]]] = {}
    on_host: list[Tensor] = []
    for batch in batches:
        counted = batch.options["capturable"] or found_inf is not None or any(x.is_cuda for x in batch.steps)
        if counted:
            _move([x for x in batch.steps if x.device != device or x.dtype != torch.float32], device)
        else:
            on_host += batch.steps
        tensors = zip(batch.params, batch.grads, *batch.moments, strict=True)
        keys = [tuple(x.dtype for x in own) for own in tensors]
        for key in dict.fromkeys(keys):
            part = batch.pick([i for i, x in enumerate(keys) if x == key])
            by_dtypes.setdefault(key, []).append((part, counted))
    # All that can be refused comes before anything is changed.
    prepared = [(key, *_prepare(parts, device, numbers)) for key, parts in by_dtypes.items()]
    one, zero = _constants(device)
    scaling = (one if grad_scale is None else grad_scale, zero if found_inf is None else found_inf)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for dtypes, plan, table, _ in prepared:
            _launch(dtypes, plan, table, *scaling)
    if on_host:
        torch._foreach_add_(on_host, 1)


def _move(steps: list[Tensor], device: torch.device) -> None:
    """Makes counters on the device of counters anywhere."""
    if steps:
        moved = torch.stack([x.to(torch.float32) for x in steps]).to(device, non_blocking=True)
        for step, on_device in zip(steps, moved.unbind(), strict=True):
            step.data = on_device


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """What `grad_scale` and `found_inf` are by default."""
    return torch.ones((), device=device), torch.zeros((), device=device)


def _prepare(
    parts: list[tuple[Batch, bool]], device: torch.device, numbers: Numbers
) -> tuple[Plan, Tensor, list[Tensor]]:
    """The plan and the records for tensors of the same dtypes; and tensors that must outlive the launch."""
    tensors = [x for batch, _ in parts for x in zip(batch.params, batch.grads, *batch.moments, strict=True)]
    rows = [x for batch, _ in parts for x in batch.rows]
    pointers = np.array([[x.data_ptr() for x in own] for own in tensors])
    aligned = (pointers % 16 == 0).all(1)
    align = _align([x.dtype for x in tensors[0]])
    geometries = tuple(map(_geometry_of, tensors, rows))
    plan = _plan(geometries, aligned.tobytes(), align, TILE, device)

    records = np.zeros((len(tensors), RECORD_SIZE.value))
    addresses = records.view(np.int64)
    addresses[:, : pointers.shape[1]] = pointers
    used, at = [], 0
    for batch, counted in parts:
        here = slice(at, at := at + len(batch.params))
        options = batch.options
        own = {EPS: options["eps"], WD_RATIO: options["wd_ratio"], NESTEROV: options["nesterov"]}
        for column, number in (own | {SIGN: -1.0 if options["maximize"] else 1.0} | numbers(options)).items():
            records[here, column.value] = number
        lr = options["lr"]
        if isinstance(lr, Tensor) and lr.device.type == device.type:
            if lr.device != device or lr.dtype not in (torch.float32, torch.float64):
                lr = lr.to(device, torch.float64)
            used.append(lr)
            addresses[here, LR_POINTER.value] = lr.data_ptr()
            addresses[here, LR_IS_DOUBLE.value] = lr.dtype == torch.float64
        else:
            records[here, LR.value] = float(lr)
        if counted:
            addresses[here, STEP.value] = [x.data_ptr() for x in batch.steps]
        else:
            counts = [int(x) + 1 for x in batch.steps]
            for column, beta in ((CORRECTION1, "beta1"), (CORRECTION2, "beta2")):
                corrections = [_correction(options[beta], t) if beta in options else 1.0 for t in counts]
                records[here, column.value] = corrections
        records[here, CHANNEL_THRESHOLD.value : LAYER_THRESHOLD.value + 1] = options["delta"] / plan.roots[here]
    return plan, plan.upload(records, device), used


class Fixed(NamedTuple):
    """What is fixed when kernels are compiled: how, what those that work on tiles are given, what `update` is given."""

    decide_options: dict[str, Any]
    options: dict[str, Any]
    tile: dict[str, Any]
    update: dict[str, Any]


def specialize(dtypes: tuple[torch.dtype, ...]) -> Fixed:
    """For parameters, gradients and moments of these dtypes."""
    work = working_dtype(dtypes[0])
    return Fixed(
        {"num_warps": 8, "enable_fp_fusion": True},
        # In float32, half of a multiprocessor's registers for one tile, so that it works on two at a time.
        {"num_warps": 2 * work.itemsize, "maxnreg": 128, "enable_fp_fusion": True},
        {"DTYPES": tuple(_TYPES[x] for x in dtypes), "WORK": _TYPES[work], "ALIGN": _align(dtypes), "TILE": TILE},
        {"ADAMP": len(dtypes) == 4, "EXACT": all(x == work for x in dtypes[2:])},
    )


def _align(dtypes: Sequence[torch.dtype]) -> int:
    """How many elements of the smallest of these dtypes make 16 bytes."""
    return 16 // min(x.itemsize for x in dtypes)


def _launch(dtypes: tuple[torch.dtype, ...], plan: Plan, table: Tensor, grad_scale: Tensor, found_inf: Tensor) -> None:
    tiles, slices, shapes, axes = plan.tables
    sums = table.new_empty(SUMS.value * plan.tiles, dtype=working_dtype(dtypes[0]))
    views = table.new_empty(plan.decided_slices, dtype=torch.int32)
    coefficients = table.new_empty(COEFFICIENTS.value * len(table), dtype=torch.float64)
    decide_options, options, of_tile, of_update = specialize(dtypes)
    if plan.decided_tiles:
        statistics[(plan.decided_tiles,)](
            table, tiles, slices, shapes, axes, sums, plan.tiles, grad_scale, found_inf, **of_tile, **options
        )
    decide[(len(table) + plan.decided_slices,)](
        table, tiles, slices, shapes, sums, views, coefficients, len(table), plan.tiles, found_inf, **decide_options
    )
    for again, programs in ((False, plan.tiles), (True, plan.decided_tiles)):
        if programs:
            update[(programs,)](
                table, tiles, slices, shapes, axes, sums, views, coefficients, plan.tiles, plan.decided_slices,
                grad_scale, found_inf, AGAIN=again, **of_tile, **of_update, **options,
            )  # fmt: skip
