"""Hypothesis profiles; `pytest tests/test_two_oracles.py --hypothesis-profile=long` searches for ten minutes."""

import os
from contextlib import suppress

import pytest
from hypothesis import settings
from rich.console import Console

from adamp_conformance import cli

with suppress(ImportError):
    import triton  # noqa: F401 - which torch loads later; loaded after TensorFlow, it ends the process

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
settings.register_profile("long", max_examples=7000, deadline=None)


@pytest.fixture(autouse=True)
def wide_console(monkeypatch):
    """Tables are not wrapped, however wide the terminal; in its workers, pytest-xdist has set COLUMNS already."""
    monkeypatch.setattr(cli, "console", Console(width=400, height=50))
