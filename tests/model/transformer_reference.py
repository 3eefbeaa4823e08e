"""An obvious transformer in numpy float64: loops over positions, heads and pairs; nothing shared with the package."""

import math

import numpy as np


def rms(x, scale, epsilon):
    return x / math.sqrt(np.mean(x**2) + epsilon) * scale


def layer_norm(x, scale, bias, epsilon):
    return (x - x.mean()) / math.sqrt(x.var() + epsilon) * scale + bias


def rotate(config, x, position):
    half = config.head_dim // 2
    out = x.copy()
    for pair in range(half):
        coordinate = position[pair % 3] if config.rope == "time_row_column" else position[0]
        angle = coordinate / config.rope_theta ** (pair / half)
        a, b = x[pair], x[pair + half]
        out[pair] = a * math.cos(angle) - b * math.sin(angle)
        out[pair + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def head_norm(config, x, weights, name):
    if config.qk_norm == "rms":
        return rms(x, weights[name], config.norm_epsilon)
    if config.qk_norm == "layer":
        return layer_norm(x, weights[name], weights[name + "_bias"], config.norm_epsilon)
    return x


def attention(config, weights, rows, positions, segments, largest):
    """What attention adds at each token of one row [length, dim]; `largest` becomes each token's largest logit."""
    changes = np.zeros_like(rows)
    share = config.heads // config.key_value_heads
    for now in range(len(rows)):
        seen = [then for then in range(now + 1) if segments[then] == segments[now]]
        for head in range(config.heads):
            query = head_norm(config, rows[now] @ weights["query"][:, head], weights, "query_norm")
            query = rotate(config, query, positions[now])
            scores, values = [], []
            for then in seen:
                key = head_norm(config, rows[then] @ weights["key"][:, head // share], weights, "key_norm")
                scores.append(query @ rotate(config, key, positions[then]) / math.sqrt(config.head_dim))
                values.append(rows[then] @ weights["value"][:, head // share])
            largest[now] = max(largest[now], *scores)
            shares = np.exp(np.array(scores) - max(scores))
            read = (shares / shares.sum()) @ np.array(values)
            changes[now] += read @ weights["output"][head]
    return changes


def mlp(weights, rows):
    gate = rows @ weights["gate"]
    return (gate / (1 + np.exp(-gate)) * (rows @ weights["up"])) @ weights["down"]


def add(config, x, scale, branch):
    """The residual stream after one branch, normalised before or after it."""
    norm = lambda rows: np.array([rms(row, scale, config.norm_epsilon) for row in rows])  # noqa: E731
    return x + (branch(norm(x)) if config.norm_order == "pre" else norm(branch(x)))


def forward(config, parameters, ids, positions, segments):
    """Logits [length, vocabulary] of one row; `parameters` are a Transformer's as a nested dict of float64 arrays."""
    return (
        features(config, parameters, ids, positions, segments)[0]
        @ (parameters["embedding"] if config.tied_embeddings else parameters["head"]).T
    )


def features(config, parameters, ids, positions, segments):
    """What logits are made of, each token's length of the stream before the last norm, and its largest logit."""
    x, largest = parameters["embedding"][ids], np.full(len(ids), -np.inf)
    for layer in range(config.depth):
        weights = {name: value[layer] for name, value in parameters["blocks"].items()}
        x = add(
            config,
            x,
            weights["attention_norm"],
            lambda y, w=weights: attention(config, w, y, positions, segments, largest),
        )
        x = add(config, x, weights["mlp_norm"], lambda y, w=weights: mlp(w, y))
    normed = np.array([rms(row, parameters["norm"], config.norm_epsilon) for row in x])
    return normed, np.sqrt((x**2).sum(1)), largest
