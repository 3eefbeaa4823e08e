"""Prints whether the step that `omni compile` lowers is that of `omni train`: step_jaxprs.py OUTPUT [TOPOLOGY].

Both run up to the step, which is traced for all the devices of this machine, and, for `omni compile`, for those of the
topology, of which there must be as many; without one for this machine's again.
"""

import re
import sys

import jax

from omni.compile import compiling
from omni.model.config import TransformerConfig
from omni.sharding import MeshConfig
from omni.train.language import TransformerTask
from omni.train.loop import TrainConfig
from omni.train.program import Program


class Traced(BaseException):
    """Ends whatever would go on to compile and run a step."""


def traced(start) -> str:
    """The jaxpr of the step that `start` calls or lowers, without addresses in memory and the names of chips."""
    try:
        start()
    except Traced as found:
        return re.sub(r"0x[0-9a-f]+|device_kind=[^)]*", "", str(found))
    raise AssertionError("no step was called or lowered")


def stopping(self, adversarial=False):
    step = compiled_step(self, adversarial)

    def stop(*arguments):
        raise Traced(step.trace(*arguments).jaxpr)

    stop.lower = stop
    return stop


output, *topology = sys.argv[1:]
model = TransformerConfig(vocabulary_size=256, depth=2, dim=64, heads=2, key_value_heads=2, mlp_dim=128, remat="blocks")
task = TransformerTask("random", model, row_length=64)
config = TrainConfig(output, task, 10, batch_size=8, mesh=MeshConfig(data=1, fsdp=-1))
compiled_step, Program.train_step = Program.train_step, stopping
if not topology:
    compiling.topology_devices = lambda *_: jax.devices()
trained, compiled = traced(config.run), traced(lambda: compiling.compile_training(config, *(topology or ["v5e:2x4"])))
assert "sharding_constraint" in trained and str(jax.device_count()) in trained
print(f"{len(trained)} characters, {'the same' if trained == compiled else 'another step'}")
