"""The small model of the tests of `model/`."""

from model.conftest import small, small_parameters  # noqa: F401
