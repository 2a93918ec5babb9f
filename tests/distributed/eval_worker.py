"""Worker of test_evaluation.py: evaluates one checkpoint over one file and leaves the sums."""

import json
import sys
from pathlib import Path

from rwkv_accel.checkpoint.collective import once_per_node
from rwkv_accel.config.load import load_config
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.evaluation import evaluate, token_lengths
from rwkv_accel.model.io import load_model
from rwkv_accel.model.precision import Precision
from rwkv_accel.run_setup import build_eval_sets
from rwkv_accel.runtime import build_accelerator, run_program, set_environment_defaults


def main():
    recipes, out = sys.argv[1:-1], sys.argv[-1]
    set_environment_defaults()
    results, accelerator = [], None
    for recipe in recipes:
        config = load_config(recipe)
        accelerator = accelerator or build_accelerator(config.trainer, 1)
        model = accelerator.prepare(load_model(config.model.path, Precision.from_name("32-true")))
        ((name, loader),) = build_eval_sets(config, accelerator)
        lengths = token_lengths(build_tokenizer(config.data.tokenizer), 257)
        result = evaluate(accelerator, model, loader, lengths, name=name)
        results.append([result.loss, result.num_targets, result.num_bytes, result.bits_per_byte])
    once_per_node(accelerator, lambda: Path(out).write_text(json.dumps(results)))
    return 0


if __name__ == "__main__":
    run_program(main)
