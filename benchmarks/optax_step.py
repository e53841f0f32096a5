"""Times one optimizer step in Optax: `python benchmarks/optax_step.py --help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import optax

from adamp_jax import adamp, sgdp
from benchmarks import command
from benchmarks.command import Session, console, options, select
from benchmarks.parameter_lists import Shape
from benchmarks.rounds import Entry, Work, compare, copies_on_host, on_host, take_turns
from benchmarks.tables import Page, Results
from benchmarks.ways import (
    LEARNING_RATE,
    MEASURES,
    MODELS,
    MOMENTUM,
    REHEARSAL,
    WEIGHT_DECAY,
    Contender,
    columns,
    compiled_costs,
    contenders,
    make_arrays,
    run_of,
)

PAGE = Page(
    tool="optax_step",
    document="docs/benchmarks_optax.md",
    caption="Time of a step, relative to optax.adamw and optax.sgd",
    measures=MEASURES,
    columns=columns,
)

MAKERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "lamb": lambda: optax.lamb(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "adamp": lambda: adamp(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "sgd": lambda: optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, MOMENTUM)),
    "sgdp": lambda: sgdp(LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY),
}

# Name of a way -> options of XLA. Where reductions of many tensors could run at once, XLA's default scheduler on CPU
# lets them, at the price of memory.
WAYS: dict[str, dict[str, str]] = {
    "jit": {},
    "jit-memory": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
}
CONTENDERS = contenders(WAYS)


class Steps:
    """Compiled steps of contenders on the same parameters; each takes over the buffers from the one before it.

    The ways of one optimizer share its state.
    """

    def __init__(self, shapes: Sequence[Shape], device: Any) -> None:
        arrays = make_arrays(shapes)
        # XLA must own what is donated to it.
        self._params, self._grads = (
            {k: jax.device_put(x, device, may_alias=False) for k, x in y.items()} for y in arrays
        )
        self._states: dict[str, Any] = {}

    def first(self, contender: Contender) -> tuple[Work, jax.stages.Compiled]:
        """Compiles the step of a contender and takes it once.

        Returns:
          The step, and what it runs.
        """
        name, transformation = contender.optimizer, MAKERS[contender.optimizer]()
        if name not in self._states:
            self._states[name] = jax.jit(transformation.init)(self._params)

        def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = transformation.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(update, donate_argnums=(0, 1), compiler_options=WAYS[contender.way])
        compiled = jitted.lower(self._params, self._states[name], self._grads).compile()

        def step() -> None:
            self._params, self._states[name] = jax.block_until_ready(
                compiled(self._params, self._states[name], self._grads)
            )

        step()
        return step, compiled


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@options(MODELS, rounds=15, everything="All three")
def main(
    models: Sequence[str],
    patterns: Sequence[str],
    device_name: str,
    rounds: int,
    everything: bool,
    **paths: Path | None,
) -> None:
    """Times a jitted step of every contender on the parameters of real models, in turn and on the same tensors.

    On a CPU under both schedulers of XLA, `jit` and `jit-memory`. Contenders that fail are named, with the reason.
    Options repeat where they make a choice.
    """
    device = _device(device_name)
    names = [x for x in select(CONTENDERS, patterns) if device.platform == "cpu" or not WAYS[CONTENDERS[x].way]]
    session = Session(PAGE, environment(device), everything=everything, **paths)
    with jax.default_device(device):
        for model in models or MODELS:
            session.add(measure(model, names, rounds, device))
    session.write()


def measure(model: str, names: Sequence[str], rounds: int, device: Any) -> Results:
    """Times steps of contenders that are given the same parameters and gradients."""
    shapes = MODELS[model]()
    entries = [CONTENDERS[x].entry("optax") for x in names]
    run = run_of(model, shapes, rounds, entries)
    steps, rehearsal = Steps(shapes, device), Steps(REHEARSAL, device)

    def start(kept: Entry) -> Work:
        contender, results = CONTENDERS[kept["name"]], []
        console.print(f"{model}, {contender.name} ...")
        rehearsal.first(contender)
        kept["first_seconds"] = on_host(lambda: results.append(steps.first(contender)))
        [(step, compiled)] = results
        kept |= compiled_costs(compiled, run["elements"])
        return step

    take_turns(entries, start, rounds, on_host, copies_on_host())
    compare(entries, {x: CONTENDERS[x].measures for x in names})
    return run


def _device(name: str) -> Any:
    kind, _, index = name.partition(":")
    try:
        return jax.devices(kind)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError):
        message = f"JAX {jax.__version__} finds no device {name!r}; pass cpu, or cuda where it sees a GPU"
        raise click.BadParameter(message, param_hint="--device") from None


def environment(device: Any) -> Results:
    """What a measurement depends on."""
    on_cpu = device.platform == "cpu"
    packages = ["jax", "jaxlib", "optax", "adamp-parity"]
    return command.environment(
        "cpu" if on_cpu else "cuda", None if on_cpu else device.device_kind, len(os.sched_getaffinity(0)), packages
    )


if __name__ == "__main__":
    sys.exit(main())
