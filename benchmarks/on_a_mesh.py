"""What one process of several_gpus.py measures: takes a job as JSON, prints a JSON line for each row."""

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
"""Tokens whose logits are compared: 206 MB of them with the released vocabulary."""

PARTS = (1, 2, 4, 8)
"""In how many parts one device computes them, too."""

SUMS = ((17, 25), (3, 4), (120, 7), (99, 1), (640, 228), (15, 15), (402, 399), (8, 761))
"""What the small model is asked to add."""

LOUDNESS = 16
"""Root mean square of the random token embeddings whose logits are compared.

As drawn they are 0.02 to the 1 or so that a layer adds. What a router decides in the last bit is then as much of a
token as the token itself, and after 24 layers bfloat16's error is as large as the logits (0.7 of them), so that nothing
could be told from it. Trained layers each add little to what is there.
"""

UNLIKE = 1e-3
"""Relative error of a token's float32 logits above which they are not the same."""

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
        with Turns(job).shared():
            emit(plan(job))
    elif job.parts[0] in STEPS:
        emit(step(job))
    else:
        measure(job)


def emit(row: Row) -> None:
    # In one piece: threads have rows, too.
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def devices() -> Row:
    """How many, of which of the planner's families (h100 for what is of none), and what one of them can do at most."""
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
    """The parts of a mesh, small ones before the model is loaded; what fails has a row with the reason."""
    from gptoss_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    turns = Turns(job)
    with turns.shared():
        if "tokens" in job.parts:
            with failing(job, "tokens"):
                emit(job.name | tokens(job))
            # What of it is still held would count as the weights'.
            gc.collect()
        model = load(job) if {"logits", "speed"} & set(job.parts) else None
        if model is not None and "logits" in job.parts:
            with failing(job, "logits"):
                emit(job.name | logits(job, model))
        prepared = prepare(job, model) if model is not None and "speed" in job.parts else {}
    found: dict[int, list[Collectives]] = {}
    for batch, one in prepared.items():
        with failing(job, "speed", batch=batch):
            row, found[batch] = speed(job, one, turns)
            emit(job.name | row)
    from gptoss_jax.benching.collectives import alone_seconds

    for batch, taken in found.items():
        if model is not None and model.partition.mesh is not None:
            with failing(job, "collectives", batch=batch):
                seconds = alone_seconds(model.partition.mesh, taken, turns.shared, turns.alone)
                emit(job.name | {"part": "collectives", "batch": batch, "collective_alone": seconds})


class Turns:
    """Processes that run together share the machine while they prepare; who times something has it alone."""

    def __init__(self, job: Job) -> None:
        self._lock = Path(job.folder) / "turns.lock"

    def shared(self) -> contextlib.AbstractContextManager[None]:
        """Among others, of whom none times anything."""
        return self._locked(fcntl.LOCK_SH)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """While no other process does anything."""
        return self._locked(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with self._lock.open("w") as file:
            fcntl.flock(file, how)
            yield


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


def load(job: Job) -> GptOss | None:
    """The model on the mesh, or a row that says why not."""
    import jax

    from gptoss_jax.benching.workload import load as load_weights

    named = None if job.model == "embedded" else job.model
    model: GptOss | None = None
    with failing(job, "weights"):
        model = jax.block_until_ready(load_weights(named, job.mesh, "bfloat16", 0, rules_of(job)))
        emit(job.name | weights(model))
    return model


def weights(model: GptOss) -> Row:
    """Bytes of the weights on a device, and what the allocator of the fullest has in use for them."""
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
    """The shipped model's greedy answers, and with how many tokens they begin as one device's do."""
    from gptoss_jax.engine.engine import EngineOptions
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
    right = sum(str(a + b) in (o.outputs[0].text or "") for (a, b), o in zip(SUMS, found, strict=True))
    row: Row = {"part": "tokens", "answers": len(answers), "right": right, "tokens": sum(map(len, answers))}
    kept = Path(job.folder) / "tokens.json"
    if job.mesh is None:
        with kept_whole(kept) as path:
            path.write_text(json.dumps(answers))
        return row
    alone = json.loads(found_by_one(kept).read_text())
    same = [_common(*pair) for pair in zip(answers, alone, strict=True)]
    identical = sum(ours == theirs for ours, theirs in zip(answers, alone, strict=True))
    return row | {"identical": identical, "tokens_alike": sum(same)}


@contextlib.contextmanager
def kept_whole(path: Path) -> Iterator[Path]:
    """Where to write what is at `path` after the block; others may wait for it."""
    partial = path.with_name(f"partial.{path.name}")
    yield partial
    partial.rename(path)


def found_by_one(path: Path) -> Path:
    """What the process of one device keeps there, once it does. Raises RuntimeError if it has ended without it."""
    while not path.exists():
        ended = path.with_name(ENDED).exists() or not path.parent.exists()
        if ended and not path.exists():
            raise RuntimeError("there is nothing of one device to compare with")
        time.sleep(0.1)
    return path


def _common(a: list[int], b: list[int]) -> int:
    """The length of what both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def logits(job: Job, model: GptOss) -> Row:
    """Relative errors: of the mesh's logits, and of a float32 reference on the same mesh, from one device's.

    One device computes the sequences also in as many parts as they have on the mesh: which ops compute them, and what
    is rounded in between, depends on how many tokens there are. The bound is the largest error that it has so. Random
    weights have near-ties in routing, where the last bit decides on another expert: hence medians over the tokens, too,
    and how many tokens of the float32 reference are unlike.
    """
    import jax
    import numpy as np

    from benchmarks.errors import relative_error

    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, (SEQUENCES, LENGTH), dtype=np.int32)
    loudness = LOUDNESS if job.model != "embedded" else None
    kept = Path(job.folder) / "logits.npz"
    if job.mesh is None:
        possible = [n for n in PARTS if n <= jax.device_count()]
        with kept_whole(kept) as path:
            np.savez(path, **logits_of(model, drawn, loudness, possible))  # type: ignore[arg-type]
        return {"part": "logits"}
    degree = model.partition.degree("batch")
    parts = degree if SEQUENCES % degree == 0 else 1
    found = logits_of(model, drawn, loudness, (1,))
    with np.load(found_by_one(kept)) as one:
        alone, exact = one[f"in {parts}"], one["exact"]
        bound = max(relative_error(one[name], exact) for name in one.files if name != "exact")
    pairs = {
        "one_from_float32": (alone, exact),
        "from_one": (found["in 1"], alone),
        "from_float32": (found["in 1"], exact),
        "float32_from_one": (found["exact"], exact),
    }
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    tokens = {name: by_token(*pair) for name, pair in pairs.items()}
    row: Row = {"part": "logits", **errors, "bound": bound, "within": errors["from_one"] <= bound}
    row |= {f"median_{name}": float(np.median(values)) for name, values in tokens.items()}
    unlike = int(np.sum(tokens["float32_from_one"] > UNLIKE))
    return row | {"unlike": unlike, "compared": tokens["float32_from_one"].size}


def by_token(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Relative errors [B, T] of logits [B, T, V]."""
    import numpy as np

    return np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


def logits_of(
    model: GptOss, drawn: np.ndarray, loudness: float | None, parts: Sequence[int]
) -> dict[str, np.ndarray]:
    """float32 [B, T, V] of tokens [B, T]: as the model computes ("in N" parts), and in float32 ("exact").

    `loudness` is about the root mean square that the embeddings are brought to, exactly: by a power of two.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from benchmarks.errors import to_float32
    from gptoss_jax.runtime.xla_options import in_order
    from pallas_kernels import use_backend

    table = model.embed_tokens[...]
    if loudness:
        rms = jax.jit(lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))(table)
        model.embed_tokens[...] = table * 2.0 ** round(math.log2(loudness / rms))
    graph, weights = nnx.split(model)

    def compiled(weights: nnx.State, backend: str, precision: str | None, some: np.ndarray) -> Any:
        # Made for the thread: who names the backend and the precision does so in it.
        run = jax.jit(lambda weights, drawn: nnx.merge(graph, weights)(drawn))
        with use_backend(backend), jax.default_matmul_precision(precision):
            return run.lower(weights, some).compile(in_order(model.partition.mesh))

    try:
        exact = to_float32(weights)
        with ThreadPoolExecutor() as pool:
            # GPUs would round float32 products' operands to 11 bits.
            exact_program = pool.submit(compiled, exact, "reference", "highest", drawn)
            programs = {n: pool.submit(compiled, weights, "auto", None, drawn[: len(drawn) // n]) for n in parts}
        found = {"exact": np.asarray(exact_program.result()(exact, drawn))}
        for n, program in programs.items():
            pieces = [np.asarray(program.result()(weights, some)) for some in np.split(drawn, n)]
            found[f"in {n}"] = np.concatenate(pieces)
        return found
    finally:
        # Only now: the weights above are the model's own variables.
        model.embed_tokens[...] = table


def prepare(job: Job, model: GptOss) -> dict[int, Prepared]:
    """An engine for each batch, with its steps compiled, of several at once; what fails has a row with the reason."""
    from gptoss_jax.benching import latency
    from gptoss_jax.benching.batch import Workload
    from gptoss_jax.engine.engine import EngineOptions
    from gptoss_jax.types import SamplingParams

    def one(batch: int) -> Prepared | None:
        workload = Workload(batch, job.prompt_tokens, job.output_tokens)
        options = EngineOptions(enable_prefix_caching=False, kv_cache_memory=cache_memory(model, workload))
        with failing(job, "speed", batch=batch):
            return latency.prepare(model, options, SamplingParams(temperature=0), workload, 0, progress=False)
        return None

    with ThreadPoolExecutor() as pool:
        found = dict(zip(job.batch, pool.map(one, job.batch), strict=True))
    return {batch: prepared for batch, prepared in found.items() if prepared is not None}


def cache_memory(model: GptOss, workload: Workload) -> int:
    """Bytes of a device for the workload: as many tokens of each sequence as `benching.batch.start` asks for at most.

    But of others' prompts, beside which a sequence decodes, several are in a step.
    """
    import jax

    from gptoss_jax.benching.batch import TRACED_STEPS
    from gptoss_jax.engine.engine import EngineOptions
    from gptoss_jax.engine.pace import Pace
    from gptoss_jax.model.kv_cache import page_bytes, ring_bytes

    partition, config, dtype = model.partition, model.config, model.embed_tokens[...].dtype
    slots = -(-workload.batch // partition.degree("batch"))
    heads = len(partition.heads.kv_sources) // partition.degree("kv_heads")
    pace = Pace.of(jax.default_backend(), None, None, None)
    beside = -(-workload.batch * workload.prompt_tokens // pace.max_num_batched_tokens)
    tokens = (
        workload.prompt_tokens + workload.output_tokens + max(beside, 1) + 2 * TRACED_STEPS * pace.num_decode_steps
    )
    # A table of at least 64 pages, as in a cache that takes all that is free.
    pages = max(slots * -(-tokens // EngineOptions.page_size), 64)
    page = page_bytes(config, EngineOptions.page_size, dtype, heads)
    return slots * ring_bytes(config, config.sliding_window, dtype, heads) + pages * page


def speed(job: Job, prepared: Prepared, turns: Turns) -> tuple[Row, list[Collectives]]:
    """Decode and prefill of a batch through the engine, tokens a second and seconds; and a step's collectives."""
    from gptoss_jax.benching.ceilings import Ceilings
    from gptoss_jax.benching.latency import measure
    from sharding.compiled.bounds import lower_bound
    from sharding.compiled.topologies import parse_topology

    with turns.alone():
        one = measure(prepared, Ceilings(*job.ceilings), job.repeats, profile=False)
    names = ("rate", "step", "device_step", "floor", "prefill_rate", "first_token", "last_first_token")
    row: Row = {"part": "speed", "batch": one.workload.batch, **{name: getattr(one, name) for name in names}}
    if prepared.model.partition.mesh is None:
        return row, []
    taken = [of_a_step(c, one.steps_per_launch) for c in one.collectives if not c.conditional]
    row |= {
        "collectives": sum(c.count for c in taken),
        "collective_bytes": sum(c.num_bytes for c in taken),
        "collective_least": lower_bound(parse_topology(job.topology), 0, 0, taken).links,
        "ops": sorted({c.op for c in taken}),
    }
    return row, taken


def of_a_step(collectives: Collectives, rounds: int) -> Collectives:
    """Of those of a launch of several steps; what a launch does once counts as once a step."""
    count = max(1, round(collectives.count / rounds))
    num_bytes = round(collectives.num_bytes / collectives.count * count)
    return dataclasses.replace(collectives, count=count, num_bytes=num_bytes)


def step(job: Job) -> Row:
    """One of the planner's steps, run: the devices' peak and seconds."""
    from benchmarks.plan_check import run
    from gptoss_jax.checkpoints.loading import EMBEDDED

    [name] = job.parts
    context, chunk = planned_lengths(job)
    turns = Turns(job)
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
            turns.shared,
            turns.alone,
        )
    except Exception as error:
        return {"error": reason(error)}


def planned_lengths(job: Job) -> tuple[int, int]:
    """The context of the planner's steps, and the tokens of a chunk."""
    context = min(job.context, config_of(job).max_position_embeddings)
    return context, min(512, context)


def plan(job: Job) -> Row:
    """The planner's figures for both steps. Real machines are planned as if absent, with nothing of theirs in use."""
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
