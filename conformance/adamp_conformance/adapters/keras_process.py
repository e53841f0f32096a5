"""`adamp_tf` on JAX and torch as adapters, in processes of their own: a process has one Keras backend for life."""

from __future__ import annotations

import shlex
import sys

from adamp_conformance.adapter import Adapter
from adamp_conformance.adapters.process import ProcessAdapter

SECONDS = 300.0  # for one reply; the first step of a case is compiled


class KerasProcessAdapter(ProcessAdapter):
    """`KerasAdapter` of the execution `jax` or `torch`, with `KERAS_BACKEND` set, spoken to in the suite's protocol."""

    def __init__(self, execution: str = "jax", device: str = "cpu") -> None:
        if device != "cpu":
            raise RuntimeError(f"keras-{execution} runs on the CPU only, got the device {device!r}")
        served = f"{__name__}:on_{execution}"
        command = ["env", f"KERAS_BACKEND={execution}", sys.executable, "-m", "adamp_conformance.serve", served]
        super().__init__(shlex.join(command), SECONDS)


def on_jax() -> Adapter:
    """What the process on JAX serves."""
    from adamp_conformance.adapters.keras import KerasAdapter

    return KerasAdapter("jax")


def on_torch() -> Adapter:
    """What the process on torch serves."""
    from adamp_conformance.adapters.keras import KerasAdapter

    return KerasAdapter("torch")
