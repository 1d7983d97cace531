"""The one place of the version: the wheel, `dq.__version__` and what is kept on disk read it here."""

__version__ = "0.1.0"
