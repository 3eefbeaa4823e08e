"""A VQGAN of 256 x 256 pixels as 16 x 16 codes of 16,384, trained on a directory of pictures: for accelerators.

    omni tokenizer train experiments/tokenizers/image_256.py --task.data.files.directory PICTURES \
        --task.losses.perceptual-weights LPIPS.safetensors

Net and losses are LlamaGen's VQ-16 (Sun et al. 2024, arXiv:2406.06525, section 2.1): codes of 8 numbers at length 1,
L2, perceptual distance and PatchGAN from step 20,000. Without weights of a perceptual distance it trains without one,
and the log says so.

On a CPU it was run at a tiny scale only, to see that it runs; no result of the whole training is known.
"""

from omni.data.files import Files, PictureFiles
from omni.train.loop import TrainConfig
from omni.train.optimizer import OptimizerConfig
from omni.train.tokenizers import ImageAdversary, ImageTokenizerTask
from omni_tokenizers.losses.image import ImageLosses
from omni_tokenizers.quantizers import LearnedQuantizerConfig
from omni_tokenizers.vqgan import VQGANConfig

net = VQGANConfig(image_size=256, quantizer=LearnedQuantizerConfig(codebook_size=16384, dim=8, normalize="always"))
config = TrainConfig(
    "runs/image_256",
    ImageTokenizerTask(
        PictureFiles(Files("pictures"), size=256),
        net,
        losses=ImageLosses(absolute=0.0),
        adversary=ImageAdversary(weight=0.5, start=20_000),
        compute_dtype="bfloat16",
    ),
    steps=400_000,
    batch_size=128,
    log_every=100,
    checkpoint_every=5_000,
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1_000, weight_decay=0.05, ema_decay=0.999),
)
