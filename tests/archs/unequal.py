"""A family whose blocks differ in kind and size: config.json has a list, one value per block, where others have a number.

Its names are Llama's. No published model has all of this; see tests/unequal.py.
"""

from collections.abc import Callable

from convert import naming
from convert.arch import Arch, Field
from convert.config import Config


def _each(name: str) -> Callable[[Config], tuple[int, ...]]:
    return lambda config: tuple(config.list_of(name, int))


def _rotated(config: Config) -> tuple[int, ...]:
    length = config.get("head_dim", int)
    return tuple(length if rotates else 0 for rotates in config.list_of("rotates", bool))


_BIASES = Field("biases")

ARCH = Arch(
    family="unequal",
    architectures=("UnequalForCausalLM",),
    activation=Field("hidden_act"),
    activations={"relu": "relu", "relu2": "relu2", "drelu": "drelu"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        "context_length": Field("max_position_embeddings"),
        "feed_forward_length": _each("intermediate_size"),
        "head_count": _each("num_attention_heads"),
        "head_count_kv": _each("num_key_value_heads"),
        "head_length": Field("head_dim"),
        "position": "rope_neox",
        "rope_dimension_count": _rotated,
        "sliding_window": Field("sliding_window"),
        "sliding_window_pattern": lambda config: tuple(config.list_of("windowed", bool)),
        "norm": Field("norm"),
        "norm_epsilon": 1e-5,
        "residual": Field("residual"),
        "ffn_gate": Field("gate"),
        "attention_bias": _BIASES,
        "attention_output_bias": _BIASES,
        "ffn_bias": _BIASES,
    },
    tensors={
        **naming.ends(bias=True),
        **naming.block_norms(bias=True),
        **naming.attention(),
        **naming.gated_ffn(),
    },
)
