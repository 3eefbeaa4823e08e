"""Small runs for the tests of training; as a script it trains one: training_cases.py KIND OUTPUT key=value ..."""

import ast
import sys
from dataclasses import dataclass, field
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from documents import make_documents, make_grammar

from omni.data.shards import write_shards
from omni.exits import exits
from omni.model.config import TransformerConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig, train
from omni.train.optimizer import OptimizerConfig
from omni.train.task import Adversary, Task


class Statistics(nnx.Variable):
    """Not a parameter: the forward pass keeps it, as tokenizers keep their codebooks."""


class Net(nnx.Module):
    """Two layers, and a running mean of what lies between them."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.up = nnx.Linear(4, width, rngs=rngs)
        self.down = nnx.Linear(width, 2, rngs=rngs)
        self.mean = Statistics(jnp.zeros(width))

    def __call__(self, x, training: bool):
        hidden = jnp.tanh(self.up(x))
        if training:
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(hidden.mean(0))
        return self.down(hidden - self.mean[...])


class Points:
    """Endless random points; `bad` says by number which of them have another value."""

    def __init__(self, seed: int, bad: dict[int, float] | None = None):
        self.seed, self.bad = seed, bad or {}

    def __len__(self):
        return 1 << 62

    def __getitem__(self, index: int):
        x = np.random.default_rng([self.seed, int(index)]).normal(size=4).astype(np.float32)
        x = np.full_like(x, self.bad.get(int(index), x))
        return {"x": x, "weight": np.float32(1 + index % 3)}


@dataclass(frozen=True)
class Regression(Task):
    """Learns a fixed function of points, each with a weight, under noise that the step's key draws."""

    width: int = 16
    noise: float = 0.01
    explode: str = ""
    """"loss" makes that no number, "gradient" only what is derived from it."""
    bad: dict[int, float] = field(default_factory=dict)
    """Points by number that have another value."""

    def build(self, rngs):
        return Net(self.width, rngs)

    def loss(self, model, batch, key, *, training):
        x, weight = batch["x"], batch["weight"]
        wanted = jnp.stack([x[:, 0] * x[:, 1], jnp.sin(x[:, 2])], axis=1)
        noise = self.noise * jax.random.normal(key, wanted.shape) if training else 0
        error = jnp.square(model(x, training) - wanted + noise).sum(1)
        total = jnp.sum(error * weight) * (jnp.nan if self.explode == "loss" else 1)
        if self.explode == "gradient":
            total += jnp.sqrt(0 * total)  # 0, whose derivative is 0 times infinity
        return total, weight.sum(), {"largest": (error.max(), jnp.ones(()))}

    def dataset(self, seed):
        return grain.MapDataset.source(Points(seed, self.bad))

    def validation(self):
        points = Points(99)
        return [{key: np.stack([points[i][key] for i in range(6)]) for key in ("x", "weight")}]

    def save(self, model, directory):
        np.savez(directory / "net.npz", kernel=np.asarray(model.up.kernel[...]), mean=np.asarray(model.mean[...]))


@dataclass(frozen=True)
class Duel(Regression):
    """The same, while a critic tells (point, value) from (point, what the net makes of it); both keep statistics."""

    adversary: Adversary = field(default_factory=lambda: Adversary(start=5))
    statistics: bool = True
    """Whether what is between layers is kept, which depends on what else is in a batch."""

    def build_critic(self, rngs):
        return Net(8, rngs)

    def adversarial_loss(self, model, critic, batch, key):
        x, weight = batch["x"], batch["weight"]
        wanted, made = jnp.stack([x[:, 0] * x[:, 1], jnp.sin(x[:, 2])], axis=1), model(x, self.statistics)
        real, fake = (jnp.concatenate([x[:, :2], y], axis=1) for y in (wanted, made))
        deceiving = -jnp.sum(critic(fake, False)[:, 0] * weight)
        total = jnp.sum(jnp.square(made - wanted).sum(1) * weight) + 0.1 * deceiving
        shown = {"real": real, "fake": fake, "weight": weight}
        return (total, weight.sum(), {"deceiving": (deceiving, weight.sum())}), shown

    def critic_loss(self, critic, shown):
        real, fake = (critic(shown[name], self.statistics)[:, 0] for name in ("real", "fake"))
        hinge = jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)
        return jnp.sum(hinge * shown["weight"]), shown["weight"].sum(), {"told": ((real - fake).sum(), jnp.float32(8))}


def regression(output, *, width=16, explode="", bad=None, ema_decay=0.9, accumulation=1, **settings) -> TrainConfig:
    """A run of `Regression`."""
    settings = {"steps": 12, "batch_size": 8, "log_every": 2, "checkpoint_every": 4} | settings
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=3, ema_decay=ema_decay, accumulation=accumulation)
    return TrainConfig(str(output), Regression(width, explode=explode, bad=bad or {}), optimizer=optimizer, **settings)


def language(output, *, accumulation=1, documents=200, dim=32, depth=2, dropout=0.0, **settings) -> TrainConfig:
    """A run of a small transformer on shards beside the output, written on first use."""
    grammar = make_grammar()
    shards = epath.Path(output).parent / f"shards-{documents}"
    if not shards.exists():
        write_shards(shards, make_documents(grammar, documents), grammar.vocabulary, grammar, {"made by": "a test"})
    shape = {"depth": depth, "dim": dim, "heads": 4, "key_value_heads": 2, "head_dim": 8, "mlp_dim": 2 * dim}
    model = TransformerConfig(vocabulary_size=grammar.vocabulary.size, dropout=dropout, **shape)
    task = TransformerTask(str(shards), model, row_length=48, loss_weights={"image": 0.5}, context_weight=0.1)
    settings = {"steps": 20, "batch_size": 8, "log_every": 1, "checkpoint_every": 10} | settings
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, ema_decay=0.99, accumulation=accumulation)
    return TrainConfig(str(output), task, optimizer=optimizer, **settings)


if __name__ == "__main__":
    kind, output, *settings = sys.argv[1:]
    settings = {key: ast.literal_eval(value) for key, value in (setting.split("=") for setting in settings)}
    with exits():
        train({"regression": regression, "language": language}[kind](output, **settings))
