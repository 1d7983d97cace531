"""Runnable pipelines: one file per model family to copy from, and `tiny/`, the embedded trained models."""
