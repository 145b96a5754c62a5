"""How sure the model is of each token: python examples/confidence.py MODEL PROMPT

Stops where it is less sure than one in fifty.
"""

import math
import sys

import runtime


def progress(done: int, total: int) -> None:
    """Told after every batch of the prompt."""
    print(f"prompt: {done} of {total} tokens")


def show(token: runtime.Token) -> bool:
    """Told of every token; False ends the generation."""
    sure = math.exp(token.logprob)
    print(f"{sure:7.1%}  {token.data.decode('utf-8', 'replace')!r}")
    return sure >= 0.02


with runtime.load(sys.argv[1]) as model:
    generation = model.generate(
        sys.argv[2], max_tokens=24, sampling=runtime.Sampling(seed=1), on_prompt=progress, on_token=show
    )
    text = "".join(generation)
    print(f"{text!r} (ended by {generation.stop_reason})")
