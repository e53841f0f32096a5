"""Snapshots of a small transformer in each backend: the benchmark ends well, and memory stays within a tensor."""

import json
import math
import time

import pytest
from click.testing import CliRunner

from benchmarks import snapshot
from benchmarks.parameter_lists import MODELS


@pytest.mark.parametrize("backend", snapshot.BACKENDS)
def test_memory_peaks_at_a_tensor_above_the_model(backend, tmp_path):
    arguments = ["--parameters", "2e7", "--backend", backend, "--cache", "cold", "--rounds", "1"]
    arguments += ["--directory", str(tmp_path), "--json", str(tmp_path / "x.json")]
    assert CliRunner().invoke(snapshot.main, arguments, catch_exceptions=False).exit_code == 0
    [run] = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert [(x["name"], x["status"]) for x in run["contenders"]] == [
        (f"{work}-{backend}", "measured") for work in snapshot.WORKS
    ]
    peaks = {x["name"]: x["peak_bytes"] / run["largest_bytes"] for x in run["contenders"] if x["ours"]}
    assert len(peaks) == 2
    assert all(peak < 1.25 for peak in peaks.values()), peaks
    assert [x.name for x in tmp_path.iterdir()] == ["x.json"]


def test_the_transformer_has_as_many_parameters_as_asked_for():
    for wanted in (1e8, 1e9):
        assert sum(map(math.prod, snapshot.transformer(wanted))) == pytest.approx(wanted, rel=0.02)
    assert len(snapshot.transformer(1e8)) == 2 * len(MODELS["gpt2-small"]()) - 4


def test_the_peak_of_memory_is_seen():
    with snapshot.peak_of_memory() as most:
        before = most[0]
        time.sleep(0.01)
        x = bytearray(b"\1") * (1 << 26)
        time.sleep(0.01)
        del x
    assert 1 << 26 <= most[0] - before < 1.5 * (1 << 26)
