"""The two sides of `omni bench generate`: a Chameleon of 94 million parameters here and in transformers.

It has Chameleon's own vocabulary, 65,536 ids of which 8,192 are codes, so that what the last product costs is in the
proportion that it has in small models of this family.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import numpy as np
from jaxtyping import Int

from omni.bench.sides import Ours as OurProcess
from omni.bench.sides import Theirs as TheirProcess
from omni_tokenizers.errors import OmniError

KINDS = ("prompt", "text", "picture", "mixed")
PICTURE = 1024  # codes of a picture
TEMPERATURE, TOP_P = 0.7, 0.9  # Chameleon's own
_VOCABULARY, _BEGIN, _END, _TURN, _TEXT = 65_536, 8197, 8196, 8710, 8713
_CODES = range(4, 8196)
SETTINGS: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "vq_config": {
        "base_channels": 32,
        "channel_multiplier": [1] * 5,
        "num_res_blocks": 1,
        "latent_channels": 32,
        "num_embeddings": 8192,
        "resolution": 512,
    },
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed: reading prompts ("prompt"), or replies that are texts, pictures, or half of them each."""

    kind: str
    batch: int
    prompt_tokens: int
    text_tokens: int

    def prompts(self) -> Int[np.ndarray, "batch tokens"]:
        """Random text between bos and turn."""
        ids = np.random.default_rng(0).integers(_TEXT, _VOCABULARY, (self.batch, self.prompt_tokens))
        ids[:, 0], ids[:, -1] = 0, _TURN
        return ids.astype(np.int32)

    def split(self) -> tuple[int, int]:
        """How many texts and how many pictures are asked for."""
        texts = {"text": self.batch, "picture": 0, "mixed": self.batch // 2}[self.kind]
        return texts, self.batch - texts


class Ours(OurProcess):
    """This project's engine."""

    def load(self, directory: str) -> None:
        """Opens what `Theirs.make` wrote."""
        import omni

        self.model = omni.load(directory)
        self.engine = self.model.engine

    def greedy(self, tokens: int) -> list[int]:
        """The likeliest ids of text after a prompt."""
        work = Work("text", 1, 32, tokens)
        reply = self.engine.generate([self._request(work.prompts()[0], "text", tokens, temperature=0)])[0]
        return reply.ids[:tokens].tolist()

    def first(self, work: Work) -> str:
        """Compiles what the work needs."""
        self._run(work)
        return ""

    def turn(self, work: Work) -> float:
        """Seconds."""
        start = time.perf_counter()
        self._run(work)
        return time.perf_counter() - start

    def _run(self, work: Work) -> None:
        prompts = work.prompts()
        if work.kind == "prompt":
            self.engine.generate([self._request(ids, None, 0) for ids in prompts])
            return
        texts, _ = work.split()
        requests = [
            self._request(ids, *(("text", work.text_tokens) if place < texts else ("image", PICTURE + 2)), seed=place)
            for place, ids in enumerate(prompts)
        ]
        replies = self.engine.generate(requests)
        if [len(reply.ids) for reply in replies] != [request.max_tokens for request in requests]:
            raise OmniError("a reply ended before it was as long as the other side's; choose another seed")

    def _request(
        self, ids: Int[np.ndarray, " tokens"], want: str | None, tokens: int, seed: int = 0, temperature=TEMPERATURE
    ):
        from omni.generate import PreparedRequest

        modalities = self.model.grammar.modalities

        def every(value: float) -> np.ndarray:
            return np.full(len(modalities), value, np.float32)

        settings = {"temperature": every(temperature), "top_p": every(TOP_P), "top_k": every(0).astype(np.int32)}
        settings |= {"min_p": every(0), "repetition_penalty": every(1)}
        # One token more than is asked for: the end.
        order = None if want is None else (modalities.index(want),)
        return PreparedRequest(ids, tokens + 1, **settings, want=order, seed=seed)


class Theirs(TheirProcess):
    """transformers' Chameleon and its `generate`."""

    def make(self, directory: str) -> None:
        """A model with every parameter random, written to `directory` as transformers does."""
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        config = transformers.ChameleonConfig(**SETTINGS, vocabulary_map=vocabulary_map())
        self.model = _drawing()(config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1 + 0.1 * noise if "norm" in name and "bias" not in name else 0.05 * noise
        self.model.save_pretrained(directory)
        self.model.to(self.device)
        self.compiled = None

    def greedy(self, tokens: int) -> list[int]:
        """As of the other side."""
        prompts = Work("text", 1, 32, tokens).prompts()
        return self._generate(prompts, "text", tokens, "dynamic cache", do_sample=False)[0, -tokens:].tolist()

    def first(self, work: Work) -> str:
        """Finds the fastest way, each tried after what it compiles; that of pictures on texts, which are shorter."""
        tried = work if work.kind == "prompt" else dataclasses.replace(work, kind="text")
        seconds = {}
        for way in ("dynamic cache", "static cache", "static cache, compiled"):
            try:
                self._run(tried, way)
            except Exception as error:  # no compiler for torch.compile, which says so in many ways
                if "compiled" not in way:
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"torch.compile cannot be used: {reason}", file=sys.stderr, flush=True)
                continue
            start = time.perf_counter()
            self._run(tried, way)
            seconds[way] = time.perf_counter() - start
        self.way = min(seconds, key=seconds.get)
        if tried != work:
            self._run(work, self.way)
        return self.way

    def turn(self, work: Work) -> float:
        """Seconds."""
        start = time.perf_counter()
        self._run(work, self.way)
        return time.perf_counter() - start

    def _run(self, work: Work, way: str) -> None:
        prompts = work.prompts()
        if work.kind == "prompt":
            self._generate(prompts, "text", 1, way)
            return
        texts, _ = work.split()
        if texts:
            self._generate(prompts[:texts], "text", work.text_tokens, way)
        if texts < len(prompts):
            begin = np.full((len(prompts) - texts, 1), _BEGIN, np.int32)
            self._generate(np.concatenate([prompts[texts:], begin], 1), "picture", PICTURE, way)

    def _generate(self, prompts: Int[np.ndarray, "batch tokens"], kind: str, tokens: int, way: str, do_sample=True):
        import torch

        ids = torch.from_numpy(prompts).long().to(self.device)
        sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0} if do_sample else {}
        options = {"cache_implementation": "static"} if way.startswith("static") else {}
        self.model.uses = self._compiled() if "compiled" in way else None
        with torch.inference_mode():
            return self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=do_sample,
                logits_processor=[self._only(kind)],
                disable_compile=True,
                **sampling,
                **options,
            )

    def _compiled(self):
        import torch

        if self.compiled is None:
            self.compiled = torch.compile(self.model.plain)
        return self.compiled

    def _only(self, kind: str):
        """A processor that admits text, or codes of pictures alone."""
        import torch

        mask = torch.full((_VOCABULARY,), -torch.inf, device=self.device)
        mask[_TEXT:] = 0 if kind == "text" else -torch.inf
        mask[_CODES.start : _CODES.stop] = 0 if kind == "picture" else -torch.inf
        return lambda ids, logits: logits + mask


def vocabulary_map() -> dict[str, int]:
    """The names that transformers and this package look for."""
    codes = {f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z": 4 + code for code in range(8192)}
    control = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": _END, "<racm3:break>": _BEGIN}
    return codes | control | {"<image>": 8711, "<reserved08706>": _TURN, "<reserved08708>": 8712}


def _drawing():
    """transformers' class without the mask that keeps it from drawing, whose forward pass may be a compiled one."""
    import transformers
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Drawing(transformers.ChameleonForConditionalGeneration):
        uses = None

        def plain(self, input_ids=None, **inputs):
            inputs.pop("logits_to_keep", None)
            found = self.model(input_ids=input_ids, **inputs)
            logits = self.lm_head(found.last_hidden_state[:, -1:])
            return CausalLMOutputWithPast(logits=logits, past_key_values=found.past_key_values)

        def forward(self, input_ids=None, **inputs):
            is_token = input_ids is not None and input_ids.shape[1] == 1
            return (self.uses if self.uses is not None and is_token else self.plain)(input_ids=input_ids, **inputs)

    return Drawing
