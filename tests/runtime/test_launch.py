"""From what is wanted to a command line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshd.ids import InstanceId, ModelId, NodeId
from meshd.runtime.launch import LaunchSpec, on_workers, server_argv
from meshd.view import Part, SplitPlan

INSTANCE = InstanceId("~0011223344556677")


def value(argv: tuple[str, ...], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_the_least_command_line() -> None:
    spec = LaunchSpec(ModelId("m"), "/w/m.gguf", context=4096, parallel=4)
    argv = server_argv("/opt/llama-server", spec, INSTANCE, "ab.sock")
    assert argv[0] == "/opt/llama-server"
    assert value(argv, "--model") == "/w/m.gguf"
    assert value(argv, "--alias") == f"m,m{INSTANCE}"
    assert value(argv, "--host") == "ab.sock"
    assert value(argv, "--ctx-size") == "16384"  # llama-server divides it among the slots
    assert value(argv, "--parallel") == "4"
    assert {"--no-webui", "--slots", "--offline"} <= set(argv)
    assert not {"--mmproj", "--n-gpu-layers", "--cache-type-k", "--threads"} & set(argv)


def test_all_of_it_with_further_arguments_last() -> None:
    spec = LaunchSpec(
        ModelId("m"),
        "/w/m.gguf",
        context=1024,
        parallel=1,
        mmproj="/w/mmproj-F16.gguf",
        gpu_layers=0,
        kv_type="q8_0",
        threads=3,
        prompt_cache_bytes=(100 << 20) + 1,
        extra=("--jinja", "--seed", "7"),
    )
    argv = server_argv("s", spec, INSTANCE, "ab.sock")
    assert value(argv, "--mmproj") == "/w/mmproj-F16.gguf"
    assert value(argv, "--n-gpu-layers") == "0"
    assert (value(argv, "--cache-type-k"), value(argv, "--cache-type-v")) == ("q8_0", "q8_0")
    assert value(argv, "--threads") == "3"
    assert value(argv, "--cache-ram") == "101"  # MiB; 0 would turn it off
    assert argv[-3:] == ("--jinja", "--seed", "7")


def test_a_comma_in_a_name_does_not_make_another_alias() -> None:
    spec = LaunchSpec(ModelId("a,b"), "/w/a,b.gguf", context=1024, parallel=1)
    assert value(server_argv("s", spec, INSTANCE, "x"), "--alias") == f"a_b,a_b{INSTANCE}"


@pytest.mark.parametrize("name", ["zebra", "~", "Ünïcode", "模型", "a b"])
def test_clients_read_the_name_whatever_its_script(name: str) -> None:
    spec = LaunchSpec(ModelId(name), "/w/m.gguf", context=1024, parallel=1)
    aliases = value(server_argv("s", spec, INSTANCE, "x"), "--alias").split(",")
    assert min(aliases, key=str.encode) == name
    assert aliases[1].endswith(INSTANCE)


PLAN = SplitPlan(
    parts=(
        Part(NodeId("b"), "b", (("CUDA0", 5), ("CUDA1", 5)), (3, 2), 1, False, 0.5),
        Part(NodeId("c"), "c", (("CPU", 4),), (4,), 6, False, 0.4),
    ),
    own=(("CUDA1", 1),),
    beside=1,
)
ENDS = ("127.0.0.1:7001", "127.0.0.1:7002")


def test_a_plan_names_every_device_in_its_order() -> None:
    spec = LaunchSpec(ModelId("m"), "/w/m.gguf", context=512, parallel=1)
    spread = on_workers(spec, PLAN, ENDS)
    argv = server_argv("s", spread, INSTANCE, "x")
    assert value(argv, "--rpc") == "127.0.0.1:7001,127.0.0.1:7002"
    assert value(argv, "--device") == "RPC0,RPC1,RPC2,CUDA1"
    assert value(argv, "--tensor-split") == "3,2,4,2"  # the output layer is the last device's
    assert value(argv, "--n-gpu-layers") == "11"
    assert value(argv, "--split-mode") == "layer"
    assert value(argv, "--fit") == "off"
    assert "--verbosity" in argv
    assert argv.index("--rpc") < argv.index("--device")  # which knows RPC0 only then


def test_a_projector_stays_on_this_machine() -> None:
    spec = LaunchSpec(ModelId("m"), "/w/m.gguf", context=512, parallel=1, mmproj="/w/p.gguf")
    argv = server_argv("s", on_workers(spec, PLAN, ENDS), INSTANCE, "x")
    assert value(argv, "--mmproj-device") == "CUDA1"
    argv = server_argv("s", on_workers(spec, replace(PLAN, own=()), ENDS), INSTANCE, "x")
    assert "--no-mmproj-offload" in argv
    assert not {"--mmproj-device", "--no-mmproj-offload"} & set(
        server_argv("s", spec, INSTANCE, "x")
    )
