"""Which axes of each parameter are its channels: the built-in rules, overrides, and a table of both."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamp_spec import Assignment, Layout, Rule, assign_layouts, format_layouts

Layouts = Layout | Mapping[str, Layout] | None

# Names that Flax, Equinox and Haiku give by themselves. The reference is dim 0 of PyTorch's own weight (SPEC: LAYOUT).
RULES = (
    Rule(r"embeddings?$", Layout(0)),  # one row per token
    Rule(r"(^|/)(query|key|value)/kernel$", Layout((-2, -1)), rank=3),  # Flax attention: (in, heads, head_dim)
    Rule(r"(Layer|RMS|layer_|rms_)[Nn]orm[^/]*/(scale|bias|offset)$", Layout(-1)),  # over several axes: (H, W, C)
    Rule(r"(^|/)ConvTranspose(_\d+)?/kernel$", Layout(-2)),  # Flax: (k.., in, out), and PyTorch's dim 0 is `in`
    # Vectors in PyTorch; elsewhere (heads, head_dim) in Flax attention, (out, 1, 1) in Equinox, (1, 1, 1, C) in Haiku.
    Rule(r"(^|/)(bias|b|scale|offset)$", Layout(None)),
    Rule(r"(^|/)weight(_ih|_hh)?$", Layout(0)),  # Equinox: (out, in, k..)
    Rule(r"(^|/)(kernel|w|w_i|w_h)$", Layout(-1)),  # Flax and Haiku: (k.., in, out)
)
DEFAULT = Layout(-1)
VECTORS = (Rule("", Layout(None), rank=0), Rule("", Layout(None), rank=1))


def describe(params: optax.Params, layouts: Layouts = None) -> str:
    """A table of the parameters, their layouts, and what chose each layout.

    Names cannot tell everything: look here once per model, and override what is wrong. What the
    rules cannot see: parameters stacked by ``nn.scan`` or ``vmap`` (add ``batch=``), transposed
    convolutions under a name of their own and Equinox's (channels are the input's axis), and
    ``DenseGeneral`` kernels with several output axes.

    Args:
      params: a tree of parameters; anything with a shape will do.
      layouts: as for :func:`adamp_jax.adamp`.

    Returns:
      One line per parameter: path, shape, layout, rows per slice times row length, and the origin
      of the layout (an override, a rule, or the default: the last axis).

    Raises:
      ValueError, TypeError: as `init` of the optimizer would.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamp_jax import describe
      >>> from adamp_spec import Layout
      >>> params = {"Conv_0": {"bias": jnp.ones(8), "kernel": jnp.ones((3, 3, 4, 8))}, "mix": jnp.ones((6, 5))}
      >>> print(describe(params, {"mix": Layout(channel=0)}))
      parameter      shape         layout                rows           chosen by
      Conv_0/bias    (8,)          Layout(channel=None)  not projected  rule '(^|/)(bias|b|scale|offset)$'
      Conv_0/kernel  (3, 3, 4, 8)  Layout(channel=-1)    8 x 36         rule '(^|/)(kernel|w|w_i|w_h)$'
      mix            (6, 5)        Layout(channel=0)     6 x 5          override 'mix'
    """
    return format_layouts(assign(params, layouts))


def assign(params: optax.Params, layouts: Layouts) -> dict[str, Assignment]:
    """The layout of every parameter, by path (SPEC: LAYOUT-7)."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = {path_name(path): jnp.shape(leaf) for path, leaf in leaves}
    if len(shapes) < len(leaves):
        raise ValueError(f"several parameters share a path; the paths are {[path_name(path) for path, _ in leaves]}")
    if isinstance(layouts, Layout):
        return assign_layouts(shapes, {}, VECTORS, layouts)
    if layouts is not None and not isinstance(layouts, Mapping):
        raise TypeError(f"layouts must be None, an adamp_spec.Layout or a mapping from path to Layout, got {layouts!r}")
    # Under optax.masked and optax.partition a key may be meant for a parameter that is hidden here,
    # and optax.tree_map_params calls init with a placeholder that has no parameters at all.
    nodes = jax.tree.leaves(params, is_leaf=_is_masked)
    complete = bool(nodes) and not any(map(_is_masked, nodes))
    return assign_layouts(shapes, layouts or {}, RULES, DEFAULT, all_used=complete)


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as text, without the box that Flax puts around a variable."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
