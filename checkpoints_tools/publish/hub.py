"""Uploads a checkpoint to the Hugging Face hub."""

import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from grinqh_jax.errors import UsageError


def check(repo: str) -> None:
    """Checks the name of a repository, and that the hub knows the user, before hours of work.

    Raises:
      UsageError: The name is not ``OWNER/NAME``, or the hub cannot be reached or does not accept the token.
    """
    if repo.count("/") != 1:
        raise UsageError(f"--push-to-hub {repo}: expected OWNER/NAME")
    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except Exception as error:  # hub errors, connection errors of its HTTP library, no token
        raise UsageError(f"--push-to-hub {repo}: {_line(error)}; log in with `hf auth login`") from None


def push(directory: Path, repo: str) -> str:
    """Uploads all files of a checkpoint, in a new repository if there is none; returns its address.

    Raises:
      UsageError: The hub refuses the upload or cannot be reached. Another attempt resumes it.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Upload a GRINQH checkpoint")
    except Exception as error:
        raise UsageError(
            f"--push-to-hub {repo}: {_line(error)}; {directory} is complete, push it with `grinqh-jax publish"
            f" --model {directory} --push-to-hub {repo}`"
        ) from None
    return str(url)


def _line(error: Exception) -> str:
    """Returns the messages of an error and of its cause on one line."""
    errors = [error, *([error.__cause__] if error.__cause__ else [])]
    messages = (" ".join(str(one).split()) or type(one).__name__ for one in errors)
    return f"{': '.join(messages):.400}"
