"""The text tokenizer of a model of one's own documents (docs/own_data.md).

omni tokenizer train experiments/own/text.py --source.path my/train
"""

from omni.data.json_lines import JsonLines
from omni.train.text import TextTokenizerConfig

config = TextTokenizerConfig("runs/own/text", JsonLines("my/train"), vocabulary_size=8192)
