"""What loading takes: the small version of benchmarks/loading.py, with bounds that scale."""

import json
from pathlib import Path

from benchmarks import loading
from gptoss_jax.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=16,
    layer_types=("sliding_attention", "full_attention") * 2,
)


def test_each_of_two_processes_reads_and_holds_half(tmp_path: Path) -> None:
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(CONFIG.to_dict()))
    size = loading.make_checkpoint(tmp_path / "checkpoint", CONFIG.num_hidden_layers, config_file)
    for figures in loading.measure(tmp_path / "checkpoint", 2):
        # Weights of fewer elements than devices are read by both.
        assert figures["read_bytes"] < 0.51 * size
        # As 1.5 GB is to half of the 20b's 13.8 GB, and a constant for what compiling leaves.
        assert figures["peak_bytes"] - figures["base_bytes"] < 0.5 * size + 0.11 * size + 50e6
        assert figures["load_s"] < 1.5 * figures["plain_s"] + 10
