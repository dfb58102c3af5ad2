from pathlib import Path

import openai_harmony
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.text.tokenizer_json import O200K_PATTERN
from tools.goldens.harmony_goldens import load_oracle
from tools.goldens.o200k import install

MARKS = ["<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>"]


@pytest.fixture(scope="session")
def o200k_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("o200k")
    install(directory)
    return directory


@pytest.fixture(scope="session")
def o200k(o200k_files: Path) -> Tokenizer:
    return Tokenizer.from_name("o200k_harmony")


@pytest.fixture(scope="session")
def oracle(o200k_files: Path) -> openai_harmony.HarmonyEncoding:
    return load_oracle()


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained tokenizer, like that of the embedded model."""
    model = HFTokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(
        [Path(__file__).read_text(), O200K_PATTERN * 3, "Straße 漢字 naïve 12345 " * 20], trainer
    )
    directory = tmp_path_factory.mktemp("small")
    model.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def small(small_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(small_dir)
