"""From the fields of a request to what the engine is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.base.arguments import token_ids
from runtime.serve.conversation import Message, chat_ids, chat_prompt, is_prefill
from runtime.serve.fields import Fields, biases, sampling_of
from runtime.serve.forms import grammar_of
from runtime.serve.front import Front
from runtime.serve.jobs import Job
from runtime.serve.tools import Tools
from runtime.text.grammar import Grammar


def job_of(
    front: Front,
    given: Fields,
    prompt: Sequence[int],
    name: str,
    top_logprobs: int | None = None,
    max_tokens: int | None = None,
    grammar: Grammar | None = None,
) -> Job:
    """A job of what the request says; max_tokens: where neither it nor the settings say;
    grammar: in place of the one that it asks for. Raises ApiError or
    UserError.
    """
    model = front.model
    wanted = given.get("max_tokens", front.settings.max_tokens if front.settings.max_tokens is not None else max_tokens)
    bias = biases(
        given.get("logit_bias"),
        lambda text: model.tokenize(text, add_special=False, parse_special=False),
        model.structure.vocab_size,
    )
    return Job(
        tuple(token_ids("prompt", prompt, model.structure.vocab_size)),
        max_tokens=None if wanted == -1 else wanted,
        sampling=sampling_of(given, front.settings.sampling, bias),
        stop=given.get("stop", ()),
        top_logprobs=top_logprobs,
        prompt_logprobs=bool(given.get("echo")) and top_logprobs is not None,
        ignore_eos=given.get("ignore_eos", False),
        cache_prompt=given.get("cache_prompt", True),
        grammar=grammar if grammar is not None else grammar_of(given),
        activity=given.get("return_activity", False),
        name=name,
    )


def chat_job(
    front: Front,
    given: Fields,
    messages: Sequence[Message],
    name: str,
    top_logprobs: int | None = None,
    tools: Tools | None = None,
) -> Job:
    """A job of a conversation; tools: that may be called, or must. Raises ApiError or UserError."""
    ids = prompt_ids(front, given, messages, tools)
    return job_of(front, given, ids, name, top_logprobs, grammar=tools.grammar() if tools else None)


def prompt_ids(front: Front, given: Fields, messages: Sequence[Message], tools: Tools | None = None) -> tuple[int, ...]:
    """The ids of a conversation. Raises ApiError or UserError."""
    add_generation_prompt = given.get("add_generation_prompt")
    prompt = chat_prompt(
        front.chat_template,
        messages,
        front.model.special_tokens,
        add_generation_prompt is not False,
        given.get("chat_template_kwargs"),
        tools,
        is_prefill(messages, given.get("continue_final_message"), add_generation_prompt),
    )
    return chat_ids(prompt, front.model.tokenize)


def wants_usage(given: Fields) -> bool:
    """Whether a stream is to end with its usage. Raises ApiError for an option that is no truth value."""
    return bool(given.get("stream_options", {}).get("include_usage"))
