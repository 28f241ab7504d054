# SPDX-License-Identifier: Apache-2.0
"""The page: its views under each other's tabs, and the endpoints. Each view makes its components and connects its events."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path


ROOT = Path(tempfile.gettempdir()) / "calibprune-space"
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ["GRADIO_TEMP_DIR"] = str(ROOT / "files")  # gradio reads both when it is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else threads that never end remember each tokenizer
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # no visitor sees or does anything by the token of this Space

import gradio as gr  # noqa: E402
import spaces  # noqa: E402, F401  first of all that brings torch, which it prepares where GPUs are lent

from api import endpoints  # noqa: E402
from events import key_of  # noqa: E402
from limits import KEPT_SECONDS, SESSIONS, WAITING  # noqa: E402
from view_big import big_view  # noqa: E402
from view_compare import compare_view  # noqa: E402
from view_prune import prune_view  # noqa: E402
from view_try import try_view  # noqa: E402
from visitors import Visitors  # noqa: E402


HERE = Path(__file__).parent
ABOUT = """# CalibPrune
Prune a language model in the browser and see what it forgets: general knowledge, commonsense, code and math are measured before
and after. The bundled **pocket** model is ready; press Prune."""


def theme() -> gr.themes.Base:
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]  # nothing is fetched from elsewhere
    mono = ["ui-monospace", "Menlo", "monospace"]
    return gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=mono)


def build_demo(visitors: Visitors, login: bool = False) -> gr.Blocks:
    """The page and its API. With `login` there is a button that logs in at the Hub, which works on a Space only."""

    def leave(request: gr.Request) -> None:
        visitors.leave(key_of(request))

    with gr.Blocks(title="CalibPrune", delete_cache=(60, KEPT_SECONDS)) as demo:
        endpoints(visitors)
        gr.Markdown(ABOUT, elem_classes="cp-title")
        if login:  # above all views, since the page is loaded anew, and what it has shown is gone then
            gr.LoginButton(size="sm", elem_id="login")
        with gr.Tabs():
            prune_view(visitors, login)
            compare_view(visitors)
            try_view(visitors)
            big_view(visitors.root, login)
        demo.unload(leave)
    return demo.queue(max_size=WAITING, default_concurrency_limit=8)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing stays behind then, either
    shutil.rmtree(ROOT, ignore_errors=True)  # of a server that was killed
    on_a_space = "SPACE_ID" in os.environ  # elsewhere the button would hand out the token of whoever runs this
    visitors = Visitors(ROOT / "visitors", ROOT / "files")
    demo = build_demo(visitors, login=on_a_space)
    try:
        demo.launch(
            theme=theme(),
            css_paths=HERE / "style.css",
            max_file_size="1kb",
            ssr_mode=False,
            footer_links=["api"],
            state_session_capacity=SESSIONS,
        )
    finally:
        visitors.close()
        shutil.rmtree(ROOT, ignore_errors=True)


if __name__ == "__main__":
    main()
