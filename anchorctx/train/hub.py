"""Pushing an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from anchorctx.errors import UserError
from anchorctx.models.load import reason


def check(repository: str) -> None:
    """UserError where nothing could be pushed: a name that is none, no network, nobody logged in; changes nothing."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"push_to={repository} is no name of a repository on the hub: use USER/NAME") from error
    try:
        HfApi().whoami()
    except Exception as error:  # anything from a missing token to a network library's own errors
        raise UserError(
            f"push_to={repository} cannot be reached ({_why(error)}): log in with `hf auth login` on a machine "
            "with a network, or leave push_to out and upload the folder later with `hf upload`"
        ) from error


def push(folder: Path, repository: str) -> None:
    """Upload the folder's files in one commit; a repository that does not exist is made, private.

    Raises:
        UserError: the upload failed; the folder stays.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by anchorctx")
    except Exception as error:  # as above, and a repository of somebody else's
        raise UserError(
            f"{folder} was written but not pushed to {repository} ({_why(error)}): upload it with "
            f"`hf upload {repository} {folder}`"
        ) from error
    print(f"pushed to https://huggingface.co/{repository}")


def _why(error: Exception) -> str:
    return reason(error, first=True).partition(". ")[0]
