"""The table of architecture families: two or more tiny random checkpoints of each, and what their reference computes.

The reference is transformers' own class. Where it has none, it is the class of the same body with the published
arithmetic put into it (`change`): FATReLU and dReLU gates, MiniCPM's scales, BitNet's rounding. Sizes are no multiples of 256.
A new family adds rows to CASES.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import experts
import torch
import transformers
from checkpoints import VOCAB_SIZE, save
from oracle import Logits

Change = Callable[[Any], None]


@dataclass(frozen=True)
class Case:
    """A checkpoint. body: name of transformers' classes, before `Config` and `ForCausalLM`. config: of that body.

    written: what config.json says instead, None for keys it lacks. change: what the model does otherwise than the body's class.
    buffers: changes what is no parameter, before the model is saved.
    """

    family: str
    body: str
    config: dict[str, Any]
    written: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None
    ffn_type: str | None = None
    buffers: Change | None = None

    @property
    def tied(self) -> bool:
        """Whether the output head is the embeddings."""
        return bool(self.config.get("tie_word_embeddings", False))

    def _config(self) -> Any:
        common = {
            "vocab_size": VOCAB_SIZE,
            "num_hidden_layers": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        }
        # Copied: transformers completes the objects in it.
        return getattr(transformers, f"{self.body}Config")(**{**common, **copy.deepcopy(self.config)})

    def make(self, folder: Path) -> None:
        """Save the checkpoint to `folder`."""
        model = getattr(transformers, f"{self.body}ForCausalLM")(self._config())
        if self.buffers:
            self.buffers(model)
        save(model, folder)
        values = json.loads((folder / "config.json").read_text()) | self.written
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    def logits(self, folder: Path, ids: list[int]) -> Logits:
        """float32 [len(ids), n_vocab] of the checkpoint in `folder`. Reads its weights, not its config."""
        config = self._config()
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{self.body}ForCausalLM").from_pretrained(
            folder, config=config, dtype=torch.float32
        )
        if self.change:
            self.change(model)
        with torch.no_grad():
            logits: Logits = model(torch.tensor([ids])).logits[0].numpy()
        return logits


# --- what some models do otherwise than their body's class ------------------------------------------------------------


class FatRelu(torch.nn.Module):
    """x above the threshold, else 0: a jump, at which a rounding error decides. No number of the tests may lie that close."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert (x - self.threshold).abs().min() > 1e-5, "use another threshold"
        return torch.where(x > self.threshold, x, torch.zeros_like(x))


def fatrelu(threshold: float) -> Change:
    """Gates pass where they are above a threshold (ProSparse, arXiv:2402.13516)."""

    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.act_fn = FatRelu(threshold)

    return change


def drelu(model: Any) -> None:
    """relu(gate) * relu(up) (TurboSparse, arXiv:2406.05955)."""
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, m=mlp: m.down_proj(torch.relu(m.gate_proj(x)) * torch.relu(m.up_proj(x)))


def drelu_experts(model: Any) -> None:
    """The same in each expert (TurboSparse-Mixtral)."""

    def forward(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for token, place in itertools.product(range(len(hidden)), range(index.shape[1])):
            expert = int(index[token, place])
            gate, up = (module.gate_up_proj[expert] @ hidden[token]).chunk(2)
            out[token] += weights[token, place] * (module.down_proj[expert] @ (torch.relu(gate) * torch.relu(up)))
        return out

    for layer in model.model.layers:
        layer.mlp.experts.forward = functools.partial(forward, layer.mlp.experts)


def minicpm(scale_emb: float, scale_depth: float, dim_model_base: int, threshold: float) -> Change:
    """Scaled embeddings, residual branches and logits (MiniCPM, arXiv:2404.06395), and FATReLU."""

    def change(model: Any) -> None:
        fatrelu(threshold)(model)
        branch = scale_depth / math.sqrt(model.config.num_hidden_layers)
        model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: out * scale_emb)
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda _m, _i, out: (out[0] * branch, *out[1:]))
            layer.mlp.register_forward_hook(lambda _m, _i, out: out * branch)
        width = model.config.hidden_size / dim_model_base
        model.lm_head.register_forward_pre_hook(lambda _m, inputs: (inputs[0] / width,))

    return change


def unclamped(model: Any) -> None:
    """transformers keeps the steps of Mamba-2 above `time_step_min` in prompts, and not where it has one token."""
    for layer in model.model.layers:
        layer.mixer.time_step_limit = (0.0, math.inf)


def biased_routers(model: Any) -> None:
    """Corrections that decide which experts are chosen, and do not weigh them."""
    generator = torch.Generator().manual_seed(18)
    for layer in model.model.layers:
        if hasattr(layer.mixer, "gate"):
            bias = layer.mixer.gate.e_score_correction_bias
            bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))


def ternary(model: Any) -> None:
    """Every matrix but the head rounded to three values (BitNet b1.58, arXiv:2402.17764)."""
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            scale = 1.0 / module.weight.data.abs().mean().clamp(min=1e-5)
            module.weight.data = (module.weight.data * scale).round().clamp(-1, 1) / scale
            assert len(module.weight.data.unique()) == 3, name


# --- the table --------------------------------------------------------------------------------------------------------

_GATED = {"hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 6, "hidden_act": "relu"}
GQA = {**_GATED, "num_key_value_heads": 2}
_UNGATED = {"hidden_size": 96, "intermediate_size": 352, "num_attention_heads": 6}
_TIED = {"tie_word_embeddings": True}
_FALCON = {"hidden_size": 96, "num_attention_heads": 6, "activation": "relu"}
_FALCON_40B = {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
_LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    }
}
_ONLINE = {
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
}
_SPARSE_LLAMA = {
    "architectures": ["SparseLlamaForCausalLM"], "model_type": "llama_sparse_relu", "sparsity_gated_mlp": True,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
_BAMBOO = {"architectures": ["BambooForCausalLM"], "model_type": "bamboo"}
_SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 48}
_MINICPM = {"architectures": ["MiniCPMForCausalLM"], "hidden_act": "fatrelu", "hidden_act_param": 0.03, **_SCALES}
_OLD_FALCON = {"architectures": ["RWForCausalLM"], "n_layer": 2, "n_head": 6, "num_hidden_layers": None, "num_attention_heads": None,
               "num_kv_heads": None, "new_decoder_architecture": None, "rope_parameters": None, "ffn_hidden_size": None,
               "num_ln_in_parallel_attn": None}  # fmt: skip
_HYBRID = {
    "hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"], "n_groups": 2, "mamba_num_heads": 6,
    "mamba_head_dim": 16, "ssm_state_size": 32, "chunk_size": 32, "mlp_hidden_act": "relu2",
}  # fmt: skip
_HYBRID_EXPERTS = _HYBRID | {
    "layers_block_type": ["moe", "linear_attention", "moe", "full_attention", "mlp"], "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 96, "moe_shared_expert_intermediate_size": 160,
    "routed_scaling_factor": 2.5,
}  # fmt: skip

CASES: dict[str, Case | experts.Model] = {
    "llama-fatrelu": Case(
        "llama", "Llama", GQA | _LLAMA3, {"hidden_act": "fatrelu", "hidden_act_param": 0.5}, fatrelu(0.5)
    ),
    "llama-fatrelu-tied": Case(
        "llama", "Llama", _GATED | _TIED, {"hidden_act": "silu"}, fatrelu(1.25), ffn_type="fatrelu:1.25"
    ),
    "llama-drelu": Case("llama", "Llama", GQA, {}, drelu, ffn_type="drelu"),
    "llama-relu2": Case("llama", "Llama", {**_GATED, "hidden_act": "relu2"} | _TIED),
    "sparse-llama-tied": Case("sparse_llama", "Llama", _GATED | _TIED, {**_SPARSE_LLAMA, "hidden_act": "silu"}),
    "sparse-llama": Case(
        "sparse_llama",
        "Llama",
        {**GQA, **_LLAMA3, "attention_bias": True, "mlp_bias": True},
        {**_SPARSE_LLAMA, "intermediate_size": 999, "sparsity_new_intermediate_size": 224},
    ),
    "opt-tied": Case(
        "opt", "OPT", {"hidden_size": 96, "ffn_dim": 352, "num_attention_heads": 6, "word_embed_proj_dim": 96} | _TIED
    ),
    "opt-narrow-untied": Case(
        "opt", "OPT", {"hidden_size": 80, "ffn_dim": 224, "num_attention_heads": 5, "word_embed_proj_dim": 80}
    ),
    "bamboo": Case("bamboo", "Mistral", GQA | _LLAMA3, _BAMBOO, drelu),
    "bamboo-tied": Case("bamboo", "Mistral", {**GQA, "head_dim": 32, "sliding_window": None} | _TIED, _BAMBOO, drelu),
    "mistral-relu": Case("mistral", "Mistral", GQA | _LLAMA3),
    "mistral-drelu-tied": Case(
        "mistral", "Mistral", {**GQA, "sliding_window": None} | _TIED, {}, drelu, ffn_type="drelu"
    ),
    "mistral-window": Case("mistral", "Mistral", {**GQA, "sliding_window": 40} | _TIED),
    "mixtral": Case("mixtral", "Mixtral", GQA | _EXPERTS | _LLAMA3 | {"sliding_window": 40}),
    "mixtral-drelu": Case(
        "mixtral", "Mixtral", {**GQA, **_EXPERTS, "num_local_experts": 7} | _TIED, {}, drelu_experts, ffn_type="drelu"
    ),
    "qwen2-drelu": Case("qwen2", "Qwen2", GQA | _YARN, {}, drelu, ffn_type="drelu"),
    "qwen2-relu-tied": Case("qwen2", "Qwen2", {**GQA, "num_key_value_heads": 3} | _TIED),
    "minicpm": Case("minicpm", "Llama", {**GQA, **_YARN, "rms_norm_eps": 1e-5}, _MINICPM, minicpm(12, 1.4, 48, 0.03)),
    "minicpm-tied": Case(
        "minicpm",
        "Llama",
        {**_GATED, "attention_bias": True} | _TIED,
        {**_MINICPM, "scale_depth": 0.7, "hidden_act_param": 0.45},
        minicpm(12, 0.7, 48, 0.45),
    ),
    "falcon-40b": Case("falcon", "Falcon", _FALCON_40B | _TIED),
    "falcon-40b-one-norm": Case(
        "falcon", "Falcon", {**_FALCON_40B, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 224, "bias": True}
    ),
    "falcon-40b-old": Case(
        "falcon", "Falcon", _FALCON_40B | _TIED, {**_OLD_FALCON, "n_head_kv": 2, "model_type": "RefinedWeb"}
    ),
    "falcon-7b": Case("falcon", "Falcon", {**_FALCON, **_YARN, "bias": True}),
    "falcon-7b-old": Case("falcon", "Falcon", _FALCON | _TIED, {**_OLD_FALCON, "model_type": "RefinedWebModel"}),
    "falcon-sequential": Case("falcon", "Falcon", {**_FALCON, "parallel_attn": False, "multi_query": False} | _TIED),
    "nemotron_h": Case("nemotron_h", "NemotronH", _HYBRID, change=unclamped),
    "nemotron_h-tied": Case(
        "nemotron_h",
        "NemotronH",
        _HYBRID
        | {"layers_block_type": ["mlp", "full_attention", *["linear_attention"] * 2, "mlp"], "n_groups": 1}
        | {"mamba_head_dim": 32, "conv_kernel": 3}
        | _TIED,
        change=unclamped,
    ),
    "nemotron_h-experts": Case("nemotron_h", "NemotronH", _HYBRID_EXPERTS, change=unclamped, buffers=biased_routers),
    "nemotron_h-latent": Case(
        "nemotron_h",
        "NemotronH",
        _HYBRID_EXPERTS | {"moe_latent_size": 64, "norm_topk_prob": False, "n_routed_experts": 16, "n_groups": 3},
        change=unclamped,
        buffers=biased_routers,
    ),
    "nemotron_h-letters": Case(
        "nemotron_h",
        "NemotronH",
        _HYBRID | {"layers_block_type": ["full_attention", "linear_attention", "mlp"], "n_groups": 3},
        written={"layers_block_type": None, "hybrid_override_pattern": "*M-", "num_hidden_layers": 3},
        change=unclamped,
    ),
    "nemotron": Case("nemotron", "Nemotron", {**_UNGATED, **_YARN, "num_key_value_heads": 2, "hidden_act": "relu2"}),
    "nemotron-biases-tied": Case(
        "nemotron",
        "Nemotron",
        {**_UNGATED, "num_key_value_heads": 3, "head_dim": 24, "attention_bias": True, "mlp_bias": True} | _TIED,
    ),
    "arcee": Case("arcee", "Arcee", {**_UNGATED, **_YARN, "num_key_value_heads": 2}),
    "arcee-biases-tied": Case(
        "arcee", "Arcee", {**_UNGATED, "num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True} | _TIED
    ),
    "jais2": Case("jais2", "Jais2", {**_UNGATED, **_YARN, "num_key_value_heads": 2}),
    "jais2-tied": Case("jais2", "Jais2", {**_UNGATED, "intermediate_size": 224, "layer_norm_eps": 1e-4} | _TIED),
    "persimmon": Case("persimmon", "Persimmon", {**_UNGATED, **_YARN}),
    "persimmon-plain-tied": Case(
        "persimmon", "Persimmon", {**_UNGATED, "qk_layernorm": False, "intermediate_size": 224} | _TIED
    ),
    "nanochat": Case(
        "nanochat", "NanoChat", {**_UNGATED, **_LLAMA3, "num_key_value_heads": 2, "final_logit_softcapping": 5.0}
    ),
    "nanochat-biases-tied": Case(
        "nanochat", "NanoChat", {**_UNGATED, "num_key_value_heads": 3, "attention_bias": True} | _TIED
    ),
    "bitnet": Case("bitnet", "BitNet", {**GQA, **_YARN, "hidden_act": "relu2"}, _ONLINE, ternary),
    "bitnet-unrounded-tied": Case(
        "bitnet",
        "BitNet",
        {**GQA, "num_key_value_heads": 3, "attention_bias": True, "hidden_act": "relu2", "rms_norm_eps": 1e-3} | _TIED,
    ),
    **experts.MODELS,  # whose reference is float64 numpy
}
