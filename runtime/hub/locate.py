"""Where a model is: a local path, or a name on the Hugging Face Hub, from which it is fetched."""

from __future__ import annotations

from pathlib import Path

from runtime.base.home import expanded
from runtime.hub.names import choose_model, parse


def locate(source: str | Path) -> Path:
    """The model `source`: a local file (the first shard of a split one), fetched from the Hub where it is a name there.

    A path that exists is never looked up. What is neither a path nor like a name on the Hub comes back as it is.
    Raises UserError when there is no such model, when the name fits several, and when it cannot be fetched whole.
    """
    path = expanded(source)
    reference = None if path.exists() else parse(str(source))
    if reference is None:
        return path
    from runtime.hub.download import fetch  # noqa: PLC0415  (slow to import, and needless for local files)

    folder, names = fetch(reference, choose_model)
    return folder / names[0]
