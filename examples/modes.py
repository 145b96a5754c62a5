"""Dense, exact and predicted on one prompt: python examples/modes.py MODEL PROMPT"""

import sys

import numpy as np
import numpy.typing as npt

import runtime


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities, float64 [n, n_vocab]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    logprobs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logprobs


reference = None
print(f"{'mode':<10} {'tokens/s':>9} {'MB/token':>9} {'KL from dense, nats':>20}")
for mode in ("dense", "exact", "predicted"):
    with runtime.load(sys.argv[1], ffn=mode) as model:
        logprobs = log_softmax(model.logits(model.tokenize(sys.argv[2])))
        reference = logprobs if reference is None else reference
        divergence = (np.exp(reference) * (reference - logprobs)).sum(-1).mean()
        generation = model.generate(sys.argv[2], max_tokens=48, sampling=runtime.Sampling(temperature=0))
        list(generation)
    stats = generation.stats
    print(f"{mode:<10} {stats.tokens_per_s:9.1f} {stats.bytes_per_token / 1e6:9.2f} {divergence:20.2e}")
