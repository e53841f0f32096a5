"""The models of `examples/handover`: from any framework into any other, in the middle of a training.

The oracle judges the step that the second framework takes as if the first one had taken it.
"""

import dataclasses
import re
import sys
from functools import cache, partial
from importlib import import_module
from itertools import combinations, permutations
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import page
import pytest
import relay
import torch
from relay import BATCHES, carried, carried_beside, hand_over, judge, map_between
from trainers import TRAINERS, Arrays, Held, Trainer, trainer

from adamp_conformance.port.derive import propose
from adamp_conformance.port.maps import convert_snapshot
from adamp_conformance.port.trainings import training_of
from adamp_spec import Branch

DOCS = Path(__file__).parent.parent / "docs"

STEPS = 3  # before the hand-over
AHEAD = 3  # batches after it that are looked at

# Relative. Models round alike to 2e-7 in losses and 1.2e-6 in gradients; the other GELU, the smallest difference that
# the examples could have, makes 1e-4 in gradients, and too little in losses.
TOLERANCE = 1e-5

every_example = pytest.mark.parametrize("example", BATCHES)
every_pair = pytest.mark.parametrize(("first", "second"), list(permutations(TRAINERS, 2)))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On arrays as small as these, further ones gain nothing, and lose much on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Trained(NamedTuple):
    """A training in the middle, and what its next steps would see.

    Attributes:
      runner: stays there.
      held: all that it holds.
      evaluated: the loss of the next batch in inference.
      seen: loss and gradients of each of the next batches in training.
    """

    runner: Trainer
    held: Held
    evaluated: float
    seen: list[tuple[float, Arrays]]

    @property
    def gradients(self) -> Arrays:
        return self.seen[0][1]


@cache
def trained(example, framework):
    runner = trainer(example, framework)
    for step in range(STEPS):
        train_on(runner, example, step)
    held, evaluated = runner.hold(), runner.evaluate(*BATCHES[example](STEPS))
    seen = look_ahead(runner, example)
    runner.take(held)  # without the statistics of these batches
    return Trained(runner, held, evaluated, seen)


def look_ahead(runner, example):
    return [runner.gradients(*BATCHES[example](step)) for step in range(STEPS, STEPS + AHEAD)]


def train_on(runner, example, step):
    _, gradients = runner.gradients(*BATCHES[example](step))
    runner.step(gradients)


@cache
def another(example, framework):
    """A training that is to be overwritten."""
    return trainer(example, framework)


@cache
def derived(example, source, target):
    return map_between(another(example, source), another(example, target))


def check_same(a, b):
    """Bit for bit: tensors, steps, hyperparameters, layouts."""
    assert a.snapshot == b.snapshot
    check_same_tensors(a, b)


def check_same_tensors(a, b):
    assert a.tensors.keys() == b.tensors.keys()
    for name, x in a.tensors.items():
        assert x.dtype == b.tensors[name].dtype, name
        assert x.tobytes() == b.tensors[name].tobytes(), name


def check_function(start, runner, there, example):
    """The same function of the weights, of the statistics, and of a batch.

    Its gradients, too, as a loss hardly shows which GELU it is; of one batch at least, as in another one a rounding may
    turn a rectified unit on.
    """
    assert runner.evaluate(*BATCHES[example](STEPS)) == pytest.approx(start.evaluated, rel=TOLERANCE)
    apart = []
    for (loss, gradients), (wanted_loss, wanted) in zip(look_ahead(runner, example), start.seen, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=TOLERANCE)
        apart.append(distance(gradients, carried_beside(start.held, wanted, there)))
    assert min(apart) < TOLERANCE


def distance(a, b):
    """Relative to b, of all arrays together."""
    assert a.keys() == b.keys()
    return np.sqrt(sum(np.sum((a[x] - b[x]) ** 2) for x in b) / sum(np.sum(b[x] ** 2) for x in b))


def check_step(start, runner, there, back):
    """With the gradients that the first framework has, its step."""
    runner.step(carried_beside(start.held, start.gradients, there))
    return judge(start.held, start.gradients, carried(runner.hold(), back))


@every_example
@every_pair
def test_the_second_framework_takes_the_step_of_the_first(example, first, second):
    start, runner = trained(example, first), another(example, second)
    there, back = derived(example, first, second), derived(example, second, first)
    hand_over(start.runner, runner, there)
    check_step(start, runner, there, back)


@every_example
@every_pair
def test_there_and_back_every_bit_returns(example, first, second):
    start, runner, returned = trained(example, first), another(example, second), another(example, first)
    train_on(returned, example, STEPS)  # so that there is something to overwrite
    for overwritten in (runner, returned):
        set_apart(overwritten)
    hand_over(start.runner, runner, derived(example, first, second))
    hand_over(runner, returned, derived(example, second, first))
    check_same(returned.hold(), start.held)
    check_same(returned.hold(), start.runner.hold())


def set_apart(runner):
    """Other hyperparameters, where a snapshot's are taken over."""
    if runner.training.framework == "torch":
        for group in runner.optimizer.param_groups:
            group.update(lr=0.5, weight_decay=0.5 * group["weight_decay"])
    elif runner.training.framework == "keras":
        runner.model.optimizer.learning_rate = 0.5


@every_example
@every_pair
def test_both_compute_the_same_loss_and_gradients(example, first, second):
    start, runner, there = trained(example, first), another(example, second), derived(example, first, second)
    hand_over(start.runner, runner, there)
    check_function(start, runner, there, example)


def test_batches_tracked_are_steps_taken():
    held = trained("resnet", "torch").held
    counts = {int(x) for name, x in held.tensors.items() if name.endswith("num_batches_tracked")}
    assert counts == {STEPS} == {entry.step for entry in held.snapshot.parameters.values()}


def test_tied_weights_go_over_once():
    for framework, name in (("torch", "tokens.weight"), ("keras", "tokens/embeddings"), ("flax", "tokens/embedding")):
        names = [x for x in trained("transformer", framework).held.tensors if x.startswith("parameter/")]
        assert len([x for x in names if x.endswith(name)]) == 1
        assert not any("head" in x for x in names)


@every_example
def test_a_keras_model_is_saved_whole(example, tmp_path):
    import keras

    start = trained(example, "keras")
    start.runner.model.save(tmp_path / "model.keras")
    loaded = TRAINERS["keras"](keras.saving.load_model(tmp_path / "model.keras"))
    assert loaded.evaluate(*BATCHES[example](STEPS)) == start.evaluated
    assert loaded.model.optimizer.iterations == STEPS


def test_embeddings_begin_apart():
    model = trainer("transformer", "keras").model
    tokens, positions = (layer.get_weights()[0] for layer in (model.tokens, model.positions))
    assert not np.any(tokens[: len(positions)] == positions)


# --- Faults ----------------------------------------------------------------------------------------------------------


# All layers of the ResNet that have one kind and one shape, two by two.
ALIKE = [
    ("block1.conv1", "block1.conv2"),
    *combinations(("norm", "block1.norm1", "block1.norm2"), 2),
    *combinations(("block2.norm1", "block2.norm2", "block2.shortcut.1"), 2),
]


@pytest.mark.parametrize(("this", "that"), ALIKE)
def test_a_swapped_pair_is_seen(this, that):
    """By what the model computes alone, if the way back swaps them again."""
    there, back = derived("resnet", "torch", "keras"), derived("resnet", "keras", "torch")
    one, other = (i for i, pair in enumerate(there.pairs) if pair.source[0] in (f"{this}.*", f"{that}.*"))
    pairs = list(there.pairs)
    pairs[one] = dataclasses.replace(pairs[one], target=there.pairs[other].target)
    pairs[other] = dataclasses.replace(pairs[other], target=there.pairs[one].target)
    swapped = dataclasses.replace(there, pairs=tuple(pairs))
    start, runner = trained("resnet", "torch"), another("resnet", "keras")
    hand_over(start.runner, runner, swapped)
    with pytest.raises(AssertionError):
        check_same_tensors(carried(runner.hold(), back), start.held)
    check_same_tensors(carried(runner.hold(), swapped.reversed()), start.held)
    with pytest.raises(AssertionError):
        check_function(start, runner, swapped, "resnet")

    hand_over(start.runner, runner, swapped)
    with pytest.raises(AssertionError, match="margin"):
        check_step(start, runner, swapped, back)
    hand_over(start.runner, runner, swapped)
    check_step(start, runner, swapped, swapped.reversed())


def with_zeros(kind, held):
    return held._replace(tensors={x: y * 0 if x.startswith(f"{kind}/") else y for x, y in held.tensors.items()})


def with_a_step_less(held):
    entries = {x: dataclasses.replace(entry, step=entry.step - 1) for x, entry in held.snapshot.parameters.items()}
    return held._replace(snapshot=dataclasses.replace(held.snapshot, parameters=entries))


@pytest.mark.parametrize("lose", [partial(with_zeros, "m"), partial(with_zeros, "v"), with_a_step_less])
def test_what_the_hand_over_loses_is_seen(lose):
    start, runner = trained("transformer", "keras"), another("transformer", "torch")
    there, back = derived("transformer", "keras", "torch"), derived("transformer", "torch", "keras")
    runner.take(lose(carried(start.held, there)))
    with pytest.raises(AssertionError, match="margin"):
        check_step(start, runner, there, back)


# --- The relay -------------------------------------------------------------------------------------------------------


RELAYS = [("resnet", tuple(TRAINERS)), ("transformer", tuple(TRAINERS))]
RELAYS += [("recurrent", order) for order in permutations(TRAINERS)]  # the cheapest in every order


@cache
def alone(example, framework):
    return list(relay.train(example, trainer(example, framework), range(4)))


@pytest.mark.parametrize(("example", "order"), RELAYS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_a_relay_stays_beside_the_uninterrupted_run(example, order):
    """Close after few steps; every step is judged on the way, and some weights are projected in it, some not."""
    steps = list(relay.relay(example, order, 1))
    assert len(steps) == 4
    seen = {Branch(int(x)) for step in steps for name in page.norms(step.before) for x in step.decisions[name].flat}
    assert Branch.NONE in seen
    assert seen & {Branch.CHANNEL, Branch.LAYER}
    for one, other in zip(steps, alone(example, order[0]), strict=True):
        # Ten times as far as after one step: each amplifies what its gradients were off.
        assert one.loss == pytest.approx(other.loss, rel=10 * TOLERANCE)
        assert page.alike(one, other)


# --- The pages -------------------------------------------------------------------------------------------------------


def test_another_decision_is_seen():
    """In one slice of one parameter, though as many are projected as before."""
    step, *_ = alone("transformer", "torch")
    one, other = (step._replace(decisions=step.decisions | {"in_proj": np.eye(3)[[i]]}) for i in (0, 1))
    assert page.alike(one, one)
    assert not page.alike(one, other)


def test_the_page_is_made(tmp_path, monkeypatch):
    text = (DOCS / "handover.md").read_text()
    (tmp_path / "handover.md").write_text(re.sub(r"(?m)^\| (resnet|transformer|recurrent): .*\n", "", text))
    order = page.ORDERS["recurrent"]
    monkeypatch.setattr(page, "DOCS", tmp_path)
    monkeypatch.setattr(page, "LENGTH", 1)
    monkeypatch.setattr(page, "ORDERS", {"recurrent": order})
    with plt.rc_context():
        page.main()
    (line,) = re.findall(
        r"(?m)^\| recurrent: Keras, Flax, PyTorch, Keras \| (.*) \|$", (tmp_path / "handover.md").read_text()
    )
    steps, margin, same, handed, alone, drift, rounding = map(float, line.split(" | "))
    assert steps == same == 4
    assert 0 < margin <= 1
    assert handed == pytest.approx(alone, abs=1e-3)
    assert 0 < drift < 1e-4
    assert 0 < rounding < 1e-4
    svg = (tmp_path / "handover" / "recurrent.svg").read_text()
    assert all(name in svg for name in ("uninterrupted, Keras", "handed over", "by channel", "not projected"))


def test_the_page_shows_every_example():
    text = (DOCS / "handover.md").read_text()
    for example in BATCHES:
        assert f"(handover/{example}.svg)" in text
        assert (DOCS / "handover" / f"{example}.svg").exists()
        assert f"| {example}: " in text


def test_the_setup_for_optax_on_the_page_of_porting(tmp_path, monkeypatch):
    text = (DOCS / "porting.md").read_text()
    monkeypatch.syspath_prepend(tmp_path)
    for code, name in re.findall(r"```python\n(# ((?:keras|optax)_digits\.py)\n.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(code)
    made = {}
    for name in ("keras_digits", "optax_digits"):
        module = import_module(name)
        made[name] = training_of(module.setup())
        monkeypatch.delitem(sys.modules, name)
    proposal = propose(made["keras_digits"].inventory(), made["optax_digits"].inventory())
    assert not proposal.unmatched_source
    assert not proposal.unmatched_target
    assert {pair.row for pair in proposal.map.pairs} == {"conv", "batch_norm", "dense"}
    made["keras_digits"].save_snapshot(tmp_path / "keras.safetensors")
    convert_snapshot(tmp_path / "keras.safetensors", tmp_path / "optax.safetensors", proposal.map)
    made["optax_digits"].load_snapshot(tmp_path / "optax.safetensors")
