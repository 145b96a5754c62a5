"""Which weights are read into memory of our own when a model is loaded, and which stay in the mapped file.

What every token reads from its first byte to its last gains by it: it is read at the speed of large pages. So do whole
experts, though each token uses some of them only. Rows picked here and there gain next to nothing, and stay mapped:
they can be dropped where memory gets short, and are shared with whoever has the same file open.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from runtime.base.figures import memory
from runtime.compute.paging import paged_names
from runtime.compute.repack import gains
from runtime.compute.weights import Held
from runtime.errors import UserError
from runtime.hybrid.executor import multiplies
from runtime.hybrid.tensor_map import CPU, NEURON_ELEMENTS, TensorMap
from runtime.model_file import tensor_names as n
from runtime.model_file.reader import GgufFile, TensorInfo
from runtime.model_file.tensor_shapes import required_tensors
from runtime.options import SettledOptions

_OF_PREDICTORS = (n.weight(n.PREDICTOR_IN), *(name for name in n.PREDICTOR_ROWS if name not in n.PREDICTOR_BIASES))
_UNUSED_DENSE = frozenset((*n.PREDICTOR_ROWS, n.weight(n.PREDICTOR_IN), *n.TRANSPOSED))
_UNUSED_SPARSE = frozenset((n.SHARED_MATRICES[-1],))  # a device or `dense` reads it
_USABLE = 0.9  # of the memory that is left
_GAINS = sys.platform == "linux"  # where it was measured that memory of one's own is faster


@dataclass(frozen=True)
class Choice:
    """What is read into memory. note: why nothing is, where something should be; "" otherwise."""

    held: Mapping[str, Held] = field(default_factory=dict)
    note: str = ""


def choose_held(
    file: GgufFile,
    tensor_map: TensorMap,
    run: SettledOptions,
    kv_bytes: int,
    left: float,
    names: Collection[str] | None = None,
) -> Choice:
    """What `run.mmap` asks for: None: what is read whole; False: all that the CPU computes with; True: nothing.

    With a budget of main memory all is held but the rows of neurons, which `Paging` has.
    names: of the tensors that are computed with, None for all. kv_bytes: keys and values of a full context. left: bytes
    of main memory that can still be taken. Nothing is held where what the CPU can touch does not fit beside it: pages
    of a file are dropped, other memory is swapped out.
    Raises UserError where all is to be held and does not fit.
    """
    names = required_tensors(tensor_map.structure) if names is None else names
    if run.ram_budget is not None:
        paged = frozenset(paged_names(file))
        return Choice({name: part for name, part in _on_cpu(file, tensor_map, run, names).items() if name not in paged})
    if run.mmap or (run.mmap is None and not _GAINS):
        return Choice()
    touched = _on_cpu(file, tensor_map, run, names)
    held = touched if run.mmap is False else _read_whole(tensor_map, run, touched)
    needed = sum(part.length for part in touched.values()) + kv_bytes
    if needed <= _USABLE * left:
        return Choice(held)
    found = f"{memory(int(left))} of memory left, {memory(needed)} needed for the model"
    if run.mmap is False:
        raise UserError(f"`{file.path}`: {found}", "leave --no-mmap out: what is not in memory is read from the file")
    return Choice(note=f"{found}: all weights stay in the mapped file")


def _on_cpu(file: GgufFile, tensor_map: TensorMap, run: SettledOptions, names: Collection[str]) -> dict[str, Held]:
    """What of some tensors the CPU can read in this mode, without what is repacked at load."""
    found = {}
    for name in names:
        info, block = file.tensors[name], n.parsed(name)
        unused = block is not None and block[1] in (_UNUSED_DENSE if run.ffn == "dense" else _UNUSED_SPARSE)
        repacked = run.ffn == "dense" and gains(info.type_id) and multiplies(tensor_map, name)
        part = _part(info, tensor_map)
        if part.length and not unused and not repacked:
            found[name] = part
    return found


def _part(info: TensorInfo, tensor_map: TensorMap) -> Held:
    """The bytes of a tensor that the CPU computes with, in this or that mode."""
    whole, nothing, block = Held(0, info.nbytes), Held(0, 0), n.parsed(info.name)
    if block is None:
        of_head = info.name.startswith((n.OUTPUT_NORM, n.OUTPUT_PROJ, n.weight(n.OUTPUT)))
        return nothing if of_head and tensor_map.head != CPU else whole
    i, short = block
    sides = tensor_map.blocks[i]
    pieces = sides.on(CPU)
    ffn = tensor_map.structure.blocks[i].ffn
    if short in NEURON_ELEMENTS and not (ffn and ffn.experts):
        row = info.nbytes // info.ne[-1]
        if not pieces:
            return nothing
        # From the first to the last: pieces of the CPU between which a device has some are an exception.
        return Held(row * pieces[0].first, row * (pieces[-1].end - pieces[0].first))
    if short in (*NEURON_ELEMENTS, *n.NEURON_COLUMNS, n.weight(n.PREDICTOR_IN)):
        return whole if pieces else nothing
    return whole if sides.home == CPU and short not in n.NEURON_NOTES else nothing


def _read_whole(tensor_map: TensorMap, run: SettledOptions, touched: Mapping[str, Held]) -> dict[str, Held]:
    """Of what the CPU can read, that which it reads for every token."""
    s = tensor_map.structure
    names = {n.weight(stem) for stem in (n.TOKEN_EMBD_PROJ, n.OUTPUT_PROJ)}
    if tensor_map.head == CPU:
        names.add(n.weight(tensor_map.head_stem))
    for i in range(s.block_count):
        names |= {n.weight_of(i, stem) for stem in (*n.ATTENTION_MATRICES, *n.MAMBA_MATRICES)}
    for i, ffn in s.ffns.items():
        names |= {n.in_block(i, short) for short in n.LATENTS}
        if run.ffn == "dense":
            names |= {n.weight_of(i, stem) for stem in n.Stems().matrices}
            names |= {n.in_block(i, short) for short in n.SHARED_MATRICES}
            continue
        if i in s.shared:
            names.add(n.weight_of(i, n.row_matrices(s.shared[i])[0]))
        predicted = s.rank(i) > 0 and (run.chooses or run.ffn == "verified")
        if predicted and not tensor_map.scored_at_home(i):
            names |= {n.in_block(i, short) for short in _OF_PREDICTORS}
        if ffn.experts:
            names |= {n.in_block(i, short) for short in n.ROUTERS}
        # Of experts, those that a token uses; a few tokens later all were.
        if not predicted or run.ffn == "verified":
            names.add(n.weight_of(i, n.row_matrices(ffn)[0]))
    return {name: part for name, part in touched.items() if name in names}
