"""From what is wanted to a command line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshd.ids import InstanceId, ModelId
from meshd.runtime.reported import RPC, VERBOSITY
from meshd.view import SplitPlan

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
    rpc: tuple[str, ...] = ()
    """HOST:PORT of RPC servers that other nodes run for it. The engine calls their devices `RPC0`,
    `RPC1` and so on, counted through all servers."""
    devices: tuple[str, ...] = ()
    """What it may use beside the CPU, in this order; empty leaves it to the engine."""
    tensor_split: tuple[int, ...] = ()
    """Layers on each of `devices`; the output layer counts as one of the last device's. Empty
    leaves it to the engine."""
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


def on_workers(spec: LaunchSpec, plan: SplitPlan, endpoints: tuple[str, ...]) -> LaunchSpec:
    """`spec` as `plan` spreads it. `endpoints`: HOST:PORT of each part's RPC server, in order.

    Every device is named: own accelerators that the plan leaves out stay unused, and the order of
    devices is the plan's, whatever the engine's would be. (That is the same: RPC servers go before
    own accelerators, `llama_prepare_model_devices` in src/llama.cpp.) Layer n of N that are
    offloaded goes to the first device whose shares, added up, pass n/N (`load_tensors` in
    src/llama-model.cpp), so whole numbers that add up to N are kept exactly.
    """
    lent = sum(len(part.layers) for part in plan.parts)
    return replace(
        spec,
        rpc=endpoints,
        devices=(*(f"{RPC}{n}" for n in range(lent)), *(device for device, _ in plan.own)),
        gpu_layers=plan.gpu_layers,
        tensor_split=plan.tensor_split,
        talkative=True,
    )


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
    argv += _device_argv(spec)
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


def _device_argv(spec: LaunchSpec) -> list[str]:
    """What lies where. The engine knows a server's devices only after `--rpc`."""
    argv = []
    if spec.rpc:
        argv += ["--rpc", ",".join(spec.rpc)]
    if spec.devices:
        argv += ["--device", ",".join(spec.devices)]
    if spec.gpu_layers is not None:
        argv += ["--n-gpu-layers", str(spec.gpu_layers)]
    if spec.tensor_split:
        shares = ",".join(map(str, spec.tensor_split))
        argv += ["--split-mode", "layer", "--tensor-split", shares, "--fit", "off"]
    if spec.mmproj is not None:
        argv += ["--mmproj", spec.mmproj]
        if spec.rpc:  # left to itself it goes to the first device, a worker's
            own = [device for device in spec.devices if not device.startswith(RPC)]
            argv += ["--mmproj-device", own[0]] if own else ["--no-mmproj-offload"]
    return argv
