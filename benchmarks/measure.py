"""Timing: contenders in turn on the same tensors, each after a copy that empties the caches and measures bandwidth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.contenders import FUSED_ACCESSES, MEASURES, Contender, Parameters, path_taken
from benchmarks.operations import Operations
from benchmarks.parameter_lists import Shape
from benchmarks.rounds import COPIED, Clock, Entry, Work, compare, entry, on_host, quartiles, reason, take_turns


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

    return on_cuda if device.type == "cuda" else on_host


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
    chosen = {x.name: x for x in contenders}
    entries = [entry(x.name, x.algorithm, x.package) for x in chosen.values()]
    moments: dict[tuple[int, int], Tensor] = {}

    def start(kept: Entry) -> Work:
        contender = chosen[kept["name"]]
        optimizer = contender.make(params)
        kept["first_seconds"] = clock(optimizer.step)
        _share(optimizer, params, moments)
        optimizer.step()
        kept |= _costs(contender, optimizer, elements, device)
        return optimizer.step

    source, target = (torch.empty(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    copies: list[float] = []

    def copy() -> None:
        copies.append(clock(lambda: target.copy_(source)))

    copy()
    copies.clear()  # the first touches new memory
    take_turns(entries, start, rounds, clock, copy)
    compare(entries, {x.name: {y: y for y in MEASURES[x.algorithm]} for x in chosen.values()})
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(params),
        "elements": elements,
        "rounds": rounds,
        "copy_bytes_per_second": [2 * COPIED / x for x in reversed(quartiles(copies))] if copies else None,
        "contenders": entries,
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
