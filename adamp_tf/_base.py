"""What AdamP and SGDP share as Keras optimizers: checks, layouts, working precision, saving."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import keras
from keras import ops
from keras.backend import is_float_dtype, standardize_dtype

from adamp_spec import Rows, check_flag, check_hyperparameter
from adamp_tf._layouts import LayoutTable, named_shapes, path_of, read_table, resolve
from adamp_tf._projection import project


class ProjectedOptimizer(keras.optimizers.Optimizer):
    """Base of `AdamP` and `SGDP`; arguments as there."""

    def __init__(
        self,
        learning_rate: Any,
        weight_decay: float,
        nesterov: bool,
        epsilon: float,
        delta: float,
        wd_ratio: float,
        layouts: LayoutTable | None,
        **kwargs: Any,
    ) -> None:
        if isinstance(learning_rate, Real):
            check_hyperparameter("lr", learning_rate, "learning_rate")
        weight_decay = check_hyperparameter("weight_decay", weight_decay)
        check_flag("nesterov", nesterov)
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, **kwargs)
        self.nesterov = nesterov
        self.epsilon = check_hyperparameter("eps", epsilon, "epsilon")
        self.delta = check_hyperparameter("delta", delta)
        self.wd_ratio = check_hyperparameter("wd_ratio", wd_ratio)
        self._layouts = read_table(layouts)
        self._undecayed: tuple[tuple[str, Any], ...] = ()
        self._named: list[tuple[str, tuple[int, ...]]] = []  # what the layouts were resolved for

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the slots and settles each variable's layout.

        Args:
          variables: the variables to optimize, of any real floating-point dtype.

        Raises:
          TypeError: a variable is not of a real floating-point dtype.
          ValueError: `layouts` does not fit the variables.
        """
        if self.built:
            return
        for variable in variables:
            _check_dtype(variable, path_of(variable))
        named = named_shapes(variables)
        if _renamed(self._named) == _renamed(named):
            named = self._named  # from a file: loading renames variables (a Sequential loses its prefix)
        resolved = resolve(named, self._layouts).values()
        super().build(variables)
        self._named = named
        self._rows = [layout.rows(shape) for shape, layout, _ in resolved]
        self._decays = [
            not self._is_undecayed(path, variable) for (path, _), variable in zip(named, variables, strict=True)
        ]

    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Takes one step, as `keras.optimizers.Optimizer.apply`, after checking all gradients.

        Sparse gradients are made dense first: every row decays and its moments fade, whether the
        batch touched it or not.

        Raises:
          TypeError: a gradient is not of a real floating-point dtype.
          ValueError: the gradients are not one per variable, or one has another shape than its
            variable. Nothing has changed then.
        """
        grads = list(grads)
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if grads and variables:
            if len(grads) != len(variables):
                raise ValueError(f"got {len(grads)} gradients for {len(variables)} variables; apply needs one for each")
            grads = [_checked(gradient, variable) for gradient, variable in zip(grads, variables, strict=True)]
        super().apply(grads, None if trainable_variables is None else variables)

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Exempts variables from weight decay; the projection still applies to them.

        Unlike in Keras, the exemption is part of the config, so that it survives saving.

        Args:
          var_list: variables to exempt.
          var_names: regular expressions, looked for in each variable's `path` and `name`.

        Raises:
          ValueError: the optimizer is already built, or a name is not a regular expression.
          TypeError: `var_names` is one string.
        """
        if self.built:
            raise ValueError("exclude_from_weight_decay must be called before the optimizer is built")
        if isinstance(var_names, str):
            raise TypeError(f"var_names must be a list of regular expressions, got the string {var_names!r}")
        for name in var_names or ():
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(f"var_names entry {name!r} is not a regular expression: {error}") from error
        exact = [(f"^{re.escape(path_of(variable))}$", self._var_key(variable)) for variable in var_list or ()]
        self._undecayed = (*exact, *((name, None) for name in var_names or ()))

    def _is_undecayed(self, path: str, variable: Any) -> bool:
        return any(
            key == self._var_key(variable)
            if key is not None
            else re.search(pattern, path) or re.search(pattern, variable.name)
            for pattern, key in self._undecayed
        )

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: the decay needs the projection's decision, so `update_step` does it."""

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        """Computes what the variables' steps share, once per step.

        Keras takes it to each `update_step` in place of the learning rate: into the branch of a
        condition, a replica, a compiled function.
        """
        dtypes = sorted({working_dtype(variable) for variable in trainable_variables})
        shared = {dtype: self._coefficients(ops.cast(learning_rate, dtype)) for dtype in dtypes}
        super()._backend_update_step(grads, trainable_variables, shared)

    def _coefficients_for(self, variable: Any, learning_rate: Any) -> tuple[Any, ...]:
        """What `_backend_update_step` has computed; from a learning rate, where `update_step` is called with one."""
        dtype = working_dtype(variable)
        if isinstance(learning_rate, dict):
            return learning_rate[dtype]
        return self._coefficients(ops.cast(learning_rate, dtype))

    def _coefficients(self, lr: Any) -> tuple[Any, ...]:
        """The scalars of one step that depend on no variable, in the dtype of `lr`."""
        raise NotImplementedError

    def _load(self, rows: Rows, *tensors: Any) -> list[Any]:
        """Variable, gradient and slots, in the variable's working dtype and in the shape of its rows."""
        dtype = working_dtype(tensors[0])
        return [_reshaped(ops.cast(tensor, dtype), rows.shape) for tensor in tensors]

    def _project(self, q: Any, p: Any, g: Any, rows: Rows) -> tuple[Any, Any]:
        return project(q, p, g, rows, epsilon=self.epsilon, delta=self.delta, wd_ratio=self.wd_ratio)

    def _store(self, variable: Any, value: Any) -> None:
        self.assign(variable, ops.cast(_reshaped(value, tuple(variable.shape)), variable.dtype))  # PREC-6

    def set_weights(self, weights: Sequence[Any]) -> None:
        """As in Keras, but checks all weights first.

        Raises:
          ValueError: the weights are of another model or optimizer. Nothing has changed then.
        """
        if self.built:
            self._check_state([tuple(weight.shape) for weight in weights])
        super().set_weights(weights)

    def load_own_variables(self, store: Any) -> None:
        """Called by Keras when it loads a file; checks all of it first.

        Raises:
          ValueError: the saved state is of another model or optimizer. Nothing has changed then.
            (Where Keras itself skips a state with a warning, so does this: an optimizer that is not built
            yet, and the state of a `LossScaleOptimizer` read without one, as from a mixed_float16 model.)
        """
        shapes = [tuple(store[str(i)].shape) for i in range(len(store.keys()))]
        if self.built and len(shapes) != len(self.variables) + _OF_LOSS_SCALING:
            self._check_state(shapes)
        super().load_own_variables(store)

    def _check_state(self, shapes: list[tuple[int, ...]]) -> None:
        expected = [tuple(variable.shape) for variable in self.variables]
        if len(shapes) != len(expected):
            raise ValueError(
                f"the saved state has {len(shapes)} variables, but {self.name!r} has {len(expected)}; "
                "it belongs to another model or optimizer"
            )
        for variable, shape, wanted in zip(self.variables, shapes, expected, strict=True):
            if shape != wanted:
                raise ValueError(
                    f"the saved state has shape {shape} for {variable.path!r}, which has shape {wanted}; "
                    "it belongs to another model"
                )

    def get_config(self) -> dict[str, Any]:
        """What `from_config` needs, as JSON values.

        Beside the constructor's arguments: exemptions from weight decay, and the paths and shapes
        of the variables of a built optimizer. Loading a file may give variables other paths;
        `layouts` and exemptions go on meaning the paths that they were written for.
        """
        config = super().get_config()
        config.update(
            {
                "nesterov": self.nesterov,
                "epsilon": self.epsilon,
                "delta": self.delta,
                "wd_ratio": self.wd_ratio,
                "layouts": {key: layout.to_dict() for key, layout in self._layouts.items()} or None,
            }
        )
        if self._undecayed:
            config["exclude_from_weight_decay"] = [pattern for pattern, _ in self._undecayed]
        if self._named:
            config["variables"] = [[path, list(shape)] for path, shape in self._named]
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> ProjectedOptimizer:
        """The optimizer that `get_config` described, without state."""
        config = dict(config)
        undecayed = config.pop("exclude_from_weight_decay", None)
        named = config.pop("variables", ())
        optimizer = super().from_config(config, custom_objects)
        optimizer.exclude_from_weight_decay(var_names=undecayed)
        optimizer._named = [(path, tuple(shape)) for path, shape in named]
        return optimizer


def working_dtype(variable: Any) -> str:
    """What a variable's step is computed in (PREC-1)."""
    return "float64" if standardize_dtype(variable.dtype) == "float64" else "float32"


def _reshaped(tensor: Any, shape: tuple[int, ...]) -> Any:
    return tensor if tuple(tensor.shape) == shape else ops.reshape(tensor, shape)


_OF_LOSS_SCALING = 4  # variables that a LossScaleOptimizer adds to those of the optimizer it wraps


def _renamed(named: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    """What stays of paths when a file is loaded: each variable's own name and shape."""
    return [(path.rpartition("/")[2], shape) for path, shape in named]


def _check_dtype(tensor: Any, what: str) -> None:
    dtype = standardize_dtype(tensor.dtype)
    if not is_float_dtype(dtype) or "float8" in dtype:
        raise TypeError(f"{what} has dtype {dtype}; AdamP and SGDP optimize real floating-point variables")


def _checked(gradient: Any, variable: Any) -> Any:
    """`gradient`, dense and known to fit `variable`; None stays None."""
    if gradient is None:
        return None
    path, shape = path_of(variable), tuple(variable.shape)
    _check_dtype(gradient, f"the gradient of {path!r}")
    slices = type(gradient).__name__ == "IndexedSlices"  # TensorFlow's, which Keras's own sparse=False leaves as it is
    got = (None, *gradient.values.shape[1:]) if slices and gradient.dense_shape is None else tuple(gradient.shape)
    if len(got) != len(shape) or any(size not in (None, wanted) for size, wanted in zip(got, shape, strict=True)):
        raise ValueError(f"the gradient of {path!r} has shape {got}, but the variable has shape {shape}")
    if slices:
        return ops.scatter(ops.expand_dims(gradient.indices, -1), gradient.values, shape)
    return ops.convert_to_tensor(gradient, sparse=False)
