"""SPEC.md, its tables, their schemas and the code say the same."""

import json
import tomllib
from dataclasses import MISSING, fields

import jsonschema
import pytest

from adamp_conformance.runner import catalogue
from adamp_conformance.spec_files import clauses, spec_file
from adamp_spec import DOMAINS, AdamPHyper, SGDPHyper, check_hyperparameter

HYPERS = {"adamp": AdamPHyper, "sgdp": SGDPHyper}


def table(name):
    return tomllib.loads(spec_file(f"{name}.toml").read_text())


def validator(name):
    schema = json.loads(spec_file(f"schema/{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", ["hyperparameters", "variants"])
def test_tables_fit_their_schemas(name):
    validator(name).validate(table(name))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hyperparameters", {"lr": {"meaning": "x"}}),
        ("hyperparameters", {"lr": table("hyperparameters")["lr"] | {"unknown": 1}}),
        ("variants", {"x": {"clause": "PROJ-1", "question": "Why?", "options": []}}),
        ("variants", {"x": {"clause": "first", "question": "Why?", "options": [{}, {}]}}),
    ],
)
def test_schemas_refuse(name, change):
    assert not validator(name).is_valid(change)


def test_the_hyperparameter_table_is_the_code():
    rows = table("hyperparameters")
    for algorithm, hyper in HYPERS.items():
        mine = {name for name, row in rows.items() if algorithm in row["algorithms"]}
        assert {field.name for field in fields(hyper)} == mine
        for field in fields(hyper):
            default = rows[field.name]["default"].get(algorithm, MISSING)
            assert field.default == default, field.name
    with_domain = {name: row for name, row in rows.items() if "low" in row}
    assert set(with_domain) == set(DOMAINS)
    for name, row in with_domain.items():
        assert DOMAINS[name] == (row["low"], row.get("high", float("inf")), row.get("closed", False)), name


@pytest.mark.parametrize("name", DOMAINS)
def test_domains(name):
    domain = DOMAINS[name]
    assert check_hyperparameter(name, domain.low) == domain.low
    for bad in (-1.0, float("nan"), float("inf"), domain.high + (1 if domain.closed else 0)):
        with pytest.raises(ValueError, match=f"{name} must be in"):
            check_hyperparameter(name, bad)
    for bad in ("0.1", None, True, 1j):
        with pytest.raises(TypeError, match="spelled must be a real number"):
            check_hyperparameter(name, bad, "spelled")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SGDPHyper(0.1, nesterov=True), "momentum above 0"),
        (lambda: SGDPHyper(0.1, momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: AdamPHyper(beta2=1.0), "beta2"),
        (lambda: AdamPHyper(eps=0.0), "eps"),
    ],
)
def test_hyperparameter_classes_refuse(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_every_label_that_is_cited_exists():
    cited = {clause for case in catalogue().values() for clause in case.clauses} | {
        row["clause"] for row in table("variants").values()
    }
    assert cited <= set(clauses())


def test_every_clause_of_the_update_has_a_case():
    covered = {clause for case in catalogue().values() for clause in case.clauses}
    update = {label for label in clauses() if label.split("-")[0] in {"ADAMP", "SGDP", "PROJ", "LAYOUT", "EDGE"}}
    assert update <= covered


def test_the_oracle_cites_the_clauses_of_the_update():
    import inspect

    import adamp_spec.oracle

    source = inspect.getsource(adamp_spec.oracle)
    for label in clauses():
        if label.split("-")[0] in {"ADAMP", "SGDP", "PROJ"}:
            assert f"# {label}" in source or f", {label}" in source, label
