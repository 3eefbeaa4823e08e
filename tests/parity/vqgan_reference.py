"""VQGAN as its papers and releases describe it, slowly: plain functions of named tensors, in float64.

Where transformers lacks a piece (Chameleon's decoder) or departs from the original (Janus encodes without scaling to
unit length), this is what the package is held against. Channels come second here, as in PyTorch.
"""

import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Names:
    """How a release calls the parts that the others call otherwise."""

    down: str
    up: str
    block: str
    middle: tuple[str, str, str]
    deepest_up: bool
    """Whether the decoder's stage 0 is the one of the lowest resolution."""


TAMING = Names("down", "up", "block", ("mid.block_1", "mid.attn_1", "mid.block_2"), False)
LLAMAGEN = Names("conv_blocks", "conv_blocks", "res", ("mid.0", "mid.1", "mid.2"), True)


def shapes(names, *, channels, multipliers, blocks, attention, latents, codes, code_dim) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every tensor; `attention` are the stages that have it."""
    found = {}

    def layer(name, *shape):
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    def block(name, inputs, outputs):
        layer(f"{name}.norm1", inputs)
        layer(f"{name}.conv1", outputs, inputs, 3, 3)
        layer(f"{name}.norm2", outputs)
        layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def attend(name, width):
        layer(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    def middle(side, width):
        block(f"{side}.{names.middle[0]}", width, width)
        attend(f"{side}.{names.middle[1]}", width)
        block(f"{side}.{names.middle[2]}", width, width)

    last = len(multipliers) - 1
    width = channels
    layer("encoder.conv_in", channels, 3, 3, 3)
    for stage, multiplier in enumerate(multipliers):
        for index in range(blocks):
            block(f"encoder.{names.down}.{stage}.{names.block}.{index}", width, channels * multiplier)
            width = channels * multiplier
            if stage in attention:
                attend(f"encoder.{names.down}.{stage}.attn.{index}", width)
        if stage < last:
            layer(f"encoder.{names.down}.{stage}.downsample.conv", width, width, 3, 3)
    middle("encoder", width)
    layer("encoder.norm_out", width)
    layer("encoder.conv_out", latents, width, 3, 3)
    layer("quant_conv", code_dim, latents, 1, 1)
    found["quantize.embedding.weight"] = (codes, code_dim)
    layer("post_quant_conv", latents, code_dim, 1, 1)
    layer("decoder.conv_in", width, latents, 3, 3)
    middle("decoder", width)
    for stage in reversed(range(last + 1)):
        place = f"decoder.{names.up}.{last - stage if names.deepest_up else stage}"
        for index in range(blocks + 1):
            block(f"{place}.{names.block}.{index}", width, channels * multipliers[stage])
            width = channels * multipliers[stage]
            if stage in attention:
                attend(f"{place}.attn.{index}", width)
        if stage:
            layer(f"{place}.upsample.conv", width, width, 3, 3)
    layer("decoder.norm_out", width)
    layer("decoder.conv_out", 3, width, 3, 3)
    return found


def encoded(tensors, names, image):
    """Latents [batch, code_dim, rows, columns] of images [batch, 3, height, width] within [-1, 1], not yet scaled."""
    x = _conv(tensors, "encoder.conv_in", image, padding=1)
    for stage in range(_count(tensors, f"encoder.{names.down}")):
        x = _stage(tensors, f"encoder.{names.down}.{stage}", names, x)
        if f"encoder.{names.down}.{stage}.downsample.conv.weight" in tensors:
            x = _conv(tensors, f"encoder.{names.down}.{stage}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = _silu(_norm(tensors, "encoder.norm_out", _middle(tensors, "encoder", names, x)))
    return _conv(tensors, "quant_conv", _conv(tensors, "encoder.conv_out", x, padding=1))


def decoded(tensors, names, vectors):
    """What the decoder reads, and the images, of code vectors [batch, code_dim, rows, columns]."""
    start = _conv(tensors, "post_quant_conv", vectors)
    x = _middle(tensors, "decoder", names, _conv(tensors, "decoder.conv_in", start, padding=1))
    stages = range(_count(tensors, f"decoder.{names.up}"))
    for stage in stages if names.deepest_up else reversed(stages):
        x = _stage(tensors, f"decoder.{names.up}.{stage}", names, x)
        if f"decoder.{names.up}.{stage}.upsample.conv.weight" in tensors:
            wide = torch.repeat_interleave(torch.repeat_interleave(x, 2, 2), 2, 3)
            x = _conv(tensors, f"decoder.{names.up}.{stage}.upsample.conv", wide, padding=1)
    x = _silu(_norm(tensors, "decoder.norm_out", x))
    return start, _conv(tensors, "decoder.conv_out", x, padding=1)


def unit(vectors, axis):
    """Vectors along `axis` at length 1."""
    return vectors / vectors.pow(2).sum(axis, keepdim=True).sqrt()


def _count(tensors, start):
    return 1 + max(int(name[len(start) + 1 :].split(".")[0]) for name in tensors if name.startswith(f"{start}."))


def _stage(tensors, place, names, x):
    for index in range(_count(tensors, f"{place}.{names.block}")):
        x = _block(tensors, f"{place}.{names.block}.{index}", x)
        if f"{place}.attn.{index}.q.weight" in tensors:
            x = _attention(tensors, f"{place}.attn.{index}", x)
    return x


def _middle(tensors, side, names, x):
    x = _block(tensors, f"{side}.{names.middle[0]}", x)
    x = _attention(tensors, f"{side}.{names.middle[1]}", x)
    return _block(tensors, f"{side}.{names.middle[2]}", x)


def _block(tensors, place, x):
    y = _conv(tensors, f"{place}.conv1", _silu(_norm(tensors, f"{place}.norm1", x)), padding=1)
    y = _conv(tensors, f"{place}.conv2", _silu(_norm(tensors, f"{place}.norm2", y)), padding=1)
    return y + (_conv(tensors, f"{place}.nin_shortcut", x) if f"{place}.nin_shortcut.weight" in tensors else x)


def _attention(tensors, place, x):
    y = _norm(tensors, f"{place}.norm", x)
    query, key, value = (_conv(tensors, f"{place}.{part}", y).flatten(2) for part in "qkv")
    weights = (query.transpose(1, 2) @ key / key.shape[1] ** 0.5).softmax(2)
    return x + _conv(tensors, f"{place}.proj_out", (value @ weights.transpose(1, 2)).reshape(x.shape))


def _norm(tensors, place, x):
    groups = x.reshape(len(x), 32, -1)
    centred = groups - groups.mean(2, keepdim=True)
    y = (centred / (centred.pow(2).mean(2, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    return y * tensors[f"{place}.weight"][:, None, None] + tensors[f"{place}.bias"][:, None, None]


def _silu(x):
    return x * x.sigmoid()


def _conv(tensors, place, x, **settings):
    return F.conv2d(x, tensors[f"{place}.weight"], tensors[f"{place}.bias"], **settings)
