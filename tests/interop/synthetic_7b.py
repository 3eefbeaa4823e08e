"""What memory it takes to load a public checkpoint of 7 billion parameters, beside the parameters themselves.

    python tests/interop/synthetic_7b.py docs/results/import_memory.json

The file has Llama-2-7B's shapes in bfloat16, all zeros, which takes no room on a disk that knows holes. It is loaded
in bfloat16 by a process of its own, whose largest resident memory is measured; on a CPU the parameters lie in it, too.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LAYERS, WIDTH, MLP, VOCABULARY = 32, 4096, 11_008, 32_000


def write(directory: Path, layers: int) -> None:
    """config.json, and a safetensors file of zeros."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": [VOCABULARY, WIDTH], "lm_head.weight": [VOCABULARY, WIDTH]}
    shapes["model.norm.weight"] = [WIDTH]
    for layer in range(layers):
        own = {f"self_attn.{name}_proj": [WIDTH, WIDTH] for name in "qkvo"}
        own |= {"mlp.gate_proj": [MLP, WIDTH], "mlp.up_proj": [MLP, WIDTH], "mlp.down_proj": [WIDTH, MLP]}
        own |= {"input_layernorm": [WIDTH], "post_attention_layernorm": [WIDTH]}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    encoded = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + place)


def measure(directory: str) -> dict[str, float]:
    """Bytes: the parameters, the largest tensor in float32, and the largest resident memory before and after."""
    import jax
    from flax import nnx

    import omni

    jax.numpy.zeros(()).block_until_ready()
    before = resident()
    model = omni.load(directory, dtype="bfloat16")
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model.transformer, nnx.Param)))
    return {
        "parameters": sum(leaf.nbytes for leaf in leaves),
        "largest_tensor": 4 * VOCABULARY * WIDTH,
        "before": before,
        "peak": resident(),
    }


def resident() -> int:
    """The largest resident memory of this process so far, bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--measure", metavar="DIR", help="of the process that loads")
    options = parser.parse_args()
    if options.measure:
        options.output.write_text(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), options.layers)
        found = Path(directory) / "found.json"
        subprocess.run([sys.executable, __file__, str(found), "--measure", directory], check=True)
        results = json.loads(found.read_text())
    results["beside"] = results["peak"] - results["before"] - results["parameters"]
    results["command"] = f"python tests/interop/synthetic_7b.py {options.output}"
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
