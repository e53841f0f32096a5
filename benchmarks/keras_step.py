"""Times one optimizer step in Keras, on each backend: `python benchmarks/keras_step.py --help`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks import command
from benchmarks.command import Session, console, options, select
from benchmarks.parameter_lists import Shape
from benchmarks.rounds import Entry, compare, fail
from benchmarks.tables import Page, Results
from benchmarks.ways import MEASURES, MODELS, columns, contenders, run_of

PAGE = Page(
    tool="keras_step",
    document="docs/benchmarks_keras.md",
    caption="Time of a step, relative to AdamW and SGD of Keras on the same backend",
    measures=MEASURES,
    columns=columns,
)
WORKER = Path(__file__).with_name("keras_worker.py")

# By backend, which is also the name of the distribution.
WAYS = {
    "tensorflow": ("tensorflow-eager", "tensorflow-graph", "tensorflow-xla"),
    "jax": ("jax-jit",),
    "torch": ("torch-eager",),
}
CONTENDERS = {backend: contenders(ways) for backend, ways in WAYS.items()}
ALL = {name: x for chosen in CONTENDERS.values() for name, x in chosen.items()}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@options(MODELS, rounds=7, everything="All three")
def main(
    models: Sequence[str],
    patterns: Sequence[str],
    device_name: str,
    rounds: int,
    everything: bool,
    **paths: Path | None,
) -> None:
    """Times a step of every contender on the parameters of real models, in turn and on the same tensors.

    Each backend has a process of its own, and its ways of execution take turns within. Contenders that are not
    installed or fail are named, with the reason. Options repeat where they make a choice.
    """
    names = select(ALL, patterns)
    session = Session(PAGE, environment(device_name), everything=everything, **paths)
    for model in models or MODELS:
        shapes = MODELS[model]()
        entries: list[Entry] = []
        for backend, chosen in CONTENDERS.items():
            asked = [chosen[x].entry("keras", backend) for x in names if x in chosen]
            if any(x["status"] == "measured" for x in asked):
                console.print(f"{model}, Keras on {backend} ...")
                asked = ask(backend, device_name, shapes, rounds, asked)
            entries += asked
        compare(entries, {x: ALL[x].measures for x in names})
        session.add(run_of(model, shapes, rounds, entries))
    session.write()


def ask(backend: str, device: str, shapes: list[Shape], rounds: int, entries: list[Entry]) -> list[Entry]:
    """Has a process with this backend measure contenders.

    Args:
      backend: as in KERAS_BACKEND.
      device: as on the command line.
      shapes: of the parameters, as PyTorch has them.
      rounds: how often each is timed.
      entries: of the contenders.

    Returns:
      The entries, with what was measured; all as failed if the process did not come to an end.
    """
    kind, _, index = device.partition(":")
    surroundings = {"KERAS_BACKEND": backend, "JAX_PLATFORMS": kind, "TF_CPP_MIN_LOG_LEVEL": "2"}
    if kind == "cpu" or index:
        surroundings["CUDA_VISIBLE_DEVICES"] = index
    request = json.dumps({"shapes": shapes, "rounds": rounds, "entries": entries, "gpu": kind != "cpu"})
    done = subprocess.run(
        [sys.executable, str(WORKER)], input=request, stdout=subprocess.PIPE, text=True, env=os.environ | surroundings
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    for kept in entries:
        fail(kept, f"its process ended with exit code {done.returncode}")
    return entries


def environment(device: str) -> Results:
    """What a measurement depends on."""
    kind, _, index = device.partition(":")
    packages = ["keras", *WAYS, "jaxlib", "adamp-parity"]
    if kind == "cpu":
        return command.environment(kind, None, len(os.sched_getaffinity(0)), packages)
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]  # so that no backend is loaded here
    try:
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines() if kind == "cuda" else []
        gpu = gpus[int(index or 0)]
    except (OSError, ValueError, IndexError):
        message = f"{device!r} is no device of this machine; pass cpu, or cuda where nvidia-smi finds a GPU"
        raise click.BadParameter(message, param_hint="--device") from None
    return command.environment(kind, gpu, len(os.sched_getaffinity(0)), packages)


if __name__ == "__main__":
    sys.exit(main())
