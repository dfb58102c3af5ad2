"""What the commands share: flags in one spelling, and errors as one line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax.errors import GptOssError, UsageError
from sharding.errors import ShardingError

if TYPE_CHECKING:
    from gptoss_jax.engine.engine import EngineOptions
    from gptoss_jax.engine.params import SamplingParams
    from gptoss_jax.llm import LLM


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser for `python -m gptoss_jax.<command>`."""
    return argparse.ArgumentParser(prog=f"python -m gptoss_jax.{command}", description=description)


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """Which model, and how it runs."""
    group = flags.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="PATH|NAME",
        help="a checkpoint's directory, or a Hub name such as openai/gpt-oss-20b (default: the small model that "
        "ships with the project)",
    )
    group.add_argument(
        "--mesh",
        metavar="MESH",
        help="devices to run on: expert=4,tensor=2 (also data=), or a preset of configs/meshes",
    )
    group.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of all but the experts"
    )


def add_engine_flags(flags: argparse.ArgumentParser) -> None:
    """How much runs at once, and what the cache may take."""
    group = flags.add_argument_group("engine")
    group.add_argument("--max-batch", type=int, metavar="N", help="sequences that run together (default: 8)")
    group.add_argument(
        "--kv-cache-memory", type=int, metavar="BYTES", help="of each device (default: a share of what is free)"
    )
    group.add_argument("--kv-cache-dtype", choices=("bfloat16", "float32", "float8"), help="default: as --dtype")
    group.add_argument("--prefill-chunk", type=int, metavar="N", help="prompt tokens of one sequence in a step")
    group.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt from its beginning")
    group.add_argument(
        "--speculative-tokens",
        type=int,
        metavar="N",
        help="guess N tokens a step from the text so far, and verify them",
    )


def add_sampling_flags(flags: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    group = flags.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="default: what the context holds")
    group.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest token")
    group.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens")
    group.add_argument(
        "--min-p", type=float, default=0.0, help="keep tokens this likely relative to the likeliest"
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="repeat the same tokens (default: a new seed each time)"
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable")


def add_conversation_flags(flags: argparse.ArgumentParser) -> None:
    """What the conversation's opening messages say."""
    group = flags.add_argument_group("conversation")
    group.add_argument("--instructions", metavar="TEXT", help="the developer message")
    group.add_argument("--tools", type=Path, metavar="FILE", help="a JSON list of OpenAI-style function tools")
    group.add_argument(
        "--builtin-tools",
        nargs="+",
        choices=("browser", "python"),
        default=[],
        help="tools that gpt-oss was trained on",
    )
    group.add_argument("--reasoning-effort", choices=("low", "medium", "high"), default="medium")


def sampling_params(options: argparse.Namespace, **more: Any) -> SamplingParams:
    """The sampling flags as SamplingParams; a value out of range is reported by its flag."""
    from gptoss_jax.engine.params import SamplingParams

    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")
    try:
        return SamplingParams(
            max_tokens=options.max_new_tokens, **{name: getattr(options, name) for name in names}, **more
        )
    except UsageError as error:
        field, _, rest = str(error).partition(":")
        flag = "max_new_tokens" if field == "max_tokens" else field
        raise UsageError(f"--{flag.replace('_', '-')}:{rest}") from None


def conversation_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `LLM.chat` takes besides messages, from the flags."""
    return {
        "tools": read_json(options.tools, "--tools", list) if options.tools else None,
        "builtin_tools": options.builtin_tools,
        "reasoning_effort": options.reasoning_effort,
    }


def load_llm(options: argparse.Namespace, **more: Any) -> LLM:
    """The model of the flags, with the compile cache on."""
    from gptoss_jax.compile_cache import enable_compile_cache

    enable_compile_cache()
    from gptoss_jax.llm import LLM
    from gptoss_jax.loading import EMBEDDED

    return LLM(options.model or EMBEDDED, options.mesh, options.dtype, engine=engine_options(options, **more))


def engine_options(options: argparse.Namespace, **more: Any) -> EngineOptions:
    """The engine flags as EngineOptions; `more` has precedence. A value out of range is reported by its flag."""
    from gptoss_jax.engine.engine import EngineOptions

    names = ("max_batch", "kv_cache_memory", "kv_cache_dtype", "prefill_chunk", "speculative_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    try:
        return EngineOptions(**given | {"prefix_cache": not options.no_prefix_cache} | more)
    except UsageError as error:
        field, _, rest = str(error).partition(":")
        raise UsageError(f"--{field.replace('_', '-')}:{rest}") from None


def read_text(path: Path, flag: str) -> str:
    """A text file named by a flag. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{flag}: {path}: not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"{flag}: {path}: {error.strerror}") from None


def read_json(path: Path, flag: str, kind: type) -> Any:
    """A JSON file named by a flag, whose outermost value is a `kind`. Raises UsageError."""
    try:
        value = json.loads(read_text(path, flag))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{flag}: {path}: not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise UsageError(f"{flag}: {path}: expected a JSON {kind.__name__}, found {type(value).__name__}")
    return value


def run(main: Callable[[], int | None]) -> None:
    """Run a command: bad input is one line on standard error and exit code 2, Ctrl-C exits with 130."""
    try:
        code = main()
        sys.stdout.flush()
    except (GptOssError, ShardingError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader has left; what is buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
