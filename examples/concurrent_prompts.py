"""Several prompts at once: python examples/concurrent_prompts.py MODEL PROMPT PROMPT ...

The model answers one after the other, the event loop stays free, and a task that takes too long is simply cancelled.
"""

import asyncio
import sys

import runtime


async def answer(model: runtime.Model, prompt: str) -> None:
    """Print one continuation, or how far it came within 30 seconds."""
    generation = model.generate(prompt, max_tokens=24, sampling=runtime.Sampling(temperature=0))

    async def collect() -> None:
        async for _ in generation:
            pass

    try:
        await asyncio.wait_for(collect(), timeout=30)
    except asyncio.TimeoutError:
        print("(out of time)")
    print(f"{prompt} ...{generation.text!r}")


async def main(path: str, prompts: list[str]) -> None:
    """Answer all prompts."""
    with runtime.load(path) as model:
        await asyncio.gather(*(answer(model, prompt) for prompt in prompts))
        figures = model.stats()
        print(f"{figures.generations} generations, {figures.total.tokens} tokens")


asyncio.run(main(sys.argv[1], sys.argv[2:]))
