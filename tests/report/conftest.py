"""Shards with their images, as the tests of data make them."""

from tests.data.conftest import inputs

__all__ = ["inputs"]
