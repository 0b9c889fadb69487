"""The examples: small models from recurrent-network tutorials, on torch.nn and on fused_rnn.

Every file here also runs alone (`python benchmarks/examples/hello_rnn.py`). Python then puts this
folder, and not its parent, on the import path, so the examples import each other by plain name
(`from training import Example`). This file makes the same plain names work for benchmarks/run.py
and the tests: they import what they need from `examples`, never from a file inside it, because
Python would load that file a second time under its longer name.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cell_tour
import char_lm
import hello_cell
import hello_embedding
import hello_rnn
import hello_world
import image_rows
import layer_sizes
import sentiment
import shapes_tour
from agreement import TOUR_TOLERANCE, Agreement, compare, compare_tours
from training import SEED, Example, Tour, seeded_model, tour_results

__all__ = [
    "EXAMPLES",
    "SEED",
    "TOURS",
    "TOUR_TOLERANCE",
    "Agreement",
    "Example",
    "Tour",
    "compare",
    "compare_tours",
    "seeded_model",
    "tour_results",
]

TOURS = [cell_tour.TOUR, shapes_tour.TOUR]

EXAMPLES = [
    *hello_cell.EXAMPLES,
    *hello_rnn.EXAMPLES,
    *hello_embedding.EXAMPLES,
    *hello_world.EXAMPLES,
    *sentiment.EXAMPLES,
    *layer_sizes.EXAMPLES,
    *image_rows.EXAMPLES,
    *char_lm.EXAMPLES,
]
