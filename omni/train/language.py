"""The transformer's task: the next token of packed documents, whatever it stands for."""

from __future__ import annotations

import difflib
import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni.data.loader import PackedRows, mixed_rows, rows_of_each, stack
from omni.data.random_documents import RandomDocuments
from omni.data.shards import TokenShards
from omni.model.attention import row_order
from omni.model.config import TransformerConfig
from omni.model.embeddings import start_from_codebook
from omni.model.files import save_transformer
from omni.model.lora import ADAPTERS, Lora, attach, merged
from omni.model.presets import active_parameter_count, training_flops_per_token
from omni.model.transformer import Transformer
from omni.train.cross_entropy import token_losses
from omni.train.task import LARGEST, Batch, Task, Work
from omni_tokenizers.errors import UsageError
from omni_tokenizers.losses.terms import Sum

HELD_OUT_BATCH = 16
_OF_THE_NEXT = ("ids", "segments", "modalities", "target")
"""What the loss asks of the token that is predicted."""


@dataclass(frozen=True)
class TransformerTask(Task):
    """A transformer on token shards."""

    data: str | dict[str, float]
    """Shard directory, or several, each with the share of the tokens that comes from it; "random": random documents,
    for measuring and compiling alone."""
    model: TransformerConfig = field(default_factory=TransformerConfig)
    """Shape and variants of the transformer."""
    row_length: int = 256
    """Tokens of a row, into which whole documents are packed; the context of the finished model."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Weight of a token of each modality; 1 where none is given."""
    context_weight: float = 0.0
    """Weight of a token that belongs to no target part, beside its modality's."""
    z_loss: float = 1e-4
    """Weight of the squared log of the softmax's denominator, which keeps logits from drifting."""
    logits_chunk: int = 1024
    """Tokens of a row whose logits exist at once."""
    balance_loss: float = 1e-2
    """Weight of the routers' balance term, where there are experts."""
    router_z_loss: float = 1e-3
    """Weight of the routers' z term, where there are experts."""
    codebook_share: float = 0.0
    """Part of the variance of the embedding rows of codes that begins as the tokenizers' own vectors (0 to 1), where
    the shards hold them; see `omni.model.embeddings`."""
    held_out: str | None = None
    """Shard directory of documents that are only measured."""
    lora: Lora | None = None
    """Adapters that are trained in place of all parameters; the finished model has them merged. None: no adapters."""

    @functools.cached_property
    def mixture(self) -> list[tuple[TokenShards | RandomDocuments, float]]:
        """All shard sets with their shares; `UsageError` where they were not written for one model."""
        if self.data == "random":
            return [(RandomDocuments(self.model.vocabulary_size, self.row_length), 1.0)]
        shares = {self.data: 1.0} if isinstance(self.data, str) else self.data
        if not shares:
            raise UsageError("data names no shard directory")
        first = TokenShards(next(iter(shares)))
        sets = [first, *(TokenShards(name, first.vocabulary, first.grammar) for name in list(shares)[1:])]
        for each in sets[1:]:
            here, there = (one.manifest["provenance"].get("tokenizers") for one in (first, each))
            if here != there:
                raise UsageError(
                    f"{first.directory} and {each.directory} were written with different tokenizers ({here}, {there}), "
                    "so the same ids mean different things; write one of them anew"
                )
        return list(zip(sets, shares.values(), strict=True))

    @functools.cached_property
    def shards(self) -> TokenShards | RandomDocuments:
        """The (first) documents; `UsageError` where the configuration does not fit them."""
        shards, _ = self.mixture[0]
        if self.model.vocabulary_size != shards.vocabulary.size:
            raise UsageError(
                f"the transformer has {self.model.vocabulary_size} ids, the vocabulary of {shards.directory} "
                f"{shards.vocabulary.size}; set model.vocabulary_size to that"
            )
        known = shards.grammar.modalities
        for name in self.loss_weights:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, 1, 0)[0]
                raise UsageError(f"loss_weights names the modality '{name}'; the nearest that there is is '{nearest}'")
        if not 0 <= self.codebook_share <= 1:
            raise UsageError(f"codebook_share is {self.codebook_share}; it must lie in 0 to 1")
        if self.codebook_share and self.model.code_nets:
            raise UsageError("codebook_share speaks of rows of the embedding, which codes with code_nets do not have")
        if self.codebook_share and not shards.codebooks:
            raise UsageError(f"codebook_share is {self.codebook_share}, but {shards.directory} holds no codebooks")
        return shards

    def build(self, rngs: nnx.Rngs) -> Transformer:
        model = Transformer(self.model, rngs=rngs)
        if self.codebook_share:
            for name, vectors in self.shards.codebooks.items():
                ids, key = self.shards.vocabulary.block(name), rngs.params()
                rows = start_from_codebook(model.embedding[...], ids, vectors, self.codebook_share, key)
                model.embedding[...] = rows
        if self.lora is not None:
            attach(model, self.lora, rngs)
        return model

    def trained(self) -> Sequence[str]:
        if self.lora is not None:
            return (ADAPTERS, *self.lora.trained)
        if self.model.vision is None:
            return super().trained()
        # Shards hold codes alone, so nothing goes through the tower.
        there = {"head": not self.model.tied_embeddings, "codes.*": self.model.code_nets is not None}
        return ("embedding", "norm", "blocks.*", *(name for name, is_there in there.items() if is_there))

    def loss(
        self, model: Transformer, batch: Batch, key: PRNGKeyArray, *, training: bool
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Sum]]:
        """Cross-entropy in nats and z-loss (Chowdhery et al. 2022, arXiv:2204.02311) of each next token, weighted, and
        in training the routers' terms; metrics are of target tokens, unweighted."""
        names = self.shards.grammar.modalities
        batch = dict(batch) | {f"following_{name}": following(batch[name]) for name in _OF_THE_NEXT}
        if (order := row_order(batch["ids"].shape[1])) is not None:
            batch = {name: x[:, order] for name, x in batch.items()}
        features = model.features(
            batch["ids"], batch["positions"], batch["segments"], dropout_key=key if training else None, order=order
        )
        heads = model.output_weights(), batch["following_ids"], model.code_head()
        found = token_losses(features.stream, *heads, chunk=self.logits_chunk)
        segments, modality = batch["segments"], batch["following_modalities"]
        predicted = ((batch["following_segments"] == segments) & (segments > 0)).astype(jnp.float32)
        target = batch["following_target"] * predicted
        by_modality = jnp.array([self.loss_weights.get(name, 1.0) for name in names], jnp.float32)
        weight = by_modality[modality] * (target + self.context_weight * (predicted - target))
        z = jnp.square(found.log_denominator)

        metrics = {"z_loss": (jnp.sum(z * target), jnp.sum(target))}
        there = segments > 0
        metrics["output_norm"] = (jnp.sum(features.norms * there), jnp.sum(there))
        if features.largest_logits is not None:
            largest = jnp.max(jnp.where(there, features.largest_logits, -jnp.inf))
            metrics[f"{LARGEST}attention_logit"] = (largest, jnp.any(there))
        for index, name in enumerate(names):
            chosen = target * (modality == index)
            metrics[f"loss/{name}"] = (jnp.sum(found.cross_entropy * chosen), jnp.sum(chosen))
            metrics[f"z_loss/{name}"] = (jnp.sum(z * chosen), jnp.sum(chosen))
            metrics[f"share/{name}"] = (jnp.sum(chosen), jnp.sum(target))
            metrics[f"accuracy/{name}"] = (jnp.sum(found.correct * chosen), jnp.sum(chosen))
        total, all_weight = jnp.sum((found.cross_entropy + self.z_loss * z) * weight), jnp.sum(weight)
        for name, term in features.routers.items():
            metrics[f"experts/{name}"] = (term * all_weight, all_weight)
        if features.routers and training:
            balance, router_z = features.routers["balance"], features.routers["router_z"]
            total += all_weight * (self.balance_loss * balance + self.router_z_loss * router_z)
        return total, all_weight, metrics

    def dataset(self, seed: int) -> grain.MapDataset:
        _ = self.shards  # checks that all fits
        return mixed_rows(self.mixture, self.row_length, seed)

    def next_dataset(self, seed: int, before: Sequence[tuple[Task, int]]) -> grain.MapDataset:
        """Each set goes on where it stands, if stages before had it in the same place with rows of the same length."""
        own, taken, goes_on = self._sets(), [0] * len(self.mixture), 0
        groups = [(sets, list(group)) for sets, group in itertools.groupby(before, key=lambda stage: stage[0]._sets())]
        if groups and groups[-1][0] == own:  # the mixture as a whole goes on
            goes_on = sum(rows for _, rows in groups.pop()[1])
        for (row_length, sets), group in groups:
            counts = rows_of_each(group[0][0].mixture, row_length, seed, sum(rows for _, rows in group))
            for place, ((one, _), (other, _), count) in enumerate(zip(own[1], sets, counts, strict=False)):
                taken[place] += count * (one == other and row_length == self.row_length)
        _ = self.shards  # checks that all fits
        return mixed_rows(self.mixture, self.row_length, seed, taken)[goes_on:]

    def _sets(self) -> tuple[int, list[tuple[str, float]]]:
        """Length of a row, and names and shares of the sets."""
        return self.row_length, list((self.data if isinstance(self.data, dict) else {self.data: 1.0}).items())

    def validation(self) -> list[dict[str, np.ndarray]] | None:
        if self.held_out is None:
            return None
        shards = TokenShards(self.held_out, self.shards.vocabulary, self.shards.grammar)
        rows = PackedRows(shards, self.row_length, seed=0)
        every = range(rows.packing.rows)
        return [stack([rows[i] for i in every[j : j + HELD_OUT_BATCH]]) for j in every[::HELD_OUT_BATCH]]

    def metadata(self) -> dict[str, dict[str, Any]]:
        return {"vocabulary": self.shards.vocabulary.to_json(), "grammar": self.shards.grammar.to_json()}

    def work(self) -> Work:
        flops = training_flops_per_token(self.model, self.row_length)
        if self.lora is not None:  # no gradient of matrices
            flops -= 2.0 * active_parameter_count(self.model)
        return Work(self.row_length, flops)

    def save(self, model: Transformer, directory: epath.Path) -> None:
        """Writes what `omni.bundle.Model` reads, adapters merged; tokenizers, which training knows not, if shards have
        them."""
        hashes = {"vocabulary": self.shards.vocabulary.hash, "grammar": self.shards.grammar.hash}
        tokenizers = self.shards.manifest["provenance"].get("tokenizers", {})
        save_transformer(directory, merged(model), context_length=self.row_length, belongs_to=hashes | tokenizers)
        for file in (self.shards.directory / "tokenizers").glob("*/*"):  # omni tokenize leaves them there
            copied = directory / "tokenizers" / file.parent.name / file.name
            copied.parent.mkdir(parents=True, exist_ok=True)
            file.copy(copied, overwrite=True)
        for name, content in self.metadata().items():
            (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def following(x: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Of each token the value of the next one; 0 at the end of a row."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
