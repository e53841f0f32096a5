"""What the loops of three frameworks have in common: a loss, gradients by the names of snapshots, a step with them."""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from adamp_conformance.port.trainings import training_of
from adamp_spec import snapshot
from adamp_spec.snapshot import Snapshot, Tensor, dtype_name

Arrays = dict[str, np.ndarray]


class Held(NamedTuple):
    """All that a training holds between two steps: what a snapshot says, and its tensors by their names there."""

    snapshot: Snapshot
    tensors: Arrays

    def lazy(self) -> dict[str, Tensor]:
        """The tensors as files and maps want them."""
        return {
            name: Tensor(dtype_name(name, str(x.dtype)), x.shape, partial(np.asarray, x))
            for name, x in self.tensors.items()
        }


class Trainer:
    """A training of one of the examples in one framework.

    Subclasses have the attribute `framework` and what differs: `evaluate`, `gradients` and `step`.

    Args:
      made: what the example's `setup` has returned.
    """

    def __init__(self, made: Any) -> None:
        self.training = training_of(made)

    def evaluate(self, x: np.ndarray, y: np.ndarray) -> float:
        """The mean cross-entropy of a batch as in inference; nothing changes."""
        raise NotImplementedError

    def gradients(self, x: np.ndarray, y: np.ndarray) -> tuple[float, Arrays]:
        """The mean cross-entropy of a batch as in training, and its gradients; running statistics are updated."""
        raise NotImplementedError

    def step(self, gradients: Arrays) -> None:
        """Takes a step of the optimizer."""
        raise NotImplementedError

    def hold(self) -> Held:
        """What the training holds, as a snapshot tells it."""
        with TemporaryDirectory() as folder:
            self.training.save_snapshot(Path(folder) / "held")
            with snapshot.opened(Path(folder) / "held") as (header, tensors):
                return Held(header, {name: tensor.load() for name, tensor in tensors.items()})

    def take(self, held: Held) -> None:
        """Goes on from there."""
        with TemporaryDirectory() as folder:
            snapshot.write(Path(folder) / "held", held.snapshot, held.lazy())
            self.training.load_snapshot(Path(folder) / "held")


class TorchTrainer(Trainer):
    def __init__(self, made: Any) -> None:
        super().__init__(made)
        self.model, self.optimizer = made

    def evaluate(self, x: np.ndarray, y: np.ndarray) -> float:
        import torch

        self.model.eval()
        with torch.no_grad():
            return self._loss(x, y).item()

    def gradients(self, x: np.ndarray, y: np.ndarray) -> tuple[float, Arrays]:
        self.model.train()
        self.optimizer.zero_grad()
        loss = self._loss(x, y)
        loss.backward()
        named = self.model.named_parameters()
        return loss.item(), {name: p.grad.numpy().copy() for name, p in named if p.requires_grad}

    def step(self, gradients: Arrays) -> None:
        import torch

        for name, gradient in gradients.items():
            self.model.get_parameter(name).grad = torch.tensor(gradient)
        self.optimizer.step()

    def _loss(self, x: np.ndarray, y: np.ndarray) -> Any:
        import torch

        logits = self.model(torch.from_numpy(x))
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.from_numpy(y).long().flatten())


class KerasTrainer(Trainer):
    def __init__(self, made: Any) -> None:
        super().__init__(made)
        self.model = made

    def evaluate(self, x: np.ndarray, y: np.ndarray) -> float:
        return float(self._loss(x, y, training=False))

    def gradients(self, x: np.ndarray, y: np.ndarray) -> tuple[float, Arrays]:
        import tensorflow as tf

        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            loss = self._loss(x, y, training=True)
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        arrays = (np.array(tf.convert_to_tensor(gradient)) for gradient in gradients)  # an embedding's are slices
        return float(loss), dict(zip((variable.path for variable in variables), arrays, strict=True))

    def step(self, gradients: Arrays) -> None:
        import tensorflow as tf

        variables = self.model.trainable_variables
        self.model.optimizer.apply([tf.constant(gradients[variable.path]) for variable in variables], variables)

    def _loss(self, x: np.ndarray, y: np.ndarray, training: bool) -> Any:
        return self.model.loss(y, self.model(x, training=training))


class FlaxTrainer(Trainer):
    """Linen's or NNX's; the trees that change are those of the training."""

    def __init__(self, made: Any, optimizer: Any) -> None:
        import jax
        from flax import nnx

        super().__init__(made)
        self.update = jax.jit(optimizer.update)
        self.static: Any = made.model
        self.state: Any = None
        if isinstance(made.model, nnx.Module):
            self.static, self.state = nnx.split(made.model)

    def evaluate(self, x: np.ndarray, y: np.ndarray) -> float:
        made = self.training.made
        return float(_flax_loss()[0](made.params, made.others, self.state, x, y, model=self.static, train=False)[0])

    def gradients(self, x: np.ndarray, y: np.ndarray) -> tuple[float, Arrays]:
        made = self.training.made
        (loss, others), gradients = _flax_loss()[1](
            made.params, made.others, self.state, x, y, model=self.static, train=True
        )
        self.training.made = made._replace(others=others)
        return float(loss), {name: np.array(x) for name, x in _named(gradients)}

    def step(self, gradients: Arrays) -> None:
        import jax
        import optax

        made = self.training.made
        tree = jax.tree.unflatten(jax.tree.structure(made.params), [gradients[name] for name, _ in _named(made.params)])
        updates, opt_state = self.update(tree, made.opt_state, made.params)
        self.training.made = made._replace(params=optax.apply_updates(made.params, updates), opt_state=opt_state)


@cache
def _flax_loss() -> tuple[Any, Any]:
    """The loss of a batch with what the model holds besides, and its gradients too; compiled once for all trainings.

    `model` is a Linen module or the definition of an NNX module's graph, whose `state` is random states of cells.
    """
    import jax
    import optax
    from flax import linen, nnx

    def loss(params: Any, others: Any, state: Any, x: Any, y: Any, model: Any, train: bool) -> tuple[Any, Any]:
        if isinstance(model, linen.Module):
            logits, others = model.apply({"params": params, **others}, x, train, mutable=list(others))
        else:
            logits = nnx.merge(model, nnx.merge_state(state, params), copy=True)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), others

    compiled = partial(jax.jit, static_argnames=("model", "train"))
    return compiled(loss), compiled(jax.value_and_grad(loss, has_aux=True))


def _named(tree: Any) -> list[tuple[str, Any]]:
    import jax

    named = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        named.append((name.removesuffix("/value"), leaf))  # of NNX's boxes
    return named


TRAINERS = {"torch": TorchTrainer, "keras": KerasTrainer, "flax": FlaxTrainer}


def trainer(example: str, framework: str) -> Trainer:
    """A training of an example from its start."""
    module = import_module(f"{example}.{framework}_model")
    given = (module.OPTIMIZER,) if framework == "flax" else ()
    return TRAINERS[framework](module.setup(), *given)
