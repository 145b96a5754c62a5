"""SakanaAI's SparseLM: Llama with a ReLU on the gate, whatever `hidden_act` says (arXiv 2603.23198).

Its FFNs are stored as Llama's, as training saves them, or as its kernels read them; parts of the latter are transposed.
"""

from convert.arch import Arch, Field, Source
from convert.archs.llama import ARCH as LLAMA
from convert.config import Config

_MLP = "model.layers.{i}.mlp."


def _gated(config: Config) -> bool:
    return config.get("sparsity_gated_mlp", bool, True)


def _up(config: Config) -> tuple[Source, ...]:
    # Without a gate, training saves the up projection transposed.
    saved = Source(f"{_MLP}up_weight", "identity" if _gated(config) else "transpose")
    return (Source(f"{_MLP}up_proj.weight"), saved, Source(f"{_MLP}UP"))


def _down(plain: str, turned: str) -> tuple[Source, ...]:
    # A model trained with the kernels keeps `down_proj` as they read it.
    forms = {"down_proj.weight": plain, "down_weight": turned, "DOWN": turned}
    return (
        *(Source(_MLP + name, rewrite) for name, rewrite in forms.items()),
        Source(f"{_MLP}down_proj.weight", turned),
    )


ARCH = Arch(
    family="sparse_llama",
    architectures=("SparseLlamaForCausalLM",),
    model_type="llama_sparse_relu",
    activation=Field("hidden_act", "silu"),
    activations={"silu": "relu", "relu": "relu"},
    base_prefix=LLAMA.base_prefix,
    keys={
        **LLAMA.keys,
        "feed_forward_length": Field("sparsity_new_intermediate_size", Field("intermediate_size")),
        "ffn_gate": lambda config: "gated" if _gated(config) else "none",
    },
    tensors={
        **LLAMA.tensors,
        "blk.{i}.ffn_gate.weight": (
            Source(f"{_MLP}gate_proj.weight"),
            Source(f"{_MLP}gate_weight", "transpose"),
            Source(f"{_MLP}GATE"),
        ),
        "blk.{i}.ffn_up.weight": _up,
        "blk.{i}.ffn_down.weight": _down("identity", "transpose"),
        "blk.{i}.ffn_down_t.weight": _down("transpose", "identity"),
    },
    skip=("*tracker.*", "*metrics_accumulator.*"),
)
