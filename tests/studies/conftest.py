"""Fixtures of the tests of studies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.studies.campaigns import write_arms


@pytest.fixture
def arms(tmp_path: Path) -> Path:
    """A folder with the config files of two arms."""
    return write_arms(tmp_path)
