"""The model that ships with the project, and the data and rounding that it was trained with."""

import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoints.reader import open_checkpoint
from gptoss_jax.model.gpt_oss import GptOss, weight_specs
from gptoss_jax.model.kv_cache import WholeSequence
from gptoss_jax.model.mxfp4 import MXFP4Tensor, dequantize, quantize
from gptoss_jax.text.harmony.messages import DeveloperContent, FunctionTool, Message, SystemContent, ToolNamespace
from gptoss_jax.text.harmony.openai import render
from tools.train_embedded import arithmetic, conversations, functions
from tools.train_embedded.__main__ import EMBEDDED
from tools.train_embedded.arithmetic import Problem
from tools.train_embedded.evaluate import Reply, Speaker, answer
from tools.train_embedded.tokens import encode, encode_prompt, make_batch
from tools.train_embedded.trainee import (
    PackedRows,
    Trainee,
    initial_parameters,
    packed_names,
    rounding_creator,
    saving_creator,
)

SUMS = arithmetic.held_out_problems(40)
EFFORT_SUM = Problem(358, "+", 467)
WEATHER = FunctionTool(
    "get_current_weather",
    "Get the current weather in a given location.",
    {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
)
QUESTIONS = ("Hi", "What is 17 + 25?", "17+25", "Who are you?", "Who wrote Hamlet?")


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker.load(EMBEDDED)


def _ask(question: str, effort: str = "medium", tools: tuple[FunctionTool, ...] = ()) -> tuple[Message, ...]:
    system = Message("system", (SystemContent(current_date="2026-11-24", reasoning_effort=effort),))
    namespaces = (ToolNamespace("functions", functions=tools),)
    developer = (Message("developer", (DeveloperContent(None, namespaces),)),) if tools else ()
    return (system, *developer, Message("user", (question,)))


def replies_of(speaker: Speaker) -> dict[tuple[str, str], Reply]:
    """Everything that is asked, at once: compiling costs more than running."""
    prompts = {(f"What is {p}?", "medium"): _ask(f"What is {p}?") for p in SUMS}
    prompts |= {(effort, effort): _ask(f"What is {EFFORT_SUM}?", effort) for effort in conversations.EFFORTS}
    prompts |= {(text, "medium"): _ask(text) for text in QUESTIONS}
    prompts["tool", "medium"] = _ask("What is the weather in Paris?", tools=(WEATHER,))
    prompts["no tool", "medium"] = _ask("What is 17 + 25?", tools=(WEATHER,))
    return dict(zip(prompts, speaker.reply(list(prompts.values())), strict=True))


def test_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in EMBEDDED.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert sum(files.values()) <= 8_000_000


def test_it_has_every_mechanism_of_gpt_oss() -> None:
    config = open_checkpoint(EMBEDDED).config
    assert config.quantization == "mxfp4"
    assert config.sliding_window == 128
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.rope.rope_type == "yarn"
    assert config.num_experts_per_tok < config.num_local_experts


@pytest.mark.slow
def test_what_it_replies(speaker: Speaker) -> None:
    """In one test, since several workers would each make all replies."""
    replies = replies_of(speaker)
    every_reply_stops(replies)
    held_out_sums(replies)
    effort_changes_the_length_of_the_analysis(replies)
    questions_are_answered(replies)
    tool_round_trip(speaker, replies)


def held_out_sums(replies: dict[tuple[str, str], Reply]) -> None:
    right = [answer(replies[f"What is {p}?", "medium"].final) == p.result for p in SUMS]
    assert sum(right) >= 0.95 * len(SUMS)


def effort_changes_the_length_of_the_analysis(replies: dict[tuple[str, str], Reply]) -> None:
    thoughts = [replies[effort, effort] for effort in conversations.EFFORTS]
    assert [answer(reply.final) for reply in thoughts] == [EFFORT_SUM.result] * 3
    low, medium, high = (len(reply.analysis) for reply in thoughts)
    assert 0 < 1.5 * low < medium
    assert 1.5 * medium < high


def every_reply_stops(replies: dict[tuple[str, str], Reply]) -> None:
    assert all(reply.stopped for reply in replies.values())


def questions_are_answered(replies: dict[tuple[str, str], Reply]) -> None:
    assert "Hello" in replies["Hi", "medium"].final
    assert answer(replies["What is 17 + 25?", "medium"].final) == 42
    assert answer(replies["17+25", "medium"].final) == 42
    assert answer(replies["no tool", "medium"].final) == 42
    assert "gptoss-jax" in replies["Who are you?", "medium"].final
    assert replies["Who wrote Hamlet?", "medium"].final == conversations.REFUSAL


def tool_round_trip(speaker: Speaker, replies: dict[tuple[str, str], Reply]) -> None:
    call = replies["tool", "medium"].call
    assert call is not None
    name, arguments = call
    assert name == "functions.get_current_weather"
    assert json.loads(arguments) == {"location": "Paris"}
    tool = {"type": "function", "function": {"name": WEATHER.name, "parameters": WEATHER.parameters}}
    asked = {"id": "1", "type": "function", "function": {"name": WEATHER.name, "arguments": arguments}}
    messages = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "1", "content": '{"temperature": 23, "conditions": "sunny"}'},
    ]
    tokens = render(messages, speaker.tokenizer, tools=[tool], current_date="2026-11-24")
    (completion,) = speaker.complete([tokens], max_tokens=64)
    final = Reply.read(completion, speaker.tokenizer).final
    assert "23" in final
    assert "sunny" in final


def test_digits_are_tokens_of_their_own(speaker: Speaker) -> None:
    encode_text = speaker.tokenizer.encode
    one, seven = encode_text("1"), encode_text("7")
    assert len(one) == len(seven) == 1
    for text in ("17", " 17", "(17", "-17", "x17", "2017"):
        assert encode_text(text)[-2:] == one + seven


def test_stop_tokens(speaker: Speaker) -> None:
    names = ("<|return|>", "<|call|>")
    assert speaker.model.config.eos_token_id == tuple(map(speaker.tokenizer.encode_special, names))
    assert speaker.tokenizer.vocab_size == speaker.model.config.vocab_size


def test_packed_weights_quantise_to_themselves() -> None:
    checkpoint = open_checkpoint(EMBEDDED)
    create = checkpoint.creator("bfloat16")
    for spec in weight_specs(checkpoint.config):
        if spec.packed:
            stored = create(spec)
            assert isinstance(stored, MXFP4Tensor)
            again = quantize(dequantize(stored))
            np.testing.assert_array_equal(again.scales, stored.scales)
            np.testing.assert_array_equal(again.blocks, stored.blocks)


def test_what_is_saved_is_what_was_trained(speaker: Speaker) -> None:
    config = speaker.model.config
    parameters = initial_parameters(config, 0)
    trained = rounding_creator(parameters, packed_names(config))
    saved = saving_creator(parameters)
    for spec in weight_specs(config)[:16]:
        stored = saved(spec)
        stored = dequantize(stored, jnp.bfloat16) if isinstance(stored, MXFP4Tensor) else stored
        np.testing.assert_array_equal(np.asarray(trained(spec)), np.asarray(stored))


def test_gradients_pass_the_rounding(speaker: Speaker) -> None:
    config = speaker.model.config
    (spec,) = (s for s in weight_specs(config) if s.name == "model.layers.0.mlp.experts.down_proj")
    weight = {spec.name: initial_parameters(config, 0)[spec.name]}

    def total(parameters: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(rounding_creator(parameters, packed_names(config))(spec).astype(jnp.float32))

    np.testing.assert_array_equal(jax.grad(total)(weight)[spec.name], 1.0)


@pytest.mark.slow
def test_training_model_is_the_model() -> None:
    """Packed rows, blocks of a window and dense experts compute what the model does on each conversation."""
    speaker = Speaker.load(EMBEDDED, "float32")
    config, create = speaker.model.config, open_checkpoint(EMBEDDED).creator("float32")
    batch = make_batch(speaker.tokenizer, (3,), 1, 400)

    def unpacked(spec):
        weight = create(spec)
        return dequantize(weight) if isinstance(weight, MXFP4Tensor) else weight

    by_name = {spec.name: unpacked(spec) for spec in weight_specs(config)}
    trainee = Trainee(dataclasses.replace(config, quantization=None), lambda spec: by_name[spec.name])
    tokens, positions, segments, _ = map(jnp.asarray, batch)
    x, _ = trainee.hidden(tokens, positions, PackedRows(segments))
    for segment in range(1, int(segments.max()) + 1):
        (own,) = np.nonzero(batch.segments[0] == segment)
        goal, _ = GptOss.hidden(speaker.model, tokens[:, own], positions[:, own], WholeSequence())
        np.testing.assert_allclose(np.asarray(x[:, own]), np.asarray(goal), atol=1e-3)


def test_batches_depend_on_the_seed_alone(speaker: Speaker) -> None:
    first, again, other = (make_batch(speaker.tokenizer, seed, 2, 512) for seed in ((1, 2), (1, 2), (1, 3)))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first.tokens != other.tokens).any()


def test_learned_tokens_are_the_assistants(speaker: Speaker) -> None:
    rng = random.Random(5)
    for _ in range(50):
        conversation = conversations.random_conversation(rng)
        tokens, learned = encode(conversation, speaker.tokenizer)
        prompt = encode_prompt(conversation.prompt, speaker.tokenizer)
        assert tokens[: len(prompt)] == prompt
        assert not any(learned[: len(prompt)])
        own = speaker.tokenizer.decode(t for t, mine in zip(tokens, learned, strict=True) if mine)
        assert own.endswith("<|return|>")
        for message in conversation.reply:
            assert (str(message.content[0]) in own) or message.role == "tool"
            assert f"functions.{message.name} to=assistant" not in own


def test_held_out_sums_are_never_worked_out() -> None:
    rng, seen = random.Random(11), 0
    for _ in range(3000):
        conversation = conversations.random_conversation(rng)
        for message in (*conversation.prompt, *conversation.reply):
            if message.role == "assistant":
                for a, op, b in re.findall(r"(-?\d+) ([+-]) \(?(-?\d+)", str(message.content[0])):
                    assert not arithmetic.is_held_out(Problem(int(a), op, int(b)))
                    seen += 1
    assert seen > 5000


def test_held_out_problems() -> None:
    problems = arithmetic.held_out_problems(500)
    assert problems == arithmetic.held_out_problems(500)
    assert len(set(problems)) == 500
    assert all(map(arithmetic.is_held_out, problems))
    assert not any(map(arithmetic.may_train_on, problems))
    assert {p.op for p in problems} == {"+", "-"}


def test_held_out_tools_are_never_defined() -> None:
    rng = random.Random(13)
    for _ in range(1000):
        for message in conversations.random_conversation(rng).prompt:
            for content in message.content:
                if isinstance(content, DeveloperContent):
                    for namespace in content.tools:
                        assert not any(functions.is_held_out(tool.name) for tool in namespace.functions)


@pytest.mark.parametrize("effort", conversations.EFFORTS)
def test_the_worked_steps_are_right(effort: str) -> None:
    rng = random.Random(17)
    for _ in range(500):
        problem = arithmetic.random_problem(rng)
        text = arithmetic.analysis(problem, effort)
        assert answer(text) == problem.result
        for line in text.splitlines():
            if step := re.match(r"\w+: ([\d +-]+) = (-?\d+), write (\d), (carry|borrow) (\d)\.", line):
                value = int(step[2])
                assert eval(step[1]) == value
                assert int(step[3]) == value % 10
                assert int(step[5]) == (value > 9 or value < 0)


def test_help_is_quick_and_needs_no_jax() -> None:
    code = (
        "import sys; sys.argv = ['x', 'train', '--help']\n"
        "from tools.train_embedded.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "--minutes" in done.stdout
