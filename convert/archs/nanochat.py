"""nanochat: RMS norms without weights, also of the embeddings and, after their rotation, of queries and keys; logits
squashed by tanh; squared ReLU.
"""

from collections.abc import Callable

import numpy as np

from convert import naming
from convert.arch import Arch, Field, Generated
from convert.config import Config
from convert.rope import Rope, head_length


def _ones(length: Callable[[Config], int]) -> Generated:
    return Generated(lambda config: np.ones(length(config), np.float32))


def _softcap(config: Config) -> float:
    key = "final_logit_softcapping"
    return 0.0 if config.values.get(key, 15.0) is None else config.positive(key, float, 15.0)


_WIDE = _ones(lambda config: config.get("hidden_size", int))
_HEAD = _ones(head_length)

_ROPE = Rope(backwards=True)

ARCH = Arch(
    family="nanochat",
    architectures=("NanoChatForCausalLM",),
    model_type="nanochat",
    activation=Field("hidden_act", "relu2"),
    activations={"relu2": "relu2", "relu": "relu"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **naming.ATTENTION_BIASES,
        **_ROPE.keys(),
        "qk_norm": "after_rope",
        "embedding_norm": True,
        "logit_softcap": _softcap,
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-6),
        "ffn_gate": "none",
    },
    tensors={
        **naming.ends(),
        **_ROPE.tensors(),
        "token_embd_norm.weight": _WIDE,
        "output_norm.weight": _WIDE,
        "blk.{i}.attn_norm.weight": _WIDE,
        "blk.{i}.ffn_norm.weight": _WIDE,
        "blk.{i}.attn_q_norm.weight": _HEAD,
        "blk.{i}.attn_k_norm.weight": _HEAD,
        **naming.attention(),
        **naming.up("model.layers.{i}.mlp.fc1", bias=False),
        **naming.down("model.layers.{i}.mlp.fc2", bias=False),
    },
)
