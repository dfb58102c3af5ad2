"""A measuring process of several_gpus.py: takes a job as JSON, and prints a JSON line for each row."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import gc
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.several_gpus import ALL_TO_ALL, ENDED, STEPS, Job, Row, progress

if TYPE_CHECKING:
    import numpy as np

    from gptoss_jax.benching.batch import Workload
    from gptoss_jax.benching.latency import Prepared
    from gptoss_jax.model.config import ModelConfig
    from gptoss_jax.model.gpt_oss import GptOss
    from sharding import ShardingRules
    from sharding.compiled.program import Collectives

SEQUENCES, LENGTH = 8, 32
"""Tokens whose logits are compared; the logits are 206 MB with the released vocabulary."""

SPLITS = (1, 2, 4, 8)
"""Numbers of equal batches in which one device computes the sequences."""

SUMS = ((17, 25), (3, 4), (120, 7), (99, 1), (640, 228), (15, 15), (402, 399), (8, 761))
"""Additions that the small model is asked for."""

EMBEDDING_RMS = 16
"""Root mean square of the random token embeddings whose logits are compared.

Initialised embeddings have 0.02, while each layer adds about 1. A routing decision in the last bit would then change a
token as much as the token's own embedding, and after 24 layers bfloat16's error would be as large as the logits (0.7 of
them), too large for a comparison. Trained layers each add little to the residual stream.
"""

DIFFERENT = 1e-3
"""Relative error of a token's float32 logits above which the token counts as differing."""

ANSWER_TOKENS = 96
SMALL_CACHE = 64 << 20


def main() -> None:
    if sys.argv[1] == "devices":
        emit(devices())
        return
    from gptoss_jax.engine.compiling import also_compile_with

    job = Job.read(sys.argv[1])
    also_compile_with(job.compiler_options)
    if job.parts == ("plan",):
        with MachineLock(job).shared():
            emit(plan(job))
    elif job.parts[0] in STEPS:
        emit(step(job))
    else:
        measure(job)


def emit(row: Row) -> None:
    # A single write, because several threads emit rows.
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def devices() -> Row:
    """The row of the devices: number, kind, the planner's device family (h100 if unknown), and peak rates of one."""
    import jax

    from gptoss_jax.benching.ceilings import measure_ceilings
    from sharding.compiled.topologies import families

    device = jax.devices()[0]
    known = [family for family, facts in families().items() if facts.name == device.device_kind]
    return {
        "part": "devices",
        "devices": jax.device_count(),
        "device": device.device_kind,
        "family": known[0] if known else "h100",
        "trial": device.platform == "cpu",
        "jax": jax.__version__,
        **dataclasses.asdict(measure_ceilings("bfloat16")),
    }


def measure(job: Job) -> None:
    """Measure a mesh, the small model first; a part that fails emits a row with the error."""
    from gptoss_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    lock = MachineLock(job)
    with lock.shared():
        if "tokens" in job.parts:
            with errors_as_rows(job, "tokens"):
                emit(job.name | tokens(job))
            # Memory that the small model still holds would count as the weights'.
            gc.collect()
        model = load(job) if {"logits", "speed"} & set(job.parts) else None
        if model is not None and "logits" in job.parts:
            with errors_as_rows(job, "logits"):
                emit(job.name | logits(job, model))
        prepared = prepare(job, model) if model is not None and "speed" in job.parts else {}
    found: dict[int, list[Collectives]] = {}
    for batch, one in prepared.items():
        with errors_as_rows(job, "speed", batch=batch):
            row, found[batch] = speed(job, one, lock)
            emit(job.name | row)
    from gptoss_jax.benching.collectives import isolated_seconds

    for batch, taken in found.items():
        if model is not None and model.partition.mesh is not None:
            with errors_as_rows(job, "collectives", batch=batch):
                seconds = isolated_seconds(model.partition.mesh, taken, lock.shared, lock.exclusive)
                emit(job.name | {"part": "collectives", "batch": batch, "collective_alone": seconds})


class MachineLock:
    """A lock between concurrent processes: shared while they prepare, exclusive while one of them measures time."""

    def __init__(self, job: Job) -> None:
        self._lock = Path(job.folder) / "machine.lock"

    def shared(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock together with other processes that prepare."""
        return self._locked(fcntl.LOCK_SH)

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock alone, to measure time."""
        return self._locked(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with self._lock.open("w") as file:
            fcntl.flock(file, how)
            yield


class errors_as_rows:
    """Emits any exception in the block as a row of the part, and suppresses it."""

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
    """The first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.300}"


def rules_of(job: Job) -> ShardingRules:
    from sharding import BATCH_OVER_EXPERTS, ShardingRules

    return BATCH_OVER_EXPERTS if job.strategy == ALL_TO_ALL else ShardingRules(dispatch="replicated")


def load(job: Job) -> GptOss | None:
    """The model on the mesh; None if it fails, after a row with the error."""
    import jax

    from gptoss_jax.benching.workload import load as load_weights

    named = None if job.model == "embedded" else job.model
    model: GptOss | None = None
    with errors_as_rows(job, "weights"):
        model = jax.block_until_ready(load_weights(named, job.mesh, "bfloat16", 0, rules_of(job)))
        emit(job.name | weights(model))
    return model


def weights(model: GptOss) -> Row:
    """Bytes of the weights on a device, and the most bytes that the allocator of any device has in use."""
    import jax

    from gptoss_jax.engine.step import Structure
    from gptoss_jax.planner.work import held_bytes

    in_use = [(device.memory_stats() or {}).get("bytes_in_use", 0) for device in jax.local_devices()]
    return {"part": "weights", "held": held_bytes(Structure.of(model)[1]), "in_use": max(in_use) or None}


def config_of(job: Job) -> ModelConfig:
    from gptoss_jax.checkpoints.loading import EMBEDDED
    from gptoss_jax.model.config import ModelConfig

    return ModelConfig.from_file(EMBEDDED if job.model == "embedded" else Path(job.model))


def tokens(job: Job) -> Row:
    """Counts of the embedded model's greedy answers: correct ones, and equality and common prefix with one device's."""
    from gptoss_jax.engine.options import EngineOptions
    from gptoss_jax.serving.client import LLM
    from gptoss_jax.types import SamplingParams

    engine = EngineOptions(max_num_seqs=len(SUMS), kv_cache_memory=SMALL_CACHE)
    llm = LLM(mesh=job.mesh, rules=rules_of(job), engine=engine, progress=False)
    found = llm.chat(
        [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in SUMS],
        SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0),
        reasoning_effort="low",
        current_date="2026-01-01",
    )
    answers = [list(output.outputs[0].token_ids) for output in found]
    correct = sum(str(a + b) in (o.outputs[0].text or "") for (a, b), o in zip(SUMS, found, strict=True))
    row: Row = {"part": "tokens", "answers": len(answers), "correct": correct, "tokens": sum(map(len, answers))}
    kept = Path(job.folder) / "tokens.json"
    if job.mesh is None:
        with written_atomically(kept) as path:
            path.write_text(json.dumps(answers))
        return row
    one_device = json.loads(one_device_file(kept).read_text())
    common = [_common_prefix(*pair) for pair in zip(answers, one_device, strict=True)]
    identical = sum(ours == theirs for ours, theirs in zip(answers, one_device, strict=True))
    return row | {"identical": identical, "common_prefix": sum(common)}


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a file to write, which is renamed to `path` after the block; other processes may wait for it."""
    partial = path.with_name(f"partial.{path.name}")
    yield partial
    partial.rename(path)


def one_device_file(path: Path) -> Path:
    """Wait for a file of the one-device process. Raises RuntimeError if that process ended without writing it."""
    while not path.exists():
        ended = path.with_name(ENDED).exists() or not path.parent.exists()
        if ended and not path.exists():
            raise RuntimeError("one device has no result to compare with")
        time.sleep(0.1)
    return path


def _common_prefix(a: list[int], b: list[int]) -> int:
    """The length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def logits(job: Job, model: GptOss) -> Row:
    """Relative errors of the mesh's logits, and of a float32 reference on the mesh, against one device.

    One device also computes the sequences in as many batches as there are data-parallel ranks on the mesh, because the
    choice of kernels and the rounding depend on the number of tokens. The bound is its largest error against float32
    over all of `SPLITS`. Random weights have near-ties in routing, in which the last bit selects another expert; the
    row therefore also has medians over the tokens, and the number of tokens that differ in the float32 reference.
    """
    import jax
    import numpy as np

    from benchmarks.errors import relative_error

    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, (SEQUENCES, LENGTH), dtype=np.int32)
    embedding_rms = EMBEDDING_RMS if job.model != "embedded" else None
    kept = Path(job.folder) / "logits.npz"
    if job.mesh is None:
        possible = [n for n in SPLITS if n <= jax.device_count()]
        with written_atomically(kept) as path:
            np.savez(path, **logits_of(model, drawn, embedding_rms, possible))  # type: ignore[arg-type]
        return {"part": "logits"}
    ranks = model.partition.degree("batch")
    splits = ranks if SEQUENCES % ranks == 0 else 1
    found = logits_of(model, drawn, embedding_rms, (1,))
    with np.load(one_device_file(kept)) as one:
        one_device, exact = one[f"splits {splits}"], one["exact"]
        bound = max(relative_error(one[name], exact) for name in one.files if name != "exact")
    pairs = {
        "one_from_float32": (one_device, exact),
        "from_one": (found["splits 1"], one_device),
        "from_float32": (found["splits 1"], exact),
        "float32_from_one": (found["exact"], exact),
    }
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    tokens = {name: by_token(*pair) for name, pair in pairs.items()}
    row: Row = {"part": "logits", **errors, "bound": bound, "within": errors["from_one"] <= bound}
    row |= {f"median_{name}": float(np.median(values)) for name, values in tokens.items()}
    differing = int(np.sum(tokens["float32_from_one"] > DIFFERENT))
    return row | {"differing": differing, "compared": tokens["float32_from_one"].size}


def by_token(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Relative errors [B, T] of logits [B, T, V]."""
    import numpy as np

    return np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


def logits_of(
    model: GptOss, drawn: np.ndarray, embedding_rms: float | None, splits: Sequence[int]
) -> dict[str, np.ndarray]:
    """Logits, float32 [B, T, V], of tokens [B, T]: the model's in N batches ("splits N"), and in float32 ("exact").

    The embeddings are scaled to a root mean square near `embedding_rms`, by a power of two so that no bits are lost.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from benchmarks.errors import to_float32
    from gptoss_jax.runtime.xla_options import in_order
    from pallas_kernels import use_backend

    table = model.embed_tokens[...]
    if embedding_rms:
        rms = jax.jit(lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))(table)
        model.embed_tokens[...] = table * 2.0 ** round(math.log2(embedding_rms / rms))
    graph, weights = nnx.split(model)

    def compiled(weights: nnx.State, backend: str, precision: str | None, some: np.ndarray) -> Any:
        # The backend and the precision are thread-local settings, so they are set in the compiling thread.
        run = jax.jit(lambda weights, drawn: nnx.merge(graph, weights)(drawn))
        with use_backend(backend), jax.default_matmul_precision(precision):
            return run.lower(weights, some).compile(in_order(model.partition.mesh))

    try:
        exact = to_float32(weights)
        with ThreadPoolExecutor() as pool:
            # By default GPUs round the operands of float32 products to 11 bits.
            exact_program = pool.submit(compiled, exact, "reference", "highest", drawn)
            programs = {n: pool.submit(compiled, weights, "auto", None, drawn[: len(drawn) // n]) for n in splits}
        found = {"exact": np.asarray(exact_program.result()(exact, drawn))}
        for n, program in programs.items():
            pieces = [np.asarray(program.result()(weights, some)) for some in np.split(drawn, n)]
            found[f"splits {n}"] = np.concatenate(pieces)
        return found
    finally:
        # Restored last, because the programs above run on the model's own variables.
        model.embed_tokens[...] = table


def prepare(job: Job, model: GptOss) -> dict[int, Prepared]:
    """An engine with compiled programs for each batch size; a failure emits a row with the error."""
    from gptoss_jax.benching import latency
    from gptoss_jax.benching.batch import Workload
    from gptoss_jax.engine.options import EngineOptions
    from gptoss_jax.types import SamplingParams

    found = {}
    for batch in job.batch:
        workload = Workload(batch, job.prompt_tokens, job.output_tokens)
        with errors_as_rows(job, "speed", batch=batch):
            options = EngineOptions(
                max_num_seqs=batch, enable_prefix_caching=False, kv_cache_memory=cache_memory(model, workload)
            )
            found[batch] = latency.prepare(
                model, options, SamplingParams(temperature=0), workload, 0, progress=False
            )
    return found


def cache_memory(model: GptOss, workload: Workload) -> int:
    """Bytes of KV cache per device for the workload, for the most tokens that `benching.batch.start` asks for."""
    from gptoss_jax.benching.batch import new_tokens
    from gptoss_jax.model.kv_cache import page_bytes
    from gptoss_jax.planner.steps import sizes

    partition, config, dtype = model.partition, model.config, model.embed_tokens[...].dtype
    heads = len(partition.heads.kv_sources) // partition.degree("kv_heads")
    pace, cache = sizes(config, partition, workload.batch, config.max_position_embeddings, None, dtype)
    needed = workload.prompt_tokens + new_tokens(pace, cache.slots, 0, workload)
    tokens = min(needed, config.max_position_embeddings)
    page, sliding_page = (
        page_bytes(config, layers, cache.page_size, dtype, heads)
        for layers in ("full_attention", "sliding_attention")
    )
    return cache.slots * -(-tokens // cache.page_size) * page + cache.sliding_pages * sliding_page


def speed(job: Job, prepared: Prepared, lock: MachineLock) -> tuple[Row, list[Collectives]]:
    """Decode and prefill rates and times of a batch through the engine, and the collectives of a step."""
    from gptoss_jax.benching.ceilings import Ceilings
    from gptoss_jax.benching.latency import measure
    from sharding.compiled.bounds import lower_bound
    from sharding.compiled.topologies import parse_topology

    with lock.exclusive():
        one = measure(prepared, Ceilings(*job.ceilings), job.repeats, profile=False)
    names = ("rate", "step", "device_step", "floor", "prefill_rate", "first_token", "last_first_token")
    row: Row = {"part": "speed", "batch": one.workload.batch, **{name: getattr(one, name) for name in names}}
    if prepared.model.partition.mesh is None:
        return row, []
    taken = [per_step(c, one.steps_per_launch) for c in one.collectives if not c.conditional]
    row |= {
        "collectives": sum(c.count for c in taken),
        "collective_bytes": sum(c.num_bytes for c in taken),
        "collective_least": lower_bound(parse_topology(job.topology), 0, 0, taken).links,
        "ops": sorted({c.op for c in taken}),
    }
    return row, taken


def per_step(collectives: Collectives, steps: int) -> Collectives:
    """A step's share of the collectives of a launch of several steps, at least one."""
    count = max(1, round(collectives.count / steps))
    num_bytes = round(collectives.num_bytes / collectives.count * count)
    return dataclasses.replace(collectives, count=count, num_bytes=num_bytes)


def step(job: Job) -> Row:
    """Run one of the planner's steps: the devices' peak memory and the step's seconds."""
    from benchmarks.plan_check import run
    from gptoss_jax.checkpoints.loading import EMBEDDED

    [name] = job.parts
    context, chunk = planned_lengths(job)
    lock = MachineLock(job)
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
            ),
            lock.shared,
            lock.exclusive,
        )
    except Exception as error:
        return {"error": reason(error)}


def planned_lengths(job: Job) -> tuple[int, int]:
    """The context and the prefill chunk of the planner's steps, in tokens."""
    context = min(job.context, config_of(job).max_position_embeddings)
    return context, min(512, context)


def plan(job: Job) -> Row:
    """The planner's figures for both steps. GPUs are planned ahead of time, without using the devices."""
    from sharding.compiled.topologies import parse_topology, prepare_environment

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
