"""Parts of architecture tables that families share: config keys and tensor names as Hugging Face's Llama has them.

Values for an architecture's file to compose. Knows no family.
"""

from __future__ import annotations

from collections.abc import Callable

from convert.arch import Field, Source, Sources
from convert.config import Config

Table = dict[str, Sources]

SIZES = {
    "vocab_size": Field("vocab_size"),
    "embedding_length": Field("hidden_size"),
    "block_count": Field("num_hidden_layers"),
    "feed_forward_length": Field("intermediate_size"),
    "head_count": Field("num_attention_heads"),
    "head_count_kv": Field("num_key_value_heads", Field("num_attention_heads")),
    "tied_output": Field("tie_word_embeddings", False),
}
ATTENTION_BIASES = {
    "attention_bias": Field("attention_bias", False),
    "attention_output_bias": Field("attention_bias", False),
}


def biases(key: str, default: bool) -> dict[str, Field]:
    """All projections have biases, or none, as one key says."""
    return dict.fromkeys(("attention_bias", "attention_output_bias", "ffn_bias"), Field(key, default))


def heads_kv(usual: int) -> Callable[[Config], int]:
    """Key-value heads where a config without the key means `usual` of them; a null means as many as there are heads."""

    def count(config: Config) -> int:
        absent = "num_key_value_heads" not in config.values
        return config.get("num_key_value_heads", int, usual if absent else config.get("num_attention_heads", int))

    return count


def sliding_window(context_length: Callable[[Config], int], usual: int = 0) -> Callable[[Config], int]:
    """Positions that a token attends to, 0 for all: a config without the key means `usual` of them, a null no window,
    and neither is a window that the whole context fits into.
    """

    def length(config: Config) -> int:
        found = config.get("sliding_window", int, 0 if "sliding_window" in config.values else usual)
        return found if found < context_length(config) else 0

    return length


def pair(name: str, source: str | tuple[str, ...], rewrite: str = "identity", bias: bool = True) -> Table:
    """A matrix or a norm with its bias. source: of several, the first that the checkpoint has."""
    # Of what changes on the way, only rows that move have a bias that does.
    moved = rewrite if rewrite.startswith("fused") else "identity"
    parts = {"weight": rewrite, "bias": moved} if bias else {"weight": rewrite}
    if isinstance(source, str):
        return {f"{name}.{part}": Source(f"{source}.{part}", change) for part, change in parts.items()}
    return {
        f"{name}.{part}": tuple(Source(f"{one}.{part}", change) for one in source) for part, change in parts.items()
    }


def ends(norm: str = "model.norm", bias: bool = False, rewrite: str = "identity") -> Table:
    """Embeddings, the norm before the head, and the head. bias: of the norm; rewrite: of its weights."""
    return {
        "token_embd.weight": Source("model.embed_tokens.weight"),
        **pair("output_norm", norm, rewrite, bias),
        "output.weight": Source("lm_head.weight"),
    }


def block_norms(bias: bool = False, rewrite: str = "identity") -> Table:
    """The norms before attention and FFN."""
    return {
        **pair("blk.{i}.attn_norm", "model.layers.{i}.input_layernorm", rewrite, bias),
        **pair("blk.{i}.ffn_norm", "model.layers.{i}.post_attention_layernorm", rewrite, bias),
    }


def attention(
    bias: bool = True, output_bias: bool = True, at: str = "model.layers.{i}.self_attn", output: str = "o_proj"
) -> Table:
    """Four projections. at: what their names begin with; output: the last one's own name."""
    table: Table = {}
    for letter in "qkv":
        table |= pair(f"blk.{{i}}.attn_{letter}", f"{at}.{letter}_proj", bias=bias)
    return table | pair("blk.{i}.attn_output", f"{at}.{output}", bias=output_bias)


def fused_attention(fused: str, output: str, bias: bool = True) -> Table:
    """Queries, keys and values in one matrix, and the output projection."""
    table: Table = {}
    for letter in "qkv":
        table |= pair(f"blk.{{i}}.attn_{letter}", fused, f"fused_{letter}", bias)
    return table | pair("blk.{i}.attn_output", output, bias=bias)


def up(source: str, bias: bool = True) -> Table:
    """The up projection."""
    return pair("blk.{i}.ffn_up", source, bias=bias)


def down(source: str, bias: bool = True) -> Table:
    """The down projection in both layouts."""
    return {
        **pair("blk.{i}.ffn_down", source, bias=bias),
        "blk.{i}.ffn_down_t.weight": Source(f"{source}.weight", "transpose"),
    }


# What a config of experts must say, if anything: routers that choose groups of experts first, by the token's id or for
# each expert its tokens, and experts that all tokens share are not implemented. The weights of a token's experts add up
# to 1 in all of these families.
PLAIN_ROUTING = {
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "num_hash_layers": 0,
    "n_shared_experts": 0,
    "shared_expert_intermediate_size": 0,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1,
}


def experts(at: str, gate: str, up: str, down: str, router: str) -> Table:
    """Experts and their router. at: what the names of one expert's matrices begin with, `{e}` being its number;
    gate, up, down: their own names (gate: any, where experts have none); router: the whole name of the router's matrix,
    without `.weight`.
    """
    return {
        **pair("blk.{i}.ffn_gate_inp", router, bias=False),
        "blk.{i}.ffn_gate_exps.weight": Source(f"{at}.{gate}.weight"),
        "blk.{i}.ffn_up_exps.weight": Source(f"{at}.{up}.weight"),
        "blk.{i}.ffn_down_exps.weight": Source(f"{at}.{down}.weight"),
        "blk.{i}.ffn_down_t_exps.weight": Source(f"{at}.{down}.weight", "transpose"),
    }


def shared_expert(at: str, gate: str, up: str, down: str) -> Table:
    """The expert that every token uses, where `expert_shared_feed_forward_length` says that there is one. at: what the
    names of its matrices begin with; gate, up, down: as in `experts`.
    """
    return {
        "blk.{i}.ffn_gate_shexp.weight": Source(f"{at}.{gate}.weight"),
        "blk.{i}.ffn_up_shexp.weight": Source(f"{at}.{up}.weight"),
        "blk.{i}.ffn_down_shexp.weight": Source(f"{at}.{down}.weight"),
        "blk.{i}.ffn_down_t_shexp.weight": Source(f"{at}.{down}.weight", "transpose"),
    }


def latent_experts(down: str, up: str) -> Table:
    """What makes the experts' input of the FFN's, and the reverse, where `expert_latent_length` says that there is
    something: whole names, without `.weight`.
    """
    return pair("blk.{i}.ffn_latent_down", down, bias=False) | pair("blk.{i}.ffn_latent_up", up, bias=False)


def gated_ffn(bias: bool = True) -> Table:
    """Gate, up and down projections."""
    mlp = "model.layers.{i}.mlp."
    return (
        pair("blk.{i}.ffn_gate", mlp + "gate_proj", bias=bias)
        | up(mlp + "up_proj", bias)
        | down(mlp + "down_proj", bias)
    )
