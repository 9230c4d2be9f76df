"""Download and upload model folders from and to the Hugging Face Hub; unchanged, without code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from beingvl.errors import InputError
from beingvl.inference.asked import check_names

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
PUSH_OPTIONS = ("token", "revision", "commit_message", "commit_description", "create_pr")


def fetched(name: Path | str, options: Mapping[str, Any], others: Sequence[str] = ()) -> Path:
    """The local folder `name`, else a snapshot of the repository of that name, with `options` for
    the Hub. Raises InputError for any other option; `others` are what the caller also takes.
    """
    check_names("from_pretrained", options, (*others, *HUB_OPTIONS))
    if Path(name).is_dir():
        return Path(name)
    with _about(f"{name} is neither a folder here nor reachable on the Hub"):
        return Path(snapshot_download(str(name), **options))


def push(
    folder: Path, repo_id: str, extra: Path | None, private: bool | None, **options: Any
) -> str:
    """Upload a finished folder, and the file `extra` beside it; returns the URL. Raises InputError
    for an option that is not in PUSH_OPTIONS.
    """
    check_names("push_to_hub", options, PUSH_OPTIONS)
    api = HfApi(token=options.pop("token", None))
    with _about(f"{folder} cannot be uploaded to {repo_id}"):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=["*.tmp"], **options)
        if extra:
            api.upload_file(
                path_or_fileobj=extra, path_in_repo=extra.name, repo_id=repo_id, **options
            )
    return str(address)


@contextmanager
def _about(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # also those of its HTTP library
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{what} ({reason})") from error
