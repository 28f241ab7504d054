# SPDX-License-Identifier: Apache-2.0
"""Pushing a result to the Hub in the name of its visitor: the form on the page, and what it and the API do."""

from __future__ import annotations

import gradio as gr

import figures
from events import PRIVATE, key_of
from limits import checked_repo, checked_token
from optimum_calibprune import push_folder
from runs import PruneRun
from visitors import Visitors
from watch import EXPECTED, sentence


LOG_IN = ". Or log in at the top of the page, before you prune: it is loaded anew then"


def push_form(visitors: Visitors, login: bool) -> gr.HTML:
    """The form; what it has said is returned, for a view to clear."""
    gr.Markdown("## Push it to the Hub")
    with gr.Row():
        repo = gr.Textbox(
            label="Repo",
            elem_id="repo",
            placeholder="you/pocket-50",
            max_length=96,
            info="of yours; it is made where there is none",
        )
        token = gr.Textbox(
            label="Your token",
            elem_id="token",
            type="password",
            max_length=200,
            info="with the right to write; used once, kept nowhere" + (LOG_IN if login else ""),
        )
    with gr.Row():
        private = gr.Checkbox(label="Private")
        create_pr = gr.Checkbox(label="Open a pull request instead of committing")
    button = gr.Button("Push")
    said = gr.HTML(padding=False)

    def push(
        repo: str, token: str, private: bool, create_pr: bool, request: gr.Request, owner: str | None = None
    ) -> str:
        try:
            url = upload(visitors.result(key_of(request)), repo, token or owner, private, create_pr)
        except Exception as error:
            return figures.message(sentence(error), "error")
        return figures.link("Pushed", url)

    def push_logged_in(
        repo: str, token: str, private: bool, create_pr: bool, request: gr.Request, oauth: gr.OAuthToken | None
    ) -> str:
        return push(repo, token, private, create_pr, request, oauth.token if oauth is not None else None)

    button.click(push_logged_in if login else push, [repo, token, private, create_pr], said, **PRIVATE)
    return said


def upload(run: PruneRun, repo: str, token: str | None, private: bool, create_pr: bool) -> str:
    """Pushes the model of a run; the address of the commit, or of the pull request."""
    name = checked_repo(repo)
    owner = checked_token(token)  # never the token of this Space
    with run.in_use() as folder:
        try:
            commit = push_folder(folder, name, private=True if private else None, token=owner, create_pr=create_pr)
        except EXPECTED as error:
            raise ValueError(sentence(error, folder)) from error
    return commit.pr_url or commit.commit_url
