"""python -m gptoss_jax.bench: measure a model on this machine or behind a server, and compare it with peak rates."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax.commands import load_flags, plotting
from gptoss_jax.commands.flags import (
    add_engine_flags,
    add_max_num_seqs,
    add_model_flags,
    command_parser,
    file_path,
    flag_name,
    integers,
)
from gptoss_jax.commands.load_flags import add_serve_flags
from gptoss_jax.commands.options import by_flag, engine_options, sampling_params
from gptoss_jax.commands.running import run_command
from gptoss_jax.errors import UsageError

if TYPE_CHECKING:
    from gptoss_jax.engine.options import EngineOptions
    from gptoss_jax.model.gpt_oss import GptOss
    from gptoss_jax.types import SamplingParams


UNTRACED = {"num_prompts": 64, "input_len": 512, "output_len": 128}
"""Default requests of `throughput` without a trace."""


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command_parser(
        "bench", "Measure a model on this machine, or a server. The --help of a subcommand lists its flags."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="latency|throughput|start|serve")
    latency = _add(
        commands, "latency", "Time to first token and decode step time of a batch of equally long requests."
    )
    latency.add_argument("--batch-size", type=integers, default=[1], metavar="N,...", help="requests (default: 1)")
    latency.add_argument(
        "--max-num-seqs",
        type=int,
        metavar="N",
        help="maximum number of concurrent sequences of each batch's engine (default: the batch)",
    )
    latency.add_argument("--repeats", type=int, default=3, metavar="N", help="measured runs (default: 3)")
    latency.add_argument(
        "--sampling",
        nargs="?",
        const="all",
        metavar="MODE,...",
        help="measure what these sampling modes add to a step, such as top_p,logprobs (without a value: all)",
    )
    throughput = _add(commands, "throughput", "Tokens per second of many requests, and the latency of each.")
    throughput.add_argument("--num-prompts", type=int, metavar="N", help="default: 64, all at once")
    throughput.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.jsonl",
        help="requests with arrival times: one {arrival_s, prompt_tokens, output_tokens} per line",
    )
    add_max_num_seqs(throughput)
    throughput.add_argument("--repeats", type=int, default=1, metavar="N", help="measured runs (default: 1)")
    throughput.set_defaults(**dict.fromkeys(UNTRACED))
    start = _add(
        commands,
        "start",
        "Time from the start of a process to its first tokens, with a cold and with a warm compile cache.",
    )
    start.add_argument("--started-at", type=float, help=argparse.SUPPRESS)
    description = "Send a load to an OpenAI-compatible server: throughput, and percentiles of the latencies."
    add_serve_flags(commands.add_parser("serve", help=description, description=description))
    return parser


def _add(commands: Any, name: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=description, description=description)
    if name == "latency":
        parser.add_argument(
            "--input-len",
            type=integers,
            default=[512],
            metavar="N,...",
            help="random prompt tokens per request, each length measured in turn (default: 512)",
        )
    else:
        parser.add_argument(
            "--input-len",
            type=int,
            default=512,
            metavar="N",
            help="random prompt tokens per request (default: 512)",
        )
    parser.add_argument(
        "--output-len", type=int, default=128, metavar="N", help="output tokens per request (default: 128)"
    )
    add_model_flags(parser, "a checkpoint's directory or Hub name, or a config.json for random weights")
    add_engine_flags(parser, max_num_seqs=False)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--top-k", type=int, default=0, metavar="K")
    sampling.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of random weights, prompts and sampling"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    output.add_argument("--plot", type=file_path, metavar="FILE.png|svg|pdf", help="write a figure (extra: plot)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = flags().parse_args(arguments)
    if options.command == "serve":
        return _serve(options)
    _check(options)
    if options.plot:
        plotting.check(options.plot)
    with by_flag(options):
        if options.command == "start":
            return _start(options, arguments)
        run: dict[str, Callable[[argparse.Namespace], int]] = {"latency": _latency, "throughput": _throughput}
        return run[options.command](options)


def _check(options: argparse.Namespace) -> None:
    for name in ("batch_size", "input_len", "output_len", "repeats", "num_prompts"):
        value = getattr(options, name, None)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one < 1:
                raise UsageError(f"expected 1 or more, found {one}", flag_name(name))
    if options.command == "latency" and options.output_len < 8:
        raise UsageError(f"expected 8 or more steps to measure, found {options.output_len}", "--output-len")
    if options.command == "latency" and (options.max_num_seqs or max(options.batch_size)) < max(
        options.batch_size
    ):
        raise UsageError(
            f"expected at least the batch of {max(options.batch_size)}, found {options.max_num_seqs}",
            "--max-num-seqs",
        )
    if options.command == "throughput":
        for name, default in UNTRACED.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
            elif options.trace:
                raise UsageError("not with --trace, which defines the requests", flag_name(name))


def _prepare(options: argparse.Namespace) -> tuple[EngineOptions, SamplingParams]:
    """The engine options and sampling parameters of the flags. Raises UsageError."""
    from gptoss_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    options.max_new_tokens, options.min_p, options.stop = None, 0.0, []
    return engine_options(options), sampling_params(options)


def _load(options: argparse.Namespace) -> GptOss:
    from gptoss_jax.benching.workload import load

    _progress(f"loading {options.model or 'the embedded model'}")
    return load(options.model, options.mesh, options.dtype, options.seed)


def _check_room(model: GptOss, named: str, prompt: int, output: int) -> None:
    room = model.config.max_position_embeddings
    if prompt + output > room:
        raise UsageError(f"{prompt} prompt and {output} output tokens exceed the model's context of {room}", named)


def _latency(options: argparse.Namespace) -> int:
    engine_options, params = _prepare(options)
    from gptoss_jax.benching import report
    from gptoss_jax.benching.batch import Workload
    from gptoss_jax.benching.ceilings import measure_ceilings
    from gptoss_jax.benching.latency import measure, prepare
    from gptoss_jax.benching.sampling import sampling_modes

    modes = sampling_modes(options.sampling) if options.sampling else ()
    # Measured before the weights are loaded, because a large copy needs the memory.
    ceilings = measure_ceilings(options.dtype)
    model = _load(options)
    _check_room(model, "--input-len", max(options.input_len), options.output_len)
    found = []
    for prompt_tokens in options.input_len:
        for batch in options.batch_size:
            _progress(f"batch {batch}, prompts of {prompt_tokens} tokens")
            workload = Workload(batch, prompt_tokens, options.output_len)
            # The KV cache takes a share of the free memory, so the previous engine's must have been freed.
            gc.collect()
            own = dataclasses.replace(engine_options, max_num_seqs=options.max_num_seqs or batch)
            prepared = prepare(model, own, params, workload, options.seed, warm_up=options.warm_up)
            one = measure(prepared, ceilings, options.repeats, sampling=modes)
            del prepared
            _progress(
                f"  {1e3 * one.step:.3f} ms per step, {one.rate:.0f} tok/s, "
                f"time to the last first token {1e3 * one.last_first_token:.1f} ms"
            )
            found.append(one)
    if options.plot:
        plotting.save(report.latency_figure(found), options.plot)
    rows = {"ceilings": dataclasses.asdict(ceilings), "rows": [dataclasses.asdict(one) for one in found]}
    _show(options, rows, report.latency_tables(found, ceilings))
    return 0


def _throughput(options: argparse.Namespace) -> int:
    engine_options, params = _prepare(options)
    from gptoss_jax.benching import report
    from gptoss_jax.benching.throughput import measure, median_run, simultaneous
    from gptoss_jax.commands.traces import read_trace
    from gptoss_jax.engine.engine import Engine

    if options.trace:
        arrivals = read_trace(options.trace)
    else:
        arrivals = simultaneous(options.num_prompts, options.input_len, options.output_len)
    model = _load(options)
    longest = max(arrivals, key=lambda arrival: arrival.prompt_tokens + arrival.output_tokens)
    named = f"--trace: {options.trace}: prompt_tokens" if options.trace else "--input-len"
    _check_room(model, named, longest.prompt_tokens, longest.output_tokens)
    engine = Engine(model, engine_options, eos_token_ids=())
    if options.warm_up:
        engine.warm_up()
    _progress(
        f"{len(arrivals)} requests; {options.repeats} measured runs, each repeated until it compiles nothing"
    )
    one = median_run([measure(engine, params, arrivals, options.seed + i) for i in range(options.repeats)])
    if options.plot:
        plotting.save(report.throughput_figure(one), options.plot)
    _show(options, dataclasses.asdict(one), report.throughput_table(one))
    return 0


def _serve(options: argparse.Namespace) -> int:
    load_flags.check(options)
    from gptoss_jax.commands.load import serve

    return serve(options)


def _start(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.started_at is not None:
        return _start_here(options)
    from gptoss_jax.benching import report, start

    found = start.measure(arguments)
    if options.plot:
        plotting.save(report.start_figure(found), options.plot)
    _show(options, {"starts": [dataclasses.asdict(one) for one in found]}, report.start_table(found))
    return 0


def _start_here(options: argparse.Namespace) -> int:
    """Measure the phases of this fresh process, and print them as JSON."""
    from gptoss_jax.benching.start import Stopwatch

    watch = Stopwatch(options.started_at)
    engine_options, params = _prepare(options)
    import jax
    import numpy as np

    from gptoss_jax.benching.batch import step
    from gptoss_jax.benching.workload import load, random_prompt
    from gptoss_jax.engine.engine import Engine

    watch.lap("import")
    jax.devices()
    watch.lap("devices")
    model = jax.block_until_ready(load(options.model, options.mesh, options.dtype, options.seed))
    watch.lap("weights")
    _check_room(model, "--input-len", options.input_len, options.output_len)
    engine = Engine(model, dataclasses.replace(engine_options, max_num_seqs=1), eos_token_ids=())
    if options.warm_up:
        engine.warm_up()
    watch.lap("engine")
    rng = np.random.default_rng(options.seed)
    params = dataclasses.replace(params, max_tokens=options.output_len, ignore_eos=True)
    second = Stopwatch(0.0)
    for request in ("first", "second"):
        engine.add(request, random_prompt(rng, model.config.vocab_size, options.input_len), params)
        second.lap("added")
        while not step(engine):
            pass
        (watch if request == "first" else second).lap("first_token")
        while engine.unfinished:
            step(engine)
        if request == "first":
            watch.lap("more_tokens")
    found = {"phases": watch.phases, "total": watch.total, "second_request": second.phases["first_token"]}
    print(json.dumps(found))
    return 0


def _show(options: argparse.Namespace, found: dict[str, Any], table: str) -> None:
    import jax

    device = jax.devices()[0]
    facts = {
        "command": options.command,
        "model": str(options.model or "embedded"),
        "device": device.device_kind,
        "platform": device.platform,
        "mesh": options.mesh,
        "dtype": options.dtype,
        "kv_cache_dtype": options.kv_cache_dtype,
        "kernels": options.kernels or "auto",
        "jax": jax.__version__,
    }
    if options.json:
        print(json.dumps(facts | found))
        return
    heading = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if value and key != "command"
    )
    print(f"{heading}\n\n{table}")


def _progress(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
