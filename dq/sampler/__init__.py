"""What runs around a model: corrections of its scheduler's steps. Part of the plan, saved with it.

steps         a scheduler whose `step` is corrected, everything else of it its own
corrections/  one kind a file
"""
