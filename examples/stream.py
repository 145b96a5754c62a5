"""Text as it comes, and what it cost: python examples/stream.py MODEL PROMPT"""

import sys

import runtime

with runtime.load(sys.argv[1]) as model:
    generation = model.generate(sys.argv[2], max_tokens=48, sampling=runtime.Sampling(temperature=0.7, seed=1))
    for piece in generation:
        print(piece, end="", flush=True)
    stats = generation.stats
    print(f"\n\n{stats.tokens} tokens, {stats.tokens_per_s:.0f} per second, ended by {generation.stop_reason}")
    print(f"{stats.computed_share:.1%} of the neurons computed, {stats.bytes_per_token / 1e6:.1f} MB read per token")
