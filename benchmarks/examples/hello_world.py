"""hello -> world with the RNN of hello_rnn.py, over seven letters.

Harder than hello -> ohlol in one way: the two l of "hello" must give different letters ("r" and
"l"), so the network has to remember what came before. It learns this within 100 epochs.
"""

from functools import partial

from hello_rnn import LetterRNN
from training import command_line, run_examples
from words import one_hot_letters, word_example

LETTERS = "ehlowrd"
WORD = "hello"

EXAMPLES = [
    word_example(
        "hello_world",
        build=partial(LetterRNN, num_letters=len(LETTERS)),
        word=WORD,
        answer="world",
        alphabet=LETTERS,
        inputs=one_hot_letters(WORD, LETTERS).unsqueeze(1),  # (time, batch, letters) = (5, 1, 7)
        learning_rate=0.1,
        epochs=100,
    )
]

if __name__ == "__main__":
    run_examples(EXAMPLES, command_line(__doc__).parse_args())
