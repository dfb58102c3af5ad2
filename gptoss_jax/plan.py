"""python -m gptoss_jax.plan: whether a model fits on hardware that is not present, and how fast it could run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_jax.commands import plotting
from gptoss_jax.commands.flags import command_parser, file_path
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
        "Compile a model's prefill and decode steps for hardware that need not be present, and report their memory "
        "per device, their collectives, and the lower bound and the expected value of their time.",
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
        "--mesh", metavar="AXIS=N,...", help="plan this mesh (default: the one with the best estimate)"
    )
    which.add_argument("--search", action="store_true", help="rank every sensible mesh of the devices")
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="with --search: compile the N best meshes (default: 3)"
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences in the KV cache (default: 8)")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens per sequence (default: {CONTEXT}, or the model's limit if that is less)",
    )
    parser.add_argument(
        "--chunk", type=int, default=512, metavar="N", help="tokens per prefill step (default: 512)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of all weights but the experts"
    )
    parser.add_argument(
        "--batch-over-experts",
        action="store_true",
        help="shard the sequences over the expert axis too, for large batches",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument(
        "--plot", type=file_path, metavar="FILE.png|svg|pdf", help="plot the memory and time of each mesh"
    )
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
        raise UsageError(f"expected at most the model's {longest}, found {context}", "--context")
    prepare_environment()
    from gptoss_jax.planner import plans, report
    from sharding import BATCH_OVER_EXPERTS, ShardingRules

    rules = BATCH_OVER_EXPERTS if options.batch_over_experts else ShardingRules()
    chunk = min(options.chunk, context)
    request = plans.Request(config, topology, options.batch, context, chunk, options.dtype, rules)
    devices = topology.devices()
    if options.mesh:
        partition = plans.partition_of(request, options.mesh, devices)
        request = _round_up(request, partition.degree("batch"))
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
            raise UsageError(f"expected {least} or more, found {value}", f"--{name}")
    if options.plot:
        plotting.check(options.plot)


def _round_up(request: Request, ranks: int) -> Request:
    """The request with its batch rounded up to a multiple of the data-parallel ranks."""
    batch = -(-request.batch // ranks) * ranks
    if batch != request.batch:
        _progress(f"--batch: rounding {request.batch} sequences up to {batch}, for {ranks} data-parallel ranks")
    return dataclasses.replace(request, batch=batch)


def _progress(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
