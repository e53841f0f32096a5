"""Times one optimizer step in PyTorch: `python benchmarks/torch_step.py --help`."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import psutil  # type: ignore[import-untyped]
import torch
from rich.console import Console

from benchmarks.contenders import CONTENDERS
from benchmarks.measure import COPIED, measure
from benchmarks.parameter_lists import MODELS, Shape
from benchmarks.tables import plot, renew, show

console = Console() if sys.stdout.isatty() else Console(width=160)

ROOT = Path(__file__).parent.parent
FORMAT = 1
_QUIET = 0.5  # load average
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_file = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="Default: all that memory allows."
)
@click.option("--contender", "patterns", multiple=True, help="A name, or a pattern such as 'sgd*'. Default: all.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Default: float32.")
@click.option("--device", "device_name", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True, help="Steps of each that are timed.")
@click.option("--threads", type=click.IntRange(1), help="Of PyTorch. Default: its own.")
@click.option("--json", "json_path", type=_file, help="Keep everything that was measured.")
@click.option("--markdown", "markdown_path", type=_file, help="A page with markers, to renew the tables between them.")
@click.option("--plot", "plot_path", type=_file, help="Time over that of PyTorch's fused optimizer, SVG or PNG.")
@click.option(
    "--all", "everything", is_flag=True, help="Both dtypes, and all three files at their places in this repository."
)
def main(
    models: Sequence[str],
    patterns: Sequence[str],
    dtypes: Sequence[str],
    device_name: str,
    rounds: int,
    threads: int | None,
    json_path: Path | None,
    markdown_path: Path | None,
    plot_path: Path | None,
    everything: bool,
) -> None:
    """Times a step of every contender on the parameters of real models, in turn and on the same tensors.

    Contenders that are not installed or fail are named, with the reason. Options repeat where they make a choice.
    """
    device = _device(device_name)
    names = _select(patterns)
    if threads:
        torch.set_num_threads(threads)
    if everything:
        dtypes = dtypes or list(DTYPES)
        json_path = json_path or ROOT / "benchmarks" / "results" / f"torch_step_{device.type}.json"
        markdown_path = markdown_path or ROOT / "docs" / "benchmarks_torch.md"
        plot_path = plot_path or json_path.with_suffix(".svg")
    page = markdown_path.read_text(encoding="utf-8") if markdown_path else ""  # before an hour of measuring

    results: dict[str, Any] = {"format": FORMAT, "environment": environment(device), "skipped": {}, "runs": []}
    if (load := results["environment"]["load"]) > _QUIET:
        console.print(f"[yellow]the load average is {load}: on a machine that does other work, times mean little")
    for model in models or MODELS:
        shapes = MODELS[model]()
        for dtype in dtypes or ["float32"]:
            needed, free = memory(shapes, DTYPES[dtype]), _free_memory(device)
            if not models and needed > free:
                why = f"needs about {needed / 1e9:.0f} GB of memory, of which {free / 1e9:.0f} are free"
                results["skipped"][f"{model}, {dtype}"] = why
                console.print(f"[yellow]{model}, {dtype}: left out, {why}; --model {model} runs it nevertheless")
                continue
            console.print(f"{model}, {dtype} ...")
            run = {"model": model} | measure([CONTENDERS[x] for x in names], shapes, DTYPES[dtype], device, rounds)
            results["runs"].append(run)
            show(console, run)

    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if plot_path:
        plot_path.parent.mkdir(parents=True, exist_ok=True)
        plot(results, plot_path)
    if markdown_path:
        address = Path(os.path.relpath(plot_path, markdown_path.parent)).as_posix() if plot_path else None
        markdown_path.write_text(renew(page, results, address), encoding="utf-8")


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


def _select(patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in CONTENDERS):
            message = f"{pattern!r} is none of {', '.join(CONTENDERS)}"
            raise click.BadParameter(message, param_hint="--contender")
    return [name for name in CONTENDERS if not patterns or any(fnmatchcase(name, x) for x in patterns)]


def memory(shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    """About as many bytes as a run needs: tensors, moments twice while an optimizer starts, and intermediate ones."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    intermediate = 8 * 4 * max(1 << 25, *sizes)
    return (2 + 2 * 2) * sum(sizes) * dtype.itemsize + intermediate + 2 * COPIED


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def environment(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on."""
    return {
        "date": date.today().isoformat(),
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpu": _processor(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": dict(_versions()) | ({"CUDA": torch.version.cuda} if device.type == "cuda" else {}),
    }


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in dict.fromkeys([*(x.package for x in CONTENDERS.values()), "numba", "triton"]):
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
