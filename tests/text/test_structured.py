"""Structured output: whatever a model would say, its answer has the form, and nothing but an answer gets by."""

import json
import random
import re
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax import LLM, SamplingParams, StructuredOutputsParams
from gptoss_jax.checkpoints.loading import EMBEDDED, random_model
from gptoss_jax.engine.engine import Engine, EngineOptions, Load
from gptoss_jax.errors import UsageError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.text.harmony import parse, to_openai
from gptoss_jax.text.structured import Grammars, check
from gptoss_jax.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}
FORMS = {
    "json": ({"json": SCHEMA}, lambda text: set(json.loads(text)) == {"sum", "sure"}),
    "json text": ({"json": json.dumps(SCHEMA)}, lambda text: 0 <= json.loads(text)["sum"] <= 999),
    "regex": ({"regex": "[a-f]{2,5}-[0-9]{1,3}é"}, re.compile("[a-f]{2,5}-[0-9]{1,3}é").fullmatch),
    "choice": ({"choice": ['yes "sir"', "no\n", "<|end|>"]}, ['yes "sir"', "no\n", "<|end|>"].__contains__),
    "lark": ({"grammar": 'start: "It is " /[0-9]{2}/ "."'}, re.compile(r"It is \d\d\.").fullmatch),
    "gbnf": ({"grammar": 'root ::= "x" [0-9] ("," "y" [a-c])?'}, re.compile(r"x\d(,y[a-c])?").fullmatch),
}
VOCABULARY = 1064
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


def asking(form: dict, **more: object) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 100, "temperature": 0, "structured_outputs": StructuredOutputsParams(**form)} | more
    )


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(EMBEDDED)


@cache
def grammars() -> Grammars:
    # As a model with more outputs than the tokenizer has tokens.
    return Grammars(tokenizer(), VOCABULARY, eos())


def eos() -> list[int]:
    return [tokenizer().encode_special(name) for name in ("<|return|>", "<|call|>")]


@cache
def model() -> GptOss:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=("full_attention",),
        max_position_embeddings=512,
        eos_token_id=(),
    )
    return random_model(config, dtype="float32")


def run(requests: list[SamplingParams], **options: object) -> tuple[list[list[list[int]]], Load]:
    """The completions of prompts that are alike, run together."""
    settings = {"max_batch": 4, "page_size": 16, "prefill_chunk": 64, "step_tokens": 64} | options
    engine = Engine(model(), EngineOptions(**settings), eos_token_ids=eos(), constrain=grammars())
    tokens = [[[] for _ in range(params.n)] for params in requests]
    for name, params in enumerate(requests):
        engine.add(str(name), range(1, 42 + name), params, "final" if name % 2 else "text")
    while engine.unfinished:
        for event in engine.step():
            tokens[int(event.request_id)][event.index].append(event.token_id)
    assert engine.load.pages_held == 0
    return tokens, engine.load


def babble(form: dict, scope: str, seed: int, most: int = 150) -> tuple[list[int], bool]:
    """What a model writes that chooses any token that is allowed, marks more often than words; whether it ended."""
    rng, marks = random.Random(seed), set(tokenizer().special_tokens.values())
    constraint = grammars()(StructuredOutputsParams(**form), scope)
    tokens: list[int] = []
    while len(tokens) < most:
        words = np.full(-(-VOCABULARY // 32), 0xFFFFFFFF, np.uint32)
        constraint.fill(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        assert allowed
        assert max(allowed) < tokenizer().vocab_size
        special = [token for token in allowed if token in marks]
        tokens.append(rng.choice(special if special and rng.random() < 0.3 else allowed))
        constraint.accept(tokens[-1])
        if tokens[-1] in eos():
            return tokens, True
    return tokens, False


@settings(max_examples=60)
@given(st.sampled_from(sorted(FORMS)), st.sampled_from(["final", "final or call"]), st.integers(0, 10**9))
def test_a_model_cannot_answer_in_another_form(name: str, scope: str, seed: int) -> None:
    form, fits = FORMS[name]
    tokens, ended = babble(form, scope, seed)
    result = parse(tokens, tokenizer())
    assert all(message.channel != "final" for message in result.messages[:-1])
    if not ended:
        return
    assert not [problem for problem in result.malformed if "UTF-8" not in problem]
    assert {message.channel for message in result.messages} <= {"analysis", "commentary", "final"}
    assert {message.role for message in result.messages} == {"assistant"}
    last = result.messages[-1]
    if last.stop == "<|call|>":
        assert scope == "final or call"
        assert last.recipient
        return
    assert last.channel == "final"
    assert last.stop == "<|return|>"
    assert fits(last.text)
    assert scope != "final" or "tool_calls" not in to_openai(result.messages)


@settings(max_examples=20)
@given(st.sampled_from(sorted(FORMS)), st.integers(0, 10**9))
def test_text_has_the_form_from_its_first_token(name: str, seed: int) -> None:
    form, fits = FORMS[name]
    tokens, ended = babble(form, "text", seed)
    assert not ended or fits(tokenizer().decode(tokens[:-1]))


@pytest.mark.slow
def test_an_answer_has_the_form_after_the_usual_reasoning() -> None:
    # Of one size, so that few steps are compiled.
    llm = LLM(engine=EngineOptions(max_batch=1, page_size=256, prefix_cache=False))
    params = SamplingParams(max_tokens=100, temperature=0)
    forms = [params, *(asking(form) for form, _ in FORMS.values())]
    free, *bound = (output.outputs[0] for output in llm.chat([QUESTION] * len(forms), forms))
    for completion, (_, fits) in zip(bound, FORMS.values(), strict=True):
        assert completion.finish_reason == "stop"
        assert fits(completion.text)
        assert completion.message["thinking"] == free.message["thinking"]
        assert not completion.malformed
    [output] = llm.generate("What is 17 + 25?", asking({"regex": "[0-9]{3}"}))
    assert re.fullmatch("[0-9]{3}", output.outputs[0].text)
    assert output.outputs[0].finish_reason == "stop"


BATCH = [
    asking(FORMS["json"][0], n=3, temperature=2.0, seed=5),
    asking(FORMS["regex"][0], temperature=1.0, seed=1, max_tokens=50),
    asking(FORMS["json"][0], temperature=2.0, seed=6),
    SamplingParams(max_tokens=40, temperature=0),
]


def test_forms_hold_through_preemption() -> None:
    together, load = run(BATCH, kv_cache_memory=30_000, prefix_cache=False)
    for completion in together[0] + together[2]:
        assert FORMS["json"][1](tokenizer().decode(completion[:-1]))
    assert load.preemptions > 0


@pytest.mark.long
def test_an_answer_is_the_same_in_any_company() -> None:
    together, _ = run(BATCH)
    tokens, load = run(BATCH, kv_cache_memory=30_000, prefix_cache=False, speculative_tokens=3)
    assert tokens == together
    assert load.preemptions > 0
    assert load.drafted > 0
    for name, params in enumerate(BATCH):
        others = [SamplingParams(max_tokens=1)] * name
        assert run([*others, params])[0][name] == together[name]


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({}, "found none"),
        ({"regex": "a", "json_object": True}, "regex and json_object"),
        ({"regex": 5}, "structured_outputs.regex"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": "abc"}, "structured_outputs.choice"),
        ({"regex": "(a"}, "unclosed group"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": "[]"}, "found list"),
        ({"json": {"type": "strange"}}, "strange"),
        ({"json": {"type": "string", "contains": 3}}, "contains"),
        ({"json": {"enum": {1}}}, "structured_outputs.json"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "root ::= ("}, "structured_outputs.grammar"),
    ],
)
def test_a_form_that_cannot_be_is_refused_in_one_line(form: dict, named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)) as caught:
        check(StructuredOutputsParams(**form))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "more", [{"ignore_eos": True}, {"min_tokens": 5}, {"structured_outputs": {"regexp": "a"}}]
)
def test_settings_that_contradict_a_form(more: dict) -> None:
    with pytest.raises(UsageError, match=r"min_tokens|ignore_eos|structured_outputs.regexp"):
        asking({"regex": "a"}, **more)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"gptoss-jax\[structured\]"):
        check(StructuredOutputsParams(regex="a"))
