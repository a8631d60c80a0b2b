"""Flags over environment over file over defaults, and words for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshd.config import (
    environment_of_children,
    hub_cache_dir,
    known_keys,
    load,
    split_address,
)
from meshd.errors import BadConfig

HOME = {"HOME": "/home/somebody"}


def test_defaults() -> None:
    config = load(environ=HOME).config
    assert config.listen_address == ("127.0.0.1", 9337)
    assert config.data_dir == Path("/home/somebody/.local/share/meshd")
    assert config.cache_dir == Path("/home/somebody/.cache")
    assert config.name
    assert config.api.queue_per_model == 256


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"MESHD_DATA_DIR": "/a", "STATE_DIRECTORY": "/b"}, "/a"),
        ({"STATE_DIRECTORY": "/b:/c", "XDG_DATA_HOME": "/d"}, "/b"),
        ({"XDG_DATA_HOME": "/d"}, "/d/meshd"),
    ],
)
def test_data_directory(environ: dict[str, str], expected: str) -> None:
    assert load(environ=HOME | environ).config.data_dir == Path(expected)
    assert load({"data_dir": "/flag"}, environ=HOME | environ).config.data_dir == Path("/flag")


def test_precedence_and_provenance(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        'name = "file"\nlog_level = "error"\nmodel = ["f1", "f2"]\n[api]\nqueue_per_model = 1\n'
    )
    environ = HOME | {"MESHD_NAME": "env", "MESHD_API__QUEUE_PER_MODEL": "2", "MESHD_MODEL": "a, b"}
    loaded = load({"data_dir": str(tmp_path), "name": "flag"}, environ=environ)
    config, sources = loaded.config, loaded.sources
    assert (config.name, sources["name"]) == ("flag", "flag")
    assert config.api.queue_per_model == 2
    assert sources["api.queue_per_model"] == "environment MESHD_API__QUEUE_PER_MODEL"
    assert config.model == ("a", "b")
    assert (config.log_level, sources["log_level"]) == ("error", str(tmp_path / "config.toml"))
    assert "listen" not in sources


def test_flags_that_were_not_given_change_nothing() -> None:
    config = load({"name": None, "model": ()}, environ=HOME | {"MESHD_MODEL": "x"}).config
    assert config.model == ("x",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lisden = 'x'", ("unknown key `lisden`", "`listen`")),
        ("[apu]\nwait_s = 1", ("unknown key `apu.wait_s`", "`api.wait_s`")),
        ("[engine]\nzzzzzz = 1", ("unknown key `engine.zzzzzz`",)),
        ("[api]\nwait_s = 'long'", ("`api.wait_s`", "'long'")),
        ("[api]\nmax_connections = 1", ("`api.max_connections`", "greater than or equal to 8")),
        ("listen = '127.0.0.1'", ("`listen`", "'127.0.0.1'")),
        ("name = 'with space'", ("`name`",)),
        ("listen = 'localhost:99999'", ("a port is 0 to 65535",)),
        ("= broken", ("not valid TOML",)),
        ("api = 3", ("`api`",)),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(BadConfig) as caught:
        load(file=path, environ=HOME)
    for word in (*words, *(() if "port" in words[0] else (str(path),))):
        assert word in caught.value.message
    assert caught.value.exit_code == 78


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="does not exist"):
        load(file=tmp_path / "none.toml", environ=HOME)
    with pytest.raises(BadConfig, match="cannot be read"):
        load(file=tmp_path, environ=HOME)


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "192.168.1.5:9337", "[::]:9337", "example.org:1"])
def test_open_addresses_need_a_key(listen: str) -> None:
    with pytest.raises(BadConfig, match="API key"):
        load({"listen": listen}, environ=HOME)
    assert load({"listen": listen, "api_key": "12345678"}, environ=HOME).config.api_key


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:1", "[::1]:9337", "127.9.9.9:80"])
def test_loopback_needs_none(listen: str) -> None:
    assert load({"listen": listen}, environ=HOME).config.listen == listen


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(" correct-horse \n")
    flags = {"api_key_file": str(path)}
    assert load(flags, environ=HOME).config.api_key == "correct-horse"
    assert "correct-horse" not in repr(load(flags, environ=HOME).config)
    with pytest.raises(BadConfig, match="keep one"):
        load(flags | {"api_key": "12345678"}, environ=HOME)
    path.write_text("short")
    with pytest.raises(BadConfig, match="at least 8"):
        load(flags, environ=HOME)
    with pytest.raises(BadConfig, match="cannot be read"):
        load({"api_key_file": str(tmp_path / "none")}, environ=HOME)


def test_sockets_must_fit_into_the_data_directory(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="too long"):
        load({"data_dir": str(tmp_path / ("x" * 100))}, environ=HOME)


def test_every_key_is_known_once() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys))
    assert {"listen", "api.wait_s", "engine.context"} <= set(keys)


def test_addresses() -> None:
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("localhost:9337") == ("localhost", 9337)


def test_children_get_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHD_API_KEY", "secret")
    monkeypatch.setenv("LLAMA_ARG_HOST", "0.0.0.0")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    environ = environment_of_children({"EXTRA": "1"})
    assert environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert environ["EXTRA"] == "1"
    assert not {"MESHD_API_KEY", "LLAMA_ARG_HOST", "NOTIFY_SOCKET"} & set(environ)


def test_hub_cache_follows_the_hubs_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    assert hub_cache_dir() == Path("/h/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hub_cache_dir() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert hub_cache_dir() == Path("/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/cache")
    assert hub_cache_dir() == Path("/cache")


def test_a_client_is_given_no_models(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="hosts no models"):
        load({"client": True, "model": ("builtin",), "data_dir": str(tmp_path)}, environ=HOME)
    with pytest.raises(BadConfig, match="chooses no models; leave --auto out") as caught:
        load({"client": True, "auto": True, "data_dir": str(tmp_path)}, environ=HOME)
    assert caught.value.exit_code == 78
