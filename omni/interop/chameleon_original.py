"""Chameleon as Meta released it: params.json, consolidated.pth (or consolidated.00.pth, ... of several ranks) and
text_tokenizer.json, seen as what transformers has.

It differs in three things. Rotations turn neighbours, pairs (2 i, 2 i + 1) of a head, where transformers turns halves,
pairs (i, i + head_dim / 2): rows of the projections to queries and keys move, and so do the scales and biases of their
norms. A matrix is cut over ranks along its outputs or its inputs. And norms of queries and keys were trained apart on
each rank, so that heads of different ranks have different ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

import omni_tokenizers
from omni.interop import chameleon
from omni.interop.family import Preset
from omni.model import TransformerConfig
from omni_tokenizers.base import read_object
from omni_tokenizers.checkpoints import import_checkpoint, open_torch
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_json import JsonTextTokenizer
from omni_tokenizers.text_public import LARGEST

PARAMETERS, TEXT, PICTURES = "params.json", "text_tokenizer.json", "vqgan.ckpt"
_RANK = re.compile(r"consolidated(\.(\d\d))?\.pth")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# transformers' name -> the original's, and the axis along which ranks cut it.
_NAMES: dict[str, tuple[str, int | None]] = {
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "self_attn.q_norm.weight": ("attention.q_normalization.weight", 0),
    "self_attn.q_norm.bias": ("attention.q_normalization.bias", 0),
    "self_attn.k_norm.weight": ("attention.k_normalization.weight", 0),
    "self_attn.k_norm.bias": ("attention.k_normalization.bias", 0),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
    "input_layernorm.weight": ("attention_norm.weight", None),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
_ORIGINALS = {original: name for name, (original, _) in _NAMES.items()}
_CONSTANTS = ("rope.freqs",)


class OriginalTensors(Mapping[str, np.ndarray]):
    """The tensors of a release under transformers' names and in its layout, float32, each made when it is asked for."""

    def __init__(self, ranks: Sequence[Mapping[str, Any]], config: TransformerConfig, source: str):
        """Tensors of each rank, numpy's or PyTorch's, by the original's names.

        Raises:
          OmniError: a rank lacks what another has.
        """
        self.ranks, self.config, self.source = ranks, config, source
        for number, rank in enumerate(ranks):
            if different := sorted(rank.keys() ^ ranks[0].keys()):
                raise OmniError(f"{source}: tensor {different[0]!r} is not in all files; rank {number} is another's")
        self._names = {_theirs(original): original for original in ranks[0] if original not in _CONSTANTS}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, which is known without making it."""
        shape, axis = list(self.ranks[0][self._names[name]].shape), _axis(name)
        heads = self._heads(name)
        if heads and len(shape) == 1:
            return (heads, *shape)
        if axis is not None and axis < len(shape):
            shape[axis] *= len(self.ranks)
        return tuple(shape)

    def __getitem__(self, name: str) -> np.ndarray:
        parts = [_array(rank[self._names[name]]) for rank in self.ranks]
        axis, heads = _axis(name), self._heads(name)
        if any(part.shape != parts[0].shape for part in parts):
            raise OmniError(f"{self.source}: tensor {self._names[name]!r} has not one shape in all files")
        if heads and parts[0].ndim == 1:
            own = heads // len(parts)
            return np.concatenate([np.tile(halves(part, 1), (own, 1)) for part in parts])
        if axis is None:
            if any(not np.array_equal(part, parts[0]) for part in parts):
                raise OmniError(f"{self.source}: tensor {self._names[name]!r} differs between files; it should not")
            return parts[0]
        whole = np.concatenate(parts, axis)
        return halves(whole, heads) if heads else whole

    def _heads(self, name: str) -> int:
        """Heads of what is rotated, or is a scale or bias of such; 0 for all else."""
        if "self_attn.q_" in name:
            return self.config.heads
        return self.config.key_value_heads if "self_attn.k_" in name else 0


def halves(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows (or values) of `heads` heads, [heads * head_dim, ...], in the order of halves instead of neighbours."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _axis(name: str) -> int | None:
    layer = _LAYER.fullmatch(name)
    return _NAMES.get(layer[2] if layer else name, ("", None))[1]


def _theirs(original: str) -> str:
    """transformers' name; the original's own where there is none, which then belongs to no parameter."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", original)
    if layer is None:
        return _ORIGINALS.get(original, original)
    return f"model.layers.{layer[1]}.{_ORIGINALS.get(layer[2], layer[2])}"


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.float().numpy() if hasattr(tensor, "float") else tensor, np.float32)


def read_config(parameters: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]], source: str) -> TransformerConfig:
    """The configuration that params.json and the tensors' shapes have.

    Raises:
      OmniError: a setting that is not supported, or a tensor that is missing.
    """
    inner = parameters.get("model", parameters)
    settings = Settings(inner if isinstance(inner, dict) else {}, source)
    settings.require("norm_eps", 1e-5)
    settings.require("qk_normalization", True)
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in ranks[0]:
            raise OmniError(f"{source}: the files of weights beside it have no tensor {name!r}")
    heads, dim = settings.get("n_heads", 32), settings.get("dim", 4096)
    return TransformerConfig(
        vocabulary_size=ranks[0]["tok_embeddings.weight"].shape[0],
        depth=settings.get("n_layers", 32),
        dim=dim,
        heads=heads,
        key_value_heads=settings.get("n_kv_heads", heads),
        head_dim=dim // max(heads, 1),
        mlp_dim=ranks[0]["layers.0.feed_forward.w1.weight"].shape[0] * len(ranks),
        norm_order="swin" if settings.get("swin_norm", False) else "pre",
        rope_theta=settings.get("rope_theta", 10_000.0),
        qk_norm="layer",
        qk_norm_per_head=True,
        tied_embeddings=False,
    )


def open_release(directory: epath.Path) -> tuple[TransformerConfig, OriginalTensors]:
    """Configuration and tensors of a release, by torch's weights_only reader; those on a disk are read when asked for.

    Raises:
      OmniError: no torch, a file of a rank is missing, or files that are damaged.
    """
    found = sorted(path.name for path in directory.iterdir() if _RANK.fullmatch(path.name))
    numbers = [int(_RANK.fullmatch(name)[2] or 0) for name in found]
    if not found or numbers != list(range(len(found))):
        missing = next(number for number in range(len(found) + 1) if number not in numbers)
        raise OmniError(f"{directory}: consolidated.{missing:02}.pth is missing; there is {', '.join(found) or 'none'}")
    ranks = [open_torch(directory / name) for name in found]
    path = directory / PARAMETERS
    config = read_config(read_object(path), ranks, str(path))
    if config.key_value_heads % len(ranks) or config.heads % len(ranks):
        raise OmniError(f"{path}: {config.key_value_heads} heads of keys cannot lie in {len(ranks)} files")
    return config, OriginalTensors(ranks, config, str(directory))


def release_preset(directory: epath.Path, config: TransformerConfig) -> tuple[Preset, JsonTextTokenizer]:
    """The documents of a release and its text tokenizer, which names the codes of pictures.

    Raises:
      OmniError: no tokenizer there.
    """
    path = directory / TEXT
    if not path.exists():
        raise OmniError(f"{path}: there is no such file, which says which ids are codes of pictures; add it")
    text = JsonTextTokenizer.from_file(path)
    content = read_object(path, LARGEST)
    names = dict(content["model"]["vocab"]) | {token["content"]: token["id"] for token in content["added_tokens"]}
    codes = sum(1 for name in names if chameleon.CODE.fullmatch(name))
    settings = Settings({"vocabulary_map": names, "vq_config": {"num_embeddings": codes}}, str(path))
    preset = chameleon.preset(settings, config, text)
    return preset, JsonTextTokenizer.from_file(path, preset.vocabulary.block("text"))


def release_pictures(directory: epath.Path) -> dict[str, omni_tokenizers.Tokenizer]:
    """The tokenizer of pictures of 512 x 512 pixels, decoder and all, if its file lies beside the weights."""
    path = directory / PICTURES
    return {"image": import_checkpoint(path, image_size=512, torch_reader=True)} if path.exists() else {}
