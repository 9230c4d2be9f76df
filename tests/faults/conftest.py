"""Fixtures of other rooms that faults are tried on."""

from tests.data.conftest import inputs

__all__ = ["inputs"]
