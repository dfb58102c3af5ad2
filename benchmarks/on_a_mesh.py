"""What one process of several_gpus.py measures: takes a job as JSON, prints a JSON line for each row."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.several_gpus import ALL_TO_ALL, STEPS, Job, Row, progress

if TYPE_CHECKING:
    import numpy as np

    from gptoss_jax.benching.ceilings import Ceilings
    from gptoss_jax.benching.latency import Latency
    from gptoss_jax.config import ModelConfig
    from gptoss_jax.model import GptOss
    from sharding import ShardingRules
    from sharding.program import Collectives

SEQUENCES, LENGTH = 8, 32
"""Tokens whose logits are compared: 206 MB of them with the released vocabulary."""

SUMS = ((17, 25), (3, 4), (120, 7), (99, 1), (640, 228), (15, 15), (402, 399), (8, 761))
"""What the small model is asked to add."""

ANSWER_TOKENS = 96
SMALL_CACHE = 64 << 20


def main() -> None:
    if sys.argv[1] == "devices":
        emit(devices())
        return
    job = Job.read(sys.argv[1])
    if job.parts == ("plan",):
        emit(plan(job))
    elif job.parts[0] in STEPS:
        emit(step(job))
    else:
        measure(job)


def emit(row: Row) -> None:
    print(json.dumps(row), flush=True)


def devices() -> Row:
    """How many there are, and which of the planner's families they belong to; h100 for what belongs to none."""
    import jax

    from sharding.topologies import families

    device = jax.devices()[0]
    known = [family for family, facts in families().items() if facts.name == device.device_kind]
    return {
        "part": "devices",
        "devices": jax.device_count(),
        "device": device.device_kind,
        "family": known[0] if known else "h100",
        "trial": device.platform == "cpu",
        "jax": jax.__version__,
    }


def measure(job: Job) -> None:
    """The parts of a mesh, small ones before the model is loaded; what fails has a row with the reason."""
    from gptoss_jax.benching.ceilings import measure_ceilings
    from gptoss_jax.compile_cache import enable_compile_cache

    enable_compile_cache()
    if "tokens" in job.parts:
        with failing(job, "tokens"):
            emit(job.name | tokens(job))
    if not {"logits", "speed"} & set(job.parts):
        return
    # Before the weights take the memory that a large copy needs.
    ceilings = measure_ceilings("bfloat16")
    model: GptOss | None = None
    with failing(job, "weights"):
        model = load(job)
    if model is None:
        return
    if "logits" in job.parts:
        with failing(job, "logits"):
            emit(job.name | logits(job, model))
    for batch in job.batch if "speed" in job.parts else ():
        # A cache takes a share of what is free, so the last one's must be gone.
        gc.collect()
        with failing(job, "speed", batch=batch):
            emit(job.name | speed(job, model, batch, ceilings))


class failing:
    """Errors of devices and compilers, and of what a mesh cannot do, become a row of the part."""

    def __init__(self, job: Job, part: str, **more: Any) -> None:
        self._row = job.name | {"part": part} | more

    def __enter__(self) -> None:
        progress(f"  {' '.join(str(value) for value in self._row.values())}")

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        emit(self._row | {"error": reason(error)})
        return True


def reason(error: Exception) -> str:
    """One line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.300}"


def rules_of(job: Job) -> ShardingRules:
    from sharding import BATCH_OVER_EXPERTS, ShardingRules

    return BATCH_OVER_EXPERTS if job.strategy == ALL_TO_ALL else ShardingRules(dispatch="replicated")


def load(job: Job) -> GptOss:
    import jax

    from gptoss_jax.benching import workload

    named = None if job.model == "embedded" else job.model
    return jax.block_until_ready(workload.load(named, job.mesh, "bfloat16", 0, rules_of(job)))


def config_of(job: Job) -> ModelConfig:
    from gptoss_jax.config import ModelConfig
    from gptoss_jax.loading import EMBEDDED

    return ModelConfig.from_file(EMBEDDED if job.model == "embedded" else Path(job.model))


def tokens(job: Job) -> Row:
    """The shipped model's greedy answers, and with how many tokens they begin as one device's do."""
    from gptoss_jax.engine.engine import EngineOptions
    from gptoss_jax.engine.params import SamplingParams
    from gptoss_jax.llm import LLM

    engine = EngineOptions(max_batch=len(SUMS), kv_cache_memory=SMALL_CACHE)
    llm = LLM(mesh=job.mesh, rules=rules_of(job), engine=engine, progress=False)
    found = llm.chat(
        [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in SUMS],
        SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0),
        reasoning_effort="low",
        current_date="2026-01-01",
    )
    answers = [list(output.outputs[0].token_ids) for output in found]
    right = sum(str(a + b) in (o.outputs[0].text or "") for (a, b), o in zip(SUMS, found, strict=True))
    row: Row = {"part": "tokens", "answers": len(answers), "right": right, "tokens": sum(map(len, answers))}
    kept = Path(job.folder) / "tokens.json"
    if job.mesh is None:
        kept.write_text(json.dumps(answers))
        return row
    alone = json.loads(kept.read_text())
    same = [_common(*pair) for pair in zip(answers, alone, strict=True)]
    identical = sum(ours == theirs for ours, theirs in zip(answers, alone, strict=True))
    return row | {"identical": identical, "tokens_alike": sum(same)}


def _common(a: list[int], b: list[int]) -> int:
    """The length of what both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def logits(job: Job, model: GptOss) -> Row:
    """Relative errors: of the mesh's logits, and of a float32 reference on the same mesh, from one device's."""
    import numpy as np

    from benchmarks.errors import relative_error

    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, (SEQUENCES, LENGTH), dtype=np.int32)
    found = {"own": logits_of(model, drawn, exact=False), "exact": logits_of(model, drawn, exact=True)}
    row: Row = {"part": "logits", "from_float32": relative_error(found["own"], found["exact"])}
    kept = Path(job.folder) / "logits.npz"
    if job.mesh is None:
        np.savez(kept, **found)  # type: ignore[arg-type]
        return row
    if not kept.exists():
        return row | {"error": "there is nothing of one device to compare with"}
    with np.load(kept) as one:
        alone, exact = one["own"], one["exact"]
    row["one_from_float32"] = relative_error(alone, exact)
    row["from_one"] = relative_error(found["own"], alone)
    row["within"] = row["from_one"] <= row["one_from_float32"]
    row["float32_from_one"] = relative_error(found["exact"], exact)
    return row | {"largest_float32": float(np.abs(found["exact"] - exact).max())}


def logits_of(model: GptOss, drawn: np.ndarray, *, exact: bool) -> np.ndarray:
    """float32 [B, T, V] of tokens [B, T]: as the model computes, or the reference in float32 on the same numbers."""
    import jax
    import numpy as np
    from flax import nnx

    from benchmarks.errors import to_float32
    from pallas_kernels import use_backend

    graph, weights = nnx.split(model)
    run = jax.jit(lambda weights, drawn: nnx.merge(graph, weights)(drawn))
    if not exact:
        return np.asarray(run(weights, drawn))
    # GPUs would round float32 products' operands to 11 bits.
    with use_backend("reference"), jax.default_matmul_precision("highest"):
        return np.asarray(run(to_float32(weights), drawn))


def speed(job: Job, model: GptOss, batch: int, ceilings: Ceilings) -> Row:
    """Decode and prefill of a batch through the engine, tokens a second and seconds."""
    from gptoss_jax.benching.batch import Case
    from gptoss_jax.benching.latency import measure
    from gptoss_jax.engine.engine import EngineOptions
    from gptoss_jax.engine.params import SamplingParams

    case = Case(batch, job.prompt_tokens, job.output_tokens)
    options, params = EngineOptions(prefix_cache=False), SamplingParams(temperature=0)
    one = measure(model, options, params, case, ceilings, job.repeats, 0)
    names = ("rate", "step", "device", "floor", "prefill_rate", "first_token", "last_first_token")
    row: Row = {"part": "speed", "batch": batch, **{name: getattr(one, name) for name in names}}
    return row | communication(job, model, one)


def communication(job: Job, model: GptOss, one: Latency) -> Row:
    """The collectives of a decode step: how many, their bytes on a device, and their seconds, least and alone."""
    from gptoss_jax.benching.collectives import alone_seconds
    from sharding.bound import lower_bound
    from sharding.topologies import parse_topology

    mesh = model.partition.mesh
    if mesh is None:
        return {}
    taken = [of_a_step(c, one.rounds) for c in one.collectives if not c.conditional]
    row: Row = {
        "collectives": sum(c.count for c in taken),
        "collective_bytes": sum(c.num_bytes for c in taken),
        "collective_least": lower_bound(parse_topology(job.topology), 0, 0, taken).links,
        "ops": sorted({c.op for c in taken}),
    }
    try:
        return row | {"collective_alone": alone_seconds(mesh, taken)}
    except Exception as error:
        # The rest of the row took minutes and stands without it.
        return row | {"error": f"collectives alone: {reason(error)}"}


def of_a_step(collectives: Collectives, rounds: int) -> Collectives:
    """Of those of a launch of several steps; what a launch does once counts as once a step."""
    count = max(1, round(collectives.count / rounds))
    num_bytes = round(collectives.num_bytes / collectives.count * count)
    return dataclasses.replace(collectives, count=count, num_bytes=num_bytes)


def step(job: Job) -> Row:
    """One of the planner's steps, run: the devices' peak and seconds."""
    from benchmarks.plan_check import run
    from gptoss_jax.loading import EMBEDDED

    [name] = job.parts
    context, chunk = planned_lengths(job)
    try:
        return run(
            argparse.Namespace(
                model=EMBEDDED if job.model == "embedded" else Path(job.model),
                mesh=job.mesh or "data=1",
                batch_over_experts=job.strategy == ALL_TO_ALL,
                step=name,
                batch=job.planned_batch,
                context=context,
                chunk=chunk,
            )
        )
    except Exception as error:
        return {"error": reason(error)}


def planned_lengths(job: Job) -> tuple[int, int]:
    """The context of the planner's steps, and the tokens of a chunk."""
    context = min(job.context, config_of(job).max_position_embeddings)
    return context, min(512, context)


def plan(job: Job) -> Row:
    """The planner's figures for both steps. Real machines are planned as if absent, with nothing of theirs in use."""
    from sharding.topologies import parse_topology, prepare_environment

    if not job.trial:
        prepare_environment()
    import jax

    from gptoss_jax.planner import plans, report

    try:
        topology = parse_topology(job.topology)
        request = plans.Request(
            config_of(job), topology, job.planned_batch, *planned_lengths(job), rules=rules_of(job)
        )
        here = jax.devices() if job.trial else topology.devices()
        partition = plans.partition_of(request, job.mesh or "data=1", here)
        planned = plans.compile_plan(request, partition, plans.estimate(request, partition))
        return report.as_json(request, [planned])
    except Exception as error:
        return {"error": reason(error)}


if __name__ == "__main__":
    main()
