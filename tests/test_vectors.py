"""The frozen vectors: intact or not used at all, what lint says of them, and where their intervals end."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import adamp_conformance
from adamp_conformance import cli, freeze, lint, runner, spec_files, vectors
from adamp_conformance.adapter import DTYPES, MOMENTS, State
from adamp_conformance.adapters.oracle import OracleAdapter
from adamp_conformance.bits import float_from_hex, float_to_hex, from_hex, to_hex
from adamp_conformance.modes import Problem, create, judge_vectors
from adamp_conformance.vectors import MANIFEST, NOTES, Legal, load
from adamp_spec import Branch

GROUPS = load().groups
ONE_STEP = [group for group in GROUPS if group.steps == 1]


# The corpus is intact, or nothing is checked


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A copy of the specification that the harness takes for the installation's; the folder of its vectors."""
    shutil.copytree(vectors.vectors_root().parent, tmp_path / "spec", ignore=shutil.ignore_patterns("adamp_spec"))
    monkeypatch.setattr(spec_files, "_ROOT", tmp_path / "spec")
    load.cache_clear()
    runner.catalogue.cache_clear()
    yield tmp_path / "spec/vectors"
    load.cache_clear()
    runner.catalogue.cache_clear()


def flip(name, place=-1):
    """Changes one bit of one byte."""

    def change(root):
        content = bytearray((root / name).read_bytes())
        content[place] ^= 1
        (root / name).write_bytes(content)

    return change


def edit(name, before, after):
    """Exchanges the first occurrence of a text for another of the same length."""

    def change(root):
        text = (root / name).read_text()
        assert before in text
        assert len(before) == len(after)
        (root / name).write_text(text.replace(before, after, 1))
        if name.endswith(".json"):
            json.loads((root / name).read_text())  # it is still JSON

    return change


def remove(name):
    return lambda root: (root / name).unlink()


def add(name, like=NOTES):
    return lambda root: shutil.copy(root / like, root / name)


def remove_everything(root):
    shutil.rmtree(root)
    root.mkdir()


def empty_but_consistent(root):
    remove_everything(root)
    (root / MANIFEST).write_text(vectors.manifest(root))


def consistent(name, change):
    """A change that the manifest knows of: only reading the file can tell."""

    def both(root):
        record = json.loads((root / name).read_text())
        change(record)
        (root / name).write_text(json.dumps(record))
        (root / MANIFEST).write_text(vectors.manifest(root))

    return both


def digit(name, key):
    """Exchanges the first hexadecimal digit after a key."""

    def change(root):
        text = (root / name).read_text()
        at = text.index(f'"{key}": "') + len(key) + 5
        edit(name, text[: at + 1], text[:at] + ("1" if text[at] == "0" else "0"))(root)

    return change


def short(record):
    """A gradient that lacks a digit group."""
    step = record["vectors"][0]["steps"][0]
    step["g"] = step["g"][8:]


ZEROS, LARGE, INPUTS = "edge/adamp-zeros.float32.json", "large/adamp-long-rows.float32", "invalid/inputs.json"

# What is done to the vectors, and the words by which that is named.
DAMAGE = {
    "a digit of a limit": (digit(ZEROS, "hi"), f"{ZEROS} has changed"),
    "a digit of a core vector": (digit("core/sgdp-views.bfloat16.json", "lo"), "core/sgdp-views.bfloat16.json has"),
    "a digit of several steps": (digit("multistep/adamp-beginning.float64.json", "g"), "adamp-beginning.float64.json"),
    "a digit of a hyperparameter": (digit(ZEROS, "lr"), f"{ZEROS} has changed"),
    "a letter of a purpose": (edit(ZEROS, "cosine 0", "cosine 1"), f"{ZEROS} has changed"),
    "a number in a safetensors file": (flip(f"{LARGE}.safetensors"), f"{LARGE}.safetensors has changed"),
    "a name in a safetensors file": (flip(f"{LARGE}.safetensors", 12), f"{LARGE}.safetensors has changed"),
    "a letter of the notes": (edit(NOTES, '"formula"', '"Formula"'), f"{NOTES} has changed"),
    "a digit of what must be refused": (digit(INPUTS, "lr"), f"{INPUTS} has changed"),
    "a byte that is no text": (flip("core/adamp-eps.float64.json", 0), "core/adamp-eps.float64.json has changed"),
    "a hash": (digit(MANIFEST, "sha256"), "ambiguous/adamp-undecided.float32.json has changed"),
    "the count of all vectors": (edit(MANIFEST, '"vectors": 755', '"vectors": 754'), f"{MANIFEST} is damaged"),
    "the count of some vectors": (edit(MANIFEST, '"vectors": 4\n', '"vectors": 5\n'), "adamp-undecided.float32.json"),
    "the version": (edit(MANIFEST, '"spec": "1', '"spec": "2'), f"{MANIFEST} is damaged"),
    "a name in the manifest": (edit(MANIFEST, "adamp-undecided", "adamp-Undecided"), "adamp-Undecided.float32.json"),
    "a blank in the manifest": (edit(MANIFEST, " ", "\t"), f"{MANIFEST} is damaged"),
    "a brace of the manifest": (flip(MANIFEST, 0), f"{MANIFEST} is damaged"),
    "a manifest that is no text": (lambda root: (root / MANIFEST).write_bytes(b"\xff"), f"{MANIFEST} cannot be read"),
    "an empty manifest": (lambda root: (root / MANIFEST).write_text(""), f"{MANIFEST} is damaged"),
    "a file emptied": (lambda root: (root / ZEROS).write_text(""), f"{ZEROS} has changed"),
    "a group missing": (remove(ZEROS), f"{ZEROS} is missing"),
    "tensors missing": (remove(f"{LARGE}.safetensors"), f"{LARGE}.safetensors is missing"),
    "notes missing": (remove(NOTES), f"{NOTES} is missing"),
    "refusals missing": (remove(INPUTS), f"{INPUTS} is missing"),
    "manifest missing": (remove(MANIFEST), f"{MANIFEST} is missing"),
    "a group more": (add("core/adamp-more.float32.json", ZEROS), "core/adamp-more.float32.json is not in"),
    "a group called like the manifest": (add(f"core/{MANIFEST}", ZEROS), f"core/{MANIFEST} is not in"),
    "refusals more": (add("invalid/more.json", INPUTS), "invalid/more.json is not in"),
    "any file more": (add("core/read.me"), "core/read.me is not in"),
    "an empty folder": (remove_everything, f"{MANIFEST} is missing"),
    "no folder": (shutil.rmtree, f"{MANIFEST} is missing"),
    "an empty folder with a manifest that fits": (empty_but_consistent, "holds no vectors"),
    "a digit too few, frozen": (consistent(ZEROS, short), "edge/adamp-zeros.float32: 248 hexadecimal digits"),
    "an unknown key, frozen": (consistent(ZEROS, lambda record: record.update(more=1)), "'more' was unexpected"),
    "no vector in a group, frozen": (
        consistent(ZEROS, lambda record: record.update(vectors=[])),
        "adamp-zeros.float32",
    ),
    "an unknown tensor, frozen": (
        consistent(f"{LARGE}.json", lambda record: record["vectors"][0]["before"].update(p="adamp/none")),
        "adamp/none",
    ),
}

COMMANDS = {
    "run": ["run", "--adapter", "oracle", "--jobs", "1", "-k", "adamp/first-step"],
    "list": ["list"],
    "explain": ["explain", "adamp/first-step/channel"],
    "mutate": ["mutate", "--jobs", "1", "-k", "step-size/ascends"],
    "diagnose": ["diagnose", "oracle"],
    "verify": ["vectors", "verify", "--jobs", "1", "-k", "adamp/first-step/channel"],
    "lint": ["vectors", "lint"],
    "export": ["vectors", "export", "vectors.h", "--lang", "c"],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_corpus_exits_3_and_is_named(spec, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    change, words = DAMAGE[damage]
    change(spec)
    commands = ("run", "list") if damage.endswith("frozen") else COMMANDS  # these take their time to read the others
    for command in commands:
        result = CliRunner().invoke(cli.main, COMMANDS[command])
        assert result.exit_code == 3, (command, result.output, result.exception)
        assert words in result.output, (command, result.output)
    assert not Path("vectors.h").exists()


@pytest.mark.parametrize("command", ["run", "list", "explain", "export", "diagnose"])
def test_the_copy_without_damage_is_accepted(spec, tmp_path, monkeypatch, command):
    """Otherwise the test above would show nothing."""
    monkeypatch.chdir(tmp_path)
    assert vectors.vectors_root() == spec
    result = CliRunner().invoke(cli.main, COMMANDS[command])
    assert result.exit_code == 0, result.output


def test_a_process_says_the_same(tmp_path):
    """The installed layout, with the specification inside the package: one changed bit, and none."""
    package = tmp_path / "adamp_conformance"
    shutil.copytree(Path(adamp_conformance.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(vectors.vectors_root().parent, package / "spec", ignore=shutil.ignore_patterns("adamp_spec"))
    flip(f"{LARGE}.safetensors")(package / "spec/vectors")
    codes = {}
    for name, command in COMMANDS.items():
        if name in ("list", "run"):
            process = [sys.executable, "-m", "adamp_conformance.cli", *command]
            done = subprocess.run(process, cwd=tmp_path, capture_output=True, text=True)
            codes[name] = done.returncode
            assert f"{LARGE}.safetensors has changed" in done.stdout, done.stdout + done.stderr
    assert codes == {"list": 3, "run": 3}
    flip(f"{LARGE}.safetensors")(package / "spec/vectors")
    process = [sys.executable, "-m", "adamp_conformance.cli", *COMMANDS["run"]]
    assert subprocess.run(process, cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--adapter", "oracle", "-k", "no such case"],
        ["run", "--adapter", "oracle", "-k", "adamp/digits", "--dtype", "float16"],
        ["run", "--adapter", "oracle", "-k", "adamp/views", "--mode", "shadow"],
        ["mutate", "-k", "no such mutant"],
        ["vectors", "verify", "-k", "no such vector"],
    ],
    ids=" ".join,
)
def test_nothing_selected_exits_3(arguments):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 3, result.output
    assert "nothing to check" in result.output


# Lint


@pytest.fixture(scope="module")
def frozen_again():
    """What the cases give today: path -> content."""
    return dict(freeze.files())


@pytest.fixture
def no_freezing(monkeypatch, frozen_again):
    monkeypatch.setattr(freeze, "files", lambda: iter(frozen_again.items()))


def changed(vector_id, dtype="float32", **changes):
    """The corpus with another vector in the place of one."""
    return of_group(
        next(g for g in GROUPS if g.dtype == dtype and any(x.id == vector_id for x in g.vectors)),
        lambda x: replace(x, **changes) if x.id == vector_id else x,
    )


def of_group(group, change):
    other = replace(group, vectors=tuple(map(change, group.vectors)))
    return load()._replace(groups=tuple(other if g is group else g for g in GROUPS))


def find(vector_id, dtype="float32"):
    return next(x for g in GROUPS if g.dtype == dtype for x in g.vectors if x.id == vector_id)


def without(**words):
    """The corpus whose vectors and refusals lack one clause or flag."""

    def lacks(x):
        return replace(x, **{key: tuple(y for y in getattr(x, key) if y != word) for key, word in words.items()})

    groups = tuple(replace(g, vectors=tuple(map(lacks, g.vectors))) for g in GROUPS)
    return load()._replace(groups=groups, refusals=tuple(map(lacks, load().refusals)))


def with_outcomes(vector_id, make):
    vector = find(vector_id)
    steps = tuple(step._replace(outcomes=make(step.outcomes)) for step in vector.steps)
    return changed(vector_id, steps=steps)


def turned(outcomes):
    """Limits in the wrong order in one element."""
    (only,) = outcomes
    low = only.low | {"m": only.low["m"].copy()}
    low["m"].ravel()[3] = np.nextafter(only.high["m"].ravel()[3], np.float32(np.inf))
    return (only._replace(low=low),)


def moved(vector_id):
    """A twin whose gradient differs in one bit."""
    (step,) = find(vector_id).steps
    gradient = step.gradient.copy()
    gradient.flat[0] = np.nextafter(gradient.flat[0], np.float32(9))
    return changed(vector_id, steps=(step._replace(gradient=gradient),))


def undecided_id(outcomes):
    return next(
        x.id for g in GROUPS if g.folder == "ambiguous" for x in g.vectors if len(x.steps[0].outcomes) == outcomes
    )


LINT = {
    "a vector twice": (
        lambda: load()._replace(groups=(*GROUPS, GROUPS[-1])),
        [f"{x.id} {GROUPS[-1].dtype} stands in the vectors 2 times" for x in GROUPS[-1].vectors],
    ),
    "a refusal twice": (
        lambda: load()._replace(refusals=(*load().refusals, load().refusals[0])),
        [f"{load().refusals[0].id}  stands in the vectors 2 times"],
    ),
    "an unknown clause": (
        lambda: changed("adamp/views/maximum", clauses=("PROJ-2", "PROJ-99")),
        ["clause PROJ-99 does not exist"],
    ),
    "an unknown flag": (
        lambda: changed("adamp/views/maximum", flags=("row-reduction", "bad-luck")),
        ["flag bad-luck does not exist"],
    ),
    "an unknown clause of a refusal": (
        lambda: load()._replace(refusals=(*load().refusals[1:], replace(load().refusals[0], clauses=("HYPER-9",)))),
        ["clause HYPER-9 does not exist"],
    ),
    "a clause without a vector": (lambda: without(clauses="LAYOUT-5"), ["clause LAYOUT-5 has no vector"]),
    "a clause without a refusal": (lambda: without(clauses="HYPER-3"), ["clause HYPER-3 has no vector"]),
    "a flag without a vector": (lambda: without(flags="exemption"), ["flag exemption has no vector"]),
    "two outcomes of a decisive vector": (
        lambda: with_outcomes("adamp/views/layer", lambda outcomes: outcomes * 2),
        ["adamp/views/layer float32: step 1 has 2 outcomes in the folder core"],
    ),
    "one outcome of an ambiguous vector": (
        lambda: with_outcomes(undecided_id(2), lambda outcomes: outcomes[:1]),
        [f"{undecided_id(2)} float32: step 1 has 1 outcomes in the folder ambiguous"],
    ),
    "an empty interval": (
        lambda: with_outcomes("adamp/views/layer", turned),
        ["adamp/views/layer float32: m has an empty interval at step 1"],
    ),
    "a twin with another number": (
        lambda: moved("adamp/shapes/dense-transposed"),
        ["adamp/shapes/dense-transposed float32: it does not hold the numbers of its twin adamp/shapes/dense"],
    ),
    "a twin turned otherwise": (
        lambda: changed("sgdp/shapes/kernel-4d-hwio", twin=("sgdp/shapes/kernel-4d", (3, 2, 1, 0))),
        ["sgdp/shapes/kernel-4d-hwio float32: it does not hold the numbers of its twin sgdp/shapes/kernel-4d"],
    ),
    "a twin that is not there": (
        lambda: changed("adamp/shapes/dense-transposed", twin=("adamp/views/channel", (1, 0))),
        ["adamp/shapes/dense-transposed float32: its twin adamp/views/channel is not in the group"],
    ),
}


@pytest.mark.parametrize("fault", LINT)
def test_lint_finds(fault):
    make, words = LINT[fault]
    assert list(lint.lint(make(), vectors.vectors_root())) == words


def test_lint_finds_a_core_that_is_too_large(monkeypatch):
    root = vectors.vectors_root()
    size = sum(path.stat().st_size for path in (root / "core").iterdir())
    monkeypatch.setattr(lint, "CORE_BYTES", size)
    assert list(lint.lint(load(), root)) == []
    monkeypatch.setattr(lint, "CORE_BYTES", size - 1)
    assert list(lint.lint(load(), root)) == [f"the core set has {size} bytes, more than {size - 1}"]


def test_what_is_shown_elsewhere_exists_and_is_not_shown_here():
    shown = {clause for g in GROUPS for x in g.vectors for clause in x.clauses}
    assert set(lint.SHOWN_ELSEWHERE) <= set(spec_files.clauses())
    assert set(lint.SHOWN_ELSEWHERE) & shown <= {"STATE-2"}  # which the ambiguous ones are the hardest test of


def test_the_vectors_of_this_checkout_are_in_order(no_freezing):
    result = CliRunner().invoke(cli.main, ["vectors", "lint"])
    assert result.exit_code == 0, result.output
    assert "the vectors are in order" in result.output


def test_regenerating_finds_what_is_changed_missing_and_more(spec, no_freezing):
    assert list(lint.regenerate(spec)) == []
    digit(ZEROS, "hi")(spec)
    flip(f"{LARGE}.safetensors")(spec)
    remove(NOTES)(spec)
    add("core/more.json", INPUTS)(spec)
    assert sorted(lint.regenerate(spec)) == [
        f"{MANIFEST} does not fit the files",
        "core/more.json comes from no case",
        f"{ZEROS} differs from what the cases give",
        f"{LARGE}.safetensors differs from what the cases give",
        f"{NOTES} is missing",
    ]


def test_a_manifest_that_fits_does_not_hide_a_change_from_regenerating(spec, no_freezing):
    digit(ZEROS, "hi")(spec)
    (spec / MANIFEST).write_text(vectors.manifest(spec))
    result = CliRunner().invoke(cli.main, ["vectors", "lint"])
    assert result.exit_code == 3
    assert f"{ZEROS} differs from what the cases give" in result.output


def test_generating_gives_the_frozen_vectors(tmp_path, no_freezing):
    result = CliRunner().invoke(cli.main, ["vectors", "generate", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    written, frozen = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "new", vectors.vectors_root())
    )
    assert written == frozen


def test_generating_overwrites_nothing(tmp_path, no_freezing):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; vectors are never overwritten, give an empty folder"):
        freeze.generate(tmp_path)
    result = CliRunner().invoke(cli.main, ["vectors", "generate", str(tmp_path)])
    assert result.exit_code == 1
    assert "never overwritten" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_generating_needs_a_longdouble_that_is_long(tmp_path, monkeypatch):
    monkeypatch.setattr(freeze.np, "finfo", lambda kind: SimpleNamespace(nmant=52))
    with pytest.raises(RuntimeError, match="fewer than 64 bits"):
        freeze.generate(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Bits


def numbers(dtype):
    """Both zeros, the smallest subnormal and normal, the largest number, infinities, NaNs with payload and sign."""
    kind = DTYPES[dtype]
    size = kind.itemsize
    infinity = int(np.array(np.inf, kind).view(f"u{size}"))
    sign = 1 << (8 * size - 1)
    patterns = [0, 1, infinity - 1, infinity, infinity + 1, infinity + 5, infinity | infinity >> 1]
    normal = int(
        np.array(np.finfo(np.float32).tiny if dtype == "bfloat16" else np.finfo(kind).tiny, kind).view(f"u{size}")
    )
    patterns += [normal, normal - 1]
    return np.array([*patterns, *(pattern | sign for pattern in patterns)], f"u{size}").view(kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_come_back(dtype):
    x = numbers(dtype)
    with np.errstate(invalid="ignore"):  # some of the NaNs are signalling
        assert np.isnan(x).sum() == 6
    table = x.reshape(3, 6)
    arrays = [x, table, table.T, table[:, ::-2], np.array(x[5]), x[5], x[:0], np.zeros((3, 0, 2), x.dtype)]
    for array in arrays:
        text = to_hex(np.asarray(array))
        assert len(text) == array.size * x.dtype.itemsize * 2
        back = from_hex(text, x.dtype, array.shape)
        assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_bits_are_written_most_significant_digit_first():
    assert to_hex(np.array([1.0, -2.0], np.float32)) == "3f800000c0000000"
    assert to_hex(np.array([[-0.0], [1.0]], DTYPES["bfloat16"])) == "80003f80"
    assert to_hex(np.array(1.5, np.float16)) == "3e00"
    assert float_to_hex(0.1) == "3fb999999999999a"
    assert float_from_hex("3fb999999999999a") == 0.1


@pytest.mark.parametrize("text", ["", "3f8000", "3f8000000", "3f8000003", "3f80000g", "0x3f8000", "3f8000 0"])
def test_bits_of_another_length_or_alphabet_are_refused(text):
    with pytest.raises(ValueError, match="hexadecimal"):
        from_hex(text, np.dtype(np.float32), (1,))
    with pytest.raises(ValueError, match="hexadecimal"):
        float_from_hex(text * 2 + "0" * (len(text) % 2))
    for shape in ((), (2, 2), (0,)):
        if len(text) != 8 * np.prod(shape):
            with pytest.raises(ValueError, match="hexadecimal"):
                from_hex(text, np.dtype(np.float32), shape)


# Intervals


def ends(vector, step, outcome, end):
    """The tensors at the lower (`low`) or the upper (`high`) end of an outcome's intervals."""
    return {tensor: x.copy() for tensor, x in getattr(vector.steps[step].outcomes[outcome], end).items()}


class Recites(OracleAdapter):
    """Answers a one-step group with what `answer` makes of each vector, and reports no branch unless told."""

    def __init__(self, group, answer, branch=None):
        super().__init__()
        self.group, self.answer, self.branch = group, answer, branch

    def step(self, gradients):
        found = {vector.name: self.answer(vector) for vector in self.group.vectors if vector.name in gradients}
        parameters = {name: tensors["p"] for name, tensors in found.items()}
        moments = {m: {name: tensors[m] for name, tensors in found.items()} for m in MOMENTS[self.group.algorithm]}
        branches = self.branch and {v.name: self.branch(v) for v in self.group.vectors if v.name in gradients}
        self.state = State(self.state.step + 1, parameters, moments, branches)


def judged(group, answer, branch=None):
    """What the judge says of each vector of a group, by id: None, or what is wrong."""
    problem = Problem(group, group.dtype, "torch")
    adapter = create(lambda: Recites(group, answer, branch), problem)
    return {id: outcome.problem for id, outcome in judge_vectors(adapter, problem).items()}


@pytest.mark.parametrize("end", ["low", "high"])
def test_both_ends_of_every_interval_conform(end):
    for group in ONE_STEP:
        for number in range(max(len(vector.steps[0].outcomes) for vector in group.vectors)):
            found = judged(
                group, lambda vector, n=number: ends(vector, 0, min(n, len(vector.steps[0].outcomes) - 1), end)
            )
            assert set(found.values()) == {None}, (group.id, found)


def beyond(x, end):
    """The next number outside, for each element whose limit is finite."""
    towards = x.dtype.type(-np.inf if end == "low" else np.inf)
    with np.errstate(all="ignore"):
        return np.where(np.isfinite(x), np.nextafter(x, towards), x)


def test_the_next_number_is_outside_every_interval():
    """Of every element of every outcome, several steps included."""
    elements = 0
    for group in GROUPS:
        for vector in group.vectors:
            for index, step in enumerate(vector.steps):
                for number, outcome in enumerate(step.outcomes):
                    for end in ("low", "high"):
                        inside = ends(vector, index, number, end)
                        assert outcome.outside(inside) == 0
                        for tensor, x in inside.items():
                            finite = int(np.isfinite(x).sum())
                            assert outcome.outside(inside | {tensor: beyond(x, end)}) == finite
                            elements += finite
    assert elements > 100_000


@pytest.mark.parametrize(("tensor", "end"), [("p", "high"), ("m", "low"), ("v", "high")])
def test_one_element_that_is_one_number_outside_fails(tensor, end):
    for group in ONE_STEP:
        if tensor not in group.vectors[0].before or group.folder == "ambiguous":
            continue
        touched = []

        def answer(vector, touched=touched):
            tensors = ends(vector, 0, 0, end)
            places = np.flatnonzero(np.isfinite(tensors[tensor]))
            if places.size:
                touched.append(vector.id)
                at = places[-1]
                tensors[tensor].flat[at] = beyond(tensors[tensor], end).flat[at]
            return tensors

        found = judged(group, answer)
        assert [id for id, problem in found.items() if problem] == touched, group.id


def test_a_frozen_interval_counts_where_the_oracle_would_let_pass():
    """An interval that is narrower than what the oracle derives today."""
    group = next(g for g in GROUPS if g.id == "core/adamp-views.float32")
    vector = find("adamp/views/layer")
    (step,) = vector.steps
    (legal,) = step.outcomes
    high = legal.high | {"p": np.where(np.arange(32).reshape(4, 8) == 5, legal.low["p"], legal.high["p"])}
    narrow = replace(vector, steps=(step._replace(outcomes=(legal._replace(high=high),)),))
    frozen = replace(group, vectors=(narrow,))
    problem = judged(frozen, lambda x: ends(vector, 0, 0, "high"))["adamp/views/layer"]
    assert problem == "1 elements lie outside the frozen intervals at step 11"
    assert judged(frozen, lambda x: ends(narrow, 0, 0, "low"))["adamp/views/layer"] is None


def test_infinite_and_undefined_limits_are_so_at_both_ends():
    """So that it is the same whether the lower or the upper end is asked (EDGE-2)."""
    kinds = set()
    for group in GROUPS:
        for vector in group.vectors:
            for step in vector.steps:
                for outcome in step.outcomes:
                    for tensor, low in outcome.low.items():
                        high = outcome.high[tensor]
                        odd = ~np.isfinite(low) | ~np.isfinite(high)
                        assert low[odd].tobytes() == high[odd].tobytes() or np.isnan(low[odd]).all()
                        kinds |= {(tensor, "nan") for _ in low[np.isnan(low)]} | {
                            (tensor, "inf") for _ in low[np.isinf(low)]
                        }
    assert kinds >= {("p", "nan"), ("p", "inf"), ("m", "nan"), ("m", "inf"), ("v", "inf")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("limit", "got", "p", "m"),
    [
        (np.nan, np.nan, True, True),
        (np.nan, 1.0, False, False),
        (np.nan, np.inf, False, False),
        (np.inf, np.inf, True, True),
        (np.inf, np.nan, True, False),  # EDGE-2: a parameter that is to become infinite may become NaN
        (np.inf, -np.inf, False, False),
        (np.inf, 60000.0, False, False),
        (-np.inf, np.nan, True, False),
        (-np.inf, -np.inf, True, True),
        (1.0, np.nan, False, False),
        (1.0, np.inf, False, False),
        (0.0, -0.0, True, True),
    ],
)
def test_what_is_not_finite(dtype, limit, got, p, m):
    limits, value = (np.array([x, 1.0]).astype(DTYPES[dtype]) for x in (limit, got))
    for tensor, legal in (("p", p), ("m", m)):
        assert Legal((), {tensor: limits}, {tensor: limits}).outside({tensor: value}) == (0 if legal else 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_counts_where_it_is_expected_and_nowhere_else(dtype):
    for group in ONE_STEP:
        if group.dtype != dtype or group.folder != "edge" or "non-finite" not in group.id:
            continue
        for word, change in {
            "nan for infinity in p": lambda t: (
                t | {"p": np.where(np.isinf(t["p"]), np.nan, t["p"]).astype(t["p"].dtype)}
            ),
            "as it should be": lambda t: t,
        }.items():
            found = judged(group, lambda vector, change=change: change(ends(vector, 0, 0, "low")))
            assert set(found.values()) == {None}, (word, found)
        for change in (
            lambda t: t | {"m": np.where(np.isinf(t["m"]), np.nan, t["m"]).astype(t["m"].dtype)},
            lambda t: {tensor: np.where(np.isnan(x), 1, x).astype(x.dtype) for tensor, x in t.items()},
            lambda t: {tensor: np.where(np.isfinite(x), x, 1).astype(x.dtype) for tensor, x in t.items()},
        ):
            originals = {vector.id: ends(vector, 0, 0, "low") for vector in group.vectors}
            altered = {
                id
                for id, tensors in originals.items()
                if any(x.tobytes() != tensors[tensor].tobytes() for tensor, x in change(tensors).items())
            }
            found = judged(group, lambda vector, change=change: change(ends(vector, 0, 0, "low")))
            assert altered
            assert {id for id, problem in found.items() if problem} == altered


def test_a_branch_that_was_not_taken_fails():
    """On every vector that has slices, and with the tensors that would conform without it."""
    names = {branch.name.lower(): branch for branch in Branch}

    def reported(vector, shift):
        legal = vector.steps[0].outcomes[0].branch
        slices = vector.layout.rows(vector.shape).slices
        return np.array([(names[name] + shift) % 3 for name in legal], int).reshape(slices)

    checked = 0
    for group in ONE_STEP:
        if group.folder == "ambiguous":
            continue
        for shift in (0, 1, 2):
            found = judged(group, lambda vector: ends(vector, 0, 0, "low"), lambda vector, s=shift: reported(vector, s))
            for vector in group.vectors:
                sliced = bool(vector.steps[0].outcomes[0].branch)
                assert bool(found[vector.id]) == (shift > 0 and sliced), (vector.id, shift, found[vector.id])
                checked += sliced
    assert checked > 1500


UNDECIDED = [(group, vector) for group in GROUPS if group.folder == "ambiguous" for vector in group.vectors]


@pytest.mark.parametrize(("group", "vector"), UNDECIDED, ids=[f"{g.dtype}-{x.id}" for g, x in UNDECIDED])
def test_either_whole_outcome_of_an_ambiguous_vector_conforms_and_a_mix_does_not(group, vector):
    alone = group.only([vector.id])
    outcomes = vector.steps[0].outcomes
    names = {branch.name.lower(): branch for branch in Branch}
    slices = vector.layout.rows(vector.shape).slices
    for number, outcome in enumerate(outcomes):
        branch = np.array([names[name] for name in outcome.branch], int).reshape(slices)
        for end in ("low", "high"):
            for said in (None, lambda x, branch=branch: branch):
                assert judged(alone, lambda x, n=number, end=end: ends(x, 0, n, end), said)[vector.id] is None
        for other, wrong in enumerate(outcomes):
            if other == number:
                continue
            apart = {tensor: outcome.low[tensor] > wrong.high[tensor] for tensor in outcome.low}
            apart = {tensor: x | (outcome.high[tensor] < wrong.low[tensor]) for tensor, x in apart.items()}
            if vector.shape[0] == 1 and {*outcome.branch, *wrong.branch} == {"channel", "layer"}:
                assert not any(x.any() for x in apart.values())  # of one row, both views are the same
                continue
            # the numbers of another outcome under the name of this one
            tensors = ends(vector, 0, other, "low")
            assert judged(alone, lambda x, t=tensors: t, lambda x, b=branch: b)[vector.id]
            # every other element from another outcome, where they can be told apart
            places = np.flatnonzero(apart["p"])[::2]
            mixed = ends(vector, 0, number, "low")
            mixed["p"].flat[places] = wrong.low["p"].flat[places]
            assert places.size
            assert judged(alone, lambda x, t=mixed: t)[vector.id]
            # the moment of one outcome with the parameter of the other
            if apart["m"].any():
                crossed = ends(vector, 0, number, "low") | {"m": wrong.low["m"].copy()}
                assert judged(alone, lambda x, t=crossed: t)[vector.id]


def test_the_outcomes_of_projected_momentum_differ_in_the_moment_too():
    """Otherwise a mix of parameter and moment could not be told."""
    for group, vector in UNDECIDED:
        first, *others = vector.steps[0].outcomes
        apart = [(first.low["m"] > x.high["m"]) | (first.high["m"] < x.low["m"]) for x in others]
        assert any(x.any() for x in apart) is (group.algorithm == "sgdp")


# Several steps


class Forgets(OracleAdapter):
    """Starts every step with moments of zero."""

    def step(self, gradients):
        zeros = {m: {name: np.zeros_like(x) for name, x in arrays.items()} for m, arrays in self.state.moments.items()}
        self.state = replace(self.state, moments=zeros)
        super().step(gradients)


class StartsAgain(OracleAdapter):
    """Takes every step from the start, but counts on."""

    def create(self, *arguments):
        super().create(*arguments)
        self.start = self.state

    def step(self, gradients):
        count = self.state.step
        self.state = self.start
        super().step(gradients)
        self.state = replace(self.state, step=count + 1)


class ForgetsToCount(OracleAdapter):
    def step(self, gradients):
        super().step(gradients)
        self.state = replace(self.state, step=1)


@pytest.mark.parametrize("make", [Forgets, StartsAgain, ForgetsToCount])
def test_an_adapter_that_is_reset_between_steps_fails_every_vector_of_several_steps(make):
    several = [group for group in GROUPS if group.steps > 1]
    assert {group.folder for group in several} == {"multistep"}
    assert len(several) == 10
    for group in several:
        problem = Problem(group, group.dtype, "torch")
        outcomes = judge_vectors(create(make, problem), problem)
        right = judge_vectors(create(OracleAdapter, problem), problem)
        for vector in group.vectors:
            assert right[vector.id].problem is None
            assert outcomes[vector.id].problem, (make, vector.id)


def test_nothing_is_injected_into_a_run_of_several_steps():
    class Loads(OracleAdapter):
        def load(self, state):
            raise AssertionError("a state was injected")

    for group in GROUPS:
        if group.steps > 1:
            problem = Problem(group, group.dtype, "torch")
            assert not any(x.problem for x in judge_vectors(create(Loads, problem), problem).values())


def test_an_adapter_that_does_not_start_where_the_vectors_do_fails():
    class Busy(OracleAdapter):
        def create(self, *arguments):
            super().create(*arguments)
            self.state = replace(self.state, step=1)

    group = next(group for group in GROUPS if group.steps > 1)
    problem = Problem(group, group.dtype, "torch")
    assert {x.problem for x in judge_vectors(create(Busy, problem), problem).values()} == {"step 0 created, 1 held"}
