"""Helpers of the tests: media files, faults, forked runs."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
