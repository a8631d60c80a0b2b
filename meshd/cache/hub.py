"""Asking the Hugging Face hub what a reference is, and its refusals in words that help.

Blocking, and for the fetch child: it brings huggingface_hub, whose import costs the daemon 0.3 s
and 30 MB. HF_ENDPOINT, HF_TOKEN (or the token of `hf auth login`) and HF_HUB_OFFLINE are read by
huggingface_hub itself, when it is imported.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pydantic import ValidationError

from meshd import __version__
from meshd.cache.manifest import Manifest
from meshd.cache.references import HubRef
from meshd.cache.selection import RepoFile, select, to_manifest
from meshd.errors import HubRefused, HubUnavailable, NoSpace

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

ANSWER_LIMIT_S: Final = 15.0
"""For the hub to accept a connection, and between two pieces of its answer."""
MAX_RETRY_AFTER_S: Final = 24 * 3600.0
MAX_SAID_CHARACTERS: Final = 300

Trouble: TypeAlias = HubRefused | HubUnavailable | NoSpace

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CLIENTS: Final = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})
"""Packages whose errors are those of a connection; which one is used depends on the version."""
_UNSENDABLE: Final = frozenset({"InvalidURL", "UnsupportedProtocol", "LocalProtocolError"})
"""Names of those that say that no request could be made at all."""
_LOGIN: Final = "set HF_TOKEN for meshd, or run `hf auth login` as the user it runs as"


def resolve(wanted: HubRef) -> Manifest:
    """What `wanted` is now, in one request: its commit, and the files of it with size and sha256.

    Raises BadReference (the repository has no such file or quantisation), HubRefused,
    HubUnavailable.
    """
    # Late: see above.
    from huggingface_hub import HfApi

    api = HfApi(library_name="meshd", library_version=__version__)
    try:
        commit, files = _listing(api, wanted)
    except (ValueError, KeyError, TypeError) as error:
        # Its own errors of a request can be ValueErrors too.
        if _is_of_the_hub(error):
            raise translate(error, wanted.repo) from error
        raise HubUnavailable(
            f"{_endpoint()} answered, but not as a hub does ({type(error).__name__}): is it the "
            "login page of a network, or does HF_ENDPOINT lead elsewhere?"
        ) from error
    except Exception as error:
        raise translate(error, wanted.repo) from error
    try:
        return to_manifest(select(files, wanted), wanted, commit)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise HubRefused(f"{wanted.repo}: the hub lists what cannot be: {first['msg']}") from error


def translate(error: Exception, repo: str | None = None) -> Trouble:
    """What an error of huggingface_hub, or of the connection below it, means. `repo`: the one that
    was asked for, if the error may not know it.

    1. Offline by HF_HUB_OFFLINE, no connection, an answer cut off: unavailable.
    2. A disk that is full: no space.
    3. 401, 403, 404 and other 4xx of the hub: refused, saying which token, licence or name.
    4. 429: unavailable until the hub's Retry-After. 408, 5xx: unavailable.
    5. 4xx of another host, where the hub's links lead: unavailable; such a link expires.
    6. A request that cannot be made (address, token): refused.

    Anything else is no trouble with the hub but a mistake here, or a disk that cannot be written:
    it is raised again.
    """
    from huggingface_hub import errors

    repo = repo or getattr(error, "repo_id", None) or "the repository"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnavailable(
            "HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or use what is here already"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, repo)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return HubRefused(f"{repo} needs a token, and there is none; {_LOGIN}")
    if isinstance(error, errors.HFValidationError):
        return HubRefused(f"{_one_line(str(error))}")
    if isinstance(error, OSError) and error.errno in _FULL:
        return NoSpace(
            f"the disk is full ({error.strerror}); `meshd cache prune --dry-run` shows what can go"
        )
    if _is_unsendable(error):
        # Its text is not repeated: it can hold the token.
        return HubRefused(
            f"no request can be made to {_endpoint()}: HF_ENDPOINT is no http address, or HF_TOKEN "
            "has characters that no token has"
        )
    if isinstance(error, (ConnectionError, TimeoutError)) or _package(error) in _CLIENTS:
        what = _one_line(str(error)) or type(error).__name__
        return HubUnavailable(f"{_endpoint()} cannot be reached, or broke off: {what}")
    if isinstance(error, errors.FileMetadataError):
        return HubUnavailable(
            f"{_endpoint()} answered, but not as a hub does: {_one_line(str(error))}"
        )
    raise error


def _listing(api: HfApi, wanted: HubRef) -> tuple[str, tuple[RepoFile, ...]]:
    """The commit, and its files."""
    # Not list_repo_tree in the first place: it would be a second request, without a limit in time,
    # and it waits out a 429 in silence.
    info = api.model_info(
        wanted.repo, revision=wanted.branch, files_metadata=True, timeout=ANSWER_LIMIT_S
    )
    commit = info.sha
    if commit is None:
        raise ValueError("no commit")
    siblings = info.siblings or []
    if any(sibling.size is None for sibling in siblings):
        return commit, tuple(_tree(api, wanted.repo, commit))
    return commit, tuple(
        RepoFile(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else None)
        for one in siblings
    )


def _tree(api: HfApi, repo: str, commit: str) -> Iterator[RepoFile]:
    """The files, from a hub that does not list them with the rest."""
    from huggingface_hub.hf_api import RepoFile as Listed

    for entry in api.list_repo_tree(repo, recursive=True, revision=commit):
        if isinstance(entry, Listed):
            yield RepoFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None)


# -- refusals -------------------------------------------------------------------------------------


def _refusal(error: HfHubHTTPError, repo: str) -> Trouble:
    from huggingface_hub import errors

    status, page = error.response.status_code, f"{_endpoint()}/{repo}"
    with_token = "authorization" in error.response.request.headers
    match error:
        case errors.GatedRepoError():
            token = "with the account of the token that is used" if with_token else f"then {_LOGIN}"
            return HubRefused(f"{repo} is gated: accept its licence at {page}, {token}")
        case errors.DisabledRepoError():
            return HubRefused(f"{repo} was disabled by the hub: {page}")
        case errors.RevisionNotFoundError():
            asked = re.search(
                r"/(?:revision|tree|resolve)/([^/?]+)", str(error.response.request.url)
            )
            revision = f" `{asked[1].replace('%2F', '/')}`" if asked else ""
            return HubRefused(f"{repo} has no revision{revision}; {page} lists its branches")
        case errors.RemoteEntryNotFoundError():
            path = str(error.response.request.url.path).partition("/resolve/")[2].partition("/")[2]
            return HubRefused(f"{repo} has no file {path or 'of that name'} (any more); see {page}")
        case errors.RepositoryNotFoundError():
            if with_token:
                return HubRefused(f"there is no {repo} on {_endpoint()} that the token may see")
            return HubRefused(
                f"there is no {repo} on {_endpoint()}, or it is private: for that, {_LOGIN}"
            )
    if not str(error.response.request.url).startswith(f"{_endpoint()}/") and 400 <= status < 500:
        host = error.response.request.url.host
        return HubUnavailable(f"{host}, where the hub leads for {repo}, answered {status}")
    return _by_status(error, repo, status, with_token=with_token)


def _by_status(error: HfHubHTTPError, repo: str, status: int, *, with_token: bool) -> Trouble:
    said = f": {_one_line(error.server_message)}" if error.server_message else ""
    if status == 429:
        retry_after_s = _retry_after(error.response.headers)
        when = f" in {retry_after_s:.0f} s" if retry_after_s else " later"
        more = "" if with_token else "; with a token (HF_TOKEN) it allows more"
        return HubUnavailable(
            f"{_endpoint()} has had too many requests from here, and is asked again{when}{more}",
            retry_after_s=retry_after_s,
        )
    if status == 408 or status >= 500:
        return HubUnavailable(
            f"{_endpoint()} answered {status}{said}",
            retry_after_s=_retry_after(error.response.headers),
        )
    if status in (401, 403):
        why = "the token is not accepted" if with_token else "a token is needed"
        if status == 403 and with_token:
            why = "the token has no right to it"
        return HubRefused(f"{_endpoint()} refuses {repo} ({status}): {why}; {_LOGIN}{said}")
    return HubRefused(f"{_endpoint()} refuses {repo} ({status}){said}")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: of Retry-After (a number or a date), else of the hub's own `RateLimit`."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return min(float(text), MAX_RETRY_AFTER_S)
    if text:
        try:
            at = parsedate_to_datetime(text)
        except ValueError:
            return None
        now = datetime.now(UTC)
        return min(max((at - now).total_seconds(), 0.0), MAX_RETRY_AFTER_S) if at.tzinfo else None
    reset = re.search(r";\s*t=(\d{1,9})", headers.get("ratelimit", ""))
    return min(float(reset[1]), MAX_RETRY_AFTER_S) if reset else None


def _is_of_the_hub(error: Exception) -> bool:
    from huggingface_hub import errors

    known = (errors.HfHubHTTPError, errors.HFValidationError)
    return isinstance(error, known) or _is_unsendable(error)


def _is_unsendable(error: Exception) -> bool:
    return isinstance(error, UnicodeError) or (
        _package(error) in _CLIENTS and type(error).__name__ in _UNSENDABLE
    )


def _package(error: Exception) -> str:
    return type(error).__module__.partition(".")[0]


def _one_line(text: str) -> str:
    """What somebody else wrote, fit for a log: one line, not long, no control characters."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:MAX_SAID_CHARACTERS]


def _endpoint() -> str:
    from huggingface_hub import constants

    endpoint: Any = constants.ENDPOINT
    return str(endpoint).rstrip("/")
