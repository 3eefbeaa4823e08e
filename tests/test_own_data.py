"""docs/own_data.md as it stands: every command of it, in order, on a few small documents."""

import glob
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from omni.parts import Audio, Image
from omni.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = {
    "tokenizer train experiments/own/text.py": "--vocabulary-size 300",
    "tokenizer train experiments/own/image.py": (
        "--steps 4 --batch-size 4 --checkpoint-every 4 --task.data.size 16 --task.tokenizer.image-size 16 "
        "--task.tokenizer.channels 16 --task.tokenizer.residual-blocks 1 --task.tokenizer.codebook-size 32"
    ),
    "tokenizer train experiments/own/audio.py": (
        "--steps 4 --batch-size 4 --checkpoint-every 4 --task.data.samples 6400 --task.tokenizer.dim 16 "
        "--task.tokenizer.codebook-size 16 --task.tokenizer.loss-windows 256 --task.tokenizer.loss-mels 20"
    ),
    "tokenize experiments": "--samples-per-shard 8 --batch-size 4 --longest-sound 1",
    "train experiments/own/model.py": (
        "--steps 4 --batch-size 2 --checkpoint-every 4 --task.row-length 256 --task.model.depth 2 --task.model.dim 32 "
        "--task.model.heads 2 --task.model.key-value-heads 2 --task.model.head-dim 16 --task.model.mlp-dim 64"
    ),
}


def commands() -> list[str]:
    """The lines of all blocks of shell commands."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "own_data.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def make_documents(folder: Path, count: int, seed: int) -> None:
    """The two lines of the page, with pictures and sounds, so many times."""
    random = np.random.default_rng(seed)
    (example,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "own_data.md").read_text(), re.DOTALL)
    lines = []
    for directory in ("pictures", "sounds"):
        (folder / directory).mkdir(parents=True)
    for number in range(count):
        Image(random.integers(0, 256, (24, 20, 3), np.uint8)).save(folder / "pictures" / f"{number}.png")
        sound = random.uniform(-0.5, 0.5, 8000).astype(np.float32)
        Audio(sound, 16000).save(folder / "sounds" / f"{number}.wav")
        lines.append(example.replace("/1.", f"/{number}."))
    (folder / "documents.jsonl").write_text("".join(lines))


@pytest.mark.slow
def test_every_command_of_the_page(tmp_path, monkeypatch, run):
    """Each ends well; the log has held-out losses; the exported model answers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    make_documents(tmp_path / "my" / "train", 12, 0)
    make_documents(tmp_path / "my" / "held_out", 3, 1)
    lines = commands()
    assert len(lines) == 17
    for line in lines:
        verb, *words = shlex.split(line)
        assert verb == "omni"
        words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]
        small = next((small for prefix, small in SMALL.items() if " ".join(words).startswith(prefix)), "")
        code, _, err = run(*words, *small.split())
        assert code == 0, f"{line}\n{err}"
    assert {"held_out/loss/text", "held_out/loss/image", "held_out/loss/audio"} <= read_metrics("runs/own/model")[
        -1
    ].keys()
    assert json.loads(Path("runs/own/tokens/manifest.json").read_text())["documents"] == 24
    assert {path.name for path in Path("exported/tokenizers").iterdir()} == {"text", "image", "audio"}
    assert Path("out/1.png").exists()
    for directory in ("runs/own/model/documents", "runs/own/asked", "runs/own/exported"):
        results = json.loads(Path(directory, "results.json").read_text())
        (found,) = results["directions"].values()
        assert found["documents"] == 3 and found["matching"]["candidates"] == 3
        assert results["data"]["left_out"]["no context"] == 3
        assert Path(directory, "report.html").exists()


def test_every_file_of_experiments_is_in_the_page():
    """No experiment of one's own is left without its command."""
    text = "\n".join(commands())
    for path in (ROOT / "experiments" / "own").glob("*.py"):
        assert f"experiments/own/{path.name}" in text
