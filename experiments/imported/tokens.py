"""Documents as token shards for a model that `omni import` wrote (docs/checkpoints.md).

omni tokenize experiments/imported/tokens.py --validate
omni tokenize experiments/imported/tokens.py
omni tokenize experiments/imported/tokens.py --source.path my/held_out --output runs/imported/held_out
"""

from pathlib import Path

from omni.data.json_lines import JsonLines
from omni.tokenize import TokenizeConfig

MODEL = "models/imported"

config = TokenizeConfig(
    "runs/imported/tokens",
    JsonLines("my/train"),
    {path.name: str(path) for path in sorted(Path(MODEL, "tokenizers").glob("*"))},
    ids_of=MODEL,
)
