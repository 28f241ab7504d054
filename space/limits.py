# SPDX-License-Identifier: Apache-2.0
"""What a visitor may ask for: every value of the form is checked here, before anything is loaded."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import httpx

from optimum_calibprune import ModelShape, calibration_sources


POCKET = "pocket"
CAPABILITIES = ("general", "commonsense", "code", "math")
MIXES = {
    "uniform": "sources in equal parts",
    "igsp": "written by the model, selected",
    "self-cal": "written by the model, unguided",
    "sgs": "begun by sources, written on by the model",
    "balanced": "as uniform, each capability with the same weight",
    "mixcal": "as uniform, half of the weight on general text",
    "cola": "texts that excite the model differently",
}
ALONE = "single:"  # and the name of a source
SPARSITIES = ("30%", "40%", "50%", "60%", "70%", "2:4", "4:8")

SAMPLES = (4, 64)
LENGTH = 256  # tokens in a sample
SOURCES = 8  # at once
ITEMS = 20  # of each benchmark; the pocket's probes are measured as a whole
WEIGHT_BYTES = 2**30  # of a model's checkpoint
BLOCKS = 128  # of a model
SECONDS = 900  # a run
GRACE = 60  # seconds beyond that, after which one that does not stop is given up
COMPARED = (2, 4)  # mixes at once; so many of a visitor's records are kept
PROMPT_CHARACTERS = 2000
NEW_TOKENS = (1, 256)  # of an answer
TEMPERATURE = (0.0, 2.0)
ANSWER_SECONDS = 120
WAITING = 20  # runs in the queue
BIG_SAMPLES = (16, 1024)  # of the model's own length, where it runs elsewhere
PROCESSES = (1, 8)  # GPUs of a visitor's machine
HOURS = (1, 24)  # of a job that a visitor pays
SESSIONS = 200  # the latest, whose pages gradio remembers, a quarter of a megabyte each
KEPT_SECONDS = 3600  # a result, after which its folder goes
KEPT_RESULTS = 8  # at once, the latest; one a visitor
NAME_CHARACTERS = 96

MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
TOKEN = re.compile(r"[!-~]{1,200}")
REPO_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Job:
    """A run that was asked for, within the limits."""

    model: str = POCKET
    mix: str = "uniform"
    sources: tuple[str, ...] = ()
    sparsity: str = "50%"
    samples: int = 16
    capabilities: tuple[str, ...] = CAPABILITIES

    @property
    def config(self) -> dict[str, Any]:
        """What is asked for, as arguments of `ModelShape.from_pretrained`."""
        asked = {"mix": self.mix, "sparsity": self.sparsity, "samples": self.samples, "length": LENGTH}
        if self.sources:
            asked["sources"] = list(self.sources)
        everything = set(self.capabilities) == set(CAPABILITIES)
        measured: Any = "auto" if everything else self.capabilities
        items = {} if self.model == POCKET else {"suite": "quick", "limit": ITEMS}
        return asked | items | {"capabilities": measured}

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `CalibPruner.from_pretrained`: no code of a model's repo, no pickles, no code that it writes."""
        closed = {"trust_remote_code": False, "allow_pickle": False, "allow_code_execution": False, "stream": False}
        return self.config | (closed if self.model != POCKET else {})


@dataclass(frozen=True)
class BigJob:
    """A run that this page only starts elsewhere, or says how to start."""

    model: str
    mix: str = "uniform"
    sources: tuple[str, ...] = ()
    sparsity: str = "50%"
    samples: int = 128
    measure: bool = True
    repo: str = ""
    private: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `ModelShape.from_pretrained`."""
        measured = "auto" if self.measure else "none"
        asked = {"mix": self.mix, "sparsity": self.sparsity, "samples": self.samples, "capabilities": measured}
        return asked | ({"sources": list(self.sources)} if self.sources else {})

    def words(self, output: str) -> list[str]:
        """The command line of the run, which writes to the folder `output`."""
        words = ["optimum-cli", "calibprune", "prune", self.model, "--sparsity", self.sparsity, "--mix", self.mix]
        words += ["--sources", *self.sources] if self.sources else []
        words += ["--samples", str(self.samples)]
        words += [] if self.measure else ["--capabilities", "none"]
        words += ["--push-to-hub", self.repo] if self.repo else []
        words += ["--private"] if self.repo and self.private else []
        return [*words, "--output", output]

    def command(self, processes: int = 1) -> str:
        """What to type on a machine of one's own, for so many GPUs; names in it do nothing to a shell."""
        words = self.words(f"{self.model.rpartition('/')[2]}-{self.sparsity.strip('%').replace(':', 'of')}")
        if processes > 1:
            words = ["torchrun", "--nproc-per-node", str(processes), "--no-python", *words]
        return shlex.join(words)


def checked_big(
    model: object,
    mix: object,
    sources: object,
    sparsity: object,
    samples: object,
    measure: object,
    repo: object = "",
    private: object = False,
) -> BigJob:
    """The run elsewhere that a form describes; `ValueError` as for `checked`."""
    name = _model_name(model)
    _one_of("mix", mix, tuple(MIXES))
    _one_of("sparsity", sparsity, SPARSITIES)
    count = whole("The number of samples", samples, BIG_SAMPLES)
    chosen = _several("source", sources, tuple(calibration_sources(name)))
    target = checked_repo(repo) if repo else ""
    return BigJob(name, str(mix), chosen, str(sparsity), count, bool(measure), target, bool(private))


def checked_token(token: object) -> str:
    """A visitor's own token; `ValueError`, which never shows it, where there is none. This Space's own is never used."""
    text = token.strip() if isinstance(token, str) else ""
    if not text:
        raise ValueError("Log in, or give a token of yours: nothing is done in another's name.")
    if not TOKEN.fullmatch(text):
        raise ValueError("The token holds characters that no token has; copy it again from the Hub's settings.")
    return text


@dataclass(frozen=True)
class Question:
    """A prompt for the dense and the sparse model, within the limits. Temperature 0: the likeliest token each time."""

    prompt: str
    new_tokens: int = 64
    temperature: float = 0.0


def mixes(model: str) -> dict[str, str]:
    """What may be asked of a model: each mix, with what it is; each source alone is one, too."""
    table = calibration_sources(model)
    return MIXES | {f"{ALONE}{name}": f"{source.capability} alone" for name, source in table.items()}


def checked(
    model: object, mix: object, sources: object, sparsity: object, samples: object, capabilities: object
) -> Job:
    """The job that a form describes; `ValueError` says what was given, what is allowed and what to do."""
    name = _model_name(model)
    _one_of("mix", mix, tuple(mixes(name)))
    _one_of("sparsity", sparsity, SPARSITIES)
    number = whole("The number of samples", samples, SAMPLES)
    chosen = _several("source", sources, tuple(calibration_sources(name)))
    if chosen and str(mix).startswith(ALONE):
        raise ValueError(f"The mix {mix} names its source; leave the other sources out.")
    if len(chosen) > SOURCES:
        raise ValueError(f"{len(chosen)} sources were chosen; this page allows {SOURCES} at once.")
    measured = _several("capability", capabilities, CAPABILITIES)
    if not measured:
        raise ValueError(f"No capability was chosen; choose at least one of {', '.join(CAPABILITIES)}.")
    if name != POCKET and "code" in measured and len(measured) < len(CAPABILITIES):
        raise ValueError(
            "Code is measured for the bundled 'pocket' only: for other models this page would have to run what they write. "
            "Leave code out, or prune on your own machine with --allow-code-execution."
        )
    return Job(name, str(mix), chosen, str(sparsity), number, measured)


def checked_mixes(
    model: object, chosen: object, sparsity: object, samples: object, capabilities: object
) -> tuple[Job, ...]:
    """The jobs of a comparison, which differ in their mix alone; `ValueError` as above."""
    names = chosen if isinstance(chosen, list | tuple) else []
    different = list(dict.fromkeys(map(str, names)))
    if not COMPARED[0] <= len(different) <= COMPARED[1]:
        raise ValueError(
            f"{len(different)} different mixes were chosen; a comparison takes {COMPARED[0]} to {COMPARED[1]}."
        )
    return tuple(checked(model, mix, (), sparsity, samples, capabilities) for mix in different)


def checked_question(prompt: object, new_tokens: object, temperature: object) -> Question:
    """What is put to both models; `ValueError` as above."""
    text = prompt if isinstance(prompt, str) else ""
    if not text.strip():
        raise ValueError("There is no prompt; write something that the models shall go on with.")
    if len(text) > PROMPT_CHARACTERS:
        raise ValueError(f"The prompt has {len(text):,} characters; this page takes up to {PROMPT_CHARACTERS:,}.")
    if any(unicodedata.category(character) == "Cs" for character in text):
        raise ValueError("The prompt holds half a character (a lone surrogate), which is no text.")
    number = whole("The number of new tokens", new_tokens, NEW_TOKENS)
    return Question(text, number, _number("The temperature", temperature, TEMPERATURE))


def checked_repo(name: object) -> str:
    """The name of a repo to push to; `ValueError` where it is none."""
    text = name.strip() if isinstance(name, str) else ""
    if not REPO_NAME.fullmatch(text) or _unusual(text):
        raise ValueError(f"{_shown(name)} is no name of a repo; write one such as 'you/pocket-50', or 'pocket-50'.")
    return text


def check_size(model: str, revision: str | None = None) -> None:
    """Asks the Hub, as nobody in particular, how large a model is, by its files and by its config, since files that lack do
    not keep it from being made; `ValueError` where it is too large or not there."""
    if model == POCKET:
        return
    try:
        files = list(HfApi(token=False).list_repo_tree(model, revision=revision, recursive=True))
        with tempfile.TemporaryDirectory() as cache:
            config = hf_hub_download(model, "config.json", revision=revision, cache_dir=cache, token=False)
            blocks = _blocks(json.loads(Path(config).read_text(encoding="utf-8")))
            size = sum(getattr(file, "size", 0) for file in files if file.path.endswith(".safetensors"))
            if blocks <= BLOCKS:  # many would take long to make, even without weights
                shape = ModelShape.from_pretrained(model, revision=revision, cache_dir=cache, token=False)
                size = max(size, shape.weight_bytes)
    except (OSError, httpx.HTTPError) as error:
        raise ValueError(
            f"The Hub does not show a public model {model!r} here; look at its name, or take the bundled 'pocket'."
        ) from error
    if size > WEIGHT_BYTES or blocks > BLOCKS:
        large = f"{blocks:,} blocks" if blocks > BLOCKS else f"{size / 2**30:,.1f} GiB of weights"
        raise ValueError(
            f"{model} has {large}; this page prunes up to {WEIGHT_BYTES / 2**30:.0f} GiB, and {BLOCKS} blocks. "
            f"On your own machine: optimum-cli calibprune prune {model} --sparsity 50% --output pruned"
        )


def _blocks(config: Any) -> int:
    """How many blocks a config asks for, by all names that there are for that, wherever they stand."""
    if not isinstance(config, dict):
        return 0
    own = [config[name] for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in config]
    return max([0, *(x for x in own if isinstance(x, int)), *map(_blocks, config.values())])


def _model_name(given: object) -> str:
    name = given.strip() if isinstance(given, str) else ""
    if name == POCKET:
        return name
    if not MODEL_NAME.fullmatch(name) or _unusual(name) or Path(name).exists():
        raise ValueError(
            f"{_shown(given)} is no name of a model on the Hub; write one such as 'owner/name', or 'pocket'."
        )
    return name


def _unusual(name: str) -> bool:
    """What the Hub does not allow in a name."""
    return len(name) > NAME_CHARACTERS or ".." in name or "--" in name or name.endswith((".", "-", ".git"))


def whole(what: str, given: object, allowed: tuple[int, int]) -> int:
    return int(_number(what, given, allowed, whole=True))


def _number(what: str, given: object, allowed: tuple[float, float], whole: bool = False) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or (whole and given % 1 != 0):
        raise ValueError(f"{what} is a {'whole ' if whole else ''}number; {_shown(given)} was given.")
    if not allowed[0] <= given <= allowed[1]:
        raise ValueError(f"{what} is {_shown(given)}; this page allows {allowed[0]:g} to {allowed[1]:g}.")
    return float(given)


def _one_of(what: str, given: object, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"Unknown {what} {_shown(given)}; allowed: {', '.join(allowed)}.")


def _several(what: str, given: object, allowed: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise ValueError(f"Give a list for {what}; {_shown(given)} was given.")
    for entry in given:
        _one_of(what, entry, allowed)
    return tuple(dict.fromkeys(given))


def _shown(given: object) -> str:
    """What was given, short and on one line."""
    text = " ".join(str(given).split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
