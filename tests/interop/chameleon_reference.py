"""Chameleon's forward pass, slowly and in float64, as the original computes it: rank by rank, neighbours rotated."""

from collections.abc import Mapping, Sequence

import numpy as np


def random_ranks(parameters: Mapping, ranks: int, vocabulary: int, mlp: int) -> list[dict[str, np.ndarray]]:
    """Noise for every tensor of every rank, by the original's names; what all ranks share is the same in all."""
    random, dim, heads = np.random.default_rng(0), parameters["dim"], parameters["n_heads"]
    groups, size = parameters.get("n_kv_heads", heads), dim // heads

    def noise(*shape: int, around: float = 0.0) -> np.ndarray:
        return (around + 0.3 * random.standard_normal(shape)).astype(np.float32)

    shared = {"norm.weight": noise(dim, around=1.0)}
    for layer in range(parameters["n_layers"]):
        for name in ("attention_norm", "ffn_norm"):
            shared[f"layers.{layer}.{name}.weight"] = noise(dim, around=1.0)
    found = []
    for _ in range(ranks):
        own = {
            "tok_embeddings.weight": noise(vocabulary, dim // ranks),
            "output.weight": noise(vocabulary // ranks, dim),
        }
        for layer in range(parameters["n_layers"]):
            at = f"layers.{layer}."
            own[at + "attention.wq.weight"] = noise(heads // ranks * size, dim)
            own[at + "attention.wk.weight"] = noise(groups // ranks * size, dim)
            own[at + "attention.wv.weight"] = noise(groups // ranks * size, dim)
            own[at + "attention.wo.weight"] = noise(dim, heads // ranks * size)
            for name in ("q", "k"):
                own[f"{at}attention.{name}_normalization.weight"] = noise(size, around=1.0)
                own[f"{at}attention.{name}_normalization.bias"] = noise(size)
            own[at + "feed_forward.w1.weight"] = noise(mlp // ranks, dim)
            own[at + "feed_forward.w3.weight"] = noise(mlp // ranks, dim)
            own[at + "feed_forward.w2.weight"] = noise(dim, mlp // ranks)
        found.append(own | shared)
    return found


def forward(parameters: Mapping, ranks: Sequence[Mapping[str, np.ndarray]], ids: np.ndarray) -> np.ndarray:
    """Logits float64 [length, vocabulary] of one row of ids."""
    ranks = [{name: value.astype(np.float64) for name, value in rank.items()} for rank in ranks]
    x = np.concatenate([rank["tok_embeddings.weight"][ids] for rank in ranks], axis=1)
    for layer in range(parameters["n_layers"]):
        for scale, branch in (("attention_norm", _attention), ("ffn_norm", _feed)):
            weight = ranks[0][f"layers.{layer}.{scale}.weight"]
            if parameters.get("swin_norm"):
                x = x + _rms(branch(parameters, ranks, layer, x), weight)
            else:
                x = x + branch(parameters, ranks, layer, _rms(x, weight))
    x = _rms(x, ranks[0]["norm.weight"])
    return np.concatenate([x @ rank["output.weight"].T for rank in ranks], axis=1)


def _rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def _layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def _rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """[length, head_dim] as complex numbers of neighbours, each turned by its place."""
    turned = np.empty_like(x)
    for place in range(x.shape[0]):
        for pair in range(x.shape[1] // 2):
            number = complex(x[place, 2 * pair], x[place, 2 * pair + 1])
            number *= np.exp(1j * place * theta ** (-2 * pair / x.shape[1]))
            turned[place, 2 * pair], turned[place, 2 * pair + 1] = number.real, number.imag
    return turned


def _attention(parameters: Mapping, ranks: Sequence[Mapping], layer: int, x: np.ndarray) -> np.ndarray:
    size, length = parameters["dim"] // parameters["n_heads"], len(x)
    total = np.zeros_like(x)
    for rank in ranks:
        at = f"layers.{layer}.attention."
        heads = len(rank[at + "wq.weight"]) // size
        per_group = heads // (len(rank[at + "wk.weight"]) // size)
        read = []
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            group = slice(head // per_group * size, (head // per_group + 1) * size)
            query, key = x @ rank[at + "wq.weight"][rows].T, x @ rank[at + "wk.weight"][group].T
            query, key = (
                _rotate(
                    _layer_norm(each, rank[f"{at}{name}_normalization.weight"], rank[f"{at}{name}_normalization.bias"]),
                    parameters.get("rope_theta", 10_000.0),
                )
                for each, name in ((query, "q"), (key, "k"))
            )
            scores = np.where(np.tri(length, dtype=bool), query @ key.T / np.sqrt(size), -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            read.append(shares / shares.sum(-1, keepdims=True) @ (x @ rank[at + "wv.weight"][group].T))
        total += np.concatenate(read, axis=1) @ rank[at + "wo.weight"].T
    return total


def _feed(parameters: Mapping, ranks: Sequence[Mapping], layer: int, x: np.ndarray) -> np.ndarray:
    total = np.zeros_like(x)
    for rank in ranks:
        gate, up, down = (rank[f"layers.{layer}.feed_forward.{name}.weight"] for name in ("w1", "w3", "w2"))
        hidden = x @ gate.T
        total += (hidden / (1 + np.exp(-hidden)) * (x @ up.T)) @ down.T
    return total
