"""Models by the name of their repository on the Hugging Face hub, owner/name or owner/name@revision."""

from __future__ import annotations

import re

from etils import epath

from omni_tokenizers.errors import OmniError

ALLOWED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken")
"""What is downloaded: no pickles, no code."""
LOCAL = frozenset({"checkpoints", "experiments", "models", "out", "runs"})
"""Usual folders of one's own, which no name of a repository begins with, whether they exist or not."""
_REPOSITORY = r"(?P<repository>(?P<owner>[\w-][\w.-]*)/[\w-][\w.-]*)"
_NAME = re.compile(rf"{_REPOSITORY}(@(?P<revision>[\w-][\w.-]*(/[\w-][\w.-]*)*))?", re.ASCII)
_FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json")


def located(name: epath.PathLike) -> epath.Path:
    """The path that a name is, or the directory into which the repository of that name was downloaded.

    Only a string names a repository. Whatever exists here goes before the hub, and a name below a folder that exists,
    or below one of `LOCAL`, is a mistyped path.

    Raises:
      OmniError: no such repository or revision, no network, or one whose terms were not accepted.
    """
    path, match = epath.Path(name), _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or path.exists() or path.suffix in _FILES:
        return path
    if match["owner"] in LOCAL or epath.Path(match["owner"]).exists():
        return path
    return epath.Path(_downloaded(match["repository"], match["revision"], name))


def _downloaded(repository: str, revision: str | None, name: str) -> str:
    """The directory of a repository's files."""
    absent = f"{name}: no such directory, and"
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError:
        raise OmniError(
            f"{absent} repositories of that form are downloaded with the package huggingface_hub: "
            "pip install 'omni-any-to-any[checkpoints]'"
        ) from None
    hub = constants.ENDPOINT
    try:
        return snapshot_download(repository, revision=revision, allow_patterns=list(ALLOWED))
    except errors.GatedRepoError:
        raise OmniError(
            f"{absent} {hub}/{repository} must be asked for: accept its terms on that page, then log in with "
            "hf auth login, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise OmniError(f"{absent} {hub}/{repository} has no revision {revision!r}; without one it is main") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise OmniError(f"{absent} {hub} has no repository of that name, or it is private (set HF_TOKEN)") from None
    except Exception as error:  # clients of HTTP raise anything where there is no network
        what = " ".join(str(error.__cause__ or error).split())[:120]
        raise OmniError(
            f"{absent} it cannot be downloaded from {hub} ({what}); download it on another "
            "machine and name its directory, or set HF_HOME to a cache that holds it"
        ) from None
