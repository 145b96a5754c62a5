"""libllama's C functions as used here: vocabulary and samplers, no model weights (declared as in
`runtime.bindings.ggml`).
"""

import ctypes
from typing import Annotated

from runtime.bindings.ffi import LLAMA, Bool, C, CharP, Float, Handle, Int32, SizeT, UInt32, VoidP, stub
from runtime.bindings.ggml import LogCallback

# enum llama_model_kv_override_type
KV_OVERRIDE_TYPE_STR = 3
DEFAULT_SEED = 0xFFFFFFFF


class ModelP(Handle):
    spelling = "struct llama_model *"


class ConstModelP(Handle):
    spelling = "const struct llama_model *"


class VocabP(Handle):
    spelling = "const struct llama_vocab *"


class SamplerP(Handle):
    spelling = "struct llama_sampler *"


class ConstSamplerP(SamplerP):
    spelling = "const struct llama_sampler *"


class llama_model_kv_override(ctypes.Structure):
    # the union's widest member is the string
    _fields_ = [
        ("tag", ctypes.c_int),
        ("key", ctypes.c_char * 128),
        ("_align", ctypes.c_int64 * 0),
        ("val_str", ctypes.c_char * 128),
    ]


class llama_model_params(ctypes.Structure):
    _fields_ = [
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.POINTER(llama_model_kv_override)),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
    ]


class llama_sampler_chain_params(ctypes.Structure):
    _fields_ = [("no_perf", ctypes.c_bool)]


class llama_token_data_array(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    ]


STRUCTS = (llama_model_kv_override, llama_model_params, llama_sampler_chain_params, llama_token_data_array)

Token = Annotated[int, C(ctypes.c_int32, "llama_token")]
TokensP = Annotated[int | None, C(ctypes.c_void_p, "llama_token *")]
ConstTokensP = Annotated[int | None, C(ctypes.c_void_p, "const llama_token *")]
CharBufferP = Annotated["ctypes.Array[ctypes.c_char] | None", C(ctypes.POINTER(ctypes.c_char), "char *")]
ConstTextsP = Annotated["ctypes.Array[ctypes.c_char_p] | None", C(ctypes.POINTER(ctypes.c_char_p), "const char **")]
TokenDataArrayP = Annotated[
    "ctypes._Pointer[llama_token_data_array] | ctypes._CArgObject",
    C(ctypes.POINTER(llama_token_data_array), "llama_token_data_array *"),
]


@stub(LLAMA)
def llama_log_set(log_callback: LogCallback, user_data: VoidP) -> None: ...
@stub(LLAMA)
def llama_model_default_params() -> llama_model_params: ...
@stub(LLAMA)
def llama_model_load_from_file(path_model: CharP, params: llama_model_params) -> ModelP: ...
@stub(LLAMA)
def llama_model_free(model: ModelP) -> None: ...
@stub(LLAMA)
def llama_model_get_vocab(model: ConstModelP) -> VocabP: ...


@stub(LLAMA)
def llama_vocab_n_tokens(vocab: VocabP) -> Int32: ...
@stub(LLAMA)
def llama_vocab_is_eog(vocab: VocabP, token: Token) -> Bool: ...
@stub(LLAMA)
def llama_vocab_bos(vocab: VocabP) -> Token: ...
@stub(LLAMA)
def llama_vocab_eos(vocab: VocabP) -> Token: ...
@stub(LLAMA)
def llama_vocab_get_add_bos(vocab: VocabP) -> Bool: ...
@stub(LLAMA)
def llama_vocab_get_add_eos(vocab: VocabP) -> Bool: ...
@stub(LLAMA)
def llama_vocab_get_text(vocab: VocabP, token: Token) -> CharP: ...
@stub(LLAMA)
def llama_tokenize(
    vocab: VocabP,
    text: CharP,
    text_len: Int32,
    tokens: TokensP,
    n_tokens_max: Int32,
    add_special: Bool,
    parse_special: Bool,
) -> Int32: ...
@stub(LLAMA)
def llama_token_to_piece(
    vocab: VocabP, token: Token, buf: CharBufferP, length: Int32, lstrip: Int32, special: Bool
) -> Int32: ...


@stub(LLAMA)
def llama_sampler_chain_init(params: llama_sampler_chain_params) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_chain_add(chain: SamplerP, smpl: SamplerP) -> None: ...
@stub(LLAMA)
def llama_sampler_apply(smpl: SamplerP, cur_p: TokenDataArrayP) -> None: ...
@stub(LLAMA)
def llama_sampler_accept(smpl: SamplerP, token: Token) -> None: ...
@stub(LLAMA)
def llama_sampler_reset(smpl: SamplerP) -> None: ...
@stub(LLAMA)
def llama_sampler_clone(smpl: ConstSamplerP) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_free(smpl: SamplerP) -> None: ...
@stub(LLAMA)
def llama_sampler_init_greedy() -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_dist(seed: UInt32) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_top_k(k: Int32) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_top_p(p: Float, min_keep: SizeT) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_min_p(p: Float, min_keep: SizeT) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_typical(p: Float, min_keep: SizeT) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_temp_ext(t: Float, delta: Float, exponent: Float) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_xtc(p: Float, t: Float, min_keep: SizeT, seed: UInt32) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_top_n_sigma(n: Float) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_mirostat(n_vocab: Int32, seed: UInt32, tau: Float, eta: Float, m: Int32) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_mirostat_v2(seed: UInt32, tau: Float, eta: Float) -> SamplerP: ...
@stub(LLAMA)
def llama_sampler_init_dry(
    vocab: VocabP,
    dry_multiplier: Float,
    dry_base: Float,
    dry_allowed_length: Int32,
    dry_penalty_last_n: Int32,
    seq_breakers: ConstTextsP,
    num_breakers: SizeT,
) -> SamplerP: ...
