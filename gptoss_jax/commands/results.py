"""Finished requests as JSON, for `--json` and `--batch`."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptoss_jax.types import CompletionOutput, RequestOutput


def result(output: RequestOutput) -> dict[str, Any]:
    """A finished request as a JSON object; `completions` lists the completions if there are several."""
    first, *others = [_completion(completion) for completion in output.outputs]
    prompt, new = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.outputs)
    fields = first | {
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "cached_tokens": output.cached_tokens,
        }
    }
    if output.drafted_tokens:
        fields["usage"] |= {"drafted_tokens": output.drafted_tokens, "accepted_tokens": output.accepted_tokens}
    if others:
        fields["completions"] = [first, *others]
    if output.prompt_logprobs is not None:
        fields["prompt_logprobs"] = [at and dataclasses.asdict(at) for at in output.prompt_logprobs]
    return fields


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "messages": [completion.message] if completion.message else [],
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        fields["logprobs"] = [dataclasses.asdict(at) for at in completion.logprobs]
    if completion.malformed:
        fields["malformed"] = list(completion.malformed)
    return fields
