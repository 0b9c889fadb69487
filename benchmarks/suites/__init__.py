"""One file per suite of `run.py`: its rows, and the calls that are timed in them."""
