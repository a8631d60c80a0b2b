"""The local hub's HTTP: the API, the resolver, and the CDN it redirects to, which has a port of its
own because the client sends its token to one origin only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from aiohttp import web
from aiohttp.typedefs import Handler

from tests.hub.faults import Drop, Fault, FaultBook, IgnoreRange, Page, Pointer, Stage, Status
from tests.hub.log import Request, RequestLog
from tests.hub.repositories import Repository, StoredFile
from tests.hub.sending import send_file

RECORD: Final[web.RequestKey[Request]] = web.RequestKey("record", Request)
RANGE = re.compile(r"bytes=(\d+)-(\d*)")
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Sign in</body></html>"
TEXTS = {
    401: "Invalid username or password.",
    403: "Forbidden",
    404: "Not Found",
    429: "We had to rate limit you",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
    503: "Service Unavailable",
}


class Site:
    """Answers requests out of `repositories`. Used in the hub's own thread."""

    def __init__(
        self,
        repositories: Mapping[str, Repository],
        faults: FaultBook,
        log: RequestLog,
        page_size: int,
    ) -> None:
        self._repositories = repositories
        self._faults = faults
        self._log = log
        self._page_size = page_size
        self.cdn = ""
        """Where LFS files are, set before the first request."""

    def hub_application(self) -> web.Application:
        application = web.Application(middlewares=[self._finish])
        application.add_routes(
            [
                web.get("/api/models/{owner}/{name}", self._info),
                web.get("/api/models/{owner}/{name}/revision/{revision}", self._info),
                web.get("/api/models/{owner}/{name}/tree/{revision}", self._tree),
                web.get("/api/models/{owner}/{name}/tree/{revision}/{below:.+}", self._tree),
                web.get("/{owner}/{name}/resolve/{revision}/{path:.+}", self._resolve),
            ]
        )
        return application

    def cdn_application(self) -> web.Application:
        application = web.Application(middlewares=[self._finish])
        application.add_routes([web.get("/lfs/{owner}/{name}/{revision}/{path:.+}", self._lfs)])
        return application

    @web.middleware
    async def _finish(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        finally:
            if RECORD in request:
                self._log.over(request[RECORD])

    # -- handlers ---------------------------------------------------------------------------------

    async def _info(self, request: web.Request) -> web.StreamResponse:
        record, faults = self._note(request, Stage.API, "info")
        if (answer := _instead(request, faults)) is not None:
            return _said(record, answer)
        repository, commit, refusal = self._find(request)
        if refusal is not None:
            return _said(record, refusal)
        return _said(
            record,
            web.json_response(
                repository.info(commit, with_files="blobs" in request.query),
                headers={"X-Repo-Commit": commit},
            ),
        )

    async def _tree(self, request: web.Request) -> web.StreamResponse:
        record, faults = self._note(request, Stage.API, "tree")
        if (answer := _instead(request, faults)) is not None:
            return _said(record, answer)
        repository, commit, refusal = self._find(request)
        if refusal is not None:
            return _said(record, refusal)
        entries = repository.tree(
            commit,
            request.match_info.get("below", ""),
            recursive=request.query.get("recursive", "").lower() in ("1", "true"),
        )
        if entries is None:
            return _said(record, _no_entry(commit))
        first = int(request.query.get("cursor", 0))
        headers = {"X-Repo-Commit": commit}
        if (following := first + self._page_size) < len(entries):
            url = request.url.update_query(cursor=following)
            headers["Link"] = f'<{url}>; rel="next"'
        return _said(record, web.json_response(entries[first:following], headers=headers))

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        repository, commit, refusal = self._find(request, gate=True)
        file = repository.commits[commit].get(path) if refusal is None else None
        whole = range(file.size if file is not None else 0)
        record, faults = self._note(request, Stage.RESOLVE, path)
        if (answer := _instead(request, faults, file)) is not None:
            return _said(record, answer)
        if refusal is not None:
            return _said(record, refusal)
        if file is None:
            return _said(record, _no_entry(commit))
        headers = {
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "ETag": f'"{file.oid}"',
            "Content-Disposition": f'inline; filename="{path.rpartition("/")[2]}"',
        }
        if file.sha256 is not None:
            headers |= {
                "X-Linked-Size": str(file.size),
                "X-Linked-Etag": f'"{file.sha256}"',
                "Location": f"{self.cdn}/lfs/{repository.name}/{commit}/{quote(path)}?signed=1",
            }
            return _said(record, web.Response(status=302, headers=headers))
        if request.method == "HEAD":
            headers["Content-Length"] = str(len(whole))
            return _said(record, web.Response(headers=headers))
        record.stage = Stage.CONTENT
        return await self._content(request, record, file, headers)

    async def _lfs(self, request: web.Request) -> web.StreamResponse:
        where = request.match_info
        repository = self._repositories[f"{where['owner']}/{where['name']}"]
        file = repository.commits[where["revision"]][where["path"]]
        record, _ = self._note(request, Stage.CONTENT, file.path)
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{file.etag}"'}
        return await self._content(request, record, file, headers)

    async def _content(
        self, request: web.Request, record: Request, file: StoredFile, headers: dict[str, str]
    ) -> web.StreamResponse:
        """The file's bytes, or the range of them that is asked for."""
        span = range(file.size)
        if record.range is not None:
            first, stop = record.range
            span = range(first, file.size if stop < 0 else min(stop, file.size))
        faults = self._faults.take(file.path, Stage.CONTENT, span)
        record.faults += tuple(faults)
        if (answer := _instead(request, faults, file)) is not None:
            record.sent_bytes += len(answer.body) if isinstance(answer.body, bytes) else 0
            return _said(record, answer)
        status = 200
        if record.range is not None:
            if any(isinstance(fault, IgnoreRange) for fault in faults):
                span = range(file.size)
            elif not span:
                return _said(
                    record,
                    web.Response(status=416, headers={"Content-Range": f"bytes */{file.size}"}),
                )
            else:
                status = 206
                headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{file.size}"
        headers["Content-Type"] = "application/octet-stream"
        response = web.StreamResponse(status=status, headers=headers)
        record.status = status
        try:
            await send_file(
                request,
                response,
                file,
                span,
                faults,
                lambda count: self._log.sent(record, count),
            )
        except ConnectionError:
            response.force_close()  # the client went; that is its right
        return response

    # -- helpers ----------------------------------------------------------------------------------

    def _note(
        self, request: web.Request, stage: Stage, subject: str
    ) -> tuple[Request, list[Fault]]:
        """Log the request; what strikes it, unless that depends on the bytes it will carry."""
        match = RANGE.fullmatch(request.headers.get("Range", ""))
        asked = (int(match[1]), int(match[2]) + 1 if match[2] else -1) if match else None
        faults = [] if stage is Stage.CONTENT else self._faults.take(subject, stage)
        record = Request(
            method=request.method,
            path=request.path_qs,
            stage=stage,
            subject=subject,
            range=asked,
            token=_token(request),
            user_agent=request.headers.get("User-Agent", ""),
            faults=tuple(faults),
        )
        self._log.add(record)
        request[RECORD] = record
        return record, faults

    def _find(
        self, request: web.Request, *, gate: bool = False
    ) -> tuple[Repository, str, web.Response | None]:
        """The repository and commit that are meant, or why the client may not see them."""
        where = request.match_info
        name = f"{where['owner']}/{where['name']}"
        repository = self._repositories.get(name)
        token = _token(request)
        if repository is None or (repository.private and token not in repository.guests):
            # Strangers shall not learn which private repositories there are.
            status = 401 if token is None else 404
            refusal = _refusal(status, "RepoNotFound", "Repository not found")
            return Repository(name), "", refusal
        if gate and repository.gated and token not in repository.guests:
            restricted = f"Access to model {name} is restricted"
            if token is None:
                refusal = _refusal(
                    401,
                    "GatedRepo",
                    f"{restricted}. You must have access to it and be authenticated to access it."
                    " Please log in.",
                )
            else:
                refusal = _refusal(
                    403,
                    "GatedRepo",
                    f"{restricted} and you are not in the authorized list."
                    f" Visit https://huggingface.co/{name} to ask for access.",
                )
            return repository, "", refusal
        revision = where.get("revision", "main")
        commit = repository.resolve(revision)
        if commit is None:
            refusal = _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return repository, "", refusal
        return repository, commit, None


def _said(record: Request, response: web.Response) -> web.Response:
    record.status = response.status
    return response


def _token(request: web.Request) -> str | None:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token if scheme == "Bearer" else None


def _refusal(status: int, code: str | None, message: str | None, **headers: str) -> web.Response:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if code is not None:
        headers["X-Error-Code"] = code
    if message is not None:
        headers["X-Error-Message"] = message
    body: dict[str, Any] = {"error": message or TEXTS.get(status, "Error")}
    return web.json_response(body, status=status, headers=headers)


def _no_entry(commit: str) -> web.Response:
    return _refusal(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)


def _instead(
    request: web.Request, faults: list[Fault], file: StoredFile | None = None
) -> web.Response | None:
    """An answer that takes the place of the right one, because a fault wants it."""
    for fault in faults:
        match fault:
            case Status():
                headers = {} if fault.retry_after_s is None else {
                    "Retry_After": str(fault.retry_after_s)
                }  # fmt: skip
                return _refusal(fault.status, fault.error_code, fault.error_message, **headers)
            case Page():
                return web.Response(body=PAGE, content_type="text/html")
            case Pointer() if file is not None:
                return web.Response(body=file.pointer, content_type="text/plain")
            case Drop() if request.transport is not None:
                request.transport.close()
                return web.Response()
            case _:
                continue
    return None
