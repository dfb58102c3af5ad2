"""The requests and arrival times of `bench serve`, from its flags and files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.benching.requests import (
    Request,
    arrival_times,
    random_ids,
    random_requests,
    random_text,
    trace_requests,
)
from gptoss_jax.commands.files import parse_json, read_text
from gptoss_jax.commands.traces import read_trace
from gptoss_jax.errors import UsageError, expect, named

DEFAULT_PROMPTS = 1000
DEFAULT_CUSTOM_OUTPUT = 256


def requests_of(options: argparse.Namespace) -> tuple[list[Request], list[float]]:
    """The requests, and when each arrives, in seconds from the start. Raises UsageError."""
    # Times have a generator of their own, so that they do not depend on the prompts' lengths.
    rng, times_rng = np.random.default_rng(options.seed).spawn(2)
    make = random_ids(rng, options.random_vocab_size) if options.backend == "openai" else random_text(rng)
    times: list[float] | None = None
    if options.dataset_name == "timed_trace":
        trace = _first(read_trace(options.dataset_path, "--dataset-path"), options)
        requests, times = trace_requests(make, trace), [one.arrival_s for one in trace]
    elif options.dataset_name == "custom":
        requests = _first(read_prompts(options.dataset_path, options.custom_output_len), options)
    else:
        requests = random_requests(
            rng,
            make,
            options.num_prompts or DEFAULT_PROMPTS,
            options.random_input_len,
            options.random_output_len,
            options.random_range_ratio,
            options.random_prefix_len,
        )
    if times is None or options.request_rate is not None:
        times = arrival_times(times_rng, len(requests), options.request_rate, options.burstiness)
    return requests, times


def _first(found: list[Any], options: argparse.Namespace) -> list[Any]:
    count = options.num_prompts or len(found)
    if count > len(found):
        raise UsageError(f"expected at most the file's {len(found)} requests, found {count}", "--num-prompts")
    return found[:count]


def read_prompts(path: Path, output_len: int | None) -> list[Request]:
    """The prompts of a JSON-lines file; `output_len` replaces each line's own. Raises UsageError, naming the line."""
    requests = []
    for number, text in enumerate(read_text(path, "--dataset-path").splitlines(), 1):
        if text.strip():
            where = f"--dataset-path: {path}: line {number}"
            requests.append(_prompt(parse_json(text, where, dict), output_len, where))
    if not requests:
        raise UsageError(f"{path}: expected one prompt per line, found none", "--dataset-path")
    return requests


def _prompt(line: dict[str, Any], output_len: int | None, where: str) -> Request:
    prompt, own = line.get("prompt"), line.get("output_tokens", DEFAULT_CUSTOM_OUTPUT)
    with named(where):
        expect(isinstance(prompt, str) and prompt != "", "prompt", "text that is not empty", prompt)
        expect(type(own) is int and own >= 1, "output_tokens", "an integer from 1", own)
    return Request(str(prompt), None, output_len or own)
