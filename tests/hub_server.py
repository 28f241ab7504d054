# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub in memory on the loopback interface, so that tests drive the real client over real HTTP."""

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.xet_store import XetStore


TOKEN = "hf_fake"  # reads and writes everything
STRANGER_TOKEN = "hf_stranger"  # valid, but sees no private repository and no gated file, and writes nothing
OWNER = "me"
USERS = {None: None, f"Bearer {TOKEN}": OWNER, f"Bearer {STRANGER_TOKEN}": "stranger"}

LFS_SUFFIXES = (".safetensors", ".parquet")
LFS_BYTES = 1024 * 1024
DATE = "2026-01-01T00:00:00.000Z"
HARDWARE = (  # of Jobs: name, GPU, memory of all GPUs and of the host, disk, micro-dollars a minute
    ("cpu-basic", None, "", "16 GB", "50 GB", 167),
    ("t4-small", ("T4", "1"), "16 GB", "15 GB", "50 GB", 6_667),
    ("l4x1", ("L4", "1"), "24 GB", "30 GB", "400 GB", 13_333),
    ("a100-large", ("A100", "1"), "80 GB", "142 GB", "1000 GB", 41_667),
    ("a100x4", ("A100", "4"), "320 GB", "568 GB", "4000 GB", 166_667),
    ("h200", ("H200", "1"), "141 GB", "256 GB", "3000 GB", 83_333),
)
CLIENT_VARIABLES = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")


@dataclass(frozen=True)
class Commit:
    """One snapshot of a repository."""

    title: str
    files: dict[str, bytes]
    sha: str = field(default_factory=lambda: secrets.token_hex(20))


@dataclass
class Repo:
    """A repository; `refs` maps each branch and pull request to its commits, oldest first."""

    repo_id: str
    repo_type: str
    private: bool
    gated: bool
    refs: dict[str, list[Commit]]
    objects: dict[str, bytes]  # uploaded files by SHA-256, whether committed or not

    @property
    def path(self) -> str:
        return f"datasets/{self.repo_id}" if self.repo_type == "dataset" else self.repo_id

    def branch(self, name: str) -> list[Commit]:
        """The commits of a branch or pull request, to be extended in place."""
        if name not in self.refs:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return self.refs[name]

    def history(self, revision: str) -> list[Commit]:
        """The commits up to `revision`, which is a ref's name or a commit's SHA."""
        for commits in self.refs.values():
            for count, commit in enumerate(commits, start=1):
                if commit.sha == revision:
                    return commits[:count]
        return self.branch(revision)[:]

    def at(self, revision: str) -> Commit:
        return self.history(revision)[-1]


@dataclass(frozen=True)
class Request:
    """What a client sent; `fields` are the parts of the path that the route names, unquoted."""

    method: str
    target: str
    headers: Message
    body: bytes
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    @property
    def repo_type(self) -> str:
        return "dataset" if self.path.startswith(("/datasets/", "/api/datasets/")) else "model"

    @property
    def user(self) -> str | None:
        if self.headers["Authorization"] not in USERS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return USERS[self.headers["Authorization"]]

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """What the server answers; to HEAD, without the body."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: object, status: int = 200, headers: dict[str, str] | None = None) -> Self:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))


@dataclass(frozen=True)
class Fault:
    """What is done instead of answering well, to the next request that fits: an `error`, or `how` an answer fails.

    `cut`: the connection is reset before the request is handled; `lost`: after it was handled, in the middle of the answer's
    body; `slow`: the answer comes in small pieces.
    """

    method: str
    substring: str
    error: "HubError | None" = None
    how: str = ""

    def fits(self, request: Request) -> bool:
        return self.method == request.method and self.substring in request.target


class HubError(Exception):
    """A refusal; `code` selects the client's exception class."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        told = {"X-Error-Message": message} if message.isascii() and message.isprintable() else {}
        coded = {"X-Error-Code": code} if code else {}
        self.reply = Reply.of({"error": message}, status, told | coded | (headers or {}))


class HubServer:
    """A Hub that listens on `url` until its `with` block ends; `requests` is all it was asked, injected faults too."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.collections: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}  # what was asked for and what is told of it, by id
        self.xet = XetStore()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._listener = Listener(self)
        self.url = f"http://127.0.0.1:{self._listener.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def environment(self, home: Path, xet: bool = False) -> dict[str, str]:
        """The whole environment of a client process that is to use this Hub, with its caches in `home`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(CLIENT_VARIABLES)}
        features = ("TELEMETRY", "PROGRESS_BARS") if xet else ("XET", "TELEMETRY", "PROGRESS_BARS")
        disabled = {f"HF_HUB_DISABLE_{feature}": "1" for feature in features}
        direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        return inherited | disabled | direct | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}

    def add_repo(
        self,
        repo_id: str,
        files: dict[str, bytes],
        repo_type: str = "model",
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """Puts a repository of one commit on the Hub, in place of any of the same name."""
        refs = {"main": [Commit("initial commit", dict(files))]}
        objects = {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        repo = self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, private, gated, refs, objects)
        return repo

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        return dict(self.repos[repo_type, repo_id].at(revision).files)

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """The commits up to `revision`, oldest first."""
        return self.repos[repo_type, repo_id].history(revision)

    def fail_next(
        self,
        method: str,
        path_substring: str,
        status: int,
        headers: dict[str, str] | None = None,
        times: int = 1,
        message: str = "Injected failure",
    ) -> None:
        """Answers `status` to the next `times` requests of this method whose path, as sent, has this substring."""
        error = HubError(status, message, headers=headers)
        self._faults += [Fault(method, path_substring, error)] * times

    def break_next(self, method: str, path_substring: str, how: str, times: int = 1) -> None:
        """Breaks the answers to the next `times` requests of this method: `how` as in `Fault`."""
        self._faults += [Fault(method, path_substring, how=how)] * times

    def forget_faults(self) -> None:
        self._faults.clear()

    def answer(self, request: Request) -> tuple[Reply, str]:
        """Handles one request at a time, which makes a commit atomic; beside the reply, how it is to be broken."""
        with self._lock:
            self.requests.append((request.method, request.target, request.headers["Authorization"]))
            fault = next((fault for fault in self._faults if fault.fits(request)), Fault("", ""))
            if fault in self._faults:
                self._faults.remove(fault)
            if fault.how == "cut":
                return Reply(), "cut"
            try:
                if fault.error is not None:
                    raise fault.error
                return dispatch(self, request), fault.how
            except HubError as error:
                return error.reply, fault.how

    def readable(self, request: Request) -> Repo:
        """The repository that the request names, if its user may know of it."""
        user = request.user
        repo = self.repos.get((request.repo_type, request.fields["repo"]))
        if repo is None or (repo.private and user != OWNER):
            # The client also takes a 401 without the code for this error, but only from an https address.
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request: Request) -> Repo:
        check_writer(request)
        return self.readable(request)


class Listener(ThreadingHTTPServer):
    """The sockets of a `HubServer`; closing it cuts the connections that clients keep alive."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up in the middle of a stream
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection: reads each `Request` from it and writes the `Reply`, outside the Hub's lock."""

    server: Listener
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    disable_nagle_algorithm = True

    def serve(self) -> None:
        reply, how = self.server.hub.answer(Request(self.command, self.path, self.headers, self.read_body()))
        body = reply.body if self.command != "HEAD" else b""
        if how == "cut" or (how == "lost" and not body):
            self.reset()
            return
        self.send_response(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        pieces = [body]
        if how == "slow":
            pieces = [body[i * len(body) // 4 : (i + 1) * len(body) // 4] for i in range(4)]
        for piece in pieces[: 1 if how != "lost" else 0]:
            self.wfile.write(piece)
        for piece in pieces[1:]:
            self.wfile.flush()
            time.sleep(0.02)
            self.wfile.write(piece)
        if how == "lost":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.reset()

    def reset(self) -> None:
        """Ends the connection as a broken network does: the client gets an error, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()  # in effect once the streams on it are closed, which the base class does next

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


Endpoint = Callable[[HubServer, Request], Reply]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []
FIELDS = {
    "repo": "[^/]+(?:/[^/]+)??",
    "revision": "[^/]+",
    "path": ".+",
    "oid": "[0-9a-f]{64}",
    "slug": "[^/]+/[^/]+",
    "key": "[0-9a-f]+",
    "name": "[^/]+",
    "right": "read|write",
}
API = "/api/(?:models|datasets)/{repo}"
FILES = "/(?:datasets/|){repo}"


def route(method: str, template: str) -> Callable[[Endpoint], Endpoint]:
    """Registers the endpoint for a method and a path, a regular expression in which `{name}` stands for a field."""
    pattern = re.sub(r"{(\w+)}", lambda name: f"(?P<{name[1]}>{FIELDS[name[1]]})", template)

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


def dispatch(hub: HubServer, request: Request) -> Reply:
    for method, pattern, endpoint in ROUTES:
        matched = pattern.fullmatch(request.path)
        if matched and method == request.method.replace("HEAD", "GET"):
            fields = {name: unquote(value) for name, value in matched.groupdict(default="").items()}
            return endpoint(hub, replace(request, fields=fields))
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


def check_writer(request: Request) -> None:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if request.user != OWNER:
        raise HubError(403, "You don't have the rights to write here")


def check_gate(repo: Repo, request: Request) -> None:
    if repo.gated and request.user != OWNER:
        raise HubError(403, f"Access to {repo.repo_id} is restricted: ask for access", "GatedRepo")


@route("GET", "/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> Reply:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    profile = {"type": "user", "name": request.user, "fullname": request.user, "isPro": False, "orgs": []}
    token = {"displayName": "test", "role": "write", "createdAt": DATE}
    auth = {"type": "access_token", "accessToken": token}
    return Reply.of(profile | {"avatarUrl": f"{hub.url}/avatar.svg", "auth": auth})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Reply:
    try:
        errors = [] if isinstance(metadata(request.json()["content"].encode()), dict) else ["not a mapping"]
    except yaml.YAMLError as error:
        errors = [str(error)]
    return Reply.of({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)


def metadata(readme: bytes) -> Any:
    """What stands between the dashes at the head of a card."""
    found = re.match(r"---\n(.*?)\n---\n", readme.decode(), re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


@route("POST", "/api/repos/create")
def create_repo(hub: HubServer, request: Request) -> Reply:
    check_writer(request)
    wanted = request.json()
    repo_id = f"{wanted['organization'] or request.user}/{wanted['name']}"
    repo_type = wanted.get("type", "model")
    if repo := hub.repos.get((repo_type, repo_id)):
        message = f"You already created this {repo_type} repo"
        return Reply.of({"error": message, "url": f"{hub.url}/{repo.path}"}, status=409)
    repo = hub.add_repo(repo_id, {}, repo_type, private=wanted.get("visibility") == "private")
    return Reply.of({"url": f"{hub.url}/{repo.path}", "name": repo_id})


@route("POST", API + "/branch/{revision}")
def create_branch(hub: HubServer, request: Request) -> Reply:
    repo, name = hub.writable(request), request.fields["revision"]
    if name in repo.refs:
        raise HubError(409, f"Reference already exists: {name}")
    repo.refs[name] = repo.history(request.json().get("startingPoint", "main"))
    return Reply(status=201)


@route("POST", API + "/preupload/{revision}")
def preupload(hub: HubServer, request: Request) -> Reply:
    """Says how to upload each file, and what is there already so that the client can skip the unchanged."""
    present = hub.writable(request).at(request.fields["revision"]).files

    def plan(path: str, size: int) -> dict[str, Any]:
        mode = "lfs" if is_lfs(path, size) else "regular"
        oid = content_oid(path, present[path]) if path in present else None
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    return Reply.of({"files": [plan(file["path"], file["size"]) for file in request.json()["files"]]})


@route("POST", FILES + r"\.git/info/lfs/objects/batch")
def lfs_batch(hub: HubServer, request: Request) -> Reply:
    repo = hub.writable(request)
    base = f"{hub.url}/{repo.path}.git/info/lfs"
    objects = request.json()["objects"]
    for item in objects:
        if item["oid"] not in repo.objects:
            upload, verify = {"href": f"{base}/storage/{item['oid']}"}, {"href": f"{base}/verify"}
            item["actions"] = {"upload": upload, "verify": verify}
    return Reply.of({"transfer": "basic", "objects": objects})


@route("PUT", FILES + r"\.git/info/lfs/storage/{oid}")
def lfs_upload(hub: HubServer, request: Request) -> Reply:
    # Without a token, since the Hub's own upload addresses are presigned.
    oid = hashlib.sha256(request.body).hexdigest()
    if oid != request.fields["oid"]:
        raise HubError(400, f"The content has SHA-256 {oid}, not {request.fields['oid']}")
    hub.repos[request.repo_type, request.fields["repo"]].objects[oid] = request.body
    return Reply()


@route("POST", FILES + r"\.git/info/lfs/verify")
def lfs_verify(hub: HubServer, request: Request) -> Reply:
    wanted = request.json()
    content = hub.writable(request).objects.get(wanted["oid"])
    if content is None or len(content) != wanted["size"]:
        raise HubError(404, f"No object {wanted['oid']} of {wanted['size']} bytes was uploaded")
    return Reply()


@route("GET", API + "/xet-{right}-token/{revision}")
def xet_token(hub: HubServer, request: Request) -> Reply:
    """Where the chunk store is, in the answer as its own client wants it and in the headers as the Hub's does."""
    if request.fields["right"] == "write":
        hub.writable(request)
    else:
        check_gate(hub.readable(request), request)
    url, token, expires = f"{hub.url}/xet", f"xet-{request.fields['right']}", 4102444800
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return Reply.of({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


@route("POST", "/xet/v1/xorbs/default/{oid}")
def xet_upload(hub: HubServer, request: Request) -> Reply:
    check_xet_token(request, "xet-write")
    hub.xet.add_block(request.fields["oid"], request.body)
    return Reply.of({"was_inserted": True})


@route("POST", "/xet/v1/shards")
def xet_register(hub: HubServer, request: Request) -> Reply:
    check_xet_token(request, "xet-write")
    try:
        hub.xet.add_files(request.body)
    except (KeyError, ValueError) as error:
        raise HubError(400, f"The shard does not fit what was uploaded: {error}") from error
    return Reply.of({"result": 1})


@route("GET", "/xet/v2/reconstructions/{oid}")
def xet_reconstruction(hub: HubServer, request: Request) -> Reply:
    check_xet_token(request, "xet-read")
    if request.fields["oid"] not in hub.xet.files:
        raise HubError(404, "No such file")
    return Reply.of(hub.xet.reconstruction(request.fields["oid"], f"{hub.url}/xet/blocks"))


@route("GET", "/xet/blocks/{oid}")
def xet_download(hub: HubServer, request: Request) -> Reply:
    # Without a token, since these addresses are presigned too.
    return partial(b"".join(hub.xet.blocks[request.fields["oid"]].packed), request.headers["Range"], {})


def check_xet_token(request: Request, wanted: str) -> None:
    if request.headers["Authorization"] != f"Bearer {wanted}":
        raise HubError(401, "Invalid token of the chunk store")


@route("POST", API + "/commit/{revision}")
def create_commit(hub: HubServer, request: Request) -> Reply:
    repo = hub.writable(request)
    branch = repo.branch(request.fields["revision"])
    header, *operations = map(json.loads, request.body.splitlines())
    if header["value"].get("parentCommit", branch[-1].sha) != branch[-1].sha:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")

    def uploaded(oid: str) -> bytes | None:
        return repo.objects.get(oid, hub.xet.content(oid))

    commit = Commit(header["value"]["summary"], apply(operations, branch[-1].files, uploaded))
    answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{hub.url}/{repo.path}/commit/{commit.sha}"}
    if "create_pr" in request.query:
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        repo.refs[f"refs/pr/{number}"] = [*branch, commit]
        answer["pullRequestUrl"] = f"{hub.url}/{repo.path}/discussions/{number}"
    else:
        branch.append(commit)
    return Reply.of(answer)


def apply(
    operations: Iterable[dict], files: dict[str, bytes], uploaded: Callable[[str], bytes | None]
) -> dict[str, bytes]:
    """The files after all operations of a commit; `uploaded` gives what was sent before it, by its SHA-256."""
    files = dict(files)
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"].rstrip("/")
        if kind == "file":
            files[path] = base64.b64decode(value["content"])
        elif kind == "lfsFile" and (content := uploaded(value["oid"])) is not None:
            files[path] = content
        elif kind == "deletedFile" and path in files:
            del files[path]
        elif kind == "deletedFolder" and any(name.startswith(f"{path}/") for name in files):
            files = {name: content for name, content in files.items() if not name.startswith(f"{path}/")}
        elif kind in ("deletedFile", "deletedFolder"):
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise HubError(400, f"Cannot apply {kind} to {path}: unknown operation, or content never uploaded")
    return files


@route("GET", API + "/tree/{revision}(?:/{path})?")
def tree(hub: HubServer, request: Request) -> Reply:
    commit, folder = hub.readable(request).at(request.fields["revision"]), request.fields["path"]
    listed = entries(hub, commit.files)
    if folder and listed.get(folder, {}).get("type") != "directory":
        raise HubError(404, f"{folder} does not exist on {commit.sha}", "EntryNotFound")
    prefix = f"{folder}/" if folder else ""
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    inside = [path for path in listed if path.startswith(prefix)]
    return Reply.of([listed[path] for path in inside if recursive or "/" not in path.removeprefix(prefix)])


@route("POST", API + "/paths-info/{revision}")
def paths_info(hub: HubServer, request: Request) -> Reply:
    listed = entries(hub, hub.readable(request).at(request.fields["revision"]).files)
    paths = parse_qs(request.body.decode()).get("paths", [])
    return Reply.of([listed[path] for path in paths if path in listed])


@route("GET", API + "(?:/revision/{revision})?")
def repo_info(hub: HubServer, request: Request) -> Reply:
    repo = hub.readable(request)
    commit = repo.at(request.fields["revision"] or "main")
    name = {"id": repo.repo_id, "author": repo.repo_id.split("/")[0], "sha": commit.sha, "lastModified": DATE}
    access = {"private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False}
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    with contextlib.suppress(yaml.YAMLError):
        access |= {"cardData": metadata(commit.files.get("README.md", b""))}
    return Reply.of(name | access | {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings})


@route("GET", "/api/models")
def list_models(hub: HubServer, request: Request) -> Reply:
    """Public models that fit what is asked for, in the order in which they came."""
    asked = {name: values[0].lower() for name, values in request.query.items()}
    wanted = {*request.query.get("filter", []), *request.query.get("pipeline_tag", [])}
    most = float(asked.get("num_parameters", "max:inf").removeprefix("max:").removesuffix("b")) * 1e9
    found = [
        {"id": repo.repo_id, "tags": sorted(tags(repo)), "gated": "auto" if repo.gated else False}
        | {"safetensors": {"parameters": {"BF16": parameters(repo)}, "total": parameters(repo)}}
        for repo in hub.repos.values()
        if repo.repo_type == "model"
        and not repo.private
        and asked.get("search", "") in repo.repo_id.lower()
        and not (repo.gated and asked.get("gated") == "false")
        and wanted <= tags(repo)
        and parameters(repo) <= most
    ]
    return Reply.of(found[: int(asked.get("limit", "1000"))])


def tags(repo: Repo) -> set[str]:
    """What a model is filtered by: what its card says, and whether it has safetensors."""
    files = repo.at("main").files
    card = metadata(files.get("README.md", b""))
    said = {*card.get("tags", []), card.get("pipeline_tag"), card.get("library_name")}
    return said - {None} | ({"safetensors"} if any(path.endswith(".safetensors") for path in files) else set())


def parameters(repo: Repo) -> int:
    """As if all weights were of two bytes."""
    return sum(len(content) for path, content in repo.at("main").files.items() if path.endswith(".safetensors")) // 2


@route("GET", "/api/jobs/hardware")
def jobs_hardware(hub: HubServer, request: Request) -> Reply:
    def told(name: str, gpu: tuple[str, str] | None, vram: str, ram: str, disk: str, price: int) -> dict[str, Any]:
        of_gpu = {"type": "gpu", "manufacturer": "Nvidia", "vram": vram}
        accelerator = of_gpu | {"model": gpu[0], "quantity": gpu[1]} if gpu is not None else None
        cost = {"unitCostMicroUSD": price, "unitCostUSD": price / 1e6, "unitLabel": "minute"}
        host = {"cpu": "8 vCPU", "ram": ram, "ephemeralStorage": disk, "accelerator": accelerator}
        return {"name": name, "prettyName": name.upper()} | host | cost

    return Reply.of([told(*entry) for entry in HARDWARE])


@route("POST", "/api/jobs/{name}")
def create_job(hub: HubServer, request: Request) -> Reply:
    check_writer(request)
    if request.fields["name"] != request.user:
        raise HubError(403, "You don't have the rights to start jobs here")
    asked = request.json()
    if asked["flavor"] not in {name for name, *_ in HARDWARE}:
        raise HubError(400, f"Unknown flavor {asked['flavor']}")
    owner = {"id": "0", "name": request.user, "type": "user"}
    told = {"id": secrets.token_hex(12), "createdAt": DATE, "owner": owner, "status": {"stage": "SCHEDULING"}}
    hub.jobs[told["id"]] = asked | told
    return Reply.of(public_job(hub.jobs[told["id"]]))


def public_job(job: dict[str, Any]) -> dict[str, Any]:
    """Secrets are told to nobody."""
    return job | {"secrets": dict.fromkeys(job.get("secrets", {}), None)}


@route("GET", "/api/jobs/{name}/{key}")
def inspect_job(hub: HubServer, request: Request) -> Reply:
    return Reply.of(public_job(own_job(hub, request)))


@route("POST", "/api/jobs/{name}/{key}/cancel")
def cancel_job(hub: HubServer, request: Request) -> Reply:
    own_job(hub, request)["status"] = {"stage": "CANCELED"}
    return Reply.of({})


def own_job(hub: HubServer, request: Request) -> dict[str, Any]:
    job = hub.jobs.get(request.fields["key"])
    if job is None or not request.user == request.fields["name"] == job["owner"]["name"]:
        raise HubError(404, "Job not found")
    return job


@route("POST", "/api/collections")
def create_collection(hub: HubServer, request: Request) -> Reply:
    check_writer(request)
    wanted = request.json()
    slug = f"{wanted['namespace']}/{re.sub('[^a-z0-9]+', '-', wanted['title'].lower())}-0123456789ab"
    if slug in hub.collections:
        return Reply.of({"error": "This collection exists", "slug": slug}, status=409)
    owner = {"name": request.user, "type": "user"}
    shown = {"slug": slug, "title": wanted["title"], "owner": owner, "items": [], "lastUpdated": DATE, "position": 0}
    hub.collections[slug] = shown | {"private": False, "theme": "blue", "upvotes": 0}
    return Reply.of(hub.collections[slug])


@route("GET", "/api/collections/{slug}")
def get_collection(hub: HubServer, request: Request) -> Reply:
    return Reply.of(hub.collections[request.fields["slug"]])


@route("POST", "/api/collections/{slug}/items")
def add_collection_item(hub: HubServer, request: Request) -> Reply:
    check_writer(request)
    collection, item = hub.collections[request.fields["slug"]], request.json()["item"]
    if any(there["id"] == item["id"] for there in collection["items"]):
        raise HubError(409, "This item is there already")
    found = {
        "_id": str(len(collection["items"])),
        "position": len(collection["items"]),
        **item,
        "repoType": item["type"],
    }
    collection["items"].append(found)
    return Reply.of(collection)


@route("GET", FILES + "/resolve/{revision}/{path}")
def resolve(hub: HubServer, request: Request) -> Reply:
    repo, path = hub.readable(request), request.fields["path"]
    check_gate(repo, request)
    commit = repo.at(request.fields["revision"])
    headers = {"X-Repo-Commit": commit.sha}
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    content = commit.files[path]
    oid = content_oid(path, content)
    headers |= {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
    if oid in hub.xet.names:
        token = f"{hub.url}/api/{request.repo_type}s/{repo.repo_id}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": hub.xet.names[oid], "Link": f'<{token}>; rel="xet-auth"'}
    if request.method == "GET" and "Range" in request.headers:
        return partial(content, request.headers["Range"], headers)
    return Reply(content, headers=headers)


def partial(content: bytes, byte_range: str, headers: dict[str, str]) -> Reply:
    """The part of `content` that a Range header asks for: `bytes=first-last`, `bytes=first-` or `bytes=-count`."""
    first, last = byte_range.removeprefix("bytes=").split("-")
    start = int(first) if first else max(len(content) - int(last), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= stop:
        return Reply(status=416, headers=headers | {"Content-Range": f"bytes */{len(content)}"})
    return Reply(content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


def entries(hub: HubServer, files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Each file and folder by its path, as the Hub describes it."""
    listed: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        for folder in map(str, reversed(PurePosixPath(path).parents[:-1])):
            listed[folder] = {"type": "directory", "path": folder, "size": 0, "oid": git_oid(folder.encode())}
        listed[path] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if is_lfs(path, len(content)):
            oid = content_oid(path, content)
            listed[path]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
            if oid in hub.xet.names:
                listed[path]["xetHash"] = hub.xet.names[oid]
    return listed


def is_lfs(path: str, size: int) -> bool:
    return size > LFS_BYTES or (size > 0 and path.endswith(LFS_SUFFIXES))


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def content_oid(path: str, content: bytes) -> str:
    """What the client knows a file's content by: its ETag, and the sign that an upload would change nothing."""
    return hashlib.sha256(content).hexdigest() if is_lfs(path, len(content)) else git_oid(content)
