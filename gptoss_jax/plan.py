"""python -m gptoss_jax.plan: whether a model fits a machine that is not here, and how fast it could be there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_jax.commands import plotting
from gptoss_jax.commands.flags import command_parser
from gptoss_jax.commands.options import by_flag
from gptoss_jax.commands.running import run_command
from gptoss_jax.errors import UsageError

if TYPE_CHECKING:
    from gptoss_jax.planner.plans import Request


CONTEXT = 8192


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command_parser(
        "plan",
        "Compile a model's prefill and decode steps for a machine that need not be here, and report the memory they "
        "take on each device, what they communicate, and the least and the expected time they take.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        required=True,
        help="a config.json, its directory, gpt-oss-20b or gpt-oss-120b",
    )
    parser.add_argument(
        "--topology",
        metavar="NAME:SHAPE",
        required=True,
        help="TPU chips such as v5e:4x8 or tpu7x:2x2x1, or slices x hosts x GPUs such as h100:1x1x8",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--mesh", metavar="AXIS=N,...", help="this mesh (default: the one estimated to be the best)"
    )
    which.add_argument("--search", action="store_true", help="every sensible factorisation of the devices")
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="with --search: compile the N best (default: 3)"
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences in the cache (default: 8)")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens of each (default: {CONTEXT}, or the model's longest if that is less)",
    )
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens a prefill call (default: 512)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of all but the experts"
    )
    parser.add_argument(
        "--batch-over-experts",
        action="store_true",
        help="attention splits its sequences over the expert axis too, for large batches",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.png|svg|pdf", help="draw memory and time of each mesh")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = flags().parse_args(arguments)
    _check(options)
    with by_flag(options):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    from gptoss_jax.model.config import ModelConfig
    from gptoss_jax.model.shapes import shape_file
    from sharding.compiled.topologies import parse_topology, prepare_environment

    config = ModelConfig.from_file(shape_file(options.model) or options.model)
    topology = parse_topology(options.topology)
    longest = config.max_position_embeddings
    context = options.context or min(CONTEXT, longest)
    if context > longest:
        raise UsageError(f"--context: the model's longest is {longest}, found {context}")
    prepare_environment()
    from gptoss_jax.planner import plans, report
    from sharding import BATCH_OVER_EXPERTS, ShardingRules

    rules = BATCH_OVER_EXPERTS if options.batch_over_experts else ShardingRules()
    chunk = min(options.chunk, context)
    request = plans.Request(config, topology, options.batch, context, chunk, options.dtype, rules)
    devices = topology.devices()
    if options.mesh:
        partition = plans.partition_of(request, options.mesh, devices)
        request = _divided(request, partition.degree("batch"))
        found = [plans.compile_plan(request, partition, plans.estimate(request, partition))]
    else:
        found = plans.search(request, devices, options.top if options.search else 1, _progress)
        found = found if options.search else found[:1]
    if options.json:
        print(json.dumps(report.as_json(request, found)))
    else:
        print(report.table(request, found))
    if options.plot:
        plotting.save(report.figure(request, found), options.plot)
    return 0


def _check(options: argparse.Namespace) -> None:
    for name, least in (("batch", 1), ("context", 1), ("chunk", 1), ("top", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name}: expected {least} or more, found {value}")
    if options.plot:
        plotting.check(options.plot)


def _divided(request: Request, parts: int) -> Request:
    """The request with as many sequences as each part of the batch has room for."""
    batch = -(-request.batch // parts) * parts
    if batch != request.batch:
        _progress(f"--batch: {request.batch} sequences over {parts} parts of the batch take the room of {batch}")
    return dataclasses.replace(request, batch=batch)


def _progress(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
