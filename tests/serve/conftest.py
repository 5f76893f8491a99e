"""The command line in the process of a test, as the tests of data have it."""

from tests.data.conftest import dare

__all__ = ["dare"]
