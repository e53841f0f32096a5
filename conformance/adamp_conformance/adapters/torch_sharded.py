"""`adamp_torch` on parameters that several processes hold together, as an adapter; and the processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from adamp_conformance.adapter import Arrays, Capabilities, Parameter, State
from adamp_conformance.adapters.torch import _KEYS, Layouts, TorchAdapter, _array

SECONDS = 60.0  # for one call, after which the processes are taken to wait for each other

Way = tuple[tuple[int, ...], tuple[Placement, ...]]  # shape of the mesh, and a placement for each of its dimensions


def ways(processes: int, rank: int) -> list[Way]:
    """The ways to place a tensor of `rank` axes on `processes` processes, on one or two dimensions; at least one."""
    shards: list[Placement] = [Shard(axis) for axis in range(rank)]
    found: list[Way] = [((processes,), (shard,)) for shard in shards]
    if processes == 4:
        each: list[Placement] = [*shards[:2], Replicate()]
        found += [((2, 2), pair) for pair in itertools.product(each, each) if any(x in shards for x in pair)]
        found += [((2, 2), (_StridedShard(axis, split_factor=2), Shard(axis))) for axis in range(min(rank, 2))]
    return found or [((processes,), (Replicate(),))]


class ShardedAdapter:
    """`adamp_torch.AdamP` and `SGDP` on DTensors, which processes of a gloo group step together.

    Args:
      execution, device: as for all adapters.
      processes: how many, 2 or 4.
      turn: of the `ways` for its rank, a parameter is placed in the one of its position plus `turn`.
    """

    def __init__(self, execution: str = "sharded", device: str = "cpu", processes: int = 4, turn: int = 0) -> None:
        if device != "cpu":
            raise RuntimeError(f"torch-{execution} runs on the CPU only, got the device {device!r}")
        self.execution = execution
        self.processes = processes
        self.turn = turn
        self.number = next(_numbers)

    def capabilities(self) -> Capabilities:
        return TorchAdapter(self.execution).capabilities()

    def create(self, algorithm: str, hyper: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        placed = {}
        for i, (name, x) in enumerate(parameters.items()):
            found = ways(self.processes, x.value.ndim)
            placed[name] = found[(i + self.turn) % len(found)]
        places = self._ask("create_part", algorithm, dict(hyper), dict(parameters), placed=placed)
        self.shapes = {name: x.value.shape for name, x in parameters.items()}
        self.places = {name: [of_process[name] for of_process in places] for name in parameters}

    def load(self, state: State) -> None:
        self._ask("load", state)

    def step(self, gradients: Arrays) -> None:
        self._ask("step", dict(gradients))

    def dump(self) -> State:
        """Puts the state together.

        Raises:
          RuntimeError: processes that hold the same element differ in its bits, or in their step counts.
        """
        parts = self._ask("dump_part")
        (step,) = {part.step for part in parts}
        state = State(step, {}, {moment: {} for moment in parts[0].moments})
        for name, shape in self.shapes.items():
            arrays = [part.tensors(name) for part in parts]
            whole = {key: _join(name, shape, [x[key] for x in arrays], self.places[name]) for key in arrays[0]}
            state.parameters[name] = whole.pop("p")
            for moment, x in whole.items():
                state.moments[moment][name] = x
        return state

    def _ask(self, method: str, *arguments: Any, **made_with: Any) -> list[Any]:
        return workers(self.processes).run(_call, self.number, method, arguments, made_with)


def _join(name: str, shape: tuple[int, ...], parts: list[np.ndarray], places: list[np.ndarray]) -> np.ndarray:
    """The whole of parts whose elements lie at `places` of it, in row-major order."""
    whole = np.zeros(shape, parts[0].dtype)
    flat = whole.reshape(-1)
    for part, place in zip(parts, places, strict=True):
        flat[place.reshape(-1)] = part.reshape(-1)
    if any(part.tobytes() != flat[place].tobytes() for part, place in zip(parts, places, strict=True)):
        raise RuntimeError(f"processes hold different copies of {name!r}")
    return whole


_numbers = itertools.count()
_parts: dict[int, _Part] = {}
_KEPT = 4  # adapters that are in use at once are fewer


def _call(adapter: int, method: str, arguments: tuple[Any, ...], made_with: dict[str, Any]) -> Any:
    """What one process does for an adapter."""
    if made_with:
        _parts.pop(adapter, None)
        _parts[adapter] = _Part(**made_with)
        for old in list(_parts)[:-_KEPT]:
            del _parts[old]
    return getattr(_parts[adapter], method)(*arguments)


class _Part(TorchAdapter):
    """One process's side of the adapter: an optimizer of DTensors."""

    def __init__(self, placed: dict[str, Way]) -> None:
        super().__init__("sharded")
        self.placed = placed

    def _make(self, options: dict[str, Any], layouts: Layouts) -> torch.optim.Optimizer:
        plain = self.parameters
        self.parameters = {name: torch.nn.Parameter(self._place(name, x.detach())) for name, x in plain.items()}
        return super()._make(options, {self.parameters[name]: layouts[x] for name, x in plain.items() if x in layouts})

    def load(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._place(name, self._tensor(state.parameters[name])))
        saved = self.optimizer.state_dict()
        saved["state"] = {
            index: {
                key: self._place(name, self._tensor(state.moments[moment][name]))
                for moment, key in _KEYS[self.algorithm].items()
            }
            for index, name in enumerate(self.parameters)
        }
        self._save_step(saved, state.step)
        self.optimizer.load_state_dict(saved)

    def step(self, gradients: Arrays) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self._place(name, self._tensor(gradients[name]))
        self.optimizer.step()

    def create_part(self, *arguments: Any) -> dict[str, np.ndarray]:
        """Creates, and tells which elements of each parameter lie here."""
        self.create(*arguments)
        numbers = {name: torch.arange(x.numel()).reshape(x.shape) for name, x in self.parameters.items()}
        return {name: self._place(name, x).to_local().numpy() for name, x in numbers.items()}

    def dump_part(self) -> State:
        """The part of the state that lies here."""
        states = {name: self.optimizer.state.get(parameter) for name, parameter in self.parameters.items()}
        moments = {
            moment: {
                name: _local(state[key] if state else torch.zeros_like(self.parameters[name]))
                for name, state in states.items()
            }
            for moment, key in _KEYS[self.algorithm].items()
        }
        (step,) = self._steps() or {0}
        return State(step, {name: _local(x) for name, x in self.parameters.items()}, moments)

    def _place(self, name: str, x: torch.Tensor) -> DTensor:
        shape, placements = self.placed[name]
        return distribute_tensor(x, mesh(shape), placements, src_data_rank=None)


def _local(x: Any) -> np.ndarray:
    return _array(x.to_local())


@cache
def mesh(shape: tuple[int, ...]) -> DeviceMesh:
    """All processes of the group, in such an arrangement."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])


# --- the processes ---------------------------------------------------------------------------------------------------


@cache
def workers(processes: int) -> Workers:
    """Processes that wait for calls as long as this one lives; new ones once those have failed."""
    return Workers(processes)


class Workers:
    """Processes of one gloo group that are all given the same calls."""

    def __init__(self, processes: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.store = tempfile.TemporaryDirectory(prefix="adamp-parity-")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, processes, str(Path(self.store.name) / "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls `function` in every process, and returns what each returned, by rank.

        Args:
          function: of a module that the processes can import.

        Raises:
          RuntimeError: `function` raised something, which is told with its traceback; or a process has died.
          TimeoutError: a process has not answered within `SECONDS`; all are killed then.
        """
        for connection in self.connections:
            connection.send((function, arguments))
        deadline = time.monotonic() + SECONDS
        replies = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self.stop()
                raise TimeoutError(f"process {rank} has not answered within {SECONDS:g} s")
            try:
                replies.append(connection.recv())
            except EOFError:
                self.stop()
                raise RuntimeError(f"process {rank} has died") from None
        for rank, (trace, _) in enumerate(replies):
            if trace:
                raise RuntimeError(f"in process {rank}: {trace}")
        return [result for _, result in replies]

    def stop(self) -> None:
        """Kills the processes."""
        workers.cache_clear()
        for process in self.processes:
            process.kill()


def _work(rank: int, processes: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=timedelta(seconds=SECONDS)
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # nobody is left to ask
            os._exit(0)
        trace, result = "", None
        try:
            result = function(*arguments)
        except Exception:
            trace = traceback.format_exc()
        connection.send((trace, result))
