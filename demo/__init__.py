"""The parts of `app.py`: models in memory, and one file per tab."""
