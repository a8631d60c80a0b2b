"""Takes out of text what nobody else may read. Pure.

Two nets. What this machine knows to be secret (keys of the configuration, tokens of the
environment, lines of private keys) goes wherever it stands, however it is spelt. What looks like a
secret goes though nobody knows it: an invite somebody pasted into a log, a password in a URL.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

SHORTEST: Final = 6
"""Characters of a known secret; shorter ones are words that stand everywhere (`true`, `1234`)."""
SECRET_NAMES: Final = re.compile(
    r"TOKEN|SECRET|PASSW|API_?KEY|PRIVATE|CREDENTIAL|COOKIE|AUTH(?!OR)|(^|_)KEY$|ACCESS_KEY",
    re.IGNORECASE,
)
"""Names of settings and variables whose values are secret."""

_PATTERNS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    # A private key, whole or cut off at its end.
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)",
                   re.DOTALL),
        "(private key)",
    ),
    (re.compile(r"\bmeshd\d{1,6}-[A-Za-z0-9=_-]{8,}", re.IGNORECASE), "(invite)"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "(token)"),
    (re.compile(r"\b(sk|pk|rk)-[A-Za-z0-9_-]{12,}"), "(key)"),
    (re.compile(r"\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"), "(token)"),
    (re.compile(r"\bAKIA[0-9A-Z]{16}\b"), "(key)"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]*"), "(token)"),
    (re.compile(r"\b(Bearer|Basic)(\s+|%20)[\w.~+/=-]{6,}", re.IGNORECASE), r"\1 (token)"),
    # https://user:password@host, and signed links to storage.
    (re.compile(r"(?<=://)[^\s/@:\"']*:[^\s/@\"']+(?=@)"), "(user)"),
    (
        re.compile(r"([?&](?:X-Amz-|X-Goog-)?(?:Signature|Credential|Security-Token|Policy|"
                   r"Key-Pair-Id|sig|token|key|access_token|api_key)=)[^&\s\"'<>]+", re.IGNORECASE),
        r"\1(secret)",
    ),
    # api_key = "…", "password": "…", MESHD_API_KEY=…, x-api-key: …; quotes stay.
    (
        re.compile(
            r"""((?:api[_-]?key|passw(?:or)?d|secret|(?:access|auth|hf|bearer|hub)[_-]?"""
            r"""token|authorization|cookie)(?:[_-](?!file)\w+)*["']?\s*[:=]\s*)"""
            r"""(?!["']?\(|None\b|null\b|true\b|false\b)"""
            r"""(?:(\\?["'])(?:(?!\2)(?:\\.|[^\\\n]))*\2|\\?["'][^\n]*|[^\s,;}\]"']+)""",
            re.IGNORECASE,
        ),
        r"\1\2(secret)\2",
    ),
    (
        re.compile(r"(--[\w-]{0,40}(?:key|token|password|secret)(?!-file|[\w-]))[ =]"
                   r"(?:\"[^\"\n]*\"|'[^'\n]*'|\S+)", re.IGNORECASE),
        r"\1 (secret)",
    ),
)  # fmt: skip
_END_OF_KEY: Final = re.compile(r"-----END [A-Z ]{0,40}PRIVATE KEY-----")
_KEY_LINES: Final = re.compile(r"[A-Za-z0-9+/=\s\\]*\Z")
"""In JSON lines end in `\\n` spelt out."""
LONGEST_KEY: Final = 8192
_HOMES: Final = re.compile(r"(?<![\w.])/(home|Users)/(?!\(user\))[^/\s\"':;,]+")
_IPV4: Final = re.compile(r"(?<![\w.])(?!127\.|0\.0\.0\.0)(\d{1,3}\.){3}\d{1,3}(?![\w.]*\d\.)")


@dataclass(frozen=True, slots=True)
class Redactor:
    """`redact` is idempotent: what it put in is left alone."""

    spellings: tuple[str, ...]
    """Of all known secrets, the longest first."""
    home: str
    names: tuple[str, ...]
    """Of machines, nodes and meshes, to be numbered; none if they may be told."""

    @classmethod
    def of(cls, secrets: Iterable[str], *, home: str = "", names: Iterable[str] = ()) -> Redactor:
        """`home`: the user's directory, told as `~`. `names`: see the field."""
        spelt = {
            spelling
            for secret in secrets
            if len(secret.strip()) >= SHORTEST
            for spelling in spellings_of(secret.strip())
        }
        return cls(
            tuple(sorted(spelt, key=lambda text: (-len(text), text))),
            home.rstrip("/"),
            tuple(sorted({name for name in names if name}, key=lambda n: (-len(n), n))),
        )

    def redact(self, text: str) -> str:
        for spelling in self.spellings:
            text = text.replace(spelling, "(secret)")
        for pattern, shown in _PATTERNS:
            text = pattern.sub(shown, text)
        text = _without_ends_of_keys(text)
        if self.home:
            text = re.sub(rf"(?<![\w.]){re.escape(self.home)}(?![\w.-])", "~", text)
        text = _HOMES.sub(r"/\1/(user)", text)
        return self._without_names(text) if self.names else text

    def _without_names(self, text: str) -> str:
        for number, name in enumerate(sorted(self.names), 1):
            alone = rf"(?<![\w-]){re.escape(name)}(?![\w-])"
            text = re.sub(alone, f"name-{number}", text, flags=re.IGNORECASE)
        addresses: dict[str, str] = {}

        def numbered(match: re.Match[str]) -> str:
            return addresses.setdefault(match[0], f"address-{len(addresses) + 1}")

        return _IPV4.sub(numbered, text)


def _without_ends_of_keys(text: str) -> str:
    """Less the rest of private keys whose beginning was cut off: from their last line back."""
    while (end := _END_OF_KEY.search(text)) is not None:
        body = _KEY_LINES.search(text[max(0, end.start() - LONGEST_KEY) : end.start()])
        start = end.start() - (len(body[0]) if body is not None else 0)
        text = f"{text[:start]}(private key){text[end.end() :]}"
    return text


def spellings_of(secret: str) -> frozenset[str]:
    """As it stands in a file, in JSON, in a URL and in base64."""
    inner = json.dumps(secret)[1:-1]
    encoded = base64.b64encode(secret.encode()).decode().rstrip("=")
    return frozenset(
        {secret, inner, json.dumps(secret, ensure_ascii=False)[1:-1], quote(secret, safe=""),
         quote(secret), encoded}
    )  # fmt: skip


def is_secret_name(name: str) -> bool:
    """Whether the value of a setting or variable of that name is nobody else's business. The name
    of a file with a secret is not."""
    return SECRET_NAMES.search(name) is not None and not name.upper().endswith(("_FILE", "_PATH"))


def secrets_in(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values of the variables whose names say that they are secret."""
    return tuple(value for name, value in environment.items() if is_secret_name(name))
