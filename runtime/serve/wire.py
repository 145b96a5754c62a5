"""What answers carry beside text: usage, timings, our own figures, and log-probabilities."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

from runtime.generation import Stats
from runtime.model import Model
from runtime.serve.jobs import End, Piece, Progress, TokenInfo

LEAST = -9999.0  # for minus infinity, which JSON has no word for: OpenAI's own
_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return prefix + secrets.token_hex(12)


def finish_reason(reason: str) -> str:
    """Why an answer ended, in OpenAI's words; reason: in ours."""
    return _FINISH[reason]


def usage(all_stats: Sequence[Stats]) -> dict[str, Any]:
    """Tokens of a request, those of its prompt once however many answers it has; those that were reused count, too."""
    first = all_stats[0]
    return usage_of(first.prompt_tokens, first.cached_tokens, sum(stats.tokens for stats in all_stats))


def usage_of(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """Tokens of a prompt, the reused among them, and of all answers."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def timings(stats: Stats) -> dict[str, Any]:
    """How long an answer took, in llama-server's form; milliseconds."""
    n_prompt = stats.prompt_tokens - stats.cached_tokens
    prompt_ms, ms = stats.prompt_seconds * 1e3, stats.seconds * 1e3
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": n_prompt,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / n_prompt if n_prompt else 0.0,
        "prompt_per_second": stats.prompt_tokens_per_s,
        "predicted_n": stats.tokens,
        "predicted_ms": ms,
        "predicted_per_token_ms": ms / stats.decoded_tokens if stats.decoded_tokens else 0.0,
        "predicted_per_second": stats.tokens_per_s,
    }


def figures(model: Model, stats: Stats, seed: int, dense_bytes: float) -> dict[str, Any]:
    """What no other server has: the share of neurons computed, in each layer and in all, and bytes read per token."""
    return {
        "ffn": model.ffn,
        "layers": stats.layer_shares,
        "computed_share": stats.computed_share,
        "bytes_per_token": stats.bytes_per_token,
        "dense_bytes_per_token": dense_bytes,
        "seed": seed,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
    }


def activity(piece: Piece, neurons: Sequence[int]) -> dict[str, Any]:
    """The same of one piece of an answer; neurons: of each layer."""
    fired = sum(share * n for share, n in zip(piece.layers, neurons, strict=False))
    share = fired / sum(neurons) if piece.layers and sum(neurons) else 0.0
    return {"layers": list(piece.layers), "computed_share": share, "bytes_per_token": piece.bytes}


def prompt_progress(progress: Progress, seconds: float) -> dict[str, Any]:
    """How much of a prompt is computed, in llama-server's form."""
    return {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.done,
        "time_ms": round(seconds * 1e3),
    }


def told(log: dict[str, Any], ends: Sequence[End]) -> None:
    """Put what answers took into the line of the log: never what they say."""
    all_stats = [end.stats for end in ends]
    first = all_stats[0]
    log |= {"prompt": first.prompt_tokens, "cached": first.cached_tokens}
    log |= {"tokens": sum(stats.tokens for stats in all_stats), "end": ",".join(sorted({end.reason for end in ends}))}
    log |= {"prompt_s": f"{first.prompt_seconds:.3f}", "s": f"{max(stats.seconds for stats in all_stats):.3f}"}


@functools.cache
def version() -> str:
    """Of this package."""
    try:
        return metadata.version("lazyneuron")
    except metadata.PackageNotFoundError:  # run from its folder, without being installed
        return "0"


def fingerprint(model: Model) -> str:
    """What the answers depend on beside the request."""
    return f"lazyneuron-{version()}-{model.ffn}"


# --- log-probabilities ------------------------------------------------------------------------------------------------


def token_text(data: bytes) -> str:
    """A token as text; one that is no whole characters is spelled byte by byte, as OpenAI does."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST  # also for what is no number


def chat_logprobs(tokens: Iterable[TokenInfo], model: Model) -> dict[str, Any]:
    """Log-probabilities in the form of chats."""

    def entry(data: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token_text(data), "logprob": _finite(logprob), "bytes": list(data)}

    return {
        "content": [
            {
                **entry(token.data, token.logprob),
                "top_logprobs": [entry(_bytes(model, i), logprob) for i, logprob in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def llama_logprobs(tokens: Iterable[TokenInfo], model: Model) -> list[dict[str, Any]]:
    """Log-probabilities in the form of llama-server's own endpoint; of a token that is no whole characters, the text is
    what there is of whole ones.
    """

    def entry(token: int, data: bytes, logprob: float) -> dict[str, Any]:
        text = data.decode("utf-8", "ignore")
        return {"id": token, "token": text, "bytes": list(data), "logprob": _finite(logprob)}

    return [
        {
            **entry(token.id, token.data, token.logprob),
            "top_logprobs": [entry(i, _bytes(model, i), logprob) for i, logprob in token.top],
        }
        for token in tokens
    ]


def text_logprobs(tokens: Sequence[TokenInfo], model: Model, offset: int, top: int) -> dict[str, Any]:
    """Log-probabilities in the form of completions; offset: of the first token's text; top: how many were asked for."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [] if top else None, "text_offset": []}
    for token in tokens:
        known = not math.isnan(token.logprob)
        found["tokens"].append(token_text(token.data))
        found["token_logprobs"].append(_finite(token.logprob) if known else None)
        found["text_offset"].append(offset)
        if top:
            found["top_logprobs"].append(_likeliest(token, model) if known else None)
        offset += len(token.data.decode("utf-8", "ignore"))
    return found


def _likeliest(token: TokenInfo, model: Model) -> dict[str, float]:
    """Texts -> log-probabilities; of two tokens with one text, the likelier. The chosen one is always there."""
    found: dict[str, float] = {}
    for i, logprob in token.top:
        found.setdefault(token_text(_bytes(model, i)), _finite(logprob))
    found.setdefault(token_text(token.data), _finite(token.logprob))
    return found


def spelled(ids: Iterable[int], model: Model) -> str:
    """A text of ids, with special tokens and the space that the vocabulary puts before a text."""
    return b"".join(_bytes(model, i) for i in ids).decode("utf-8", "replace")


def _bytes(model: Model, token: int) -> bytes:
    return model.tokenizer.token_bytes(token, special=True)
