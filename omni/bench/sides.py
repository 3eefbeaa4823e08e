"""The two sides of the comparison. Each lives in a process of its own, takes arrays of NumPy and gives back such.

What is timed is therefore what a caller waits for: copies to a device and back are part of it, and nothing that the
device still has to do can be left out.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import os
import time
from typing import Any

import numpy as np

from omni.bench.families import Family, Verb
from omni_tokenizers.errors import OmniError

_TURN = 0.2
"""Seconds that a turn lasts at the least: short calls are repeated."""


_ABOUT_ONE = ("original0", "alpha", "scale", "usage", "norm.weight", "norm1.weight", "norm2.weight", "norm_out.weight")
"""How names of torch's tensors end that multiply or divide."""


class Side(abc.ABC):
    """Holds one tokenizer, and times its `encode` and `decode`."""

    @abc.abstractmethod
    def machine(self) -> dict[str, Any]:
        """Versions, device and precision; `backend` is "cpu" or "gpu"."""

    @abc.abstractmethod
    def run(self, verb: Verb, x: np.ndarray) -> np.ndarray:
        """Encodes sound float32 [batch, channels, samples] or pictures uint8 [batch, height, width, 3], or decodes."""

    def first(self, verb: Verb, x: np.ndarray) -> tuple[np.ndarray, float]:
        """The result of the first call with an input of this shape, and its seconds, compilation included."""
        self._verb, self._input = verb, x
        start = time.perf_counter()
        result = self.run(verb, x)
        first = time.perf_counter() - start
        self._calls = 1
        self._calls = max(1, round(_TURN / self.turn()[0]))
        return result, first

    def turn(self) -> tuple[float, float]:
        """Seconds of a call with the input that `first` was given, the mean over a turn: waited, and of processors."""
        start, start_of_work = time.perf_counter(), time.process_time()
        for _ in range(self._calls):
            self.run(self._verb, self._input)
        work = time.process_time() - start_of_work
        return (time.perf_counter() - start) / self._calls, work / self._calls


class Ours(Side):
    """The tokenizers of this project."""

    def __init__(self, device: str | None):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other process wants memory of the same device
        if device == "cpu":
            os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        self.backend = jax.default_backend()
        if device == "gpu" and self.backend != "gpu":
            raise OmniError(f"jax found no GPU, but {self.backend}: pip install 'omni-any-to-any[gpu]'")

    def machine(self) -> dict[str, Any]:
        import jax
        import jaxlib

        return {
            "backend": self.backend,
            "device": jax.devices()[0].device_kind,
            "precision": "float32, highest precision of matrix products and convolutions",
            "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        }

    def load(self, family: Family, directory: str | None) -> dict[str, int]:
        """Opens what `Theirs.make` wrote, or without a directory begins anew; returns what `inputs` has to know."""
        import omni_tokenizers

        self.tokenizer = self._made(family) if directory is None else omni_tokenizers.load(directory)
        names = ("sample_rate", "channels", "codebooks", "samples_per_frame")
        found = {name: getattr(self.tokenizer, name) for name in names if hasattr(self.tokenizer, name)}
        if self.tokenizer.modality == "image":
            found["downsampling"] = self.tokenizer.config.downsampling
        return found | {"codebook_size": self.tokenizer.codebook_sizes[0]}

    def _made(self, family: Family):
        from flax import nnx

        module, _, name = family.tokenizer.partition(":")
        kind = getattr(importlib.import_module(module), name)
        config = dataclasses.replace(kind.config_class(), **family.ours)
        return kind(config, kind.net_class(config, rngs=nnx.Rngs(0)))

    def run(self, verb: Verb, x: np.ndarray) -> np.ndarray:
        return np.asarray(getattr(self.tokenizer, verb)(x))


class Theirs(Side):
    """transformers' models in torch, eager, as `from_pretrained` gives them."""

    def __init__(self, device: str | None):
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "gpu" and self.device == "cpu":
            raise OmniError("torch found no GPU; install a build of torch with CUDA")
        torch.set_num_threads(cores())
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True  # shapes repeat, so let it look for the fastest, as XLA does

    def machine(self) -> dict[str, Any]:
        import torch
        import transformers

        is_gpu = self.device == "cuda"
        return {
            "backend": "gpu" if is_gpu else "cpu",
            "device": torch.cuda.get_device_name() if is_gpu else "cpu",
            "precision": "float32, TF32 off",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def make(self, family: Family, directory: str) -> None:
        """A model with every parameter and codebook random, written to `directory` as transformers does."""
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        kind = getattr(transformers, family.model, None) or _unlisted(family.model)
        self.model = kind(kind.config_class(**family.theirs)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(_noise(name, tensor, generator))
        self.model.save_pretrained(directory)
        self.model.to(self.device)

    def run(self, verb: Verb, x: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            call = globals()[f"_{verb}_{'pictures' if hasattr(self.model, 'quant_conv') else 'sound'}"]
            return call(self.model, torch.from_numpy(x).to(self.device)).cpu().numpy()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unlisted(name: str):
    """A model that transformers does not list among its names."""
    family = name.removesuffix("VQVAE").lower()
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def _noise(name: str, tensor, generator):
    """Sizes that keep signals alive through the depth of a net."""
    import torch

    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith(_ABOUT_ONE):
        return (1 + 0.3 * noise).abs() + 0.1
    return 0.3 * noise if tensor.ndim < 2 else 0.7 * noise * (len(tensor) / tensor.numel()) ** 0.5


def _encode_sound(model, x):
    """Codes [batch, codebooks, frames] of all codebooks."""
    kind = model.config.model_type
    if kind == "encodec":
        return model.encode(x, bandwidth=model.config.target_bandwidths[-1]).audio_codes[0]
    if kind == "dac":  # its convolutions drop what does not fill a frame, which its feature extractor completes
        import torch

        x = torch.nn.functional.pad(x, (0, -x.shape[2] % model.config.hop_length))
    return model.encode(x).audio_codes


def _decode_sound(model, codes):
    """Sound [batch, 1, samples]."""
    found = (
        model.decode(codes[None], [None]) if model.config.model_type == "encodec" else model.decode(audio_codes=codes)
    )
    return found.audio_values.reshape(len(codes), 1, -1)


def _encode_pictures(model, pixels):
    """Codes [batch, rows, columns]; pixels become values within [-1, 1] on the device."""
    tokens = model.encode((pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()).image_tokens
    step = 2 ** (len(model.config.channel_multiplier) - 1)
    return tokens.reshape(len(pixels), pixels.shape[1] // step, -1)


def _decode_pictures(model, codes):
    """Pixels uint8 [batch, height, width, 3]."""
    import torch

    model.quantize.quant_state_dims = codes.shape[1:]
    image = model.decode(codes.reshape(len(codes), -1))
    return ((image + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
