"""The fields of requests: one table, by which requests are read, the documents list them, and /openapi.json is made.

A field that is null counts as absent. A field that no table knows is ignored: clients send what other servers have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from runtime.serve.checks import Anything, Check, Flag, Ids, Keyed, Listing, Number, Schema, Text, Texts, Whole
from runtime.serve.errors import ApiError, wrong
from runtime.text.sampling import Sampling

Fields = dict[str, Any]
CHAT, TEXT, NATIVE, RESPONSES, ANTHROPIC = "chat", "completions", "completion", "responses", "messages"
_BOTH = (CHAT, TEXT)
_OURS = (*_BOTH, NATIVE)
_ALL = (*_OURS, RESPONSES, ANTHROPIC)
_BIG = (1 << 31) - 1
_LONGEST_BIAS = 1024  # entries of logit_bias


@dataclass(frozen=True)
class Field:
    """One field. about: what it does, for the documents; needed: a request without it is refused; aliases: other names
    of it.
    """

    name: str
    check: Check
    about: str
    endpoints: tuple[str, ...] = _ALL
    aliases: tuple[str, ...] = ()
    needed: bool = False


_TEXT: Schema = {"type": "string"}
_PART: Schema = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"type": "string", "enum": ["text"]}, "text": _TEXT},
}
_CONTENT: Schema = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_TEXT, _PART]}}]}
_ROLE: Schema = {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]}
_MESSAGE: Schema = {"type": "object", "required": ["role"], "properties": {"role": _ROLE, "content": _CONTENT}}
_PROMPT: Schema = {"anyOf": [_TEXT, {"type": "object"}, {"type": "array", "minItems": 1, "items": {}}]}
_INPUT: Schema = {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": {"type": "object"}}]}

FIELDS: tuple[Field, ...] = (
    Field("model", Text(), "the model's name; others are served, too, unless `--strict-model` is set"),
    Field("stream", Flag(), "send the answer in pieces, as server-sent events"),
    Field("stream_options", Keyed(), "`include_usage`: a last chunk with the usage", _BOTH),
    Field("messages", Listing(_MESSAGE, 1), "the conversation", (CHAT, ANTHROPIC), needed=True),
    Field(
        "prompt",
        Anything(_PROMPT),
        "a text, token ids, both in one list, or a list of such prompts",
        (TEXT, NATIVE),
        needed=True,
    ),
    Field(
        "max_tokens",
        Whole(-1, _BIG),
        "tokens of the answer at most; 0 computes the prompt only, -1 goes on until the context is full",
        (*_OURS, ANTHROPIC),
        ("max_completion_tokens", "n_predict"),
    ),
    Field("max_output_tokens", Whole(1, _BIG), "tokens of the answer at most", (RESPONSES,)),
    Field("n", Whole(1, 128), "how many answers; the prompt is computed once", _OURS, ("n_cmpl",)),
    Field("best_of", Whole(0, 128), "accepted where it equals `n`; 0 counts as absent", (TEXT,)),
    Field("stop", Texts(), "a text that ends the answer, or several; it is not part of the answer", _OURS),
    Field("stop_sequences", Texts(), "texts that end the answer", (ANTHROPIC,)),
    Field(
        "seed",
        Whole(),
        "of the random choice; the same one gives the same answer; -1 draws one; any other number counts modulo "
        "4294967295",
    ),
    Field("temperature", Number(0, 100), "0 takes the likeliest token"),
    Field("top_p", Number(0, 1), "keep the likeliest tokens that hold this share of the probability"),
    Field("top_k", Whole(-1, _BIG), "keep the k likeliest tokens; 0 and -1: all"),
    Field("min_p", Number(0, 1), "keep tokens at least this fraction as likely as the likeliest", _OURS),
    Field("typical_p", Number(0, 1), "keep tokens of typical information; 1: all", _OURS),
    Field("top_n_sigma", Number(-1, 1000), "keep tokens within so many deviations of the best logit; -1: all", _OURS),
    Field("xtc_probability", Number(0, 1), "how often the likeliest tokens are left out", _OURS),
    Field("xtc_threshold", Number(0, 1), "how likely such tokens are at least", _OURS),
    Field("dry_multiplier", Number(0, 100), "DRY: against repeated sequences; 0: off", _OURS),
    Field("dry_base", Number(0, 100), "DRY: growth with the length of what would be repeated", _OURS),
    Field("dry_allowed_length", Whole(0, _BIG), "DRY: lengths up to this one are free", _OURS),
    Field("dry_penalty_last_n", Whole(-1, _BIG), "DRY: tokens looked at; -1: all", _OURS),
    Field("dry_sequence_breakers", Texts(), "DRY: texts that end a sequence", _OURS),
    Field("mirostat", Whole(0, 2), "1 or 2: choose for a steady surprise, in place of top_k and others", _OURS),
    Field("mirostat_tau", Number(0, 100), "the surprise aimed at", _OURS),
    Field("mirostat_eta", Number(0, 100), "how fast it is corrected", _OURS),
    Field("dynatemp_range", Number(0, 100), "the temperature varies by so much, by entropy", _OURS),
    Field("dynatemp_exponent", Number(0, 100), "how the entropy counts in that", _OURS),
    Field("min_keep", Whole(0, _BIG), "filters keep at least so many tokens", _OURS),
    Field(
        "repeat_penalty",
        Number(0.01, 100),
        "divides the logits of recent tokens, those of the prompt too; 1: none",
        _OURS,
        ("repetition_penalty",),
    ),
    Field("repeat_last_n", Whole(-1, 1 << 24), "how many tokens are recent; -1: all", _OURS),
    Field("frequency_penalty", Number(-2, 2), "against tokens, by how often the answer has them", _OURS),
    Field("presence_penalty", Number(-2, 2), "against tokens that the answer has", _OURS),
    Field(
        "logit_bias",
        Anything(),
        "token id, or a text, -> what is added to its logit, -100 to 100; `false` forbids it; also a list of pairs",
        _OURS,
    ),
    Field("logprobs", Flag(), "tell the tokens' log-probabilities", (CHAT,)),
    Field("top_logprobs", Whole(0, 20), "and those of the likeliest tokens at each place; needs `logprobs`", (CHAT,)),
    Field(
        "logprobs",
        Whole(0, 20),
        "log-probabilities of the tokens, and of as many likeliest ones each",
        (TEXT,),
    ),
    Field("n_probs", Whole(0, 100), "log-probabilities of the tokens, and of as many likeliest ones", (NATIVE,)),
    Field("return_tokens", Flag(), "tell the ids of the answer's tokens, as streams do", (NATIVE,)),
    Field("response_fields", Texts(), "tell only these; `a/b` is `b` within `a`; not in streams", (NATIVE,)),
    Field("echo", Flag(), "begin with the prompt; with `logprobs`, with its log-probabilities, too", (TEXT,)),
    Field("ignore_eos", Flag(), "go on behind what ends a text", _OURS),
    Field("cache_prompt", Flag(), "reuse what is known of the prompt (true)", _OURS),
    Field("response_format", Keyed(), "`text`, `json_object` or `json_schema`: the answer is such JSON", (CHAT, TEXT)),
    Field("json_schema", Anything({"type": "object"}), "the answer is JSON of this schema", _OURS),
    Field("grammar", Text(), "the answer is of this grammar, in llama.cpp's GBNF", _OURS),
    Field("tools", Listing(), "functions that the model may call", (CHAT, RESPONSES, ANTHROPIC)),
    Field("tool_choice", Anything(), "`auto`, `none`, `required`, or the one to call", (CHAT, RESPONSES, ANTHROPIC)),
    Field("parallel_tool_calls", Flag(), "false: one call at most", (CHAT, RESPONSES)),
    Field("chat_template_kwargs", Keyed(), "values for the chat template", (CHAT,)),
    Field("add_generation_prompt", Flag(), "end the prompt where the answer begins (true)", (CHAT,)),
    Field(
        "continue_final_message",
        Flag(),
        "go on with the last message, one of the assistant, and answer with what follows (true where it is last)",
        (CHAT, ANTHROPIC),
    ),
    Field("return_activity", Flag(), "each chunk tells the share of neurons computed, per layer", _OURS),
    Field("return_progress", Flag(), "chunks tell how much of the prompt is computed", _OURS),
    Field("timings_per_token", Flag(), "accepted; figures of speed come with the last chunk", _OURS),
    Field("input", Anything(_INPUT), "a text, or the conversation as a list of items", (RESPONSES,), needed=True),
    Field("instructions", Text(), "the system prompt", (RESPONSES,)),
    Field("text", Keyed(), "`format`: as `response_format`", (RESPONSES,)),
    Field("system", Anything(_CONTENT), "the system prompt: a text, or a list of text blocks", (ANTHROPIC,)),
)

IGNORED: Mapping[str, str] = {
    "audio, modalities": "answers are text; `modalities` without `text` is refused",
    "function_call": "beside `functions` only",
    "id_slot, slot_id": "slots are chosen by the scheduler",
    "metadata, store, user, safety_identifier": "nothing is stored",
    "n_keep, n_discard": "contexts are not shifted",
    "prediction": "a hint for speed; `--lookup` does without it",
    "prompt_cache_key, prompt_cache_retention, cache_control": "what is known of a prompt is found by its tokens",
    "reasoning_effort, reasoning, thinking, verbosity": "no model of ours has it",
    "samplers": "the order is llama.cpp's usual one",
    "service_tier": "there is one",
    "t_max_predict_ms, t_max_prompt_ms": "ask for fewer tokens, or leave",
    "web_search_options": "nothing is searched",
}
"""Fields that are accepted and do nothing -> why."""

REFUSED: Mapping[str, str] = {
    "best_of": "only as many answers as `n` are made",
    "functions": "use `tools`",
    "post_sampling_probs": "probabilities are those of the model, before filters",
    "suffix": "no model of ours fills gaps",
    "previous_response_id, conversation": "nothing is stored: send the whole conversation",
    "background": "an answer lives as long as its request",
}
"""Fields that are refused where they ask for something -> why."""


def fields_of(endpoint: str) -> tuple[Field, ...]:
    """The fields that an endpoint knows."""
    return tuple(field for field in FIELDS if endpoint in field.endpoints)


def read_fields(body: Mapping[str, Any], endpoint: str) -> Fields:
    """The fields of a request that are there, checked, under their own names. Raises ApiError with the name of the
    first one that is wrong, missing or refused.
    """
    found: Fields = {}
    for field in fields_of(endpoint):
        for name in (field.name, *field.aliases):
            if body.get(name) is not None:
                found.setdefault(field.name, field.check(name, body[name]))
        if field.needed and field.name not in found:
            raise ApiError(400, f"{field.name} is missing", field.name, "missing_field")
    _refuse(body)
    return found


def _refuse(body: Mapping[str, Any]) -> None:
    for names, why in REFUSED.items():
        for name in names.split(", "):
            if body.get(name) and not _harmless(name, body):
                raise wrong(name, f"is not supported: {why}")
    modalities = body.get("modalities")
    if isinstance(modalities, list) and modalities and "text" not in modalities:
        raise wrong("modalities", "answers are text, expected `text` among them")


def _harmless(name: str, body: Mapping[str, Any]) -> bool:
    if name == "best_of":
        return bool(body[name] == (body.get("n") or 1))
    return name == "functions" and body.get("function_call") == "none"


_SAMPLED = frozenset(field.name for field in fields(Sampling)) - {"seed", "logit_bias"}


def sampling_of(given: Fields, default: Sampling, bias: Iterable[tuple[int, float]] = ()) -> Sampling:
    """How tokens are chosen: `default`, but for what the request says."""
    values = {field.name: getattr(default, field.name) for field in fields(Sampling)}
    values |= {name: value for name, value in given.items() if name in _SAMPLED}
    if "seed" in given:
        values["seed"] = None if given["seed"] == -1 else given["seed"] % 0xFFFFFFFF
    entries = tuple(bias)
    if entries and "logit_bias" in values:
        values["logit_bias"] = entries
    elif entries:
        raise wrong("logit_bias", "is not supported")
    missing = [name for name in given if name in _SAMPLERS and name not in values]
    if missing:
        raise wrong(missing[0], "is not supported")
    return Sampling(**values)


_SAMPLERS = frozenset(
    field.name for field in FIELDS if isinstance(field.check, Number | Whole | Texts) and NATIVE in field.endpoints
) - {"max_tokens", "n", "n_probs", "response_fields", "stop", "seed"}


def biases(value: Any, ids_of: Any, n_vocab: int) -> tuple[tuple[int, float], ...]:
    """logit_bias as pairs; ids_of: text -> ids. Raises ApiError for what is none, or names no token."""
    if value is None:
        return ()
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list) or len(pairs) > _LONGEST_BIAS:
        raise wrong("logit_bias", f"expected an object or a list of pairs, of at most {_LONGEST_BIAS}")
    found: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong("logit_bias", "expected pairs of a token and a number")
        bias = float("-inf") if pair[1] is False else Number(-100, 100)("logit_bias", pair[1])
        for token in _tokens(pair[0], ids_of):
            if not 0 <= token < n_vocab:
                raise wrong("logit_bias", f"token id {token}, expected 0 to {n_vocab - 1}")
            found[token] = bias
    return tuple(found.items())


def _tokens(key: Any, ids_of: Any) -> list[int]:
    if isinstance(key, int) and not isinstance(key, bool):
        return [key]
    if not isinstance(key, str):
        raise wrong("logit_bias", "expected token ids or texts as keys")
    return [int(key)] if key.isascii() and key.isdigit() and len(key) < 10 else list(ids_of(key))


def ids_field(name: str, value: Any) -> list[int]:
    """A list of token ids. Raises ApiError."""
    return Ids()(name, value)
