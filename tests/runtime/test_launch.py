"""From what is wanted to a command line."""

from __future__ import annotations

import pytest

from meshd.ids import InstanceId, ModelId
from meshd.runtime.launch import LaunchSpec, server_argv

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
