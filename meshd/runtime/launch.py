"""From what is wanted to a command line."""

from __future__ import annotations

from dataclasses import dataclass

from meshd.ids import InstanceId, ModelId
from meshd.runtime.reported import VERBOSITY

MIB = 1 << 20

INSTANCE_PREFIX = "~"
"""What an instance id begins with, so that it can be told from a name."""


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One way to run a model."""

    model: ModelId
    weights: str
    """Absolute path of the (first shard of the) GGUF file."""
    context: int
    """Tokens per slot."""
    parallel: int
    """Slots."""
    mmproj: str | None = None
    """Path of the projector for images or sound that belongs to the weights."""
    gpu_layers: int | None = None
    """Layers on the device; None leaves it to the engine, which fits them to free memory."""
    kv_type: str | None = None
    """Type of the KV cache; None is the engine's default, f16."""
    threads: int | None = None
    prompt_cache_bytes: int | None = None
    """Main memory for conversations that have lost their slot; None is the engine's default,
    8 GiB. Rounded up to MiB."""
    talkative: bool = False
    """It tells of its layers and buffers, and much of every request."""
    extra: tuple[str, ...] = ()
    """Further arguments, appended as they are."""


def server_argv(
    binary: str, spec: LaunchSpec, instance: InstanceId, socket_name: str
) -> tuple[str, ...]:
    """llama-server's command line. `socket_name` is relative to the child's working directory:
    a unix socket's path is limited to 107 bytes, a file name is not likely to pass that."""
    # A comma would end the alias. llama-server sorts its aliases and gives the first one to clients
    # in `model`: a name sorts before whatever begins with it, in any script.
    name = spec.model.replace(",", "_")
    argv = [binary, "--model", spec.weights, "--alias", f"{name},{name}{instance}"]
    argv += ["--host", socket_name, "--ctx-size", str(spec.context * spec.parallel)]
    argv += ["--parallel", str(spec.parallel)]
    if spec.mmproj is not None:
        argv += ["--mmproj", spec.mmproj]
    if spec.gpu_layers is not None:
        argv += ["--n-gpu-layers", str(spec.gpu_layers)]
    if spec.kv_type is not None:
        argv += ["--cache-type-k", spec.kv_type, "--cache-type-v", spec.kv_type]
    if spec.threads is not None:
        argv += ["--threads", str(spec.threads)]
    if spec.prompt_cache_bytes is not None:
        argv += ["--cache-ram", str(-(-spec.prompt_cache_bytes // MIB))]
    if spec.talkative:
        argv += ["--verbosity", str(VERBOSITY)]
    argv += ["--no-webui", "--slots", "--offline"]
    return (*argv, *spec.extra)
