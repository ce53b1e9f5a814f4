"""A trained pipeline's repository on the Hugging Face hub, which is opened before training starts."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token


def open_repository(name: str) -> None:
    """Make sure that `upload` will be able to write to a repository, which is made unless it is there.

    Raises:
        OSError: without a token, a permission to write, or a connection.
    """
    try:
        if get_token() is None:
            raise PermissionError("there is no token.")
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        # asks where a file would go, for which a permission to write is needed, and uploads nothing
        api.preupload_lfs_files(name, [CommitOperationAdd("README.md", b"#")])
    except Exception as error:  # of the hub and of its client for the web, which differ from release to release
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(
            f"Expected a repository on the hub that can be written, got {name!r}: {reason} Log in by `hf auth login` "
            "with a token that may write, or leave out --push-to-hub."
        ) from error


def upload(name: str, folder: Path) -> None:
    """Upload the files of a folder to a repository."""
    HfApi().upload_folder(repo_id=name, folder_path=folder)
