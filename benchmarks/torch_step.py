"""Times one optimizer step in PyTorch: `python benchmarks/torch_step.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import psutil  # type: ignore[import-untyped]
import torch

from benchmarks import command
from benchmarks.command import Session, console, options, select
from benchmarks.contenders import CONTENDERS, MEASURES
from benchmarks.measure import COPIED, measure
from benchmarks.parameter_lists import MODELS, Shape
from benchmarks.tables import Columns, Page, Results

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _columns(run: Results, algorithm: str) -> Columns:
    def share(x: Results) -> str:
        moved = x["accesses"] * run["elements"] * DTYPES[run["dtype"]].itemsize
        return f"{moved / x['quartiles'][1] / run['copy_bytes_per_second'][1]:.0%}"

    columns: Columns = [
        ("accesses", lambda x: f"{x['accesses']:.1f}{'*' if x['accesses_are'] == 'declared' else ''}"),
        ("of copy bandwidth", share),
        ("operations", lambda x: str(x["operations"])),
        ("reads", lambda x: str(x["reads"])),
    ]
    for count in ("launches", "copies", "syncs"):
        if any(count in x for x in run["contenders"]):
            columns.append((count, partial(_count, count)))
    return [*columns, ("first step, s", lambda x: f"{x['first_seconds']:.2f}")]


def _count(name: str, x: Results) -> str:
    return str(x.get(name, ""))


PAGE = Page(
    tool="torch_step",
    document="docs/benchmarks_torch.md",
    caption="Time of a step, relative to PyTorch's fused optimizer",
    measures=MEASURES,
    columns=_columns,
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@options(MODELS, rounds=30, everything="Both dtypes, and all three")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Default: float32.")
@click.option("--threads", type=click.IntRange(1), help="Of PyTorch. Default: its own.")
def main(
    models: Sequence[str],
    patterns: Sequence[str],
    device_name: str,
    rounds: int,
    dtypes: Sequence[str],
    threads: int | None,
    everything: bool,
    **paths: Path | None,
) -> None:
    """Times a step of every contender on the parameters of real models, in turn and on the same tensors.

    Contenders that are not installed or fail are named, with the reason. Options repeat where they make a choice.
    """
    device = _device(device_name)
    names = select(CONTENDERS, patterns)
    if threads:
        torch.set_num_threads(threads)
    session = Session(PAGE, environment(device), everything=everything, **paths)
    for model in models or MODELS:
        shapes = MODELS[model]()
        for dtype in dtypes or (list(DTYPES) if everything else ["float32"]):
            needed, free = memory(shapes, DTYPES[dtype]), _free_memory(device)
            if not models and needed > free:
                why = f"needs about {needed / 1e9:.0f} GB of memory, of which {free / 1e9:.0f} are free"
                session.skip(f"{model}, {dtype}", why, f"--model {model} runs it nevertheless")
                continue
            console.print(f"{model}, {dtype} ...")
            chosen = [CONTENDERS[x] for x in names]
            session.add({"model": model} | measure(chosen, shapes, DTYPES[dtype], device, rounds))
    session.write()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise click.BadParameter(f"{name!r} is no device of PyTorch; pass cpu or cuda", param_hint="--device") from None
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r} cannot be timed here; pass cpu or cuda", param_hint="--device")
    if device.type == "cuda" and not torch.cuda.is_available():
        message = f"PyTorch {torch.__version__} finds no GPU; pass --device cpu"
        raise click.BadParameter(message, param_hint="--device")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and profiles are of the current one
    return device


def memory(shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    """About as many bytes as a run needs: tensors, moments twice while an optimizer starts, and intermediate ones."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    intermediate = 8 * 4 * max(1 << 25, *sizes)
    return (2 + 2 * 2) * sum(sizes) * dtype.itemsize + intermediate + 2 * COPIED


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def environment(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on."""
    packages = dict.fromkeys([*(x.package for x in CONTENDERS.values()), "numba", "triton"])
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    machine = command.environment(device.type, gpu, torch.get_num_threads(), packages)
    machine["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if gpu:
        machine["packages"]["CUDA"] = torch.version.cuda
    return machine


if __name__ == "__main__":
    sys.exit(main())
