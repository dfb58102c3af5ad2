"""The Python API: a wrong argument raises a one-line error that names it."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoss_jax import LLM, SamplingParams
from gptoss_jax.checkpoints.loading import EMBEDDED
from gptoss_jax.engine.engine import EngineOptions
from gptoss_jax.errors import UsageError

FEW = SamplingParams(max_tokens=2, temperature=0)
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


@cache
def llm() -> LLM:
    return LLM(engine=EngineOptions(max_num_seqs=2), progress=False)


@pytest.mark.parametrize(
    ("method", "arguments", "named"),
    [
        ("generate", (5,), "^prompts: expected text, token ids .*, found 5$"),
        ("generate", ([None],), r"^prompts\[0\]: expected text or token ids, found None$"),
        ("generate", (["hi", 1.5],), r"^prompts\[1\]: .*, found 1.5$"),
        ("generate", ({"prompt": "hi"},), "^prompts: "),
        ("generate", ([["hi"]],), "^request 0: prompt: expected token ids, found 'hi'$"),
        ("generate", ("hi", {"temperature": 0}), "^sampling_params: expected SamplingParams"),
        ("generate", ("hi", [None]), "^sampling_params: "),
        ("generate", ("hi", [FEW, FEW]), "^sampling_params: expected one or 1, found 2$"),
        ("generate", (np.array(5),), r"^prompts: expected text, token ids .*, found array\(5\)$"),
        ("chat", ("hi",), "^messages: expected a list of messages, .*, found 'hi'$"),
        ("chat", (["hi"],), r"^messages\[0\]: expected a message, .*, found 'hi'$"),
        ("chat", (QUESTION[0],), "^messages: "),
        ("chat", ([*QUESTION, None],), r"^messages\[1\]: "),
        ("chat", (QUESTION, 5), "^sampling_params: "),
    ],
)
def test_wrong_arguments_are_named(method: str, arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        getattr(llm(), method)(*arguments)
    assert llm().engine.unfinished == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"path": 5}, "^path: expected .*, found 5$"),
        ({"engine": {"max_num_seqs": 2}}, "^engine: expected EngineOptions, found "),
        ({"dtype": 5}, "^dtype: "),
        ({"mesh": 5}, "^mesh: expected .*, found 5$"),
        ({"rules": {"heads": ()}}, "^rules: expected ShardingRules, found "),
        ({"kernels": "mosaic_tpu"}, "^kernels: mosaic_tpu is for TPUs, found the platform cpu$"),
        ({"engine": EngineOptions(kv_cache_memory=1000)}, "^kv_cache_memory: 1000 bytes"),
    ],
)
def test_invalid_llm_arguments_are_rejected(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        LLM(**arguments)


def test_options_of_a_chat() -> None:
    for name in ("foo", "next_role"):
        with pytest.raises(TypeError, match=rf"LLM.chat\(\) got an unexpected keyword argument '{name}'"):
            llm().chat(QUESTION, FEW, **{name: "user"})
    with pytest.raises(UsageError, match=r"^auto_drop_analysis: expected true or false, found 'x'$"):
        llm().chat(QUESTION, FEW, auto_drop_analysis="x")
    nothing = dict.fromkeys(("builtin_tools", "reasoning_effort", "current_date", "response_format", "tools"))
    [plain], [nulls] = llm().chat(QUESTION, FEW), llm().chat(QUESTION, FEW, **nothing)
    assert plain.prompt_token_ids == nulls.prompt_token_ids


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(EMBEDDED / name)
    with pytest.raises(UsageError) as caught:
        LLM(tmp_path, progress=False).chat(QUESTION)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: no such file")
    assert "--prompt-tokens" in str(caught.value)


def test_prompts_may_be_arrays() -> None:
    listed, arrays = llm().generate([[1, 2], [3]], FEW), llm().generate([np.array([1, 2]), np.array([3])], FEW)
    assert [output.outputs[0].token_ids for output in listed] == [output.outputs[0].token_ids for output in arrays]
    [alone] = llm().generate(np.array([1, 2]), FEW)
    assert alone.outputs[0].token_ids == listed[0].outputs[0].token_ids
