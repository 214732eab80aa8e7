"""The models and texts of the measuring tests."""

from tests.jobs.measure.conftest import make, text

__all__ = ["make", "text"]
