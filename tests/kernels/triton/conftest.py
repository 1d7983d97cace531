"""Interpreted tests run in a process of their own."""

from tests.kernels.interpreted import pytest_configure, pytest_pyfunc_call, pytest_unconfigure  # noqa: F401
