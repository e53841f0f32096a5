"""The commands `adamp-parity map` and `adamp-parity port`."""

from __future__ import annotations

import math
import os
import pkgutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from adamp_conformance.port.derive import IN_ORDER, Proposal, propose
from adamp_conformance.port.inventory import Inventory
from adamp_conformance.port.maps import SAME, Map, MapError, Pair, Place
from adamp_conformance.port.trainings import SNAPSHOT, PortWarning, Training, few, training_of
from adamp_spec import snapshot
from adamp_spec.snapshot import SIZES, Snapshot, Tensor

EXIT_REFUSED = 1


class _Setup(click.ParamType):
    """`package.module:function`, a setup function; becomes the training that it makes."""

    name = "module:function"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Training:
        with suppress(ImportError):
            import triton  # noqa: F401 - which torch loads later; loaded after TensorFlow, it ends the process
        try:
            return training_of(pkgutil.resolve_name(value)())
        except (Exception, SystemExit) as error:  # the function is not ours
            self.fail(f"{value!r} made no training: {type(error).__name__}: {error}", param, context)


force_option = click.option("--force", is_flag=True, help="Replace a file that is there.")


@click.command("map")
@click.argument("source", type=_Setup())
@click.argument("target", type=_Setup())
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the map to this TOML file."
)
@force_option
@click.pass_obj
def map_models(console: Console, source: Training, target: Training, output: Path | None, force: bool) -> None:
    """Find out which layer of one model is which of another.

    SOURCE and TARGET are setup functions, module:function, which take no arguments and return (model, optimizer) in
    PyTorch, a compiled model in Keras, an OptaxTraining in Optax.

    Exit codes: 0 every layer has its counterpart; 1 some have not, and are comments in the file.
    """
    with _refused(console), _noting(console):
        _check_free(output, force)
        here, there = source.inventory(), target.inventory()
        found = propose(here, there)
        _print_proposal(console, found, found.map.pairs, here, there)
        if guessed := _guessed(found.map):
            console.print(
                f"{_layers(len(guessed))} matched by order alone: check them, and then delete their {_NOTE} from the "
                "map, which port refuses until then",
                soft_wrap=True,
                highlight=False,
            )
        if output is not None:
            found.map.write(output, [f"unmatched: {line}" for line in _unmatched(found)], found.doubtful)
            console.print(f"written to {output}", highlight=False)
    sys.exit(EXIT_REFUSED if _unmatched(found) else 0)


@click.command("port")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--from", "made_source", type=_Setup(), help="Setup function of SOURCE, module:function.")
@click.option("--to", "made_target", type=_Setup(), help="Setup function of TARGET, module:function.")
@click.option(
    "--map",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A map file, for either direction. Default: derived from both models.",
)
@click.option("--dry-run", is_flag=True, help="Check all, show what becomes of which tensor, write nothing.")
@force_option
@click.pass_obj
def port(
    console: Console,
    source: Path,
    target: Path,
    made_source: Training | None,
    made_target: Training | None,
    path: Path | None,
    dry_run: bool,
    force: bool,
) -> None:
    """Carry a training's checkpoint SOURCE over to another framework's TARGET.

    Checkpoints are .pt, .pth, .ckpt (PyTorch), .keras (Keras), .msgpack or a folder of Orbax (Optax), and snapshots,
    .safetensors, everywhere. With --map, a snapshot needs no setup function.

    Exit codes: 0 done; 1 refused, and TARGET is what it was.
    """
    for option, training, file in (("--from", made_source, source), ("--to", made_target, target)):
        if training is None and (path is None or file.suffix != SNAPSHOT):
            raise click.UsageError(f"{option} is needed, unless there is a map and the file is a snapshot ({SNAPSHOT})")
    with _refused(console), _noting(console):
        _check_free(target, force or dry_run)
        if made_target:
            made_target.check_suffix(target)
        here = made_source.inventory() if made_source else None
        there = made_target.inventory() if made_target else None
        plans = _directed(_checked(path), here, there) if path else [_derived(console, here, there)]
        with tempfile.TemporaryDirectory(prefix=".adamp-parity.", dir=target.absolute().parent) as folder:
            given, converted = source, Path(folder) / f"target{SNAPSHOT}"
            if made_source and source.suffix != SNAPSHOT:
                given = Path(folder) / f"source{SNAPSHOT}"
                made_source.read(source)
                made_source.save_snapshot(given)
            with snapshot.opened(given) as (header, tensors):
                plan, carried, made = _applied(plans, header, tensors)
                _check_target(made, there)
                if dry_run:
                    _print_plan(console, plan, tensors, carried, made)
                with _bytes_progress(console, made) as counted:
                    snapshot.write(converted, carried, counted)
            if given != source:
                given.unlink()  # which leaves its room to the target
            if made_target:
                made_target.load_snapshot(converted)
            if dry_run:
                console.print("nothing was written", highlight=False)
                return
            if made_target and target.suffix != SNAPSHOT:
                made_target.write(target)
            else:
                os.replace(converted, target)
    console.print(f"written to {target}", highlight=False)


@contextmanager
def _refused(console: Console) -> Iterator[None]:
    """Tells why something cannot be done."""
    try:
        yield
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        console.print(f"[red]refused[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(EXIT_REFUSED)


@contextmanager
def _noting(console: Console) -> Iterator[None]:
    """Prints our own warnings as notes; those of other libraries stay as they are."""
    with warnings.catch_warnings():
        otherwise = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any) -> None:
            if issubclass(category, PortWarning):
                console.print(f"[yellow]note[/]: {escape(str(message))}", soft_wrap=True, highlight=False)
            else:
                otherwise(message, category, *where)

        warnings.simplefilter("always", PortWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _check_free(path: Path | None, force: bool) -> None:
    if path and path.exists() and not force:
        raise FileExistsError(f"{str(path)!r} is there already; --force replaces it")


def _derived(console: Console, source: Inventory | None, target: Inventory | None) -> Map:
    assert source is not None
    assert target is not None
    found = propose(source, target)
    guessed = _guessed(found.map)
    if guessed or _unmatched(found):
        _print_proposal(console, found, guessed, source, target)
        raise MapError(
            f"{_layers(len(guessed))} matched by order alone, {len(_unmatched(found))} not at all: write the map with "
            "adamp-parity map -o map.toml, check and complete it, and give it with --map"
        )
    return found.map


_NOTE = f'note = "{IN_ORDER}"'


def _guessed(given: Map) -> list[Pair]:
    """What order alone tells."""
    return [pair for pair in given.pairs if pair.note == IN_ORDER]


def _layers(count: int) -> str:
    return "1 layer is" if count == 1 else f"{count} layers are"


def _checked(path: Path) -> Map:
    """The map of a file, in which nothing is left that nobody has checked."""
    given = Map.read(path)
    if guessed := _guessed(given):
        raise MapError(
            f"{_layers(len(guessed))} matched by order alone: {few([str(pair) for pair in guessed])}; check them, and "
            f"then delete their {_NOTE} from {str(path)!r}"
        )
    return given


def _directed(given: Map, source: Inventory | None, target: Inventory | None) -> list[Map]:
    """The map, the way back, or both, where nothing tells which is meant."""
    directed = [
        each
        for each in (given, given.reversed())
        if (source is None or source.framework == each.source) and (target is None or target.framework == each.target)
    ]
    if not directed:
        asked = " to ".join(x.framework if x else "any" for x in (source, target))
        raise MapError(f"the map is of {given.source} and {given.target}, and asked for is {asked}")
    return directed


def _applied(
    plans: Sequence[Map], header: Snapshot, tensors: Mapping[str, Tensor]
) -> tuple[Map, Snapshot, dict[str, Tensor]]:
    """The one map that fits a snapshot, and what it makes of it."""
    fitting, refusals = [], []
    for plan in plans:
        try:
            fitting.append((plan, *plan.apply(header, tensors)))
        except MapError as error:
            refusals.append(f"{plan.source} to {plan.target}: {error}" if len(plans) > 1 else str(error))
    if len(fitting) > 1:
        raise MapError("the snapshot fits both sides of the map: give --from or --to")
    if not fitting:
        raise MapError("; ".join(refusals))
    return fitting[0]


def _check_target(made: Mapping[str, Tensor], target: Inventory | None) -> None:
    """That the target gets all that it has, and nothing else."""
    if target is None:
        return
    found = {name: tensor.shape for name, (tensor, *_) in _by_name(made).items()}
    if differing := found.keys() ^ target.shapes.keys():
        lacking, foreign = sorted(differing - found.keys()), sorted(differing & found.keys())
        raise MapError(f"the map leaves out {lacking} of the target, and makes {foreign} that it has not")
    for name, shape in found.items():
        if shape != target.shapes[name]:
            raise MapError(f"the map gives {name!r} the shape {shape}, and the target has {target.shapes[name]}")


@contextmanager
def _bytes_progress(console: Console, made: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors, which advance a bar when they are read."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("carrying over", total=sum(map(_size, made.values())))

        def counted(tensor: Tensor) -> Tensor:
            def read() -> Any:
                array = tensor.read()
                progress.advance(task, _size(tensor))
                return array

            return tensor._replace(read=read)

        yield {name: counted(tensor) for name, tensor in made.items()}


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * SIZES[tensor.dtype]


# ------------------------------------------------------------------------------------------------ tables


def _print_proposal(
    console: Console, found: Proposal, pairs: Sequence[Pair], source: Inventory, target: Inventory
) -> None:
    """These pairs of a proposal, and what is in none."""
    table = _table("source", "row", "target", "matched")
    for pair in pairs:
        here, there = (
            [f"{name} {x.shapes[name]}" for name in _names(found.map, pair.row, side, places) if name in x.shapes]
            for x, side, places in ((source, found.map.source, pair.source), (target, found.map.target, pair.target))
        )
        _add(table, here, [pair.row], there, [pair.note or "by name"])
    if pairs:
        console.print(table)
    for line in _unmatched(found):
        console.print(f"[red]unmatched[/]: {escape(line)}", soft_wrap=True, highlight=False)


def _print_plan(
    console: Console, plan: Map, given: Mapping[str, Tensor], carried: Snapshot, made: Mapping[str, Tensor]
) -> None:
    """What becomes of which tensors; dtypes are those of the tensor and of its moments."""
    sources, targets = (_by_name(tensors) for tensors in (given, made))
    table = _table("source", "row", "target", "dtypes", "layout", "step")
    for pair in plan.pairs:
        here = [name for name in _names(plan, pair.row, plan.source, pair.source) if name in sources]
        there = [name for name in _names(plan, pair.row, plan.target, pair.target) if name in targets]
        entries = [carried.parameters.get(name) for name in there]
        _add(
            table,
            [f"{name} {sources[name][0].shape}" for name in here],
            [pair.row],
            [f"{name} {targets[name][0].shape}" for name in there],
            [" ".join(tensor.dtype for tensor in targets[name]) for name in there],
            [str(entry.layout) if entry else "" for entry in entries],
            [str(entry.step) if entry else "" for entry in entries],
        )
    console.print(table)


def _table(*titles: str) -> Table:
    """A table that breaks what is too long for its column, and cuts nothing off."""
    table = Table()
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _add(table: Table, *columns: Iterable[str]) -> None:
    """A section of lines, as many as the longest column has."""
    for cells in zip_longest(*columns, fillvalue=""):
        table.add_row(*map(escape, cells))
    table.add_section()


def _by_name(tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Each tensor of a model, and its moments."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault(name.partition("/")[2], []).append(tensor)
    return found


def _names(given: Map, row: str, framework: str, places: Iterable[Place]) -> list[str]:
    """What the tensors of a pair may be called in a model."""
    own = ("",) if row == SAME else given.row(row).names(framework)
    named: list[str] = []
    for place in places:
        named += [place.replace("*", name) for name in own] if isinstance(place, str) else place.values()
    return named


def _unmatched(found: Proposal) -> list[str]:
    """Each layer that has no counterpart, and why."""
    lines = []
    for side, unmatched in (("source", found.unmatched_source), ("target", found.unmatched_target)):
        for layer, why in unmatched:
            tensors = ", ".join(layer.tensors.values())
            lines.append(f"{side} layer {layer.path!r} ({layer.kind}: {tensors}): {' '.join(why.split())}")
    return lines
