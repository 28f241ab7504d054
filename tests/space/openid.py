# SPDX-License-Identifier: Apache-2.0
"""The loopback Hub as an OpenID provider: visitors log in there, and a Space is handed their tokens."""

from __future__ import annotations

import base64
import secrets
import time
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import parse_qsl, urlencode

from joserfc import jwt
from joserfc.jwk import RSAKey

from tests.hub_server import STRANGER_TOKEN, USERS, HubError, HubServer, Reply, Request, route


CLIENT = {"OAUTH_CLIENT_ID": "the-space", "OAUTH_CLIENT_SECRET": "a-secret-of-the-space"}
TOKENS = {str(user): header.removeprefix("Bearer ") for header, user in USERS.items() if header is not None}
LIVES = 5 * 3600  # seconds, of a login


@dataclass
class Provider:
    """What has been asked for and granted: the scopes of each visit to the page, and by its code each login."""

    scopes: list[list[str]] = field(default_factory=list)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "1", "alg": "RS256", "use": "sig"}))


class LoginHub(HubServer):
    """A Hub with accounts: `TOKENS` by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.provider = Provider()

    def of_a_space(self, scopes: list[str]) -> dict[str, str]:
        """The environment that a Space has which asks for these scopes, and whose owner keeps a token in it.

        `SPACE_HOST` is left out: with it visitors come back by https.
        """
        space = {"SYSTEM": "spaces", "SPACE_ID": "me/calibprune", "HF_TOKEN": STRANGER_TOKEN}
        return space | CLIENT | {"OAUTH_SCOPES": " ".join(scopes), "OPENID_PROVIDER_URL": self.url}


@route("GET", "/.well-known/openid-configuration")
def configuration(hub: LoginHub, request: Request) -> Reply:
    pages = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "keys"}
    found = {name: f"{hub.url}/oauth/{page}" for name, page in pages.items()}
    return Reply.of({"issuer": hub.url, "id_token_signing_alg_values_supported": ["RS256"]} | found)


@route("GET", "/oauth/keys")
def keys(hub: LoginHub, request: Request) -> Reply:
    return Reply.of({"keys": [hub.provider.key.as_dict(private=False)]})


@route("GET", "/oauth/authorize")
def ask(hub: LoginHub, request: Request) -> Reply:
    """The page that asks a visitor who they are, and whether the Space may have what it asks for."""
    asked = {name: values[0] for name, values in request.query.items()}
    if asked["client_id"] != CLIENT["OAUTH_CLIENT_ID"] or asked["response_type"] != "code":
        raise HubError(400, "Unknown client, or unknown response type")
    hub.provider.scopes.append(asked["scope"].split())
    hidden = "".join(f'<input type="hidden" name="{escape(k)}" value="{escape(v)}">' for k, v in asked.items())
    buttons = "".join(f'<button name="user" value="{user}">Authorize as {user}</button>' for user in TOKENS)
    page = (
        f'<!doctype html><title>Log in</title><form method="post" action="/oauth/authorize">{hidden}{buttons}</form>'
    )
    return Reply(page.encode(), headers={"Content-Type": "text/html"})


@route("POST", "/oauth/authorize")
def grant(hub: LoginHub, request: Request) -> Reply:
    granted, code = dict(parse_qsl(request.body.decode())), secrets.token_urlsafe()
    hub.provider.codes[code] = granted
    back, sign = granted["redirect_uri"], "&" if "?" in granted["redirect_uri"] else "?"
    return Reply(
        status=303, headers={"Location": f"{back}{sign}{urlencode({'code': code, 'state': granted['state']})}"}
    )


@route("POST", "/oauth/token")
def token(hub: LoginHub, request: Request) -> Reply:
    """A code, once, for the token of the one who authorized it, and for what the Space may know of them."""
    sent = dict(parse_qsl(request.body.decode()))
    secret = base64.b64encode(":".join(CLIENT.values()).encode()).decode()
    granted = hub.provider.codes.pop(sent.get("code", ""), None)
    if request.headers["Authorization"] != f"Basic {secret}" or granted is None:
        raise HubError(401, "Unknown client, or unknown code")
    if sent["grant_type"] != "authorization_code" or sent["redirect_uri"] != granted["redirect_uri"]:
        raise HubError(400, "The code was given for something else")
    answer = {"access_token": TOKENS[granted["user"]], "token_type": "bearer", "expires_in": LIVES}
    return Reply.of(answer | {"scope": granted["scope"], "id_token": _signed(hub, granted)})


def _signed(hub: LoginHub, granted: dict[str, str]) -> str:
    user, now = granted["user"], int(time.time())
    token = {"iss": hub.url, "aud": granted["client_id"], "nonce": granted["nonce"], "iat": now, "exp": now + LIVES}
    person: dict[str, Any] = {"sub": user, "name": user, "preferred_username": user}
    shown = {"profile": f"{hub.url}/{user}", "picture": f"{hub.url}/avatar.svg"}
    return jwt.encode({"alg": "RS256", "kid": "1"}, token | person | shown, hub.provider.key)
