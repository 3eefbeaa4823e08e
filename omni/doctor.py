"""`omni doctor`: is everything here that Omni needs, and what is to be installed if not."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys

# What each extra of setup.py brings: distribution -> module that must import.
EXTRAS = {
    "quickstart": {
        "espeakng-loader": "espeakng_loader",
        "pystoi": "pystoi",
        "scikit-image": "skimage",
        "scikit-learn": "sklearn",
    },
    "notebook": {"nbclient": "nbclient", "nbformat": "nbformat", "ipykernel": "ipykernel"},
    "test": {"hypothesis": "hypothesis", "pytest": "pytest", "ruff": "ruff"},
}
CORE = {
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    "orbax-checkpoint": "orbax.checkpoint",
    "grain": "grain",
    "tensorflow-datasets": "tensorflow_datasets",
    "array_record": "array_record",
    "sentencepiece": "sentencepiece",
    "soundfile": "soundfile",
    "safetensors": "safetensors",
}


def check() -> list[dict]:
    """The checks, each `{"name", "ok", "required", "found", "advice"}`."""
    checks = [
        {
            "name": "Python",
            "ok": sys.version_info >= (3, 11),
            "required": True,
            "found": platform.python_version(),
            "advice": "install Python 3.11 or newer",
        }
    ]
    checks += [_package(name, module, "pip install omni-any-to-any", required=True) for name, module in CORE.items()]
    checks.append(_devices())
    for extra, packages in EXTRAS.items():
        advice = f'pip install "omni-any-to-any[{extra}]"'
        checks += [_package(name, module, advice, required=False) for name, module in packages.items()]
    return checks


def _package(name: str, module: str, advice: str, *, required: bool) -> dict:
    entry = {"name": name, "ok": True, "required": required, "advice": advice}
    try:
        importlib.import_module(module)
        entry["found"] = importlib.metadata.version(name)
    except Exception as error:  # a broken install fails in many ways; all of them are the finding
        entry |= {"ok": False, "found": f"{type(error).__name__}: {error}"}
    return entry


def _devices() -> dict:
    entry = {
        "name": "devices",
        "ok": True,
        "required": True,
        "advice": "see the message; JAX_PLATFORMS=cpu always works",
    }
    try:
        import jax

        kinds = [device.device_kind for device in jax.devices()]
        float(jax.numpy.ones((8, 8)).sum())
        entry["found"] = f"{len(kinds)} x {kinds[0]} ({jax.default_backend()})"
    except Exception as error:
        entry |= {"ok": False, "found": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return entry


def print_checks(checks: list[dict]) -> None:
    """Prints a line a check, and what to do for those that failed."""
    for entry in checks:
        mark = "ok     " if entry["ok"] else "MISSING" if entry["required"] else "absent "
        print(f"{mark} {entry['name']:<22} {entry['found']}")
        if not entry["ok"]:
            print(f"        -> {entry['advice']}")
