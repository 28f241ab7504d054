# SPDX-License-Identifier: Apache-2.0
"""Uploads what was saved to the Hub in one commit, draws cards again, and collects the models of one base."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..records import RunRecord
from .card import render
from .dataset import save_dataset
from .failures import PushError, answer_lost, persistently
from .hub import RECORD_NAME, UNREADABLE, pictures_in, read_record, record_of
from .readme import has_own_text, updated


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi


CARD_NAME = "README.md"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    finish: str | None = None,
) -> CommitInfo:
    """Creates `repo_id` where it does not exist, and uploads a saved folder in one commit; none where nothing changed.

    The card is drawn with the repo's name in it; what users wrote in a README, in the folder or else on the Hub, stays. Files
    and folders whose name begins with a dot are left out. The folder itself is not changed.

    Args:
        folder: what `save_pretrained` wrote, or for `repo_type="dataset"` what `save_dataset` wrote.
        repo_id: a bare name belongs to the owner of the token.
        repo_type: `"model"` or `"dataset"`.
        private: create it as a private repo; refused where it exists and is public.
        token: that may write; without it the one that is logged in.
        revision: a branch, made where it does not exist.
        create_pr: open a pull request against the main branch instead of committing to it.
        commit_message: the commit's first line.
        finish: the command that an error ends with; default: the one that does what this function was asked to do.

    Raises:
        ValueError: for arguments that do not fit.
        FileNotFoundError: for a folder that holds no run.
        PushError: for everything else that keeps the folder from the Hub.
    """
    folder = Path(folder)
    _check_target(revision, create_pr)
    files = _files(folder)
    if repo_type == "model" and RECORD_NAME not in files:
        raise FileNotFoundError(f"{folder} holds no {RECORD_NAME}; name a folder that a run was saved to.")
    options = {"private": private, "revision": revision, "create_pr": create_pr, "message": commit_message}
    finish = finish or finishing(folder, repo_id, repo_type=repo_type, **options)

    def attempt(api: HfApi) -> CommitInfo:
        name = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True, repo_type=repo_type)
        found = api.repo_info(name, revision=revision, repo_type=repo_type)
        if private and not found.private:
            raise PermissionError(
                f"{name} exists and is public; push to another name, or make it private on the Hub first."
            )
        contents: dict[str, Path | bytes] = dict(files)
        if CARD_NAME in files:
            contents[CARD_NAME] = _card(api, folder, name, found.sha, repo_type).encode()
        return _commit(
            api,
            contents,
            repo_id=name,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
            parent_commit=found.sha,
            commit_message=commit_message or "Upload a model pruned with optimum-calibprune",
        )

    return persistently(attempt, f"{repo_id} was not pushed", token, f"{folder} is complete; finish with: {finish}")


def finishing(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    calibration: bool = False,
    collection: bool = False,
) -> str:
    """The command line that pushes a saved folder, with all that was asked for."""
    model = repo_type == "model"
    words = ["optimum-cli", "calibprune", "push", str(folder), repo_id]
    if not model:
        words = ["hf", "upload", repo_id, str(folder), "--repo-type", repo_type]
    words += ["--private"] if private else []
    words += ["--revision", revision] if revision else []
    words += ["--create-pr"] if create_pr else []
    words += ["--message" if model else "--commit-message", message] if message else []
    words += ["--calibration"] if calibration else []
    words += ["--collection"] if collection else []
    return shlex.join(words)


def push_calibration(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    finish: str | None = None,
) -> CommitInfo:
    """Publishes the calibration set of a saved run as the data set `repo_id`.

    Where that fails, the data set stays in a temporary folder, and the error ends with the command that finishes the push:
    `finish`, by default the one that uploads that folder. Raises `ValueError` where a licence does not allow it, `PushError` where the Hub cannot be had.
    """
    target = Path(tempfile.mkdtemp(prefix="calibprune-")) / "calibration"
    try:
        save_dataset(folder, target, repo_id)
    except BaseException:
        shutil.rmtree(target.parent, ignore_errors=True)
        raise
    commit = push_folder(
        target,
        repo_id,
        repo_type="dataset",
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message="Upload a calibration set chosen with optimum-calibprune",
        finish=finish,
    )
    shutil.rmtree(target.parent, ignore_errors=True)
    return commit


def redraw(name: str, *, token: str | None = None, revision: str | None = None, create_pr: bool = False) -> str:
    """Draws the card of a saved run again, from its record: of a folder in place, of a repo in one commit of its README.

    Returns what was done, as a sentence. Raises `FileNotFoundError` where there is no record, `ValueError` where it cannot be
    read or arguments do not fit, `PushError` where the Hub cannot be had.
    """
    if Path(name).is_dir():
        return _redraw_folder(Path(name))
    _check_target(revision, create_pr)

    def attempt(api: HfApi) -> str:
        found = api.repo_info(name, revision=revision)
        record = Path(api.hf_hub_download(name, RECORD_NAME, revision=found.sha))
        pictures = [file.rfilename for file in found.siblings or ()]
        there = _on_hub(api, name, found.sha, "model")
        card = updated(there, _drawn(read_record(record), found.id, pictures))
        if card == there:
            return f"The card of {found.id} is up to date."
        commit = _commit(
            api,
            {CARD_NAME: card.encode()},
            repo_id=name,
            revision=revision,
            create_pr=create_pr,
            parent_commit=found.sha,
            commit_message="Draw the card again",
        )
        return f"Pushed: {commit.pr_url or commit.commit_url}"

    words = ["optimum-cli", "calibprune", "card", name]
    words += ["--revision", revision] if revision else []
    words += ["--create-pr"] if create_pr else []
    return persistently(
        attempt, f"The card of {name} was not drawn again", token, f"Repeat it with: {shlex.join(words)}"
    )


def _redraw_folder(folder: Path) -> str:
    card = _drawn(record_of(folder), None, pictures_in(folder))
    readme, new = folder / CARD_NAME, folder / f".{CARD_NAME}.new"
    existing = readme.read_text(encoding="utf-8") if readme.is_file() else None
    new.write_text(updated(existing, card), encoding="utf-8")
    new.replace(readme)
    return f"Drew {readme}."


def collect(repo_id: str, base: str, *, token: str | None = None, finish: str | None = None) -> str:
    """Adds a pushed model to its owner's collection of all models pruned from `base`, which is made where there is none.

    `finish` is the command that an error ends with. Returns the collection's address. Raises `PushError` where the Hub cannot be had.
    """

    def attempt(api: HfApi) -> str:
        name = api.repo_info(repo_id).id
        title = f"{base.split('/')[-1]} pruned"[:60]
        collection = api.create_collection(
            title, namespace=name.split("/")[0], description=f"{base} at several sparsities"[:150], exists_ok=True
        )
        api.add_collection_item(collection.slug, name, "model", exists_ok=True)
        return collection.url

    remedy = "The model itself is on the Hub" + (f"; finish with: {finish}" if finish else ".")
    return persistently(attempt, f"{repo_id} was not added to a collection", token, remedy)


def _check_target(revision: str | None, create_pr: bool) -> None:
    if create_pr and revision is not None:
        raise ValueError(
            f"A pull request goes to the main branch; revision {revision!r} was given beside create_pr. Leave one of them out."
        )


def _commit(api: HfApi, contents: Mapping[str, Path | bytes], *, create_pr: bool, **options: str | None) -> CommitInfo:
    """One commit of these files. It names its parent, so that one whose answer was lost is not made twice; a pull request has
    no such mark, and whether it is open is then for the user to see."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    try:
        return api.create_commit(operations=operations, create_pr=create_pr, **options)
    except Exception as error:
        if create_pr and answer_lost(error, "/commit/"):
            raise PushError(
                "the connection broke, and the pull request may be open already; look before a repeat."
            ) from None
        raise


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their path in the repo, without those that are hidden."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in found.items() if not any(p.startswith(".") for p in name.parts)}


def _card(api: HfApi, folder: Path, repo_id: str, revision: str | None, repo_type: str) -> str:
    """The README to upload: the card with the repo's name, in what users wrote here, or else there."""
    here = (folder / CARD_NAME).read_text(encoding="utf-8")
    if repo_type == "model":
        here = updated(here, _drawn(record_of(folder), repo_id, pictures_in(folder)))
    return here if has_own_text(here) else updated(_on_hub(api, repo_id, revision, repo_type), here)


def _on_hub(api: HfApi, repo_id: str, revision: str | None, repo_type: str) -> str | None:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, repo_type=repo_type)
    except RemoteEntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def _drawn(run: RunRecord, repo_id: str | None, pictures: Sequence[str]) -> str:
    """The card; `ValueError` where a record holds what no run writes."""
    try:
        return render(run, repo_id, pictures)
    except UNREADABLE as error:
        raise ValueError(f"No card can be drawn from {RECORD_NAME}: {type(error).__name__}: {error}") from error
