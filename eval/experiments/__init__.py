"""Measurements behind the results pages: each file makes rows of eval/results, tables.py the pages."""
