"""Which axes of a Keras variable are its channels: defaults by path, exact answers by layer class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
from keras import layers

from adamp_spec import Assignment, Layout, Rule, assign_layouts, format_layouts

LayoutTable = Mapping[str, Layout | Mapping[str, Any]]

LAST = Layout(-1)
LAST_TWO = Layout((-2, -1))

DEFAULT = LAST  # Dense, Conv, ConvTranspose, LSTM, GRU, attention_output: (..., in, out), as PyTorch's dim 0
RULES = (
    Rule(r"(^|/)bias$", Layout(channel=None)),  # GRU (2, 3 units), attention (heads, head_dim): rank 1 in PyTorch
    Rule(r"(^|/)alpha$", Layout(channel=None)),  # PReLU (1, 1, channels)
    Rule(r"(^|/)embeddings$", Layout(0)),
    # Named by hand, and of PyTorch's shape everywhere: (1, N, D), (N, D)
    Rule(r"(^|/)((cls|class)_?token|pos(ition(al)?)?_?emb(ed(ding)?s?)?)$", Layout(0)),
    Rule(r"(^|/)depthwise_kernel$", LAST_TWO),
    Rule(r"(^|/)depthwise_conv\dd(_\d+)?/kernel$", LAST_TWO),
    Rule(r"(^|/)(query|key|value)/kernel$", LAST_TWO, rank=3),  # (in, heads, head_dim)
)

_BY_CLASS: tuple[tuple[tuple[type, ...], dict[str, Layout]], ...] = (
    ((layers.DepthwiseConv1D, layers.DepthwiseConv2D), {"kernel": LAST_TWO}),
    ((layers.SeparableConv1D, layers.SeparableConv2D), {"depthwise_kernel": LAST_TWO, "pointwise_kernel": LAST}),
    ((layers.Embedding,), {"embeddings": Layout(0), "reverse_embeddings": LAST}),
    (
        (
            layers.Dense,
            *(layers.Conv1D, layers.Conv2D, layers.Conv3D),
            *(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose),
            *(layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell),
            *(layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D),
        ),
        {"kernel": LAST, "recurrent_kernel": LAST},
    ),
)


def layouts_for(model: keras.Model) -> dict[str, Layout]:
    """Layouts of the kernels in a model, by the class of the layer that owns each.

    The optimizer alone sees paths: a `DepthwiseConv2D` named `"stem"` looks like any
    convolution to it. This function sees the layers, those inside nested models and
    `MultiHeadAttention` included.

    ```python
    model.compile(adamp_tf.AdamP(layouts=adamp_tf.layouts_for(model)), loss="mse")
    ```

    Args:
      model: a built model or layer.

    Returns:
      Path -> Layout of every kernel and embedding whose layer class is known (convolutions,
      `Dense`, `EinsumDense` and what is made of it, embeddings, recurrent cells). Other
      variables are left to the rules by path. Add to it what you know better:
      `layouts_for(model) | {"my_layer/weight": Layout(0)}`.

    Raises:
      ValueError: the model is not built, so that it has no variables yet.
    """
    if not model.built:
        raise ValueError(f"{model.name!r} is not built; call it on data or model.build(input_shape) first")
    table = {}
    for layer in model._flatten_layers():  # parents first, so that the layer that owns a variable has the last word
        for variable in layer.trainable_variables:
            layout = _by_class(layer, variable)
            if layout is not None:
                table[variable.path] = layout
    return table


def describe(variables: Any, layouts: LayoutTable | None = None) -> str:
    """A table of the layout that each variable gets from `AdamP` or `SGDP`, and why.

    Args:
      variables: a built model or layer, or an iterable of variables.
      layouts: what the optimizer is given as `layouts`.

    Returns:
      Text, one line per variable: path, shape, layout, rows x row length, and whether an
      override, a rule or the default chose it.

    Raises:
      TypeError, ValueError: as the optimizer when it is built.
    """
    variables = getattr(variables, "trainable_variables", variables)
    return format_layouts(resolve(named_shapes(variables), read_table(layouts)))


def read_table(layouts: LayoutTable | None) -> dict[str, Layout]:
    """The user's `layouts`, checked; a value may also be the dict that `Layout.to_dict` gives."""
    table = {}
    for key, value in (layouts or {}).items():
        layout = Layout(**value) if isinstance(value, Mapping) else value
        if not isinstance(layout, Layout):
            raise TypeError(f"layouts[{key!r}] must be an adamp_spec.Layout or its to_dict(), got {value!r}")
        table[key] = layout
    return table


def named_shapes(variables: Iterable[Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Path and shape of each variable."""
    return [(path_of(variable), tuple(variable.shape)) for variable in variables]


def resolve(named: Sequence[tuple[str, tuple[int, ...]]], table: Mapping[str, Layout]) -> dict[str, Assignment]:
    """Path -> layout of every variable, in order; a path that returns is numbered (SPEC: LAYOUT-7)."""
    by_path = assign_layouts(dict(named), table, RULES, DEFAULT)
    resolved: dict[str, Assignment] = {}
    for path, shape in named:
        chosen = by_path[path]
        if chosen.shape != shape:  # another variable has this path too
            chosen = assign_layouts({path: shape}, table, RULES, DEFAULT, all_used=False)[path]
        resolved[f"{path} ({len(resolved)})" if path in resolved else path] = chosen
    return resolved


def path_of(variable: Any) -> str:
    """What rules and `layouts` are matched against: `.path`, or a bare tf.Variable's name without its `:0`."""
    return getattr(variable, "path", None) or re.sub(r":\d+$", "", variable.name)


def _by_class(layer: keras.Layer, variable: keras.Variable) -> Layout | None:
    if isinstance(layer, layers.EinsumDense) and variable.name == "kernel":
        return _einsum_layout(layer.equation, tuple(variable.shape))
    for classes, kernels in _BY_CLASS:
        if isinstance(layer, classes):
            return kernels.get(variable.name)
    return None


def _einsum_layout(equation: str, shape: tuple[int, ...]) -> Layout:
    """The kernel's letters say it: new in the output, channel; in input and output, batch; else, row."""
    operands, outputs = equation.split("->")
    inputs, kernel = operands.split(",")
    letters = list(enumerate(kernel.strip()))
    batch = [axis for axis, letter in letters if letter in inputs and letter in outputs]
    channel = [axis for axis, letter in letters if letter not in inputs and letter in outputs]
    if channel:
        return Layout(channel, batch)
    return Layout(0, [axis + 1 for axis in batch], view=(1, *shape))  # one unit, as PyTorch's weight (1, in)
