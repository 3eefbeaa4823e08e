"""Replies of one engine on one device and on meshes of eight; prints JSON.

The eight are this process's own, or, with the arguments coordinator, processes and process, those of all of them.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import jax
import numpy as np
from reference import IMAGE, PLAIN, TEXT, make_grammar, make_model, prompt, request

from omni.generate import Engine, rules, unconditional_shadow
from omni.model import decoder_on, make_decoder
from omni.sharding import MeshConfig, ShardingRules, make_mesh
from omni.train.distributed import join

MESHES = {
    "tensor 4 x data 2": MeshConfig(tensor=4, data=2),
    "tensor 2 x fsdp 4": MeshConfig(tensor=2, data=1, fsdp=4),
    "data 8": MeshConfig(data=8),
}


def main() -> None:
    if len(sys.argv) > 1:
        join(False, sys.argv[1], *map(int, sys.argv[2:]))
        rules.SLICED = 1  # the head in parts, too
    grammar = make_grammar(PLAIN)
    model = make_model(grammar.vocabulary.size, seed=1)
    shadows = unconditional_shadow(prompt(grammar, 0), np.array([1, 3, 1.5], np.float32))
    greedy = [
        request(grammar, prompt(grammar, 1, "text"), temperature=0, want=(IMAGE, TEXT)),
        request(grammar, prompt(grammar, 2, "image", "audio"), temperature=0, want=(TEXT, IMAGE), shadows=shadows),
        request(grammar, prompt(grammar, 3, "audio"), temperature=0),
    ]
    requests = greedy + [dataclasses.replace(each, temperature=np.ones(3, np.float32), seed=5) for each in greedy]
    found = {}
    if len(sys.argv) == 1:
        found["one device"] = ids(Engine(make_decoder(model), grammar).generate(requests))
        found["int8, one device"] = ids(in_int8(make_decoder(model, "int8"), grammar).generate(requests))
    for name, config in list(MESHES.items())[: 1 if len(sys.argv) > 1 else None]:
        mesh = make_mesh(config)
        decoder = decoder_on(mesh, ShardingRules(), model)
        engine = Engine(decoder, grammar, mesh=mesh)
        found[name] = ids(engine.generate(requests))
        if name in ("tensor 4 x data 2", "tensor 2 x fsdp 4"):
            engine_in_int8 = in_int8(decoder_on(mesh, ShardingRules(), model, "int8"), grammar, mesh=mesh)
            found[f"int8, {name}"] = ids(engine_in_int8.generate(requests))
        held = [sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(decoder))]
        found[f"{name}, share held"] = held[0] / sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
        assert ids(engine.generate(requests[:1])) == found[name][:1], "a single request goes through a mesh as well"
    print(json.dumps(found))


def in_int8(decoder, grammar, **settings) -> Engine:
    return Engine(decoder, grammar, cache_dtype="int8", **settings)


def ids(replies) -> list[list[int]]:
    return [reply.ids.tolist() for reply in replies]


if __name__ == "__main__":
    main()
