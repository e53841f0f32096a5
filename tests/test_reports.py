"""Result files are read whole or not at all; reports say what was found, are well formed and ask nothing of anybody."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped

from adamp_conformance import expected, publish, runner
from adamp_conformance.implementations import resolve
from adamp_conformance.publish import summary
from adamp_conformance.publish.page import SHOWN_KINDS
from adamp_conformance.results import Element, Result, Run, exit_code, read, write
from adamp_conformance.spec_files import clauses

ELEMENT = Element(
    "kernel", "p", (3, 5), 10, ("channel", "none"), "-0.5", "1.375", "-0.625", "<0.75>", "-0.62", math.inf
)
PASS = Result("torch-eager", "adamp/views/channel", "adamp", "float32", "step", "passed", 0.5, False, "", 0.1)
PASS = replace(PASS, clauses=("PROJ-1", "PROJ-4"), flags=("tested-vector",))
FAIL = replace(
    PASS,
    case="adamp/views/layer",
    status="failed",
    margin=8.25,
    message="p of 'layer'[3, 5] is off by 8.25 times the bound at step 10",
    element=ELEMENT,
)
ERROR = replace(
    PASS, case="adamp/views/none", status="errored", margin=None, message="RuntimeError: <script>alert(1)</script> |`*"
)
SKIP = replace(PASS, case="adamp/views/vector", status="skipped", margin=None, message="no float16 | here")
KNOWN = replace(FAIL, case="adamp/views/row", status="expected", message="off (expected until 2030-01-01: upstream)")
DRIFT = replace(PASS, case="adamp/run", mode="shadow", drift=(0.0, 1e-8, 3e-7, math.inf))
ALL = [PASS, FAIL, ERROR, SKIP, KNOWN, DRIFT]
GREEN = [PASS, DRIFT]

NOTES = {"tested-vector": "The direction is tested in the gradient's place."}
PURPOSES = {"adamp/views/layer": "only the layer view passes"}


def run_of(results, missing=()):
    names = dict.fromkeys(result.implementation for result in results)
    return Run.here(results, "cpu", {name: f"{name} 1.0" for name in names}, list(missing))


def published(tmp_path, results, **more):
    run = run_of(results, **more)
    paths = {"html": "r.html", "markdown": "r.md", "junit": "r.xml", "badges": "badges"}
    folder = tmp_path / "not yet there"
    publish.write(run, **{name: folder / x for name, x in paths.items()}, notes=NOTES, purposes=PURPOSES)
    badges = {path.name: json.loads(path.read_text()) for path in folder.glob("badges/*")}
    return (folder / "r.html").read_text(), (folder / "r.md").read_text(), (folder / "r.xml").read_text(), badges


# Reading


def written(tmp_path, results=ALL):
    path = tmp_path / "results.jsonl"
    write(path, Run.here(list(results), "cpu", {"torch-eager": "torch 2"}, ["optax"]))
    return path


def test_what_was_written_is_read(tmp_path):
    run = read(written(tmp_path))
    assert run.results == tuple(ALL)
    assert (run.device, run.versions, run.missing) == ("cpu", {"torch-eager": "torch 2"}, ("optax",))
    assert run == replace(Run.here(ALL, "cpu", {"torch-eager": "torch 2"}, ["optax"]))
    assert run.exit_code == exit_code(ALL) == 1


def test_a_real_run_goes_through(tmp_path):
    (oracle,) = resolve("oracle")
    one = runner.Runner()
    results = [one.result(check) for check in runner.select_checks([oracle], text="adamp/zeros")]
    path = tmp_path / "results.jsonl"
    write(path, Run.here(results, "cpu", {oracle.name: "spec 1.0"}, []))
    run = read(path)
    assert list(run.results) == results
    assert all(result.status == "passed" for result in results)
    publish.write(run, html=tmp_path / "r.html", notes=NOTES, purposes=PURPOSES)
    assert f"{len(results)} of {len(results)} checks passed" in " ".join((tmp_path / "r.html").read_text().split())


def change(line, **values):
    return lambda lines: [
        json.dumps(json.loads(x) | values) if i == line % len(lines) else x for i, x in enumerate(lines)
    ]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda lines: [], r":1: not a whole line of JSON"),
        (lambda lines: lines[1:], r":1: the header is missing"),
        (lambda lines: lines[:-1], r":7: the footer is missing, so the file is incomplete"),
        (lambda lines: [*lines[:-1], lines[-1][:20]], r":8: not a whole line of JSON"),
        (lambda lines: [*lines[:2], "", *lines[2:]], r":3: not a whole line of JSON"),
        (lambda lines: [*lines[:2], *lines[3:]], r":7: the footer says failed 1, the results 0"),
        (lambda lines: [*lines[:2], *lines[1:]], r":3: torch-eager adamp/views/channel float32 step stands in line 2"),
        (lambda lines: [*lines, *lines], r":8: a second footer; a file holds one run"),
        (change(-1, exit_code=0), r":8: the footer says exit_code 0, the results 1"),
        (change(-1, passed=3), r":8: the footer says passed 3, the results 2"),
        (change(0, spec="0.9"), r":1: made under specification 0.9, this is 1.0; use the adamp-parity that made it"),
        (change(1, implementation="mine"), r":2: the header does not name the implementation 'mine'"),
        (change(1, margin=-1), r":2: \$\.margin: -1 is not valid"),
        (change(1, margin=math.nan), r":2: not a whole line of JSON \(NaN is not JSON\)"),
        (change(1, status="fine"), r":2: \$\.status: 'fine' is not one of"),
        (change(1, more=1), r":2: \$: Additional properties are not allowed"),
        (change(1, kind="remark"), r":2: kind is 'remark'"),
        (lambda lines: ["[]", *lines[1:]], r":1: kind is None"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, spoil, words):
    path = written(tmp_path)
    path.write_text("".join(f"{line}\n" for line in spoil(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}{words}") as caught:
        read(path)
    assert "again" in str(caught.value) or "keep them apart" in str(caught.value)


# Words


def test_a_margin_above_one_never_reads_as_one():
    assert [summary.margin_text(x) for x in (0.5, 0.99999, 1.0)] == ["0.500", "1.000", "1.000"]
    assert [summary.margin_text(x) for x in (1 + 1e-9, 8.25, 123456.0, math.inf)] == [
        "1.001",
        "8.25",
        "1.235e+05",
        "inf",
    ]


def test_alike_failures_are_one_kind():
    many = [
        replace(FAIL, case=f"adamp/views/x{i}", margin=float(i), message=f"p of 'x{i}'[{i}] off by {i}.5e+07 at {i}")
        for i in range(2, 300)
    ]
    (kind,) = summary.kinds(many, "failed")
    assert kind.worst.margin == 299
    assert len(kind.results) == 298
    apart = [
        FAIL,
        replace(FAIL, case="sgdp/views/layer"),
        replace(FAIL, implementation="keras-xla"),
        replace(FAIL, message="accepted"),
        replace(FAIL, status="errored"),
    ]
    assert len(summary.kinds(apart, "failed", "errored")) == 5
    assert len(summary.kinds(apart, "failed")) == 4


@pytest.mark.parametrize(
    ("results", "verdict"),
    [
        ([PASS], "conforms"),
        ([PASS, SKIP], "conforms in all that it supports"),
        ([PASS, SKIP, KNOWN], "conforms but for 1 expected failure"),
        ([PASS, ERROR, KNOWN], "could not be judged: its adapter failed"),
        (ALL, "does not conform"),
        ([SKIP], "nothing passed"),
        ([KNOWN], "nothing passed"),
    ],
)
def test_verdicts(results, verdict):
    (standing,) = summary.standings(run_of(results))
    assert standing.verdict == verdict


def test_an_explanation_says_all_that_is_known():
    text = summary.explanation(FAIL, NOTES, PURPOSES)
    for words in (
        "off by 8.25 times",
        "only the layer view passes",
        f"PROJ-1: {clauses()['PROJ-1']}",
        "tested-vector: The direction is tested",
        "p[3, 5] of 'kernel' at step 10, branch channel, none",
        "legal     -0.625 to -0.62",
        "got       <0.75>",
        "adamp-parity explain adamp/views/layer --adapter torch-eager --dtype float32",
    ):
        assert words in text
    other = replace(
        FAIL, mode="resume", implementation="exec:./a b", clauses=("PROJ-99",), flags=("odd",), element=None
    )
    text = summary.explanation(other, {}, {})
    assert "PROJ-99: not a clause of this version" in text
    assert "meant to catch odd\n" in text
    assert "adamp-parity run --adapter 'exec:./a b' --dtype float32 --mode resume -k adamp/views/layer" in text


# Markdown, JUnit, badges


def test_markdown(tmp_path):
    _, text, _, _ = published(tmp_path, ALL, missing=["optax"])
    assert "| torch-eager | ❌ does not conform | 2/6 | 1 | 1 | 1 | 1 | - | 8.25 | - | - |" in text
    assert "not run: optax" in text
    assert "- torch-eager: 1, no float16 &#124; here" in text
    assert "<script" not in text
    assert text.count("<details>") == text.count("</details>") == 3
    assert "PROJ-1: The cosine of a row" in text


def test_markdown_fits_a_step_summary(tmp_path):
    results = [
        replace(ERROR, case=f"adamp/x/{i}", message=f"Error {chr(97 + i % 26)}{chr(97 + i // 26)}\n\n\n" + "x" * 2000)
        for i in range(500)
    ]
    _, text, _, _ = published(tmp_path, results)
    assert len(text.encode()) < 2**18
    assert "and 480 more kinds" in text
    assert "\n\n" not in text[text.index("<pre>") : text.index("</pre>")]  # a blank line ends the block of HTML


def test_junit(tmp_path):
    other = replace(PASS, implementation="exec:./a")
    _, _, text, _ = published(tmp_path, [*ALL, other, replace(ERROR, mode="purity", message="a \x00 b \x1b[31m c")])
    ElementTree.fromstring(text)
    first, second = JUnitXml.fromstring(text)
    assert (first.name, first.tests, first.failures, first.errors, first.skipped) == ("torch-eager", 7, 1, 2, 2)
    assert (second.name, second.tests, second.failures) == ("exec:./a", 1, 0)
    properties = {x.name: x.value for x in first.properties()}
    assert properties["version"] == "torch-eager 1.0"
    assert properties["specification"] == "1.0"
    found = {case.name.split()[0]: case.result for case in first if case.name.endswith("step")}
    assert found["adamp/views/channel"] == []
    (failure,), (error,), (skipped,), (known,) = (
        found[f"adamp/views/{name}"] for name in ("layer", "none", "vector", "row")
    )
    assert isinstance(failure, Failure)
    assert "legal     -0.625 to -0.62" in failure.text
    assert isinstance(error, Error)
    assert isinstance(skipped, Skipped)
    assert skipped.message == SKIP.message
    assert isinstance(known, Skipped)
    assert known.type == "expected"


@pytest.mark.parametrize(
    ("results", "message", "color"),
    [
        (GREEN, "2/2 worst 0.500", "brightgreen"),
        ([PASS, SKIP], "1/2 worst 0.500", "yellowgreen"),
        ([PASS, KNOWN], "1/2 worst 8.25", "yellow"),
        ([PASS, ERROR], "1/2 worst 0.500", "red"),
        (ALL, "2/6 worst 8.25", "red"),
        ([SKIP], "0/1", "lightgrey"),
    ],
)
def test_a_badge_counts_everything(tmp_path, results, message, color):
    *_, badges = published(tmp_path, results)
    assert badges == {
        "torch-eager.json": {"schemaVersion": 1, "label": "AdamP 1.0 f32", "message": message, "color": color}
    }


def test_a_badge_says_what_was_counted(tmp_path):
    sgdp = replace(PASS, case="sgdp/views/none", algorithm="sgdp", dtype="bfloat16", implementation="exec:./x --y")
    *_, badges = published(tmp_path, [sgdp, replace(PASS, implementation="exec:./x --y")])
    assert badges["exec-.-x-y.json"]["label"] == "AdamP+SGDP 1.0 f32 bf16"


# The page


class Page(HTMLParser):
    """What a page is made of; an element that is closed out of order is an error."""

    VOID = frozenset({"meta", "link", "br", "line", "polyline", "use"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "srcset", "action", "data", "poster", "background", "xlink:href"):
                self.links.append(value)
            assert not name.startswith("on"), f"{tag} has {name}"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def requests(text):
    """What a browser would ask somebody for."""
    page = Page(text)
    css = re.findall(r"url\([^)]*\)|@import[^;]*|@font-face", text)
    return (
        [x for x in page.links if not x.startswith("#") and x != "data:,"]
        + css
        + [x for x in page.tags if x == "script"]
    )


@pytest.mark.parametrize(
    "planted", ['<link href="https://x/y.css">', '<img src="//x/y">', "<style>a{b:url(x)}</style>", "<script></script>"]
)
def test_a_request_would_be_seen(planted):
    assert requests(planted.replace("<img", "<p").replace('"//x/y">', '"//x/y"></p>'))


@pytest.mark.parametrize("results", [ALL, GREEN, []], ids=["red", "green", "empty"])
def test_the_page_is_well_formed_and_asks_for_nothing(tmp_path, results):
    text, *_ = published(tmp_path, results)
    assert requests(text) == []
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert {x[1:] for x in page.links if x.startswith("#")} <= set(page.ids)
    assert page.tags.count("h1") == 1


def words(html):
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_the_page_explains(tmp_path):
    html, *_ = published(tmp_path, ALL, missing=["optax"])
    text = words(html)
    for phrase in (
        "torch-eager does not conform. 2 of 6 checks passed, 1 failed, 1 errored, 1 skipped",
        "Not installed, so not run optax",
        "off by 8.25 times the bound at step 10",
        "only the layer view passes",
        "This case catches tested-vector The direction is tested",
        "p[3, 5] of &#39;kernel&#39; at step 10, branch channel, none",
        "&lt;0.75&gt;",
        "adamp-parity explain adamp/views/layer --adapter torch-eager --dtype float32",
        "RuntimeError: &lt;script&gt;",
        "expected until 2030-01-01",
        "no float16 | here",
        "8.25 ✗",
        "Not judged.",
    ):
        assert phrase in text, phrase
    assert "AdamP and SGDP, specification 1.0" in text


def test_every_clause_is_there_and_one_without_a_check_says_so(tmp_path):
    html, *_ = published(tmp_path, [*ALL, replace(PASS, case="adamp/odd", clauses=("PROJ-99",))])
    for label in [*clauses(), "PROJ-99"]:
        (row,) = re.findall(rf'id="row-{label}">(.*?)</tr>', html, re.S)
        checked = label in ("PROJ-1", "PROJ-4", "PROJ-99")
        assert ("no check in this run" in row) != checked
        assert f'id="clause-{label}"' in html
    assert "not a clause of this version" in html
    (row,) = re.findall(r'id="row-PROJ-1">(.*?)</tr>', html, re.S)
    assert 'href="#failures-1-1"' in row
    assert "2/6" in words(row)


def test_drift_is_drawn_on_a_log_scale(tmp_path):
    html, *_ = published(tmp_path, [DRIFT, replace(DRIFT, implementation="keras-xla", drift=(1e-8, 1e-8, 1e-7, 1e-6))])
    own = re.findall(r'<polyline class="own" points="([^"]*)"', html)
    assert len(own) == 2
    points = [[float(p.split(",")[1]) for p in line.split()] for line in own]
    (zero, low, middle, top), (flat, same, seventh, sixth) = points
    assert zero == low == flat == same == 92  # zero stands at the lower edge, where 1e-8 is
    assert top == sixth == 6  # so does infinity at the upper one
    assert seventh == pytest.approx(49)
    assert middle == pytest.approx(49 - math.log10(3) * 43, abs=0.1)
    assert re.findall(r'class="tick"[^>]*>([^<]*)<', html)[:3] == ["0", "1e-7", "1e-6"]


def test_a_large_run_stays_small(tmp_path):
    """Eight implementations, all of whose checks fail in sixty families, with many clauses each."""
    labels = [*clauses(), *(f"MORE-{i}" for i in range(60 - len(clauses())))]
    results = []
    for name in (f"an-implementation-{i}" for i in range(8)):
        for i in range(750):
            result = replace(FAIL, implementation=name, case=f"adamp/family-{i % 60}/case-{i}", margin=1.5 + i)
            result = replace(result, clauses=tuple(labels[(i + k) % 60] for k in range(9)))
            results.append(replace(result, drift=(1e-7,) * 64 if i < 8 else (), message=f"p of 'x'[{i}] is off by {i}"))
    html, *_ = published(tmp_path, results)
    assert len(html.encode()) < 2_000_000
    assert html.count('<details class="kind') == 8 * SHOWN_KINDS
    assert html.count("and 30 more kinds") == 8


def test_only_so_many_kinds_are_shown(tmp_path):
    def message(i):
        return "Error " + "".join(chr(97 + int(digit)) for digit in str(i))

    results = [replace(ERROR, case=f"adamp/x/{i}", message=message(i)) for i in range(SHOWN_KINDS + 50)]
    html, *_ = published(tmp_path, results)
    assert html.count('<details class="kind') == SHOWN_KINDS
    assert "and 50 more kinds" in html


# Expected failures

TODAY = date(2026, 6, 1)
ENTRY = {"case": "adamp/zeros/*", "reason": "slow upstream", "expires": "2026-06-01", "dtype": "float32"}


def toml(*tables):
    lines = []
    for table in tables:
        lines += ["[[expected]]", *(f"{k} = {v if k == 'expires' else json.dumps(v)}" for k, v in table.items())]
    return "\n".join(lines)


def entries_of(tmp_path, text):
    path = tmp_path / "expected.toml"
    path.write_text(text)
    return expected.read(path, runner.select_checks(resolve("torch")))


def test_expected_failures_are_read(tmp_path):
    first, second = entries_of(tmp_path, toml(ENTRY, {**ENTRY, "implementation": "torch-*", "url": "https://x.org/1"}))
    assert first == expected.Expectation("adamp/zeros/*", "slow upstream", TODAY, dtype="float32")
    assert second.url == "https://x.org/1"
    assert str(second) == "the expected failure 'adamp/zeros/* torch-* float32'"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[expected", "not TOML"),
        ("", "'expected' is a required property"),
        (toml({"case": "adamp/zeros/*", "expires": "2026-06-01"}), "'reason' is a required property"),
        (toml({"case": "adamp/zeros/*", "reason": "x"}), "'expires' is a required property"),
        (toml(ENTRY | {"reason": ""}), r"\$\.expected\[0\]\.reason: '' should be non-empty"),
        (toml(ENTRY | {"expires": '"soon"'}), r"\$\.expected\[0\]\.expires: 'soon' does not match"),
        (toml(ENTRY | {"expires": '"2026-02-30"'}), r"\$\.expected\[0\]\.expires: day"),
        (toml(ENTRY | {"dtype": "float8"}), "'float8' is not one of"),
        (toml(ENTRY | {"why": "x"}), "Additional properties"),
        (toml(ENTRY, ENTRY | {"case": "adamp/gone"}), "'adamp/gone float32' speaks of no check of this suite"),
        (toml(ENTRY | {"implementation": "keras-*"}), "speaks of no check of this suite; correct it or remove it"),
        (toml(ENTRY | {"mode": "shadow"}), "speaks of no check"),
    ],
)
def test_a_wrong_file_of_expected_failures_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError, match=f"expected.toml: .*{words}"):
        entries_of(tmp_path, text)


def applied(result, *entries, today=TODAY):
    (after,) = expected.apply([result], entries, today)
    return after


def test_what_fails_as_expected_is_neither_failed_nor_passed():
    entry = expected.Expectation("adamp/views/*", "upstream", TODAY, url="https://x.org/1")
    for result in (FAIL, ERROR):
        after = applied(result, entry)
        assert after.status == "expected"
        assert after.message == f"{result.message} (expected until 2026-06-01: upstream https://x.org/1)"
        assert replace(after, status=result.status, message=result.message) == result
    assert exit_code([applied(FAIL, entry)]) == 3
    assert exit_code([PASS, applied(FAIL, entry)]) == 0
    assert applied(SKIP, entry) == SKIP


def test_what_passes_against_expectation_fails():
    after = applied(PASS, expected.Expectation("adamp/views/channel", "upstream", TODAY))
    assert exit_code([after]) == 1
    assert after.message == (
        "passed, against the expected failure 'adamp/views/channel' (upstream): "
        "remove the entry, or narrow it to what fails"
    )


def test_an_entry_expires():
    entry = expected.Expectation("adamp/views/*", "upstream", TODAY)
    for result in (FAIL, ERROR):
        after = applied(result, entry, today=date(2026, 6, 2))
        assert exit_code([after]) == 1
        assert after.message.startswith(result.message)
        assert "expired on 2026-06-01: mend what fails, or give the entry another day" in after.message
    other = expected.Expectation("adamp/views/layer", "still", date(2027, 1, 1))
    assert applied(FAIL, other, entry, today=date(2026, 6, 2)).status == "failed"


@pytest.mark.parametrize(
    "narrow", [{"implementation": "keras-*"}, {"dtype": "float64"}, {"mode": "shadow"}, {"case": "adamp/views"}]
)
def test_an_entry_speaks_of_nothing_else(narrow):
    entry = replace(expected.Expectation("*", "upstream", TODAY), **narrow)
    assert applied(FAIL, entry) == FAIL
    assert applied(PASS, entry) == PASS
