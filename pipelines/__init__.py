"""Runnable pipelines: one file per model family, and `tiny/`, the embedded trained models."""
