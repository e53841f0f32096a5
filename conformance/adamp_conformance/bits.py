"""Numbers as text that loses nothing: bit patterns in hexadecimal digits, most significant first, row-major."""

from __future__ import annotations

import numpy as np


def to_hex(values: np.ndarray) -> str:
    """The elements' bit patterns one after the other: 16 digits each in float64, 8 in float32, 4 in half precision."""
    size = values.dtype.itemsize
    bits = np.ascontiguousarray(values).view(f"u{size}")
    return bits.astype(f">u{size}").tobytes().hex()


def from_hex(text: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array that `to_hex` wrote.

    Raises:
      ValueError: the text has another length than `shape` needs, or holds something else than hexadecimal digits.
    """
    count = int(np.prod(shape, dtype=int))
    if len(text) != count * dtype.itemsize * 2:
        raise ValueError(
            f"{len(text)} hexadecimal digits, but {list(shape)} elements of {dtype} have {count * dtype.itemsize * 2}"
        )
    bits = np.frombuffer(bytes.fromhex(text), f">u{dtype.itemsize}")
    return bits.astype(f"u{dtype.itemsize}").view(dtype).reshape(shape)


def float_to_hex(value: float) -> str:
    """The bit pattern of a binary64 number."""
    return to_hex(np.float64(value).reshape(1))


def float_from_hex(text: str) -> float:
    """The binary64 number that `float_to_hex` wrote; raises ValueError as `from_hex` does."""
    return float(from_hex(text, np.dtype(np.float64), (1,))[0])
