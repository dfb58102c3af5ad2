"""The flags of `bench serve`, which have the names and defaults of `vllm bench serve`, and their checks."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss_jax.benching.endpoints import ENDPOINTS
from gptoss_jax.commands.files import parse_json
from gptoss_jax.commands.flags import file_path, flag_name, utf8
from gptoss_jax.errors import UsageError

DATASETS = ("random", "timed_trace", "custom")
LATENCIES = ("ttft", "tpot", "itl", "e2el")

RANDOM = {"random_input_len": 1024, "random_output_len": 128, "random_range_ratio": 0.0, "random_prefix_len": 0}
"""Flags of the random data set alone, and their defaults."""


def _count(least: int) -> Callable[[str], int]:
    """The argument type of an integer that is at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,12}", text, re.ASCII) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer from {least}, found {text!a:.60}")
        return int(text)

    return parse


def _number(expected: str, fine: Callable[[float], bool]) -> Callable[[str], float]:
    """The argument type of a number that is `fine`, which NaN never is."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value) or not fine(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!a:.60}")
        return value

    return parse


_rate = _number("a number above 0, or inf", lambda value: value > 0)
_positive = _number("a number above 0", lambda value: 0 < value < math.inf)
_ratio = _number("a number from 0 to below 1", lambda value: 0 <= value < 1)
_percent = _number("a number from 0 to 100", lambda value: 0 <= value <= 100)
_from_zero = _number("a number from 0", lambda value: 0 <= value < math.inf)


def _latency_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in LATENCIES:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(LATENCIES)}, found {name!a:.60}")
    return list(dict.fromkeys(names))


def _percents(text: str) -> list[float]:
    return list(dict.fromkeys(map(_percent, text.split(","))))


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in LATENCIES or not value:
        raise argparse.ArgumentTypeError(
            f"expected NAME:MILLISECONDS with one of {','.join(LATENCIES)}, found {text!a:.60}"
        )
    return name, _from_zero(value)


def _object(text: str) -> dict[str, Any]:
    try:
        return dict(parse_json(text, None, dict))
    except UsageError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of `bench serve`."""
    _add_server(parser.add_argument_group("server"))
    _add_load(parser.add_argument_group("load"))
    requests = parser.add_argument_group("requests")
    _add_dataset(requests)
    _add_random(requests)
    _add_body(parser.add_argument_group("fields of each request"))
    _add_output(parser.add_argument_group("output"))


def _add_server(group: argparse._ActionsContainer) -> None:
    group.add_argument("--url", "--base-url", type=utf8, metavar="URL", help="http(s)://HOST:PORT of the server")
    group.add_argument(
        "--host", type=utf8, default="127.0.0.1", help="without --url: the server's host (default: 127.0.0.1)"
    )
    group.add_argument("--port", type=_count(1), default=8000, help="without --url: its port (default: 8000)")
    group.add_argument(
        "--backend",
        choices=tuple(ENDPOINTS),
        default="openai",
        help="API to send requests to (default: openai, completions)",
    )
    group.add_argument("--endpoint", type=utf8, metavar="PATH", help="path of the API (default: OpenAI's)")
    group.add_argument("--model", type=utf8, metavar="NAME", help="model's name (default: the server's first)")
    group.add_argument(
        "--api-key-file",
        type=file_path,
        metavar="FILE",
        help="file with the API key (default: the environment variable OPENAI_API_KEY)",
    )
    group.add_argument(
        "--ready-check-timeout-sec",
        type=_count(0),
        default=0,
        metavar="S",
        help="wait this many seconds for the server to become ready (default: 0)",
    )


def _add_load(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--request-rate",
        type=_rate,
        metavar="R",
        help="requests per second; inf sends all at once (default: the trace's times; otherwise inf)",
    )
    group.add_argument(
        "--burstiness",
        type=_positive,
        default=1.0,
        help="shape of the gamma distribution of the gaps between requests: below 1 for bursts, above 1 for more "
        "regular arrivals (default: 1, a Poisson process)",
    )
    group.add_argument(
        "--max-concurrency", type=_count(1), metavar="N", help="most requests in flight (default: unlimited)"
    )
    group.add_argument(
        "--num-warmups",
        type=_count(0),
        default=0,
        metavar="N",
        help="requests sent before, unmeasured (default: 0)",
    )
    group.add_argument(
        "--seed", type=_count(0), default=0, metavar="N", help="seed of prompts, lengths and arrivals (default: 0)"
    )


def _add_dataset(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--dataset-name",
        choices=DATASETS,
        help="random prompts; random prompts with the lengths and times of a trace; or prompts from a file "
        "(default: random; with --dataset-path timed_trace)",
    )
    group.add_argument(
        "--dataset-path",
        type=file_path,
        metavar="FILE.jsonl",
        help="timed_trace: {arrival_s, prompt_tokens, output_tokens} per line; custom: {prompt, output_tokens} per "
        "line, output_tokens is optional",
    )
    group.add_argument(
        "--num-prompts",
        type=_count(1),
        metavar="N",
        help="requests (default: 1000; of a file all, or its first N)",
    )
    group.add_argument(
        "--custom-output-len",
        type=_count(1),
        metavar="N",
        help="output tokens of custom prompts (default: the line's output_tokens, otherwise 256)",
    )


def _add_random(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--random-input-len", type=_count(1), metavar="N", help="prompt tokens after the prefix (default: 1024)"
    )
    group.add_argument("--random-output-len", type=_count(1), metavar="N", help="output tokens (default: 128)")
    group.add_argument(
        "--random-range-ratio",
        type=_ratio,
        metavar="X",
        help="lengths are uniform in [len * (1 - X), len * (1 + X)] (default: 0)",
    )
    group.add_argument(
        "--random-prefix-len", type=_count(0), metavar="N", help="tokens that all prompts begin with (default: 0)"
    )
    group.add_argument(
        "--random-vocab-size",
        type=_count(1),
        default=1000,
        metavar="N",
        help="random token ids are below N, at most the size of the model's vocabulary (default: 1000)",
    )


def _add_body(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--ignore-eos", action="store_true", help="ask for all output tokens, a request field that OpenAI lacks"
    )
    for name in ("temperature", "top_p", "top_k"):
        group.add_argument(
            flag_name(name), type=_count(0) if name == "top_k" else _from_zero, help="default: the server's"
        )
    group.add_argument(
        "--extra-body", type=_object, default={}, metavar="JSON", help="fields to add to each request's body"
    )


def _add_output(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--percentile-metrics",
        type=_latency_names,
        default=list(LATENCIES),
        metavar="NAME,...",
        help="latencies to report (default: ttft,tpot,itl,e2el)",
    )
    group.add_argument(
        "--metric-percentiles",
        type=_percents,
        default=[99.0],
        metavar="P,...",
        help="their percentiles (default: 99)",
    )
    group.add_argument(
        "--goodput",
        type=_limit,
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="report the rate of requests within these limits, such as ttft:500 tpot:30 (itl: the longest gap)",
    )
    group.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    group.add_argument("--save-result", action="store_true", help="save the results as a JSON file")
    group.add_argument(
        "--save-detailed", action="store_true", help="with each request's latencies, text and error in the file"
    )
    group.add_argument(
        "--result-dir", type=file_path, metavar="DIR", help="folder of the file (default: this one)"
    )
    group.add_argument(
        "--result-filename",
        type=file_path,
        metavar="FILE",
        help="its name (default: BACKEND-RATEqps[-concurrencyN]-MODEL-DATE.json)",
    )


def check(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other flags, and raise UsageError for flags that do not go together."""
    options.dataset_name = options.dataset_name or ("timed_trace" if options.dataset_path else "random")
    if (options.dataset_name == "random") == (options.dataset_path is not None):
        expected = "not with" if options.dataset_path else "expected a file for"
        raise UsageError(f"{expected} --dataset-name {options.dataset_name}", "--dataset-path")
    for name, default in RANDOM.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.dataset_name != "random":
            raise UsageError(f"not with --dataset-name {options.dataset_name}", flag_name(name))
    if options.custom_output_len is not None and options.dataset_name != "custom":
        raise UsageError(f"not with --dataset-name {options.dataset_name}", "--custom-output-len")
    if options.request_rate is None and options.dataset_name != "timed_trace":
        options.request_rate = math.inf
    if options.endpoint is not None and not re.fullmatch(r"/[!-~]*", options.endpoint):
        raise UsageError(f"expected a path such as /v1/completions, found {options.endpoint!a:.60}", "--endpoint")
    for name in ("save_detailed", "result_dir", "result_filename"):
        if getattr(options, name) and not options.save_result:
            raise UsageError("only with --save-result", flag_name(name))


def request_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of each request's body that flags set."""
    names = ("temperature", "top_p", "top_k")
    fields = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return fields | ({"ignore_eos": True} if options.ignore_eos else {}) | options.extra_body


def result_path(options: argparse.Namespace, model: str, date: str) -> Path:
    """The file of --save-result."""
    limit = f"-concurrency{options.max_concurrency}" if options.max_concurrency else ""
    rate = "trace" if options.request_rate is None else f"{options.request_rate:g}"
    # A model's name may be a path.
    name = f"{options.backend}-{rate}qps{limit}-{model.rstrip('/').rpartition('/')[2]}-{date}.json"
    return (options.result_dir or Path()) / (options.result_filename or name)
