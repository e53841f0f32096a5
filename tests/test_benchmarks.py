"""The machinery of the benchmarks: who is timed when, what is made of the times, and what is written."""

import json
import math
import re
import sys
import time

import jax
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from adamp_jax._layouts import assign
from adamp_spec import Layout
from adamp_torch import AdamP
from benchmarks import (
    command,
    contenders,
    keras_step,
    measure,
    optax_step,
    rounds,
    tables,
    torch_gpu_checks,
    torch_step,
    ways,
)
from benchmarks.contenders import CONTENDERS, MEASURES
from benchmarks.parameter_lists import MODELS

ROOT = command.ROOT
CPU = torch.device("cpu")
TINY = [(6, 4), (6,), (3, 2, 3, 3), (5, 8), ()]


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        ("resnet50", 161, 25_557_032),
        ("vit-b-16", 152, 86_567_656),
        ("gpt2-small", 148, 124_439_808),
        ("llama-1b", 146, 1_235_814_400),
    ],
)
def test_models_have_the_published_numbers_of_parameters(model, tensors, elements):
    shapes = MODELS[model]()
    assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, elements)


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_each_round_times_each_once_in_rotated_order_and_after_a_copy():
    log = []
    works = {name: lambda name=name: log.append(name) for name in "abc"}
    times = iter(range(100))

    def clock(work):
        work()
        return float(next(times))

    seconds, failures = rounds.interleave(works, 4, clock, lambda: log.append("-"))
    assert "".join(log) == "-a-b-c" + "-b-c-a" + "-c-a-b" + "-a-b-c"
    assert seconds == {"a": [0, 5, 7, 9], "b": [1, 3, 8, 10], "c": [2, 4, 6, 11]}
    assert not failures


def test_a_failure_is_named_and_ends_nothing_else():
    calls = []

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("second\nmore")

    seconds, failures = rounds.interleave({"good": list, "bad": fails}, 5, rounds.on_host, list)
    assert (len(seconds["good"]), len(calls)) == (5, 2)
    assert "bad" not in seconds
    assert failures == {"bad": "ValueError: second"}


def test_ratios_are_of_the_same_round():
    assert rounds.ratios([4.0, 2.0, 9.0], [1.0, 4.0, 3.0]) == [1.75, 3, 3.5]
    assert rounds.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2, 3, 4]


def test_the_clock_of_a_host_covers_the_work():
    assert measure.clock_of(CPU) is rounds.on_host
    assert rounds.on_host(lambda: time.sleep(0.02)) >= 0.02


def test_calls_are_counted_within_the_step():
    events = [
        ("cudaLaunchKernel", 0, 1),
        ("one step", 2, 9),
        ("cudaLaunchKernel", 3, 4),
        ("cudaLaunchKernelExC", 4, 5),
        ("cudaMemcpyAsync", 5, 6),
        ("cudaStreamSynchronize", 6, 7),
        ("aten::add", 7, 8),
        ("cudaDeviceSynchronize", 10, 11),
    ]
    assert measure.calls(events) == {"launches": 2, "copies": 1, "syncs": 1}
    for untraced in ([], events[:2], events[2:]):
        with pytest.raises(RuntimeError):
            measure.calls(untraced)


# --- a run -----------------------------------------------------------------------------------------------------------


def make_tiny(monkeypatch):
    """A model and a copy that are no work."""
    for models in (MODELS, ways.MODELS):
        monkeypatch.setitem(models, "resnet50", lambda: TINY)
    for module in (measure, rounds):
        monkeypatch.setattr(module, "COPIED", 1 << 10)


@pytest.fixture
def tiny(monkeypatch):
    make_tiny(monkeypatch)


def invoke(*arguments, tool=torch_step):
    return CliRunner().invoke(tool.main, [*map(str, arguments)], catch_exceptions=False)


def outcome(tool, directory):
    """The three files of a run of all contenders, and what it printed."""
    page = directory / "docs" / "page.md"
    page.parent.mkdir()
    begin, end = tables.markers(tool.PAGE, "cpu")
    page.write_text(f"# Before\n{begin}\nold\n{end}\nafter\n")
    paths = [directory / "out" / "r.json", page, directory / "out" / "r.svg"]
    options = [x for pair in zip(("--json", "--markdown", "--plot"), paths, strict=True) for x in pair]
    done = invoke("--model", "resnet50", "--rounds", 3, *options, tool=tool)
    assert done.exit_code == 0, done.output
    return json.loads(paths[0].read_text()), page.read_text(), paths[2].read_text(), done.output


@pytest.fixture
def results(tiny, tmp_path):
    return outcome(torch_step, tmp_path)


def test_every_contender_is_timed_and_everything_is_written(results):
    kept, page, svg, printed = results
    assert kept["format"] == command.FORMAT
    assert kept["environment"]["packages"]["torch"] == torch.__version__
    assert kept["environment"]["threads"] == torch.get_num_threads()
    (run,) = kept["runs"]
    assert (run["model"], run["dtype"], run["rounds"]) == ("resnet50", "float32", 3)
    assert (run["tensors"], run["elements"]) == (len(TINY), sum(map(math.prod, TINY)))
    assert [x["name"] for x in run["contenders"]] == list(CONTENDERS)
    for x in run["contenders"]:
        assert x["status"] == "measured", x.get("reason")
        assert len(x["seconds"]) == 3
        assert min(x["seconds"]) <= x["quartiles"][1] <= max(x["seconds"])
        assert x["accesses"] >= 5
        assert set(x["ratios"]) == set(MEASURES[x["algorithm"]])
        assert x["accesses_are"] == ("declared" if x["path"] == "fused" else "measured")
        assert re.search(rf"\| \**{x['name']}\b", page)
        assert x["name"] in svg
        assert x["name"] in printed
    assert page.startswith("# Before\n")
    assert page.endswith("-->\nafter\n")
    assert "old" not in page
    assert "](../out/r.svg)" in page


def test_all_is_kept_at_its_place(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    page = tmp_path / "docs" / "benchmarks_torch.md"
    page.parent.mkdir()
    page.write_text((ROOT / "docs" / "benchmarks_torch.md").read_text())
    invoke("--all", "--model", "resnet50", "--rounds", 1, "--contender", "sgd*-f*")
    kept = json.loads((tmp_path / "benchmarks" / "results" / "torch_step_cpu.json").read_text())
    assert [x["dtype"] for x in kept["runs"]] == ["float32", "bfloat16"]
    assert "](../benchmarks/results/torch_step_cpu.svg)" in page.read_text()
    assert (tmp_path / "benchmarks" / "results" / "torch_step_cpu.svg").exists()
    assert all(x in page.read_text() for x in tables.markers(torch_step.PAGE, "cuda")), "the tables of a GPU stay"


def test_the_measure_of_a_ratio_is_one_itself(results):
    (run,) = results[0]["runs"]
    for x in run["contenders"]:
        for name in set(MEASURES[x["algorithm"]]) & {x["name"]}:
            assert x["ratios"][name] == [1, 1, 1]


def test_what_is_missing_or_fails_is_named_and_the_rest_is_measured(tiny, tmp_path, monkeypatch):
    def fails(params):
        raise RuntimeError("no kernels here\nand more")

    names = {"adamp-fused": ("adamp-parity", fails), "adamp-timm": ("no-such-package", fails)}
    for name, (package, make) in names.items():
        monkeypatch.setitem(CONTENDERS, name, contenders.Contender(name, "adamp", package, make))
    path = tmp_path / "r.json"
    done = invoke("--model", "resnet50", "--rounds", 2, "--contender", "adamp-*", "--json", path)
    assert "adamp-fused: failed, RuntimeError: no kernels here\n" in done.output
    assert "adamp-timm: missing, no-such-package is not installed\n" in done.output
    found = {x["name"]: x for x in json.loads(path.read_text())["runs"][0]["contenders"]}
    assert found["adamp-foreach"]["status"] == "measured"
    assert set(found["adamp-foreach"]["ratios"]) == {"adamp-official"}, "adamw-fused was not asked for"
    assert "seconds" not in found["adamp-fused"]


def test_contenders_get_the_same_tensors(tiny):
    seen = {}

    def watch(contender):
        def make(params):
            seen[contender.name] = params, contender.make(params)
            return seen[contender.name][1]

        return contenders.Contender(contender.name, contender.algorithm, contender.package, make)

    chosen = ["adamw-fused", "adamp-single", "adamp-official", "sgd-fused", "sgdp-foreach"]
    run = measure.measure([watch(CONTENDERS[x]) for x in chosen], TINY, torch.float32, CPU, 1)
    assert [x["status"] for x in run["contenders"]] == ["measured"] * len(chosen)
    first, own = seen["adamw-fused"]
    for params, optimizer in seen.values():
        assert params is first
        for p in params:
            moments = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor) and x.shape == p.shape]
            for x in moments if p.ndim else ():
                assert any(x is y for y in own.state[p].values())


def test_decisions_of_both_kinds_are_there_and_stay():
    params = measure.make_parameters(TINY, torch.float32, CPU)
    before = [p.detach().clone() for p in params]
    for contender in CONTENDERS.values():
        if contender.package == "adamp-parity":
            optimizer = contender.make(params)
            for _ in range(20):
                optimizer.step()
    for i, (p, x) in enumerate(zip(params, before, strict=True)):
        torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-5)
        if p.ndim > 1:
            cosine = torch.cosine_similarity(p.detach().flatten(1), p.grad.flatten(1)).abs().max()
            assert (cosine < 1e-5) == (i % 2 == 0), i


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contender", "adamx*"], "none of adamw-loop"),
        (["--device", "gpu"], "pass cpu or cuda"),
        (["--device", "meta"], "pass cpu or cuda"),
        (["--markdown", "README.md", "--rounds", "0"], "--rounds"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_the_right_ones(arguments, words):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_a_page_without_markers_is_refused():
    results = {"environment": {"device_type": "cuda"}}
    with pytest.raises(ValueError, match="torch_step cuda: begin"):
        tables.renew(torch_step.PAGE, "# A page\n", results, None)


def test_a_machine_that_is_not_quiet_is_noticed(tiny, monkeypatch):
    for load, warned in ((0.1, False), (2.0, True)):
        monkeypatch.setattr(command.os, "getloadavg", lambda load=load: (load, load, load))
        done = invoke("--model", "resnet50", "--rounds", 1, "--contender", "sgd-fused")
        assert ("the load average is 2.0" in done.output) == warned


def test_models_that_do_not_fit_are_left_out_unless_asked_for(tiny, monkeypatch, tmp_path):
    for name in MODELS:
        monkeypatch.setitem(MODELS, name, lambda: TINY)
    monkeypatch.setitem(MODELS, "llama-1b", lambda: [(1 << 40, 8)])
    path = tmp_path / "r.json"
    done = invoke("--rounds", 1, "--contender", "sgd-fused", "--json", path)
    kept = json.loads(path.read_text())
    assert [x["model"] for x in kept["runs"]] == ["resnet50", "vit-b-16", "gpt2-small"]
    assert list(kept["skipped"]) == ["llama-1b, float32"]
    assert "--model llama-1b runs it nevertheless" in done.output


# --- Optax and Keras --------------------------------------------------------------------------------------------------

COMPILED = ("jit", "jit-memory", "jax-jit")


@pytest.fixture(scope="module", params=[optax_step, keras_step], ids=["optax", "keras"])
def ecosystem(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_tiny(monkeypatch)
        return request.param, outcome(request.param, tmp_path_factory.mktemp(request.param.PAGE.tool))


def test_every_optimizer_is_timed_in_every_way(ecosystem):
    tool, (kept, page, svg, printed) = ecosystem
    every = optax_step.CONTENDERS if tool is optax_step else keras_step.ALL
    assert len(every) == 5 * (2 if tool is optax_step else 5)
    (run,) = kept["runs"]
    assert (run["model"], run["dtype"], run["rounds"]) == ("resnet50", "float32", 3)
    assert (run["tensors"], run["elements"]) == (len(TINY), sum(map(math.prod, TINY)))
    assert [x["name"] for x in run["contenders"]] == list(every)
    for x in run["contenders"]:
        assert x["status"] == "measured", x.get("reason")
        assert len(x["seconds"]) == 3
        assert x["first_seconds"] > 0
        assert set(x["ratios"]) == set(ways.MEASURES[x["algorithm"]])
        assert ("fusions" in x) == (x["way"] in COMPILED)
        assert x["ours"] == (x["optimizer"] in ("adamp", "sgdp"))
        name = f"**{x['name']}**" if x["ours"] else x["name"]
        assert f"| {name} |" in page
        assert x["name"] in svg
        assert x["name"] in printed
    assert page.startswith("# Before\n")
    assert page.endswith("-->\nafter\n")
    assert "old" not in page


def test_ratios_are_of_the_same_way(ecosystem):
    entries = {x["name"]: x for x in ecosystem[1][0]["runs"][0]["contenders"]}
    for x in entries.values():
        for measure_of, ratios in x["ratios"].items():
            other = entries[f"{measure_of}-{x['way']}"]
            assert ratios == rounds.ratios(x["seconds"], other["seconds"])
            assert ratios == [1, 1, 1] or x is not other


def test_the_ratio_of_first_steps_is_of_the_same_way(ecosystem):
    _, (kept, page, _, _) = ecosystem
    entries = {x["name"]: x for x in kept["runs"][0]["contenders"]}
    head = next(line for line in page.splitlines() if "first / adamw" in line).split("|")
    for name, x in entries.items():
        if x["optimizer"] == "adamp":
            row = next(line for line in page.splitlines() if f"| **{name}** |" in line).split("|")
            expected = x["first_seconds"] / entries[f"adamw-{x['way']}"]["first_seconds"]
            assert row[head.index(" first / adamw ")].strip() == f"{expected:.2f}"


def test_accesses_are_those_that_an_optimizer_must_have(ecosystem):
    for x in ecosystem[1][0]["runs"][0]["contenders"]:
        if x["way"] in COMPILED:
            assert x["accesses"] >= {"adamp": 7, "sgdp": 5}[x["algorithm"]], x["name"]


def answered(backend, device, shapes, rounds, entries):
    """Instead of a process with a backend."""
    return [x | {"first_seconds": 1.0, "seconds": [1.0] * rounds} for x in entries]


@pytest.mark.parametrize("tool", [optax_step, keras_step], ids=["optax", "keras"])
def test_results_of_an_ecosystem_have_their_places(tool, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(keras_step, "ask", answered)
    page = tmp_path / tool.PAGE.document
    page.parent.mkdir()
    page.write_text((ROOT / tool.PAGE.document).read_text())
    done = invoke("--all", "--model", "resnet50", "--rounds", 1, "--contender", "sgd-*", tool=tool)
    assert done.exit_code == 0, done.output
    name = f"{tool.PAGE.tool}_cpu"
    kept = json.loads((tmp_path / "benchmarks" / "results" / f"{name}.json").read_text())
    assert kept["environment"]["packages"].keys() >= {"adamp-parity", "jax"}
    cpu = page.read_text().partition(tables.markers(tool.PAGE, "cpu")[0])[2].partition("<!--")[0]
    assert f"](../benchmarks/results/{name}.svg)" in cpu
    assert (tmp_path / "benchmarks" / "results" / f"{name}.svg").exists()
    assert all(f"| {x['name']} | " in cpu for x in kept["runs"][0]["contenders"])
    assert all(x in page.read_text() for x in tables.markers(tool.PAGE, "cuda")), "the tables of a GPU stay"


def test_an_optimizer_that_fails_is_named_and_the_rest_is_measured(tiny, tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("no such optimizer\nand more")

    monkeypatch.setitem(optax_step.MAKERS, "adamw", fails)
    path = tmp_path / "r.json"
    chosen = [x for name in ("adamw", "lamb", "sgd") for x in ("--contender", f"{name}-jit")]
    done = invoke("--model", "resnet50", "--rounds", 1, *chosen, "--json", path, tool=optax_step)
    assert "adamw-jit: failed, RuntimeError: no such optimizer\n" in done.output
    found = {x["name"]: x for x in json.loads(path.read_text())["runs"][0]["contenders"]}
    assert [x["status"] for x in found.values()] == ["failed", "measured", "measured"]
    assert set(found["lamb-jit"]["ratios"]) == {"lamb"}


def test_a_backend_that_is_missing_or_dies_is_named(tiny, tmp_path, monkeypatch):
    def version(package):
        if package == "jax":
            raise rounds.metadata.PackageNotFoundError
        return "1"

    worker = tmp_path / "worker.py"
    worker.write_text("import os, sys; sys.exit(3 if os.environ['KERAS_BACKEND'] == 'torch' else 4)")
    monkeypatch.setattr(rounds.metadata, "version", version)
    monkeypatch.setattr(keras_step, "WORKER", worker)
    done = invoke("--model", "resnet50", "--rounds", 1, "--contender", "adam*", tool=keras_step)
    assert "adamp-jax-jit: missing, jax is not installed\n" in done.output
    assert "adamp-torch-eager: failed, its process ended with exit code 3\n" in done.output
    assert "adamw-tensorflow-xla: failed, its process ended with exit code 4\n" in done.output
    assert "Keras on jax ..." not in done.output


def test_a_backend_that_finds_no_gpu_is_not_measured_on_the_cpu():
    (kept,) = keras_step.ask("torch", "cuda:99", TINY, 1, [keras_step.ALL["sgd-torch-eager"].entry("keras", "torch")])
    assert (kept["status"], kept["reason"]) == ("failed", "its process ended with exit code 1")


@pytest.mark.parametrize("tool", [optax_step, keras_step], ids=["optax", "keras"])
@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tool, device):
    done = invoke("--device", device, tool=tool)
    assert done.exit_code == 2
    assert "pass cpu, or cuda where" in " ".join(done.output.split())


# TensorFlow is imported within tests: a process that has imported it before Triton, as PyTorch does, dies.


@pytest.mark.parametrize("model", ways.MODELS)
def test_rows_are_those_of_pytorch(model):
    from adamp_tf._layouts import resolve

    shapes = ways.MODELS[model]()
    paths = ways.channels_last(shapes)
    optax = assign({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in paths.items()}, None)
    in_keras = resolve(list(paths.items()), {})
    for expected, (path, shape) in zip(shapes, paths.items(), strict=True):
        assert len(expected) % 2 == 0 or shape == expected, "only kernels are transposed"
        rows = Layout(0 if len(expected) > 1 else None).rows(expected)
        for assigned in (optax, in_keras):
            found = assigned[path].layout.rows(shape)
            assert (found.projects, found.count, found.length) == (rows.projects, rows.count, rows.length), path


def test_variables_of_keras_have_the_paths_that_layouts_go_by():
    from adamp_tf._layouts import named_shapes
    from benchmarks import keras_worker

    variable = keras_worker._variable("layer_3/kernel", np.zeros((2, 3), np.float32))
    assert named_shapes([variable]) == [("layer_3/kernel", (2, 3))]


def test_arrays_bring_decisions_of_both_kinds():
    params, grads = ways.make_arrays([*TINY, (1, 7, 3), (64, 3, 2, 2)])
    matrices = [(i, path) for i, (path, p) in enumerate(params.items()) if p.ndim > 1]
    assert {i % 2 for i, _ in matrices} == {0, 1}
    for i, path in matrices:
        columns = params[path].shape[-1] if path.endswith("kernel") else 1
        x, g = (y[path].reshape(-1, columns) for y in (params, grads))
        cosine = np.abs((x * g).sum(0)) / np.linalg.norm(x, axis=0) / np.linalg.norm(g, axis=0)
        assert (cosine.max() < 1e-5) == (i % 2 == 0), path


def test_contenders_share_parameters_that_stay_as_they_are(tiny):
    steps = optax_step.Steps(TINY, jax.devices("cpu")[0])
    before, _ = ways.make_arrays(TINY)
    for name in ("adamp-jit", "adamp-jit-memory", "lamb-jit", "sgdp-jit"):
        step, _ = steps.first(optax_step.CONTENDERS[name])
        step()
    for path, p in before.items():
        np.testing.assert_allclose(steps._params[path], p, rtol=0, atol=1e-5)


# --- checks for a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_its_checks_are_refused():
    done = CliRunner().invoke(torch_gpu_checks.main, [])
    assert done.exit_code == 2
    assert "finds no GPU" in done.output
    done = invoke("--device", "cuda")
    assert done.exit_code == 2
    assert "finds no GPU" in " ".join(done.output.split())


def makers():
    for path in torch_gpu_checks.PATHS:
        for name, make in torch_gpu_checks.makers(path, capturable=True):
            yield pytest.param(make, id=f"{path}-{name}")


@pytest.mark.parametrize("make", [*makers()])
def test_two_runs_give_the_same_bits(make):
    torch_gpu_checks.check_repeatable(make, CPU, 5)
    torch_gpu_checks.check_replay(make, CPU, 2, lambda optimizer: optimizer.step)


class Wrong(AdamP):
    """The fault, in step `at` of one of two runs: one element is another by the smallest amount."""

    made, at = 0, 3

    def __init__(self, params, **options):
        super().__init__(params, foreach=False, fused=False, **options)
        Wrong.made += 1
        self.wrong = Wrong.made % 2 == 0

    def step(self):
        super().step()
        p = self.param_groups[0]["params"][3]
        if self.wrong and self.state[p]["step"] == self.at:
            x = p.detach().view(-1)
            x[7] = torch.nextafter(x[7], torch.tensor(math.inf))


def test_one_bit_is_noticed():
    with pytest.raises(AssertionError, match="differ in some bit"):
        torch_gpu_checks.check_repeatable(Wrong, CPU, 4)


def test_a_run_in_which_nothing_happens_is_noticed():
    with pytest.raises(AssertionError, match="no parameter was changed"):
        torch_gpu_checks.check_repeatable(lambda params: torch.optim.SGD(params, lr=0.0, fused=True), CPU, 2)


@pytest.mark.parametrize("fault", ["nothing", "another lr"])
def test_a_replay_that_does_something_else_is_noticed(fault):
    def capture(optimizer):
        if fault == "nothing":
            return lambda: None
        optimizer.param_groups[0]["lr"] *= 1.001
        return optimizer.step

    with pytest.raises(AssertionError, match="differ in some bit"):
        torch_gpu_checks.check_replay(AdamP, CPU, 2, capture)


def test_checks_that_fail_are_told_and_counted(monkeypatch, capsys):
    monkeypatch.setattr(torch_gpu_checks, "console", Console(width=400))

    def fails():
        raise AssertionError("3 of 5 tensors differ")

    assert torch_gpu_checks.perform(iter([("one", list), ("two", fails)])) == 1
    assert capsys.readouterr().out == "passed  one\nfailed  two: AssertionError: 3 of 5 tensors differ\n"


def test_all_checks_are_there_for_each_path():
    found = [
        words for words, _ in torch_gpu_checks.checks(torch_gpu_checks.CHECKS, list(torch_gpu_checks.PATHS), CPU, 9)
    ]
    assert len(found) == len(set(found)) == 3 * (8 + 4 + 4) + 1
    assert "the same bits after 9 steps: SGDP nesterov, fused" in found


def test_the_suite_is_run_on_the_device(monkeypatch):
    commands = []
    monkeypatch.setattr(
        torch_gpu_checks.subprocess,
        "run",
        lambda command: commands.append(command) or type("Done", (), {"returncode": 1}),
    )
    with pytest.raises(AssertionError, match="exit code 1"):
        torch_gpu_checks.check_conformance(torch.device("cuda", 0))
    assert commands[0][0] == sys.executable
    assert {"--device", "cuda", "--adapter=torch-eager", "--adapter=torch-foreach"} <= set(commands[0])
