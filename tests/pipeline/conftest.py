"""The small model of `tests/meshes.py`."""

import pytest
from meshes import SMALL


@pytest.fixture(scope="package")
def run():
    return SMALL
