"""Reads requests, and refuses fields that ask for what the server cannot do."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from gptoss_jax.serving.api.body import decode
from gptoss_jax.serving.api.errors import bad_request
from gptoss_jax.serving.api.server import Server


@dataclasses.dataclass(frozen=True)
class Refused:
    """A field that is refused.

    Args:
      reason: why, and what to use instead.
      harmless: values that ask for nothing, which are accepted; so is null.
    """

    reason: str
    harmless: tuple[Any, ...] = (False, "", [], {})


def decode_request[T: msgspec.Struct](
    server: Server, body: bytes, kind: type[T], refused: Mapping[str, Refused], ignored: Collection[str]
) -> T:
    """A request's body as a struct. Raises ApiError, which names the field.

    Args:
      server: it logs, once each, the fields that change nothing.
      body: JSON.
      kind: the struct, whose fields are those that have an effect.
      refused: fields that are refused unless they ask for nothing.
      ignored: known fields that change nothing.
    """
    for name, raw in decode(body, dict[str, msgspec.Raw]).items():
        if name in kind.__struct_fields__ or bytes(raw) == b"null":
            continue
        if name in refused:
            if decode(bytes(raw), Any) not in refused[name].harmless:
                raise bad_request(f"{name}: {refused[name].reason}", name)
        elif name in ignored:
            server.note_once(name, "accepted, but it changes nothing")
        else:
            server.note_once(f"{name!r:.60}", "an unknown field, which changes nothing")
    return decode(body, kind)


_USE_STRUCTURED_OUTPUTS = "not supported; use response_format or structured_outputs"
_USE_LOGIT_BIAS = "not supported; use logit_bias"

REFUSED = {
    **dict.fromkeys(
        (
            *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern"),
            *("json_schema", "regex", "ebnf", "grammar", "structural_tag", "format"),
        ),
        Refused(_USE_STRUCTURED_OUTPUTS),
    ),
    **dict.fromkeys(("allowed_token_ids", "bad_words", "logits_processors"), Refused(_USE_LOGIT_BIAS)),
    "use_beam_search": Refused("beam search is not supported"),
    "length_penalty": Refused("beam search is not supported", (1,)),
    "include_stop_str_in_output": Refused("stop strings are never part of the text"),
    "skip_special_tokens": Refused("special tokens are never part of the text", (True,)),
    "truncate_prompt_tokens": Refused("prompts are never truncated"),
    "cache_salt": Refused("the prefix cache is shared by all requests"),
    "kv_transfer_params": Refused("the cache is not transferred"),
    "ec_transfer_params": Refused("the cache is not transferred"),
    "thinking_token_budget": Refused("not supported; use reasoning_effort or the maximum of tokens"),
    "repetition_detection": Refused("not supported; use repetition_penalty"),
    "logprob_token_ids": Refused("not supported; use logprobs and top_logprobs"),
    "watermarking": Refused("not supported"),
    "return_prompt_text": Refused("not supported; use return_token_ids"),
    "vllm_xargs": Refused("not supported"),
    "prompt_embeds": Refused("not supported; use prompt"),
    "moderation": Refused("not supported"),
}
"""Fields that vLLM, SGLang and others have, and which promise what this server cannot do."""

IGNORED = frozenset(
    (
        *("user", "metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_options", "prompt_cache_retention", "request_id", "session_id", "stream_interval"),
        *("spaces_between_special_tokens", "add_special_tokens", "guided_decoding_backend", "truncation_side"),
    )
)
"""Fields of OpenAI and vLLM that change nothing here."""
