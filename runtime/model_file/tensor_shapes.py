"""Which tensors a file must hold, and their shapes: what follows from its `Structure`.

Shapes are in ggml's order, the contiguous dimension first.
"""

from __future__ import annotations

from runtime.bindings.ffn_shape import FfnShape
from runtime.model_file import tensor_names as n
from runtime.model_file.structure import Attention, Mamba2, Structure

Shapes = dict[str, tuple[int, ...]]


def required_tensors(s: Structure) -> Shapes:
    """Every tensor that a file of this structure must hold -> its shape, in the order of the file."""
    d = s.embedding_length
    e = s.token_embedding_length or d
    tensors: Shapes = {n.weight(n.TOKEN_EMBD): (e, s.vocab_size)}
    if s.projected:
        tensors |= {n.weight(n.TOKEN_EMBD_PROJ): (e, d), n.weight(n.OUTPUT_PROJ): (d, e)}
    if s.position == "learned":
        tensors[n.weight(n.POSITION_EMBD)] = (d, s.context_length)
    if s.embedding_norm:
        tensors |= _norm(s, n.TOKEN_EMBD_NORM, d)
    if s.rope_freq_factors:
        tensors[n.weight(n.ROPE_FREQS)] = (s.rope_dimensions // 2,)
    for i in range(s.block_count):
        block = block_tensors(s, i) | neuron_tensors(s, i)
        tensors |= {n.in_block(i, name): shape for name, shape in block.items()}
    if s.output_norm:
        tensors |= _norm(s, n.OUTPUT_NORM, d)
    if not s.tied_output:
        tensors[n.weight(n.OUTPUT)] = (e, s.vocab_size)
    return tensors


def tensors_of(s: Structure, blocks: range) -> Shapes:
    """As `required_tensors`, of some consecutive blocks: with the first one there are the embeddings, with the last one
    the head.
    """
    if len(blocks) == s.block_count:
        return required_tensors(s)
    ends = {n.TOKEN_EMBD, n.TOKEN_EMBD_PROJ, n.POSITION_EMBD, n.TOKEN_EMBD_NORM} if blocks.start == 0 else set()
    if blocks.stop == s.block_count:
        ends |= {n.OUTPUT_NORM, n.OUTPUT_PROJ, n.TOKEN_EMBD if s.tied_output else n.OUTPUT}
    wanted = {part(stem) for stem in ends for part in (n.weight, n.bias)} | {n.weight(n.ROPE_FREQS)}

    def is_there(name: str) -> bool:
        block = n.parsed(name)
        return block[0] in blocks if block else name in wanted

    return {name: shape for name, shape in required_tensors(s).items() if is_there(name)}


def block_tensors(s: Structure, i: int) -> Shapes:
    """Short name -> shape of what block `i` computes with, its predictor aside."""
    block = s.blocks[i]
    mixer_first, mixer_rest = _mixer(s, block.mixer)
    ffn_first, ffn_rest = _ffn(s, block.ffn) if block.ffn else ({}, {})
    return mixer_first | ffn_first | mixer_rest | ffn_rest | (_shared(block.shared) if block.shared else {})


def _mixer(s: Structure, mixer: Attention | Mamba2 | None) -> tuple[Shapes, Shapes]:
    if mixer is None:
        return {}, {}
    return (_mamba2(s, mixer), {}) if isinstance(mixer, Mamba2) else _attention(s, mixer)


def _mamba2(s: Structure, m: Mamba2) -> Shapes:
    """Rows of the first matrix: z, x, B, C, and a step for each head."""
    d, inner, channels, heads = s.embedding_length, m.inner_length, m.conv_channels, m.head_count
    return {
        **_norm(s, n.ATTN_NORM, d),
        n.weight(n.SSM_IN): (d, inner + channels + heads),
        n.weight(n.SSM_CONV): (m.conv_length, channels),
        n.bias(n.SSM_CONV): (channels,),
        n.bias(n.SSM_DT): (heads,),
        n.SSM_A: (1, heads),
        n.SSM_D: (1, heads),
        n.weight(n.SSM_NORM): (inner // m.group_count, m.group_count),
        n.weight(n.SSM_OUT): (inner, d),
    }


def _attention(s: Structure, a: Attention) -> tuple[Shapes, Shapes]:
    """What every attention has, and the rest: a block's file order has the FFN's first part between them."""
    d, q, kv = s.embedding_length, a.query_length, a.kv_length
    rest: Shapes = {}
    if s.attention_bias:
        rest |= {n.bias(n.ATTN_Q): (q,), n.bias(n.ATTN_K): (kv,), n.bias(n.ATTN_V): (kv,)}
    if s.attention_output_bias:
        rest[n.bias(n.ATTN_OUTPUT)] = (d,)
    if s.qk_norm != "none":
        rest |= _norm(s, n.ATTN_Q_NORM, a.head_length) | _norm(s, n.ATTN_K_NORM, a.head_length)
    if s.attention_sub_norm:
        rest |= _norm(s, n.ATTN_SUB_NORM, q)
    first = {
        **_norm(s, n.ATTN_NORM, d),
        n.weight(n.ATTN_Q): (d, q),
        n.weight(n.ATTN_K): (d, kv),
        n.weight(n.ATTN_V): (d, kv),
        n.weight(n.ATTN_OUTPUT): (q, d),
    }
    return first, rest


def _ffn(s: Structure, ffn: FfnShape) -> tuple[Shapes, Shapes]:
    """What every FFN has, and the rest."""
    d, ff, stems = ffn.n_embd, ffn.expert_length, n.stems(ffn)
    each = (ffn.experts.count,) if ffn.experts else ()
    rest: Shapes = {n.weight(stems.gate): (d, ff, *each)} if ffn.gated else {}
    if s.layout == "both":
        rest[n.weight(stems.down)] = (ff, d, *each)
    if ffn.bias:
        rest |= {n.bias(n.FFN_UP): (ff,), n.bias(n.FFN_DOWN): (d,)}
        rest |= {n.bias(n.FFN_GATE): (ff,)} if ffn.gated else {}
    first = {n.weight(stems.up): (d, ff, *each), n.weight(stems.down_t): (d, ff, *each)}
    return {**_norm(s, n.FFN_NORM, s.embedding_length), **_router(s, ffn), **first}, rest


def _router(s: Structure, ffn: FfnShape) -> Shapes:
    if not ffn.experts:
        return {}
    count, d, latent = ffn.experts.count, s.embedding_length, s.expert_latent_length
    found: Shapes = {n.weight(n.ROUTER): (d, count)} | ({n.bias(n.ROUTER_BIAS): (count,)} if ffn.experts.bias else {})
    return found | ({n.weight(n.LATENT_DOWN): (d, latent), n.weight(n.LATENT_UP): (latent, d)} if latent else {})


def _shared(ffn: FfnShape) -> Shapes:
    """Of the shared expert, in both layouts: a block's home may be a device, which wants whole matrices."""
    stems, rows, columns = n.stems(ffn), (ffn.n_embd, ffn.n_ff), (ffn.n_ff, ffn.n_embd)
    first: Shapes = {n.weight(stems.gate): rows} if ffn.gated else {}
    return first | {n.weight(stems.up): rows, n.weight(stems.down_t): rows, n.weight(stems.down): columns}


def neuron_tensors(s: Structure, i: int) -> Shapes:
    """Short name -> shape of what block `i` stores of its neurons' order and their predictor."""
    ffn, r = s.blocks[i].ffn, s.rank(i)
    if ffn is None:
        return {}
    d, stems = ffn.n_embd, n.stems(ffn)
    rows = (ffn.expert_length, ffn.experts.count) if ffn.experts else (ffn.n_ff,)
    tensors: Shapes = {}
    if s.neuron_order == "hot":
        tensors |= {stems.index: rows, stems.freq: rows}
        tensors |= {n.EXPERT_FREQ: rows[1:]} if ffn.experts else {}
    if r and s.predictor == "signbit":
        tensors |= {stems.predictor_sign: (d // 8, *rows), n.bias(stems.predictor_out): rows}
    elif r:
        tensors |= {n.weight(n.PREDICTOR_IN): (d, r), n.weight(stems.predictor_out): (r, *rows)}
        tensors[n.bias(stems.predictor_out)] = rows
    return tensors


def _norm(s: Structure, stem: str, width: int) -> Shapes:
    parts = (n.weight, n.bias) if s.norm == "layer" else (n.weight,)
    return {part(stem): (width,) for part in parts}
