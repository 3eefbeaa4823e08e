"""Configuration of the transformer."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

from omni_tokenizers.errors import UsageError

TENSORS = ("query", "key", "value", "attention", "attention_output", "gate", "up", "mlp_output")
"""What a block computes and names for `saved` and `offloaded`, in order."""


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies slowed for more tokens than a model was first trained on, as Llama 3.1 does: waves longer than
    original_length / low_frequency tokens by `factor`, those shorter than original_length / high_frequency not at all,
    and between them by what lies between."""

    factor: float
    """How many times as long the slowest waves become."""
    low_frequency: float
    """Waves that turn less often than this in `original_length` tokens are slowed wholly."""
    high_frequency: float
    """Waves that turn more often than this are left."""
    original_length: int
    """Tokens of the rows of the first training."""

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_frequency < self.high_frequency and self.original_length > 0):
            raise UsageError(f"{self} scales no rotary frequencies: a factor below 1, or frequencies that do not rise")


@dataclass(frozen=True)
class CodeNetsConfig:
    """Nets between the last ids of a vocabulary, the codes of one block, and the stream (`omni.model.code_nets`)."""

    codes: int
    """Ids that go through these nets, the last of all."""
    width: int
    """Numbers that stand for a code."""
    depth: int = 2
    """Linear maps between these and the stream."""

    def __post_init__(self) -> None:
        if min(self.codes, self.width, self.depth) < 1:
            raise UsageError(f"{self} is no net of codes: each of its numbers must be at least 1")


@dataclass(frozen=True)
class VisionConfig:
    """A tower of pictures that are seen (`omni.model.vision`)."""

    image_size: int = 384
    """Height and width of pictures."""
    patch: int = 16
    """Height and width of the patches into which they are cut."""
    depth: int = 24
    """Number of layers."""
    dim: int = 1024
    """Width of the tower."""
    heads: int = 16
    """Heads of its attention, which divide its width."""
    mlp_ratio: float = 4.0
    """Hidden width of its perceptrons, by the width of the tower."""
    norm_epsilon: float = 1e-6
    """Added to the variance in every norm."""
    aligner_depth: int = 2
    """Linear maps between the tower and the stream."""

    def __post_init__(self) -> None:
        numbers = (self.image_size, self.patch, self.depth, self.dim, self.heads, self.aligner_depth)
        wide = math.isfinite(self.mlp_ratio) and self.mlp_dim >= 1
        if min(numbers) < 1 or not wide or self.image_size % self.patch or self.dim % self.heads:
            raise UsageError(
                f"{self} is no tower: its numbers must be at least 1, patch must divide image_size, and heads dim"
            )
        if not 0 < self.norm_epsilon < math.inf:
            raise UsageError(f"vision norm_epsilon is {self.norm_epsilon}; it must be above 0 and finite")

    @property
    def mlp_dim(self) -> int:
        """Hidden width of its perceptrons."""
        return int(self.dim * self.mlp_ratio)

    @property
    def tokens(self) -> int:
        """Patches of a picture, each of which has a feature."""
        return (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and variants of a decoder-only transformer, and how its training computes it."""

    vocabulary_size: int = 1280
    """Number of ids, rows of the embedding."""
    depth: int = 4
    """Number of blocks."""
    dim: int = 192
    """Width of the residual stream."""
    heads: int = 6
    """Query heads."""
    key_value_heads: int = 3
    """Key and value heads; each serves heads / key_value_heads query heads (grouped-query attention)."""
    head_dim: int = 32
    """Width of a head, even."""
    mlp_dim: int = 512
    """Hidden width of the SwiGLU, of each expert where there are experts."""
    experts: int = 0
    """SwiGLUs of a block among which a router chooses for each token; 0: one, and no router."""
    experts_per_token: int = 2
    """Experts that a token goes through, the likeliest ones."""
    expert_groups: tuple[tuple[int, int], ...] | None = None
    """Groups of experts by modality (MoMa, Lin et al. 2024, arXiv:2407.21770), in order, as (first id, experts): ids
    from the first on, up to the next group's, are routed among these experts alone; a vocabulary block's ids follow
    one another. The first group begins with id 0, and all have as many experts together as there are. None: no
    groups."""
    norm_order: Literal["pre", "swin"] = "pre"
    """pre: x + f(norm(x)); swin: x + norm(f(x))."""
    norm_epsilon: float = 1e-5
    """Added to the mean square (or variance) in every norm."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope: Literal["time", "time_row_column"] = "time"
    """Which of the three position coordinates rotate queries and keys."""
    rope_scaling: RopeScaling | None = None
    """What slows the rotary frequencies; None: nothing."""
    qk_norm: Literal["none", "rms", "layer"] = "rms"
    """Norm of queries and keys over head_dim, before the rotation; layer has a bias."""
    qk_norm_per_head: bool = False
    """Whether each head has scales (and biases) of its own in that norm; otherwise all heads share them."""
    dropout: float = 0.0
    """Rate of dropout on the embedding and on what each branch adds to the residual stream, in training."""
    tied_embeddings: bool = True
    """Whether the output head is the transposed embedding."""
    code_nets: CodeNetsConfig | None = None
    """What the last ids go through in place of rows of the embedding and the head; None: nothing."""
    vision: VisionConfig | None = None
    """The tower of pictures that are seen; None: there is none."""
    attention: Literal["xla", "splash"] = "xla"
    """Kernel of attention over whole sequences. xla: anywhere; splash: a fused one, for TPUs alone."""
    attention_blocks: tuple[int, int] = (1024, 1024)
    """Queries and keys that the kernel takes at once, at most; "xla" heeds the first alone."""
    remat: Literal["none", "blocks", "dots"] = "none"
    """What the backward pass recomputes.

    none; blocks: all of a block but its input, `saved` and `offloaded`; dots: all but matrix products.
    """
    saved: tuple[str, ...] = ()
    """With remat `blocks`: the tensors of a block that are kept, among `TENSORS`."""
    offloaded: tuple[str, ...] = ()
    """With remat `blocks`: the tensors of a block that are kept in the host's memory, among `TENSORS`."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of parameters at use; parameters, norms, softmax and logits are float32."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                choices = ", ".join(get_args(field.type))
                raise UsageError(f"transformer {field.name} is {value!r}; choose one of {choices}")
            if field.type is int and value < (0 if field.name == "experts" else 1):
                raise UsageError(f"transformer {field.name} is {value}; it must be at least 1")
        if self.heads % self.key_value_heads:
            raise UsageError(f"transformer heads {self.heads} is no multiple of key_value_heads {self.key_value_heads}")
        if self.head_dim % 2:
            raise UsageError(f"transformer head_dim {self.head_dim} is odd; rotary positions rotate pairs")
        for name in ("norm_epsilon", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"transformer {name} is {getattr(self, name)}; it must be above 0 and finite")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"transformer dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.experts and self.experts_per_token > self.experts:
            raise UsageError(f"transformer experts_per_token is {self.experts_per_token}, of {self.experts} experts")
        if self.qk_norm_per_head and self.qk_norm == "none":
            raise UsageError('transformer qk_norm_per_head speaks of a norm; qk_norm is "none"')
        if self.code_nets and self.code_nets.codes >= self.vocabulary_size:
            raise UsageError(f"transformer code_nets have {self.code_nets.codes} of {self.vocabulary_size} ids")
        self._check_groups()
        self._check_tensors()

    @property
    def embedded(self) -> int:
        """How many ids, the first ones, have rows of the embedding."""
        return self.vocabulary_size - (self.code_nets.codes if self.code_nets else 0)

    def _check_groups(self) -> None:
        if not self.expert_groups:
            return
        object.__setattr__(self, "expert_groups", tuple(map(tuple, self.expert_groups)))  # lists, where it was JSON
        firsts, sizes = zip(*self.expert_groups, strict=True)
        if firsts[0] != 0 or list(firsts) != sorted(set(firsts)) or firsts[-1] >= self.vocabulary_size:
            raise UsageError(
                f"transformer expert_groups begin with the ids {firsts}; they must begin with 0 and rise, below "
                f"{self.vocabulary_size}"
            )
        if sum(sizes) != self.experts or min(sizes) < self.experts_per_token:
            raise UsageError(
                f"transformer expert_groups have {sizes} experts; each must have {self.experts_per_token} or more, and "
                f"all together {self.experts}"
            )

    def _check_tensors(self) -> None:
        if min(self.attention_blocks) < 1:
            raise UsageError(f"transformer attention_blocks are {self.attention_blocks}; they must be at least 1")
        for name in (*self.saved, *self.offloaded):
            if name not in TENSORS:
                raise UsageError(f"no tensor {name!r} to save or offload; choose among {', '.join(TENSORS)}")
        if (self.saved or self.offloaded) and self.remat != "blocks":
            raise UsageError(f'saved and offloaded speak of remat "blocks"; remat is {self.remat!r}')
        if both := set(self.saved) & set(self.offloaded):
            raise UsageError(f"{', '.join(sorted(both))} cannot be saved and offloaded too")
