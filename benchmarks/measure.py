"""Timing: contenders in turn on the same tensors, each after a copy that empties the caches and measures bandwidth."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.contenders import FUSED_ACCESSES, MEASURES, Contender, Parameters, path_taken
from benchmarks.operations import Operations
from benchmarks.parameter_lists import Shape

COPIED = 1 << 28  # bytes, several times what any cache holds

Work = Callable[[], object]
Clock = Callable[[Work], float]


def make_parameters(shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> Parameters:
    """Random parameters with random gradients.

    In every other matrix the gradient is orthogonal to each row of the parameter, as it is where the function does not
    depend on the length of a row; so both outcomes of the decision are there.
    """
    generator = torch.Generator(device).manual_seed(0)
    params: Parameters = []
    for shape in shapes:
        p, g = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        if len(shape) > 1 and len(params) % 2 == 0:
            rows, of_g = p.flatten(1), g.flatten(1)
            of_g -= rows * ((of_g * rows).sum(1, keepdim=True) / (rows * rows).sum(1, keepdim=True))
        params.append(torch.nn.Parameter(p.to(dtype)))
        params[-1].grad = g.to(dtype)
    return params


# --- rounds ----------------------------------------------------------------------------------------------------------


def clock_of(device: torch.device) -> Clock:
    """Seconds that work on a device takes, from an idle device to an idle device."""

    def on_cuda(work: Work) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def on_host(work: Work) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return on_cuda if device.type == "cuda" else on_host


def interleave(
    works: Mapping[str, Work], rounds: int, clock: Clock, before: Work
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times every work once in each round, in an order that starts with another one each time.

    Args:
      works: name -> what is timed.
      rounds: how often.
      clock: gives the seconds of a work.
      before: what is done before each, untimed.

    Returns:
      Name -> seconds, by round; name -> why it failed, and then it is in the first no more.
    """
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    with _no_garbage_collection():
        for i in range(rounds):
            first = i % max(len(names), 1)
            for name in names[first:] + names[:first]:
                if name in failures:
                    continue
                before()
                try:
                    seconds[name].append(clock(works[name]))
                except Exception as error:
                    failures[name] = reason(error)
                    del seconds[name]
    return seconds, failures


@contextmanager
def _no_garbage_collection() -> Any:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quartiles(x: Iterable[float]) -> list[float]:
    """The first quartile, the median and the third."""
    return [float(q) for q in np.percentile(list(x), [25, 50, 75])]


def ratios(x: list[float], measure: list[float]) -> list[float]:
    """Quartiles of the ratio to another contender in the same round."""
    return quartiles(a / b for a, b in zip(x, measure, strict=True))


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"


# --- one model -------------------------------------------------------------------------------------------------------

_KEPT = {"exp_avg": 0, "momentum_buffer": 0, "momentum": 0, "exp_avg_sq": 1}


def measure(
    contenders: Iterable[Contender],
    shapes: list[Shape],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """Times steps of contenders that are given the same parameters, gradients and moments.

    Returns:
      What a run is in the JSON file but for `model`: `benchmarks/README.md`.
    """
    params = make_parameters(shapes, dtype, device)
    elements = sum(p.numel() for p in params)
    clock = clock_of(device)
    moments: dict[tuple[int, int], Tensor] = {}
    optimizers: dict[str, Optimizer] = {}
    entries: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        entry: dict[str, Any] = {"name": contender.name, "algorithm": contender.algorithm, "status": "measured"}
        entries[contender.name] = entry
        if contender.missing:
            entry |= {"status": "missing", "reason": f"{contender.package} is not installed"}
            continue
        try:
            optimizer = contender.make(params)
            entry["first_seconds"] = clock(optimizer.step)
            _share(optimizer, params, moments)
            optimizer.step()
            entry |= _costs(contender, optimizer, elements, device)
            optimizers[contender.name] = optimizer
        except Exception as error:
            entry |= {"status": "failed", "reason": reason(error)}

    source, target = (torch.empty(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    copies: list[float] = []

    def copy() -> None:
        copies.append(clock(lambda: target.copy_(source)))

    copy()
    copies.clear()  # the first touches new memory
    seconds, failures = interleave({name: x.step for name, x in optimizers.items()}, rounds, clock, copy)
    for name, why in failures.items():
        entries[name] |= {"status": "failed", "reason": why}
    for name, entry in entries.items():
        if name in seconds:
            entry["seconds"] = seconds[name]
            entry["quartiles"] = quartiles(seconds[name])
            measures = [x for x in MEASURES[entry["algorithm"]] if x in seconds]
            entry["ratios"] = {x: ratios(seconds[name], seconds[x]) for x in measures}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(params),
        "elements": elements,
        "rounds": rounds,
        "copy_bytes_per_second": [2 * COPIED / x for x in reversed(quartiles(copies))] if copies else None,
        "contenders": list(entries.values()),
    }


def _share(optimizer: Optimizer, params: Parameters, moments: dict[tuple[int, int], Tensor]) -> None:
    """Gives all optimizers the same moments: memory for one, and no contender with an easier place in it."""
    for i, p in enumerate(params):
        state = optimizer.state[p]
        for name, slot in _KEPT.items():
            x = state.get(name)
            if isinstance(x, Tensor) and (x.shape, x.dtype) == (p.shape, p.dtype):
                state[name] = moments.setdefault((i, slot), x)


def _costs(contender: Contender, optimizer: Optimizer, elements: int, device: torch.device) -> dict[str, Any]:
    """What a step asks of the device, and the path that it took."""
    with Operations() as seen:
        optimizer.step()
    path = path_taken(optimizer)
    counters = {id(state["step"]) for state in optimizer.state.values() if isinstance(state.get("step"), Tensor)}
    size = next(iter(optimizer.param_groups[0]["params"])).element_size()
    costs: dict[str, Any] = {
        "path": path,
        "operations": seen.kernels.total(),
        "reads": sum(id(x) not in counters or x.device.type != "cpu" for x in seen.read),
        "accesses": FUSED_ACCESSES[contender.algorithm] if path == "fused" else seen.moved / elements / size,
        "accesses_are": "declared" if path == "fused" else "measured",
    }
    if device.type == "cuda":
        try:
            costs |= _traced(optimizer.step, device)
        except RuntimeError as error:  # a profiler that cannot trace is no reason not to measure
            costs["untraced"] = reason(error)
    return costs


# --- launches --------------------------------------------------------------------------------------------------------

_RANGE = "one step"
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_SYNCS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


def _traced(step: Work, device: torch.device) -> dict[str, int]:
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        with record_function(_RANGE):
            step()
        torch.cuda.synchronize(device)
    on_host = [x for x in seen.events() or () if x.device_type == DeviceType.CPU]
    return calls((x.name, x.time_range.start, x.time_range.end) for x in on_host)


def calls(events: Iterable[tuple[str, float, float]]) -> dict[str, int]:
    """Launches of kernels, and waits of the host, during the step among events of a profile.

    Args:
      events: name, start and end of each.

    Returns:
      `launches`, `copies` (asynchronous copies and settings of memory) and `syncs`.

    Raises:
      RuntimeError: the profile has no step or no launch in it.
    """
    events = list(events)
    ranges = [(start, end) for name, start, end in events if name == _RANGE]
    if not ranges:
        raise RuntimeError("the profile does not hold the step")
    begin, finish = ranges[0]
    names = [name for name, start, end in events if begin <= start and end <= finish]
    counts = {
        "launches": sum(name in _LAUNCHES for name in names),
        "copies": sum(name in ("cudaMemcpyAsync", "cudaMemsetAsync") for name in names),
        "syncs": sum(name in _SYNCS for name in names),
    }
    if not counts["launches"]:
        raise RuntimeError("the profile holds no launch: the device is not traced")
    return counts
