"""What can be configured: every key with its meaning, unit, default and trade-off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from meshd.config.addresses import ADDRESS_PATTERN, split_address
from meshd.sizes import SIZE_OR_SHARE_PATTERN, SIZE_PATTERN

Seconds = Annotated[float, Field(ge=0, le=86_400)]
Address = Annotated[str, StringConstraints(pattern=f"^{ADDRESS_PATTERN}$")]

DEFAULT_CONTEXT_LIMIT = 8192
"""Tokens per slot when nobody asks for more: the context a model was trained for can need more
memory than its weights, and it is divided among slots that are all paid for at once."""
DEFAULT_PARALLEL = 4
"""Slots."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""Names of nodes and meshes."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiSettings(Section):
    """[api]: the HTTP side on :9337."""

    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024, le=1 << 30)
    """Longest request body, bytes. Images in chat messages need room; each one costs memory."""
    max_connections: int = Field(1024, ge=8, le=65_536)
    """Open client connections; one more is answered 503. Each needs a file descriptor."""
    head_timeout_s: Seconds = 10.0
    """From the first moment of a connection to a complete request head."""
    body_timeout_s: Seconds = 60.0
    """From the head to the last byte of the body."""
    idle_timeout_s: Seconds = 75.0
    """How long a kept-alive connection may be silent between requests."""
    first_byte_timeout_s: Seconds = 600.0
    """From admission to the engine's first byte (504 after that). A long prompt on a small machine
    takes minutes before the first token of an answer that is not streamed."""
    queue_per_model: int = Field(256, ge=0, le=65_536)
    """Requests that may wait for a free slot of one model; one more is 429. Longer queues trade
    refusals for waiting time."""
    wait_s: Seconds = 0.0
    """How long a request for a loading model waits when it carries no `x-meshd-wait-s`."""
    allowed_hosts: tuple[str, ...] = ()
    """Further DNS names clients may use in `Host`. IP addresses and localhost always may: a
    rebinding attack needs a name."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins (`https://app.example`) whose pages may call this API; `*` for all."""


class EngineSettings(Section):
    """[engine]: llama-server processes."""

    context: int | None = Field(None, ge=128)
    """Tokens of context per slot; None takes what the model was trained for, at most 8,192."""
    parallel: int | None = Field(None, ge=1, le=1024)
    """Slots; None leaves it at 4. More slots share the memory of the context."""
    threads: int | None = Field(None, ge=1)
    prompt_cache: Annotated[str, StringConstraints(pattern=SIZE_PATTERN)] = "1GB"
    """Main memory in which an engine keeps conversations that have lost their slot, so that they
    need not be read again; never more than its slots have themselves. Counted before a model is
    placed. `0B` keeps none."""
    lend: bool = True
    """Lend memory to hosts of models that are larger than any one node. A model that lies here
    alone is placed first either way."""
    tensor_cache: Annotated[str, StringConstraints(pattern=SIZE_PATTERN)] = "64GB"
    """Disk for tensors of models that lie here in part, so that their hosts need not send them at
    every load; those used longest ago go first. `0B` keeps none."""
    memory_speed: Annotated[str, StringConstraints(pattern=SIZE_PATTERN)] | None = None
    """Bytes a second that engines read of main memory, such as `60GB`: of a model split over
    several nodes the fastest memories hold the most. Default: measured when the node has started.
    `0B` says that it is not known, and does not measure."""
    extra_args: tuple[str, ...] = ()
    """Appended to llama-server's command line as they are."""
    start_silence_s: Seconds = 120.0
    """A starting engine that shows no progress (output, I/O) for this long has failed."""
    probe_interval_s: Seconds = 5.0
    """Health and slot probe of a ready engine. Shorter notices a hang sooner."""
    hang_after_s: Seconds = 60.0
    """A ready engine that answered no probe and made no progress for this long is restarted."""
    canary_interval_s: Seconds = 60.0
    """An idle engine generates one token this often, to prove it still can; 0 turns it off."""
    stop_grace_s: Seconds = 10.0
    """From SIGTERM to SIGKILL."""
    reprove_s: Annotated[float, Field(ge=10, le=30 * 86_400)] = 3600.0
    """The engine and its devices are proved again this often, and when something changed."""
    restart_budget: int = Field(5, ge=0, le=100)
    """Restarts within `restart_window_s` before the engine is degraded, and then given up."""
    restart_window_s: Seconds = 600.0
    log_bytes: int = Field(4 * 1024 * 1024, ge=65_536)
    """Size at which an engine's log file is rotated; three old ones are kept."""

    def context_of(self, asked: int | None, trained: int | None) -> int:
        """Tokens per slot of an engine that is asked for `asked`, of a model trained for
        `trained`; None: nothing was said."""
        limit = DEFAULT_CONTEXT_LIMIT
        return asked or self.context or min(trained or limit, limit)

    def slots_of(self, asked: int | None) -> int:
        return asked or self.parallel or DEFAULT_PARALLEL


class PeerSettings(Section):
    """[peers]: the side that faces other nodes."""

    preset: Literal["lan", "wan"] = "lan"
    """Timing of failure detection. `lan` notices a killed node in under 1.5 s and a silent one in
    under 4 s; `wan` allows for longer and less even round trips and takes about five times that."""
    dial_timeout_s: Annotated[float, Field(gt=0, le=60)] = 4.0
    """From a connection attempt to a node's answer to our hello."""
    max_links: int = Field(64, ge=4, le=1024)
    """Control links kept open; above that the least recently used one is closed. Each costs a file
    descriptor and some 100 KiB at both ends."""
    max_streams: int = Field(512, ge=8, le=16_384)
    """Streams (relayed requests) that other nodes may have open here at once."""


class CacheSettings(Section):
    """[cache]: the weights on this machine."""

    budget: Annotated[str, StringConstraints(pattern=SIZE_OR_SHARE_PATTERN)] | None = None
    """How much the Hugging Face cache may take: a size such as `500GB`, or a share of its disk such
    as `80%`. Models used longest ago go first when a new one needs room. Default: no limit."""
    reserve: Annotated[str, StringConstraints(pattern=SIZE_OR_SHARE_PATTERN)] = "2GB"
    """Free space that no download may touch."""
    pins: tuple[str, ...] = ()
    """REFs of models that are never removed to make room."""
    workers: int = Field(4, ge=1, le=32)
    """Transfers at once while a model is fetched. More helps against slow single connections."""
    from_peers: bool = True
    """Fetch from nodes that hold the weights verified, and serve them to others."""
    stall_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """A source that sends nothing for this long is given up."""
    scrub_days: Annotated[float, Field(ge=0, le=3650)] = 30.0
    """Every file that was verified is hashed again in the background this often; 0 turns it off."""
    scrub_rate: Annotated[str, StringConstraints(pattern=SIZE_PATTERN)] = "50MB"
    """Bytes a second the background check reads at most."""


class Config(Section):
    """The effective configuration. Top-level names are those of the flags of `meshd run`."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of this node, for people; default: the machine's host name."""
    listen: Address = "127.0.0.1:9337"
    """API address. An address other than loopback is refused without an API key."""
    peer_listen: Address = "0.0.0.0:9338"
    """Where other nodes reach this one: everything between nodes, encrypted and authenticated."""
    advertise: tuple[Address, ...] = ()
    """Addresses other nodes are told to use, HOST:PORT; default: those of this machine's network
    interfaces. Needed behind NAT."""
    mesh: Annotated[str, StringConstraints(pattern=NAME_PATTERN)] = "default"
    """Name of the mesh this node founds if it belongs to none and joins none."""
    join: tuple[str, ...] = Field((), repr=False)
    """Invite tokens (secrets), the name of a mesh, or HOST:PORT of members of the mesh this node
    is in."""
    client: bool = False
    """Use the mesh and host nothing: no engine, no capacity in the advert."""
    mdns: bool = True
    """Look for members on the LAN, and let them find this node."""
    model: tuple[str, ...] = ()
    """REFs the mesh is to serve: deployed when this node starts, hosted by whichever node suits
    best. One that is left out at the next start is unloaded, if no other node deployed it since."""
    auto: bool = False
    """If the mesh has no model deployed, choose the best one of the catalog that fits."""
    on_demand: bool = False
    """Load a model that lies on the disk of some node when a request names it. Whoever may ask
    this node's API decides then what is loaded."""
    idle_unload_s: Annotated[float, Field(ge=10, le=30 * 86_400)] | None = None
    """A model that no node has asked for this long is unloaded until it is asked for again.
    Default: never."""
    max_vram: Annotated[str, StringConstraints(pattern=SIZE_PATTERN)] | None = None
    """How much memory models may take on this node: of its accelerators together, or of main memory
    if it has none. Default: what is free."""
    api_key: str | None = Field(None, min_length=8, repr=False)
    api_key_file: Path | None = None
    data_dir: Path
    cache_dir: Path
    """Parent of `meshd/runtimes` (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    runtime_dir: Path | None = None
    """Directory with a llama-server of your own."""
    require_gpu: bool = False
    """Refuse to start, instead of running on the CPU, when the proof of a GPU fails."""
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_s: Seconds = 30.0
    """How long a stop waits for requests in flight."""
    api: ApiSettings = ApiSettings()
    engine: EngineSettings = EngineSettings()
    peers: PeerSettings = PeerSettings()
    cache: CacheSettings = CacheSettings()

    @property
    def listen_address(self) -> tuple[str, int]:
        return split_address(self.listen)

    @property
    def peer_listen_address(self) -> tuple[str, int]:
        return split_address(self.peer_listen)

    @property
    def mesh_dir(self) -> Path:
        """Membership: certificates, invites, deny list, remembered addresses."""
        return self.data_dir / "mesh"

    @property
    def weights_dir(self) -> Path:
        """What is known of the weights in the Hugging Face cache; made again when it is lost."""
        return self.cache_dir / "meshd" / "weights"

    @property
    def models_dir(self) -> Path:
        """Where the built-in model is made."""
        return self.cache_dir / "meshd" / "models"

    @property
    def run_dir(self) -> Path:
        """Sockets of children; emptied at start."""
        return self.data_dir / "run"

    @property
    def log_dir(self) -> Path:
        return self.data_dir / "logs"

    @property
    def admin_socket(self) -> Path:
        return self.data_dir / "admin.sock"
