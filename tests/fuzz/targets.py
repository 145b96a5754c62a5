"""All targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzz.checkpoints import checkpoint_targets
from fuzz.hubs import hub_targets
from fuzz.models import model_targets
from fuzz.others import other_targets
from fuzz.templates import template_targets
from fuzz.tokenizers import tokenizer_targets
from fuzz.worker import Target


def all_targets(folder: Path, rng_of: Callable[[str, int], Random]) -> list[Target]:
    """Every target; whole files are made in `folder`. rng_of: the source of all chance for an input of a target."""
    parts = (checkpoint_targets, tokenizer_targets, other_targets, template_targets)
    seeded = [target for made in parts for target in made(rng_of)]
    return [*model_targets(folder, rng_of), *seeded, *hub_targets(folder, rng_of)]
