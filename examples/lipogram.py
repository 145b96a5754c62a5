"""A text without a letter: python examples/lipogram.py MODEL LETTER PROMPT"""

import sys

import numpy as np
import numpy.typing as npt

import runtime

with runtime.load(sys.argv[1]) as model:
    letter = sys.argv[2].lower()
    vocabulary = range(model.structure.vocab_size)
    forbidden = np.array([letter in model.detokenize([i]).lower() for i in vocabulary])

    def without_letter(ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Forbid every token that has the letter; `ids` are those so far."""
        return np.where(forbidden, np.float32("-inf"), logits)

    for piece in model.generate(sys.argv[3], max_tokens=48, logits_processors=[without_letter]):
        print(piece, end="", flush=True)
    print()
