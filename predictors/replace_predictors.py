"""A model file written again with other predictors: every other tensor and key byte for byte as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from predictors.matrices import Tensor
from runtime.bindings import ggml
from runtime.model_file.bundle_writer import LAYOUT_KEYS, bundled, kept_in, laid_out
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import ARCHITECTURE
from runtime.model_file.tensor_names import in_block, parsed
from runtime.model_file.writer import NewFile, NewTensor, copied, copied_keys, write_files

REPLACED = (f"{ARCHITECTURE}.predictor.", f"{ARCHITECTURE}.calibration.")


def replace_predictors(
    source: Path, out: Path, blocks: Sequence[Sequence[Tensor]], metadata: Mapping[str, Any], layout: str | None = None
) -> int:
    """Write `source` to `out` with new predictor tensors for each block and new keys; returns the size in bytes.

    layout: of the new file; None: as it is. Raises UserError where the file cannot have it.

    After any exception, an interrupt included, `out` is as it was before and nothing else is left behind.
    """
    return write_files([with_new_predictors(source, out, blocks, metadata, layout)])


def with_new_predictors(
    source: Path, out: Path, blocks: Sequence[Sequence[Tensor]], metadata: Mapping[str, Any], layout: str | None = None
) -> NewFile:
    """What `replace_predictors` writes."""
    kept = {key: value for key, value in copied_keys(source).items() if not key.startswith(REPLACED)}
    with GgufFile(source) as file:
        s = laid_out(file.structure, layout, f"`{source}`")
        tensors = [tensor for tensor in _streams(file, blocks) if kept_in(s.layout, tensor.name)]
        described = s.to_metadata()
        keys = kept | {key: described[key] for key in LAYOUT_KEYS} | dict(metadata)
        return NewFile(out, *bundled(s, keys, tensors))


def _streams(file: GgufFile, blocks: Sequence[Sequence[Tensor]]) -> Iterator[NewTensor]:
    """Old tensors in their order, each block followed by its new ones."""
    kept = [name for name in file.tensors if ".predictor_" not in name]
    for name, following in zip(kept, [*kept[1:], ""], strict=True):
        yield copied(file, name)
        block = _block_of(name)
        if block is not None and _block_of(following) != block:
            for new in blocks[block]:
                yield NewTensor(in_block(block, new.name), new.shape, ggml.TYPES[new.type], new.nbytes, (new.data,))


def _block_of(name: str) -> int | None:
    found = parsed(name)
    return found[0] if found else None
