"""The fetch child: an order on standard input, news on standard output. Blocking.

1. Find out what is wanted: the order's manifest, else the hub's word, else what was resolved here
   before, else what most peers say.
2. Fetch, verify and land every file of it; or, if that is all that is asked for, say its shape.
3. Say how it ended: the last line is `done` or `failed`.

SIGTERM ends it as killing it does: what was got is gone on from the next time.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from pydantic import ValidationError

from meshd.cache import landing
from meshd.cache.hashes import Stopped
from meshd.cache.hub import resolve, translate
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.manifests import ManifestStore
from meshd.cache.places import Places
from meshd.cache.references import HubRef, format_ref, parse_ref
from meshd.cache.transfer.header_reading import HeaderReading
from meshd.cache.transfer.hub_source import HubFile
from meshd.cache.transfer.peer_source import ask_manifests
from meshd.cache.transfer.pull import Pull
from meshd.cache.transfer.words import (
    Credentials,
    Done,
    FetchFailed,
    FetchOrder,
    News,
    OpenStream,
    PeerSource,
    Resolved,
    Said,
    Shape,
)
from meshd.errors import (
    BadReference,
    CacheUnwritable,
    HubUnavailable,
    MeshdError,
    ModelAmbiguous,
)

CANCELLED: Final = "cancelled"
MAX_ORDER_BYTES: Final = 16 * 1024 * 1024

Dial = Callable[[Credentials], OpenStream]
"""How to open streams to peers, given this node's credentials."""


def main(incoming: BinaryIO, outgoing: BinaryIO, dial: Dial) -> int:
    """Carry out the order on `incoming`; the exit status: 0 done, 1 not."""
    speaker = _Speaker(outgoing)
    try:
        order = FetchOrder.model_validate_json(incoming.read(MAX_ORDER_BYTES))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        speaker.tell(
            FetchFailed(code="bad_order", message=f"no order: {first['msg']}", permanent=True)
        )
        return 1
    errand = _Errand(order, speaker.tell, dial)
    signal.signal(signal.SIGTERM, lambda *_: errand.stop())
    return errand.run()


class _Speaker:
    """Lines of news; for several threads."""

    def __init__(self, outgoing: BinaryIO) -> None:
        self._outgoing = outgoing
        self._lock = threading.Lock()

    def tell(self, news: News) -> None:
        line = news.model_dump_json().encode() + b"\n"
        with self._lock:
            self._outgoing.write(line)
            self._outgoing.flush()


class _Errand:
    def __init__(self, order: FetchOrder, tell: Callable[[News], None], dial: Dial) -> None:
        self._order = order
        self._tell = tell
        self._open_stream = dial(order.credentials) if order.credentials is not None else None
        self._places = Places(Path(order.hub_dir), Path(order.state_dir), Path(order.builtin_dir))
        self._work: Pull | HeaderReading | None = None
        self._stopped = False

    def stop(self) -> None:
        """From a signal's handler."""
        self._stopped = True
        if self._work is not None:
            self._work.stop()

    def run(self) -> int:
        try:
            done = self._run()
        except Stopped:
            message = "cancelled; the next time it goes on from here"
            self._tell(FetchFailed(code=CANCELLED, message=message, permanent=False))
        except MeshdError as error:
            self._tell(
                FetchFailed(
                    code=error.code,
                    message=error.message,
                    permanent=not error.retryable,
                    retry_after_s=error.retry_after_s,
                )
            )
        else:
            self._tell(done)
            return 0
        return 1

    def _run(self) -> Done:
        try:
            manifest, newest = self._resolve()
            self._tell(Resolved(manifest=manifest))
            if self._order.resolve_only:
                return Done(fetched_bytes=0)
            if self._order.headers_only:
                reached = newest or self._order.manifest is not None
                return self._read_headers(manifest, ask_hub=reached and not self._is_offline())
            if self._order.only:
                sources = self._fetch(self._part(manifest))
            else:
                sources = self._fetch(manifest)
                landing.name_branch(self._places, manifest, newest=newest)
        except OSError as error:  # of small files; those of weights are told apart where they occur
            where = error.filename or self._places.hub
            raise CacheUnwritable(f"{where}: {error.strerror or error}") from error
        return Done(fetched_bytes=sum(sources.values()), sources=sources)

    def _fetch(self, manifest: Manifest) -> dict[str, int]:
        files = {shard.sha256: self._hub_file(manifest, shard) for shard in manifest.files}

        def file_of(shard: Shard) -> HubFile:
            return files[shard.sha256]

        self._work = work = Pull(
            self._order,
            manifest,
            hub=None if self._is_offline() else file_of,
            open_stream=self._open_stream,
            tell=self._tell,
        )
        if self._stopped:
            raise Stopped
        return work.run()

    def _read_headers(self, manifest: Manifest, *, ask_hub: bool) -> Done:
        self._work = work = HeaderReading(
            self._order,
            manifest,
            hub=partial(self._hub_file, manifest) if ask_hub else None,
            open_stream=self._open_stream,
            blob=lambda shard: self._places.blob(manifest.repo, shard.sha256),
        )
        if self._stopped:
            raise Stopped
        shape, sources = work.run()
        self._tell(Shape(shape=shape.to_json().decode()))
        return Done(fetched_bytes=sum(sources.values()), sources=sources)

    def _hub_file(self, manifest: Manifest, shard: Shard) -> HubFile:
        return HubFile(manifest, shard, stall_s=self._order.stall_s, translate=translate)

    # -- what is wanted ---------------------------------------------------------------------------

    def _resolve(self) -> tuple[Manifest, bool]:
        """The manifest, and whether the hub just said so."""
        if self._order.manifest is not None:
            return self._order.manifest, False
        ref = parse_ref(self._order.ref)
        if not isinstance(ref, HubRef):
            raise BadReference(f"`{self._order.ref}` is not on the hub")
        store = ManifestStore(self._places.manifests)
        why = HubUnavailable("the hub is not asked (offline)")
        if not self._is_offline():
            try:
                manifest = resolve(ref)
            except HubUnavailable as error:
                why = error
                self._tell(Said(message=error.message))
            else:
                store.put(ref, manifest)
                return manifest, True
        manifest_here = store.find(ref)
        if manifest_here is not None:
            if self._order.expected_digest not in (None, manifest_here.digest):
                raise ModelAmbiguous(f"{self._order.ref} is another set here than was asked for")
            return manifest_here, False
        manifest = self._ask_peers(ref, why)
        store.put(ref, manifest)
        return manifest, False

    def _part(self, manifest: Manifest) -> Manifest:
        """What is wanted of it."""
        try:
            part = manifest.only(self._order.only)
        except ValueError as error:
            raise BadReference(f"`{self._order.ref}`: {error} is wanted") from None
        return part

    def _ask_peers(self, ref: HubRef, why: HubUnavailable) -> Manifest:
        """What most peers say that know it."""
        told: list[Manifest] = []
        digest = self._order.expected_digest
        for peer in self._order.peers if self._open_stream is not None else ():
            told += (m for m in self._ask_peer(ref, peer) if digest in (None, m.digest))
            if told and digest is not None:
                break  # it proves the hashes, whoever it came from
        if not told:
            raise HubUnavailable(
                f"{why.message}; no other node knows {self._order.ref} either",
                retry_after_s=why.retry_after_s,
            )
        votes = Counter(manifest.digest for manifest in told).most_common(2)
        if len(votes) > 1 and votes[0][1] == votes[1][1]:
            revisions = sorted({manifest.revision[:12] for manifest in told})
            raise ModelAmbiguous(
                f"{why.message}; other nodes have different sets for {self._order.ref}: add "
                f"@REVISION, one of {', '.join(revisions)}"
            )
        return next(manifest for manifest in told if manifest.digest == votes[0][0])

    def _ask_peer(self, ref: HubRef, peer: PeerSource) -> list[Manifest]:
        assert self._open_stream is not None, "asked only if there is a way"
        try:
            manifests = ask_manifests(self._open_stream, peer, format_ref(ref))
        except MeshdError as error:
            self._tell(Said(message=f"{peer.name}: {error.message}"))
            return []
        fitting = {m.digest: m for m in manifests if m.repo.lower() == ref.repo.lower()}
        return list(fitting.values())

    def _is_offline(self) -> bool:
        from huggingface_hub import constants

        return self._order.offline or bool(constants.HF_HUB_OFFLINE)
