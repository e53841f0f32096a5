"""The models of `examples/handover`: from any framework into any other, in the middle of a training.

The oracle judges the step that the second framework takes as if the first one had taken it.
"""

import dataclasses
from collections import Counter
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import relay
import torch
from relay import BATCHES, carried, carried_gradients, hand_over, judge, map_between
from trainers import TRAINERS, Arrays, Held, Trainer, trainer

from adamp_spec import Branch

ROOT = Path(__file__).parent.parent

STEPS = 3  # before the hand-over
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
    """A training in the middle, and what its next step would see.

    Attributes:
      runner: stays there.
      held: all that it holds.
      evaluated: the loss of the next batch in inference.
      loss, gradients: in training.
    """

    runner: Trainer
    held: Held
    evaluated: float
    loss: float
    gradients: Arrays


@cache
def trained(example, framework):
    runner = trainer(example, framework)
    for step in range(STEPS):
        train_on(runner, example, step)
    held, evaluated = runner.hold(), runner.evaluate(*BATCHES[example](STEPS))
    loss, gradients = runner.gradients(*BATCHES[example](STEPS))
    runner.take(held)  # without the statistics of this batch
    return Trained(runner, held, evaluated, loss, gradients)


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

    Its gradients, too, as a loss hardly shows which GELU it is; but not the ResNet's, where a rounding may turn a
    rectified unit on.
    """
    batch = BATCHES[example](STEPS)
    assert runner.evaluate(*batch) == pytest.approx(start.evaluated, rel=1e-5)
    loss, gradients = runner.gradients(*batch)
    assert loss == pytest.approx(start.loss, rel=1e-5)
    wanted = carried_gradients(start.held, start.gradients, there)
    assert gradients.keys() == wanted.keys()
    if example != "resnet":
        assert distance(gradients, wanted) < 1e-5


def distance(a, b):
    """Relative to b, of all arrays together."""
    return np.sqrt(sum(np.sum((a[x] - b[x]) ** 2) for x in b) / sum(np.sum(b[x] ** 2) for x in b))


def check_step(start, runner, there, back):
    """With the gradients that the first framework has, its step."""
    runner.step(carried_gradients(start.held, start.gradients, there))
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
    hand_over(start.runner, runner, derived(example, first, second))
    hand_over(runner, returned, derived(example, second, first))
    check_same(returned.hold(), start.held)
    check_same(returned.hold(), start.runner.hold())


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


# --- Faults ----------------------------------------------------------------------------------------------------------


def test_a_swapped_pair_is_seen():
    """By what the model computes alone, if the way back swaps them again."""
    there, back = derived("resnet", "torch", "keras"), derived("resnet", "keras", "torch")
    one, other = (i for i, pair in enumerate(there.pairs) if pair.source[0] in ("block1.conv1.*", "block1.conv2.*"))
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


@pytest.mark.parametrize(("example", "order"), list(zip(BATCHES, permutations(TRAINERS), strict=False)))
def test_a_relay_stays_beside_the_uninterrupted_run(example, order):
    """Close after few steps; every step is judged on the way, and some weights are projected in it, some not."""
    steps = list(relay.relay(example, order, 1))
    assert len(steps) == 4
    decisions = sum((step.decisions for step in steps), Counter())
    assert decisions[Branch.CHANNEL] + decisions[Branch.LAYER] > 0
    assert decisions[Branch.NONE] > 0
    alone = list(relay.train(example, trainer(example, order[0]), range(4)))
    for one, other in zip(steps, alone, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.decisions.total() == other.decisions.total()


def test_the_page_shows_every_example():
    page = (ROOT / "docs" / "handover.md").read_text()
    for example in BATCHES:
        assert f"(handover/{example}.svg)" in page
        assert (ROOT / "docs" / "handover" / f"{example}.svg").exists()
