"""The Optax backend on eight devices: judged by the oracle, what moves between devices, which types come out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adamp_conformance.adapters.optax_sharded import ENVIRONMENT, ways
from adamp_conformance.implementations import select
from adamp_conformance.modes import Problem, create, judge_vectors
from adamp_conformance.vectors import load

both = pytest.mark.parametrize("algorithm", ["adamp", "sgdp"])
BRANCHES = {"conv/kernel": [0], "dense/kernel": [1], "dense/bias": [0], "stack/kernel": [0, 1]}
ALL_REDUCES = {"channel": 1, "input": 1, "stacked axis": 1, "stack alone": 0, "replicated": 0}


@pytest.fixture(scope="session")
def report():
    """What `optax_on_eight_devices.py` found."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("optax_on_eight_devices.py")],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        timeout=600,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ALL_REDUCES)
@both
def test_steps_are_within_the_bounds_and_stay_where_they_are(report, algorithm, way):
    found = report[algorithm]["runs"][way]
    assert found["branches"] == BRANCHES
    assert found["margin"] <= 1
    assert found["kept"]


@both
def test_deciding_by_parts_would_be_noticed(report, algorithm):
    assert report[algorithm]["alone"]["margin"] > 1e3


@both
def test_one_all_reduce_and_nothing_else_for_the_whole_tree(report, algorithm):
    runs = report[algorithm]["runs"]
    assert {way: found["collectives"] for way, found in runs.items()} == {
        way: {"all-reduce": count} if count else {} for way, count in ALL_REDUCES.items()
    }
    usual = report["literal"]
    assert usual["all-gather"] > 0
    assert usual["all-reduce"] > 2


@pytest.mark.parametrize("way", ["channel", "input", "stacked"])
@both
def test_types_of_an_explicit_mesh_stay(report, algorithm, way):
    """Source: `test_state_sharding_type_stable` of `optax/contrib/_sharding_test.py`; the step is compiled here."""
    found = report[algorithm]["explicit"][way]
    assert "@x" in found["state"]
    assert found["after"] == found["state"]
    assert found["updates"] == found["params"]


def test_the_adapter_shares_out_most_of_the_vectors():
    """By every kind of axis; `optax-sharded` runs the whole suite so, which is judged here on some vectors only."""
    shapes = [x.before["p"].shape for group in load().groups for x in group.vectors]
    found = [way for shape in shapes for way in ways(shape) if np.prod(shape) > 0]
    sharded = [way for way in found if any(way)]
    assert len(sharded) > len(found) / 2
    assert {axis for way in sharded for axis, names in enumerate(way) if names} >= {0, 1, 2}
    assert {names for way in sharded for names in way if names} == {("x", "y"), "x", "y"}

    (implementation,) = select(["optax-sharded"])
    (group,) = [group for group in load().groups if group.id == "core/adamp-views.float32"]
    problem = Problem(group, group.dtype, "keras")
    outcomes = judge_vectors(create(implementation.factory("cpu"), problem), problem)
    assert len(outcomes) == len(group.vectors)
    assert not {id: x.problem for id, x in outcomes.items() if x.problem}
