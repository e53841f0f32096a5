"""What a step asks of a device, counted where PyTorch dispatches its operations."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}
_OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}  # what they write to, they do not read


class Operations(TorchDispatchMode):
    """Counts, within a `with` statement, what would be kernels, reads by the host, and memory moved and held.

    Each operation is taken to read its inputs once and to write its outputs once; views and allocations are free.
    Kernels that are not PyTorch's own operations are not seen, nor is what one operation does inside.

    Attributes:
      kernels: name -> calls.
      read: the tensors whose values the host has read, one entry for each time.
      moved: bytes read and written by the kernels.
      peak: the most bytes that tensors made within held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.read: list[Tensor] = []
        self.moved = 0
        self.peak = 0
        self._live: Counter[int] = Counter()
        self._held = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        inputs = list(_tensors((args, kwargs)))
        foreign = {_storage(x) for x in inputs} - self._live.keys()
        known = {_storage(x) for x in inputs}
        result = func(*args, **kwargs)
        outputs = [x for x in _tensors(result) if _storage(x) not in known]
        if name in READS:
            self.read.append(args[0])
        else:
            given = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
            written = [x for argument in _written(func, given) for x in _tensors(given.get(argument))]
            if (written or outputs) and not name.startswith("empty"):
                self.kernels[name] += 1
                overwritten = {id(x) for x in (written if name in _OVERWRITES else _tensors(kwargs.get("out")))}
                self.moved += _bytes(x for x in inputs if id(x) not in overwritten) + _bytes([*written, *outputs])
        for x in _tensors(result):
            if _storage(x) not in foreign:
                self._watch(x)
        return result

    def _watch(self, x: Tensor) -> None:
        storage, size = _storage(x), x.untyped_storage().nbytes()
        self._held += size if not self._live[storage] else 0
        self._live[storage] += 1
        self.peak = max(self.peak, self._held)
        weakref.finalize(x, self._forget, storage, size)

    def _forget(self, storage: int, size: int) -> None:
        self._live[storage] -= 1
        if not self._live[storage]:
            del self._live[storage]
            self._held -= size


def _written(func: Any, given: dict[str, Any]) -> list[str]:
    """The arguments that an operation writes to."""
    names = [x.name for x in func._schema.arguments if x.alias_info is not None and x.alias_info.is_write]
    if given.get("grad_scale") is None:
        names = [x for x in names if x != "grads"]  # torch's fused optimizers write back what they have unscaled
    return names


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(tensors: Any) -> int:
    """Bytes of distinct tensors, without the repetition of what is expanded."""
    sizes = {}
    for x in tensors:
        elements = 1
        for n, stride in zip(x.shape, x.stride(), strict=True):
            elements *= n if stride or not n else 1
        sizes[_storage(x), x.storage_offset(), x.shape, x.stride()] = elements * x.element_size()
    return sum(sizes.values())


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        yield from _tensors(tuple(x.values()))
    elif isinstance(x, list | tuple):
        for y in x:
            yield from _tensors(y)
