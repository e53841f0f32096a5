"""Sharded parameters: the same steps as whole ones, judged by the oracle; how they communicate, and what is refused."""

import importlib
import site
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from adamp_conformance.adapters import torch_sharded
from adamp_conformance.adapters.torch_sharded import ShardedAdapter, Workers, ways, workers
from adamp_conformance.modes import Problem, create, judge_vectors
from adamp_conformance.vectors import load
from adamp_spec import Layout
from adamp_torch._paths import fused_kernels

site.addsitedir(str(Path(__file__).parent))
worker = importlib.import_module("sharded_worker")

both = pytest.mark.parametrize("algorithm", worker.CLASSES)
PLACEMENTS = [
    pytest.param((4,), (Shard(0),), id="rows"),
    pytest.param((4,), (Shard(1),), id="columns"),
    pytest.param((4,), (Shard(2),), id="last axis"),
    pytest.param((2, 2), (Replicate(), Shard(0)), id="replicated rows"),
    pytest.param((2, 2), (Shard(1), Shard(0)), id="blocks"),
    pytest.param((2, 2), (_StridedShard(0, split_factor=2), Shard(0)), id="strided rows"),
]

fusible = pytest.mark.skipif(fused_kernels("cpu") is None, reason="needs numba")
FUSED = pytest.param({"fused": True}, marks=fusible)


def run(name, *arguments):
    """Calls a function of `sharded_worker` in four processes; what it returns in each."""
    pool = workers(4)
    if not getattr(pool, "prepared", False):
        pool.run(site.addsitedir, str(Path(__file__).parent))
        pool.prepared = True
    return pool.run(getattr(worker, name), *arguments)


def one(name, *arguments):
    """The same where all processes return equal things."""
    results = run(name, *arguments)
    assert all(result == results[0] for result in results)
    return results[0]


# --- one numerics ----------------------------------------------------------------------------------------------------


def outside(group, turn):
    """How many elements of each vector lie outside the frozen intervals of its step, of those where any does."""
    problem = Problem(group, group.dtype, "torch")
    adapter = create(lambda: ShardedAdapter(turn=turn), problem)
    adapter.load(problem.initial())
    adapter.step(problem.gradients(problem.initial()))
    after = adapter.dump()
    assert after.step == group.step + 1
    found = {x.id: min(y.outside(after.tensors(x.name)) for y in x.steps[0].outcomes) for x in group.vectors}
    return {id: count for id, count in found.items() if count}


GEOMETRY = [
    group
    for group in load().groups
    if group.id.split("/")[1]
    in ("adamp-shapes.float32", "adamp-views.float32", "adamp-non-finite.float32", "sgdp-views.bfloat16")
]
TURNS = max(len(ways(4, vector.before["p"].ndim)) for group in GEOMETRY for vector in group.vectors)


def test_all_vectors_hold_on_two_processes():
    for group in load().groups:
        problem = Problem(group, group.dtype, "torch")
        found = judge_vectors(create(lambda: ShardedAdapter(processes=2), problem), problem)
        assert len(found) == len(group.vectors)
        assert not {id: outcome.problem for id, outcome in found.items() if outcome.problem}


@pytest.mark.parametrize("turn", range(TURNS))
def test_vectors_hold_in_every_placement_on_four(turn):
    assert sum(len(group.vectors) for group in GEOMETRY) == 29 + 14 + 7 + 14
    for group in GEOMETRY:
        assert not outside(group, turn)


@pytest.mark.parametrize(
    "fault",
    [
        "each process for itself",
        "rows are not completed",
        "thresholds of the local part",
        "a view is not looked through",
    ],
)
def test_a_fault_in_the_sums_is_found(fault):
    run("plant", fault)
    try:
        assert any(outside(group, turn) for group in GEOMETRY for turn in range(2))
    finally:
        run("uproot")


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("shape", "placements"), PLACEMENTS)
@both
def test_a_sharded_step_follows_the_plain_one(algorithm, shape, placements, mixed):
    run("follows", algorithm, shape, placements, mixed, (None, (0, 3, 5), (), None))


@pytest.mark.parametrize("seed", range(2))
@both
def test_any_layout_on_any_axes_follows_the_plain_step(algorithm, seed):
    assert one("random_layouts", algorithm, seed, 40) == ["batch", "channel", "mixed", "row"]


@both
def test_any_placement_on_three_dimensions_follows_the_plain_step(algorithm):
    run("three_dimensions", algorithm)


def test_a_misread_view_is_found():
    run("plant", "a view is not looked through")
    try:
        with pytest.raises(RuntimeError, match="as Layout"):
            run("random_layouts", "adamp", 0, 40)
    finally:
        run("uproot")


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, FUSED, {"capturable": True}], ids=str)
@both
def test_flags_are_for_what_no_sum_is_needed_for(algorithm, options):
    assert one("flags", algorithm, options) is False


# --- what a step costs -----------------------------------------------------------------------------------------------

SQUARE = (8, 8)
COSTS = {  # mesh, placements, layout, shape -> all-reduces, numbers in them, for 6 tensors
    "rows shared out": ((4,), (Shard(0),), None, SQUARE, [6 * 5]),
    "rows cut": ((4,), (Shard(1),), None, SQUARE, [6 * 4 * 8]),
    "replicated": ((4,), (Replicate(),), None, SQUARE, []),
    "hybrid": ((2, 2), (Replicate(), Shard(0)), None, SQUARE, [6 * 5]),
    "rows shared out twice": ((2, 2), (Shard(0), Shard(0)), None, SQUARE, [6 * 5] * 2),
    "blocks": ((2, 2), (Shard(0), Shard(1)), None, SQUARE, [6 * 4 * 4, 6 * 5]),
    "vectors": ((4,), (Shard(0),), None, (8,), []),
    "exempt": ((4,), (Shard(0),), Layout(None), SQUARE, []),
    "slices shared out": ((4,), (Shard(0),), Layout(1, batch=0), (8, 4, 4), []),
    "slices cut": ((4,), (Shard(1),), Layout(1, batch=0), (8, 4, 4), [6 * 5 * 8]),
    "a view": ((4,), (Shard(0),), Layout(1, batch=0, view=(3, 4, 8)), (12, 8), [6 * 4 * 12]),
}


@pytest.mark.parametrize("case", COSTS)
@both
def test_all_tensors_travel_together(algorithm, case):
    shape, placements, layout, size, expected = COSTS[case]
    assert one("collectives", algorithm, shape, placements, 6, layout, size) == (expected, {})


@both
def test_processes_agree_on_what_is_to_be_summed_without_gradients(algorithm):
    assert one("without_gradients", algorithm) == [1, 1, 0]


@both
def test_nothing_on_the_device_is_read_on_the_host(algorithm):
    assert one("host_reads", algorithm, True) == 0
    assert (one("host_reads", algorithm, False) > 0) == (algorithm == "adamp"), "step counters, which lie there"


@both
def test_intermediate_tensors_do_not_add_up(algorithm):
    few, many = (max(run("memory", algorithm, tensors)) for tensors in (4, 16))
    assert many < few + 1


# --- wrappers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
@both
def test_fully_shard_follows_one_process(algorithm, shape):
    shapes = run("fsdp2", algorithm, shape)
    assert ((0, 10) in shapes[-1]) == (shape == (4,)), "the last process has no rows of three"


@both
def test_fully_shard_over_tensor_parallelism_follows_one_process(algorithm):
    placements = one("tensor_parallel", algorithm)
    assert any("StridedShard" in x or "_S(" in x for x in placements)


@pytest.mark.parametrize("under_way", [False, True])
@both
def test_gradients_are_placed_as_their_parameters(algorithm, under_way):
    run("partial_gradients", algorithm, under_way)


@both
def test_distributed_data_parallel_needs_nothing(algorithm):
    one("ddp", algorithm)


@pytest.mark.parametrize("buckets", [False, True])
@both
def test_the_zero_redundancy_optimizer_follows_one_process(algorithm, buckets):
    assert sum(run("zero", algorithm, buckets)) == 5


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
@both
def test_a_distributed_checkpoint_goes_on_bit_for_bit(algorithm, shape, tmp_path):
    assert one("checkpoint", algorithm, str(tmp_path), shape) == 0.2


@both
def test_a_complete_checkpoint_goes_from_sharded_to_plain_and_back(algorithm):
    ((kind, text),) = one("checkpoint_of_the_whole", algorithm)
    assert kind == "RuntimeError"
    assert "set_optimizer_state_dict" in text


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=fusible)])
@both
def test_the_gradient_scaler_skips_an_overflow_of_one_process_in_all(algorithm, fused):
    run("scaled", algorithm, fused)


# --- what is refused -------------------------------------------------------------------------------------------------


@both
def test_what_cannot_be_stepped_is_refused(algorithm):
    found = one("refusals", algorithm)
    words = {
        "partial": "redistribute",
        "differentiable": "differentiable",
        "fsdp1 False": "fully_shard",
        "fsdp1 True": "fully_shard",
        "sharded gradient": "the parameter a plain tensor",
        "plain state": "set_optimizer_state_dict",
        "other state": "set_optimizer_state_dict",
    }
    assert found.keys() == words.keys()
    for what, word in words.items():
        assert found[what] is not None, what
        assert found[what][0] == "RuntimeError", found[what]
        assert word in found[what][1]


@both
def test_flattened_parameters_are_refused_at_the_first_step(algorithm):
    def parameter(shape):
        p = torch.nn.Parameter(torch.ones(shape))
        p.grad = torch.ones(shape)
        return p

    for mark in (False, True):
        optimizer = worker.make(algorithm, [parameter((4, 3)), parameter((4,))])
        flat = parameter((16,))
        if mark:
            flat.ds_id = "0_1"
            optimizer.param_groups[0]["params"] = [flat, parameter((4, 3))]
        else:
            optimizer.param_groups[0]["params"] = [flat]
        with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO.*fully_shard"):
            optimizer.step()
        assert not optimizer.state
        assert torch.equal(flat, torch.ones(16))
    own = parameter((4, 3))
    own.ds_id = 0
    with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO.*fully_shard"):
        worker.make(algorithm, [own])


# --- the package of the authors, and a hang ---------------------------------------------------------------------------


def test_the_official_package_fails_on_dtensors():
    found = one("official", "adamp", (Shard(1),))
    assert found is not None
    assert "Partial" in found[1] or "partial" in found[1]


@both
def test_the_official_package_is_silently_wrong_on_parts(algorithm):
    theirs, ours = zip(*run("official_on_parts", algorithm), strict=True)
    assert max(theirs) > 1e-3
    assert max(ours) < 1e-14


def test_processes_that_wait_for_each_other_are_noticed(monkeypatch):
    monkeypatch.setattr(torch_sharded, "SECONDS", 1.0)
    pool = Workers(2)
    pool.run(site.addsitedir, str(Path(__file__).parent))
    with pytest.raises(TimeoutError, match="process 0"):
        pool.run(worker.wait_in_vain)
    assert not any(process.join(5) or process.is_alive() for process in pool.processes)
