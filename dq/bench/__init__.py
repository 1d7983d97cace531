"""Measuring speed: layers, rooflines, models of full width, and what a user would pick instead."""
