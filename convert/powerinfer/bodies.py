"""What the models in PowerInfer's GGUF files are made of: one `Arch` for each architecture that its loader knows.

As for a checkpoint, with the file's own keys (without their `<architecture>.`) in place of config.json's, and its
tensor names.
Rewrite `identity` keeps a tensor byte for byte, `query_rows`, `key_rows` and `value_rows` a part of its rows; others
decode it.
"""

from __future__ import annotations

from convert.arch import Arch, Field, Source
from convert.config import Config
from runtime.errors import UserError

# Keys that no file has: PowerInfer knows the activation by architecture alone (each body's first one), and ties by a
# tensor's absence.
ACTIVATION, TIED = "activation", "tied"


def _head_length(config: Config) -> int:
    width, heads = config.get("embedding_length", int), config.get("attention.head_count", int)
    if heads <= 0 or width % heads:
        raise UserError(f"{config.where}: embedding_length {width} is not a multiple of the {heads} heads")
    return width // heads


def _rope_scaling(config: Config) -> str:
    kind = config.get("rope.scaling.type", str, "none")
    if kind not in ("none", "linear"):
        raise UserError(f"{config.where}: rope scaling `{kind}`, expected none or linear")
    return kind


def _rope_factor(config: Config) -> float:
    return config.get("rope.scaling.factor", float, 1.0) if _rope_scaling(config) == "linear" else 1.0


def _same(*names: str) -> dict[str, Source]:
    """Tensors that have the same names on both sides."""
    return {name: Source(name) for name in names}


_SIZES = {
    "vocab_size": Field("vocab_size"),
    "context_length": Field("context_length"),
    "embedding_length": Field("embedding_length"),
    "block_count": Field("block_count"),
    "feed_forward_length": Field("feed_forward_length"),
    "head_count": Field("attention.head_count"),
    "head_count_kv": Field("attention.head_count_kv", Field("attention.head_count")),
    "head_length": _head_length,
}
_ATTENTION = _same(*(f"blk.{{i}}.attn_{part}.weight" for part in ("q", "k", "v", "output")))
_ATTENTION_BIASES = _same(*(f"blk.{{i}}.attn_{part}.bias" for part in ("q", "k", "v", "output")))
_FFN = {
    **_same("blk.{i}.ffn_up.weight", "blk.{i}.ffn_down_t.weight"),
    "blk.{i}.ffn_down.weight": Source("blk.{i}.ffn_down_t.weight", "transpose"),
    "blk.{i}.predictor_in.weight": Source("blk.{i}.fc1.weight"),
    "blk.{i}.predictor_out.weight": Source("blk.{i}.fc2.weight"),
}
_NORMS = _same("blk.{i}.attn_norm.weight", "blk.{i}.ffn_norm.weight", "output_norm.weight")
_NORM_BIASES = _same("blk.{i}.attn_norm.bias", "blk.{i}.ffn_norm.bias", "output_norm.bias")


_LAYER_NORM_EPSILON = 1e-5  # of all OPTs and Falcons; files of the former do not say it


def _gated(family: str, architecture: str, activation: str) -> Arch:
    """RMS norms and rotary positions; query and key rows are stored so that neighbours are pairs."""
    return Arch(
        family=family,
        architectures=(architecture,),
        activation=Field(ACTIVATION),
        activations={activation: activation, "relu": "relu", "drelu": "drelu", "fatrelu": "fatrelu"},
        keys={
            **_SIZES,
            "norm": "rms",
            "norm_epsilon": Field("attention.layer_norm_rms_epsilon"),
            "position": "rope_norm",
            "rope_dimension_count": Field("rope.dimension_count", _head_length),
            "rope_freq_base": Field("rope.freq_base", 10000.0),
            "rope_scaling": _rope_scaling,
            "rope_scaling_factor": _rope_factor,
            "ffn_gate": "gated",
        },
        tensors={
            **_same("token_embd.weight", "output.weight", "blk.{i}.ffn_gate.weight"),
            **_ATTENTION,
            **_FFN,
            **_NORMS,
        },
        skip=("rope_freqs.weight", "blk.{i}.attn_rot_embd.weight"),
    )


BODIES = {
    "llama": _gated("llama", "LlamaForCausalLM", "relu"),
    "bamboo": _gated("bamboo", "BambooForCausalLM", "drelu"),
    "opt": Arch(
        family="opt",
        architectures=("OPTForCausalLM",),
        activation=Field(ACTIVATION),
        activations={"relu": "relu"},
        keys={
            **_SIZES,
            "norm": "layer",
            "norm_epsilon": Field("attention.layer_norm_epsilon", _LAYER_NORM_EPSILON),
            "context_length": lambda config: config.get("context_length", int) - 2,  # two rows belong to no position
            "position": "learned",
            "ffn_gate": "none",
            "attention_bias": True,
            "attention_output_bias": True,
            "ffn_bias": True,
            "tied_output": Field(TIED),
        },
        tensors={
            **_same("token_embd.weight", "output.weight", "blk.{i}.ffn_up.bias"),
            "position_embd.weight": Source("position_embd.weight", "skip_rows_2"),
            "blk.{i}.ffn_down.bias": Source("blk.{i}.ffn_down_t.bias"),
            **_ATTENTION,
            **_ATTENTION_BIASES,
            **_FFN,
            **_NORMS,
            **_NORM_BIASES,
        },
    ),
    # The predictor's input is the block's own, which is the stream before the FFN's norm where attention and FFN are
    # parallel.
    "falcon": Arch(
        family="falcon",
        architectures=("FalconForCausalLM",),
        activation=Field(ACTIVATION),
        activations={"relu": "relu"},
        keys={
            **_SIZES,
            "norm": "layer",
            "norm_epsilon": Field("attention.layer_norm_epsilon", _LAYER_NORM_EPSILON),
            "residual": "parallel",
            "position": "rope_neox",
            "rope_dimension_count": _head_length,
            "rope_freq_base": Field("rope.freq_base", 10000.0),
            "ffn_gate": "none",
            "tied_output": Field(TIED),
        },
        tensors={
            **_same("token_embd.weight", "output.weight", "output_norm.weight", "output_norm.bias"),
            "blk.{i}.attn_norm.weight": Source("blk.{i}.attn_norm_2.weight"),
            "blk.{i}.attn_norm.bias": Source("blk.{i}.attn_norm_2.bias"),
            "blk.{i}.ffn_norm.weight": Source("blk.{i}.attn_norm.weight"),
            "blk.{i}.ffn_norm.bias": Source("blk.{i}.attn_norm.bias"),
            "blk.{i}.attn_q.weight": Source("blk.{i}.attn_qkv.weight", "query_rows"),
            "blk.{i}.attn_k.weight": Source("blk.{i}.attn_qkv.weight", "key_rows"),
            "blk.{i}.attn_v.weight": Source("blk.{i}.attn_qkv.weight", "value_rows"),
            "blk.{i}.attn_output.weight": Source("blk.{i}.attn_output.weight"),
            **_FFN,
        },
    ),
}
# Where a file lacks the first, the second stands for both: a block's only norm.
INSTEAD = {"attn_norm_2": "attn_norm"}
# Of byte-level BPE: libllama's name of the pre-tokenizer, which files of that time do not hold, and whether texts begin
# with BOS where they do not say.
TOKENIZERS = {
    "llama": ("llama-bpe", True),
    "bamboo": ("llama-bpe", True),
    "opt": ("gpt-2", True),
    "falcon": ("falcon", False),
}
