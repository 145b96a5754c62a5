"""BitNet b1.58 in its bf16 form: Llama's body with a norm before the output and the down projection, and a gate of
squared ReLU.

The bf16 weights are those of training: the model rounds them to three values whenever it runs. The conversion does so
once.
(Its runs in transformers round activations to 8 bits as well. That is left to the file's own format.)
"""

from collections.abc import Callable

from convert import naming
from convert.arch import Arch, Field, Source
from convert.config import Config
from convert.rope import Rope


def _rounded(config: Config) -> bool:
    quantization = config.inside("quantization_config")
    online = quantization.get("quantization_mode", str, "offline") == "online"
    return quantization.get("quant_method", str, "") == "bitnet" and online


def _matrix(name: str, rewrite: str = "identity", columns: str = "") -> Callable[[Config], Source]:
    return lambda config: Source(f"model.layers.{{i}}.{name}", rewrite, _rounded(config), columns)


_SUB_NORM = "model.layers.{i}.mlp.ffn_sub_norm.weight"
_ROPE = Rope(theta=500000.0)

ARCH = Arch(
    family="bitnet",
    architectures=("BitNetForCausalLM",),
    model_type="bitnet",
    activation=Field("hidden_act", "relu2"),
    activations={"relu2": "relu2", "relu": "relu"},
    base_prefix="model.",
    quantization=("bitnet",),
    keys={
        **naming.SIZES,
        "head_count_kv": naming.heads_kv(5),
        **naming.ATTENTION_BIASES,
        **_ROPE.keys(),
        "attention_sub_norm": True,
        "ffn_sub_norm": True,
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-5),
        "ffn_gate": "gated",
    },
    tensors={
        **naming.ends(),
        **_ROPE.tensors(),
        **naming.block_norms(),
        **naming.attention(),
        **{f"blk.{{i}}.attn_{letter}.weight": _matrix(f"self_attn.{letter}_proj.weight") for letter in "qkv"},
        "blk.{i}.attn_output.weight": _matrix("self_attn.o_proj.weight"),
        "blk.{i}.attn_sub_norm.weight": Source("model.layers.{i}.self_attn.attn_sub_norm.weight"),
        "blk.{i}.ffn_gate.weight": _matrix("mlp.gate_proj.weight"),
        "blk.{i}.ffn_up.weight": _matrix("mlp.up_proj.weight"),
        "blk.{i}.ffn_down.weight": _matrix("mlp.down_proj.weight", columns=_SUB_NORM),
        "blk.{i}.ffn_down_t.weight": _matrix("mlp.down_proj.weight", "transpose", columns=_SUB_NORM),
    },
)
