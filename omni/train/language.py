"""The transformer's task: the next token of packed documents, whatever it stands for."""

from __future__ import annotations

import difflib
import functools
import json
from dataclasses import dataclass, field
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from omni.data.loader import PackedRows, stack
from omni.data.shards import TokenShards
from omni.model.config import TransformerConfig
from omni.model.embeddings import start_from_codebook
from omni.model.files import save_transformer
from omni.model.transformer import Transformer
from omni.train.task import Batch, Task
from omni_tokenizers.errors import UsageError
from omni_tokenizers.losses.terms import Sum

HELD_OUT_BATCH = 16


@dataclass(frozen=True)
class TransformerTask(Task):
    """A transformer on token shards."""

    data: str
    """Shard directory."""
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
    codebook_share: float = 0.0
    """Part of the variance of the embedding rows of codes that begins as the tokenizers' own vectors (0 to 1), where
    the shards hold them; see `omni.model.embeddings`."""
    held_out: str | None = None
    """Shard directory of documents that are only measured."""

    @functools.cached_property
    def shards(self) -> TokenShards:
        """The documents; `UsageError` where the configuration does not fit them."""
        shards = TokenShards(self.data)
        if self.model.vocabulary_size != shards.vocabulary.size:
            raise UsageError(
                f"the transformer has {self.model.vocabulary_size} ids, the vocabulary of {self.data} "
                f"{shards.vocabulary.size}; set model.vocabulary_size to that"
            )
        known = shards.grammar.modalities
        for name in self.loss_weights:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, 1, 0)[0]
                raise UsageError(f"loss_weights names the modality '{name}'; the nearest that there is is '{nearest}'")
        if not 0 <= self.codebook_share <= 1:
            raise UsageError(f"codebook_share is {self.codebook_share}; it must lie in 0 to 1")
        if self.codebook_share and not shards.codebooks:
            raise UsageError(f"codebook_share is {self.codebook_share}, but {self.data} holds no codebooks")
        return shards

    def build(self, rngs: nnx.Rngs) -> Transformer:
        model = Transformer(self.model, rngs=rngs)
        if self.codebook_share:
            for name, vectors in self.shards.codebooks.items():
                ids, key = self.shards.vocabulary.block(name), rngs.params()
                rows = start_from_codebook(model.embedding[...], ids, vectors, self.codebook_share, key)
                model.embedding[...] = rows
        return model

    def loss(
        self, model: Transformer, batch: Batch, key: PRNGKeyArray, *, training: bool
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Sum]]:
        """Cross-entropy in nats and z-loss (Chowdhery et al. 2022, arXiv:2204.02311) of each next token, weighted;
        metrics are of target tokens, unweighted."""
        names = self.shards.grammar.modalities
        logits = model(
            batch["ids"], batch["positions"], batch["segments"], dropout_key=key if training else None
        ).astype(jnp.float32)[:, :-1]
        entropy, log_denominator = cross_entropy(logits, batch["ids"][:, 1:])
        segments, modality = batch["segments"], batch["modalities"][:, 1:]
        predicted = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(jnp.float32)
        target = batch["target"][:, 1:] * predicted
        by_modality = jnp.array([self.loss_weights.get(name, 1.0) for name in names], jnp.float32)
        weight = by_modality[modality] * (target + self.context_weight * (predicted - target))
        z = jnp.square(log_denominator)

        correct = (jnp.argmax(logits, axis=-1) == batch["ids"][:, 1:]).astype(jnp.float32)
        metrics = {"z_loss": (jnp.sum(z * target), jnp.sum(target))}
        for index, name in enumerate(names):
            chosen = target * (modality == index)
            metrics[f"loss/{name}"] = (jnp.sum(entropy * chosen), jnp.sum(chosen))
            metrics[f"accuracy/{name}"] = (jnp.sum(correct * chosen), jnp.sum(chosen))
        return jnp.sum((entropy + self.z_loss * z) * weight), jnp.sum(weight), metrics

    def dataset(self, seed: int) -> grain.MapDataset:
        return grain.MapDataset.source(PackedRows(self.shards, self.row_length, seed))

    def validation(self) -> list[dict[str, np.ndarray]] | None:
        if self.held_out is None:
            return None
        shards = TokenShards(self.held_out, self.shards.vocabulary, self.shards.grammar)
        rows = PackedRows(shards, self.row_length, seed=0)
        every = range(rows.packing.rows)
        return [stack([rows[i] for i in every[j : j + HELD_OUT_BATCH]]) for j in every[::HELD_OUT_BATCH]]

    def metadata(self) -> dict[str, dict[str, Any]]:
        return {"vocabulary": self.shards.vocabulary.to_json(), "grammar": self.shards.grammar.to_json()}

    def save(self, model: Transformer, directory: epath.Path) -> None:
        """Writes what `omni.bundle.Model` reads, but for the tokenizers, which training knows nothing of."""
        hashes = {"vocabulary": self.shards.vocabulary.hash, "grammar": self.shards.grammar.hash}
        tokenizers = self.shards.manifest["provenance"].get("tokenizers", {})
        save_transformer(directory, model, context_length=self.row_length, belongs_to=hashes | tokenizers)
        for name, content in self.metadata().items():
            (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def cross_entropy(
    logits: Float[Array, "batch length vocabulary"], ids: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length"], Float[Array, "batch length"]]:
    """(cross-entropy in nats, log of the softmax's denominator) of each token."""
    log_denominator = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return log_denominator - chosen, log_denominator
