"""The table of layers for readers: `python -m adamp_conformance.publish.layers > docs/layouts.md`."""

from __future__ import annotations

from collections.abc import Sequence

from adamp_conformance.layers import SPATIAL, Axes, Piece, Row, cut, rows, written

_HEAD = """# Layers and layouts

Which axes of each framework's weights are the channels, and how its weights become another's. Written from
`spec/layouts.toml` by `python -m adamp_conformance.publish.layers`; tests prove each row with the real layers.

A heading has the row's name, by which [maps](porting.md) call it. UPPER CASE marks the axes that index the rows; `(a
b)` is one axis of size a*b, `...` the spatial axes, `~` an axis that lies backwards. `a[q]` is the part q of a; `a +
b` a sum, which has no way back; what `;` separates is joined along the first axis. "Declare" marks what the optimizer
must be told; "by name" what it knows only under the name that the framework gives the layer; "by class" what
`adamp_tf.layouts_for` knows and a path does not tell. `adamp_conformance.layers.convert` carries weights and moments
over, `layouts` gives the layouts.
"""


def markdown() -> str:
    """The table for readers, `docs/layouts.md`."""
    lines = [_HEAD]
    for row in rows().values():
        lines += [f"## `{row.name}`: {row.title}", ""]
        lines += [f"Parts of `{row.part_axis}` in PyTorch's order: {' '.join(row.parts)}.", ""] if row.part_axis else []
        lines += ["| | layer | parameter | is | layout | |", "| --- | --- | --- | --- | --- | --- |"]
        for framework, form in row.forms.items():
            if framework == "nnx" and row.forms.get("linen") is form:
                continue
            shared = framework == "linen" and row.forms.get("nnx") is form
            first = f"| {'flax' if shared else framework} | {', '.join(form.layer)} |"
            for name, pieces in form.pieces.items():
                made_of = "; ".join(_source(row, framework, piece) for piece in pieces)
                words = (("declare", form.declare), ("by name", form.by_name), ("by class", form.by_class))
                note = " ".join(word for word, names in words if name in names)
                lines.append(f"{first} `{name}` | {made_of} | {_layout_text(row, pieces[0].axes)} | {note} |")
                first = "| | |"
            if row.statistics and framework in row.statistics.forms:
                for name, (piece,) in row.statistics.forms[framework].pieces.items():
                    source = _source(row.statistics, framework, piece)
                    lines.append(f"| | | `{name}` | {source} | gathered, not trained | |")
            if form.counter:
                lines.append(f"| | | `{form.counter}` | counts batches | gathered, not trained | |")
            if form.order:
                lines.append(f"| | | | in the order {' '.join(form.order)} | | |")
            if form.apart:
                lines.append(f"| | | | | decides apart: {form.apart} | |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _source(row: Row, framework: str, piece: Piece) -> str:
    terms = [term.parameter + (f"[{term.part}]" if term.part else "") for term in piece.terms]
    constants = "".join(f" {'-' if x < 0 else '+'} {abs(x):g}[{part}]" for x, part in piece.constants)
    return f"`{written(piece.axes)}`" + ("" if framework == "torch" else f" of `{' + '.join(terms)}{constants}`")


def _layout_text(row: Row, axes: Axes) -> str:
    channel, batch, view = cut(row, axes)
    if not channel:
        return "never projected"
    runs = view or [list(axis) for axis in axes]
    spatial = next((i for i, run in enumerate(runs) if run and run[0].name.endswith(SPATIAL)), len(runs))

    def places(indices: Sequence[int]) -> str:
        found = [i if i < spatial else i - len(runs) for i in indices]
        return str(found[0]) if len(found) == 1 else f"({', '.join(map(str, found))})"

    text = places(channel) + (f", batch={places(batch)}" if batch else "")
    if view:
        text += f", view=({', '.join('*'.join(letter.name for letter in run) or '1' for run in view)})"
    return f"`Layout({text})`"


if __name__ == "__main__":
    print(markdown(), end="")
