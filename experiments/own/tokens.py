"""One's own documents as token shards (docs/own_data.md).

omni tokenize experiments/own/tokens.py --validate
omni tokenize experiments/own/tokens.py
omni tokenize experiments/own/tokens.py --source.path my/held_out --output runs/own/held_out
"""

from omni.data.json_lines import JsonLines
from omni.tokenize import TokenizeConfig

config = TokenizeConfig(
    "runs/own/tokens",
    JsonLines("my/train"),
    {"text": "runs/own/text", "image": "runs/own/image", "audio": "runs/own/audio"},
    longest_sound=10.0,
)
