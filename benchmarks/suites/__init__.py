"""One file per suite of `run.py`: its rows and their timed calls."""
