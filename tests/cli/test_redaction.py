"""What nobody else may read does not leave the machine, whichever way it is written."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshd.cli.redaction import Redactor, is_secret_name, secrets_in, spellings_of

PEM = "\n".join(
    ("-----BEGIN PRIVATE KEY-----", "MC4CAQAwBQYDK2VwBCIEIGFsbCBvZiB0aGlzIGlzIGludmVudGVkLCBidXQ",
     "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQ", "-----END PRIVATE KEY-----")
)  # fmt: skip
UNKNOWN = Redactor.of(())


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("join meshd1-mfrggzdfmztwq2lknnwg23tpob now", "mfrggzdfmztwq2lknnwg23tpob"),
        ("MESHD1-MFRGGZDFMZTWQ2LKNNWG23TPOB", "MFRGGZDFMZTWQ2LKNNWG23TPOB"),
        ("token=hf_AbCdEfGhIjKlMnOpQrStUv", "AbCdEfGhIjKlMnOpQrStUv"),
        ("using hf_AbCdEfGhIjKlMnOpQrStUv.", "AbCdEfGhIjKlMnOpQrStUv"),
        ("key sk-proj-abcDEF123456_7890 was refused", "abcDEF123456_7890"),
        ("ghp_0123456789abcdefABCDEF0123456789abcd", "0123456789abcdef"),
        ("AKIAIOSFODNN7INVENTD", "IOSFODNN7INVENTD"),
        ("Authorization: Bearer abc.def-ghi_jkl", "abc.def-ghi_jkl"),
        ("authorization: Basic dXNlcjpodW50ZXIy", "dXNlcjpodW50ZXIy"),
        ('{"authorization":"Bearer abcdefghij"}', "abcdefghij"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2lnbmF0dXJl", "eyJzdWIiOiJtZSJ9"),
        ("GET https://user:hunter2@hub.example/x", "hunter2"),
        ("https://cdn.example/f?X-Amz-Signature=0a1b2c3d4e&x=1", "0a1b2c3d4e"),
        ("https://cdn.example/f?Policy=eyJTdGF0&Key-Pair-Id=K1INVENTED", "K1INVENTED"),
        ('api_key = "open sesame, please"', "open sesame, please"),
        ("api_key = 'open sesame'    # file", "open sesame"),
        ("MESHD_API_KEY=opensesame", "opensesame"),
        ('{"api_key": "open\\u0020sesame"}', "sesame"),
        ("x-api-key: opensesame", "opensesame"),
        ('{"said": "api_key = \\"opensesame\\" and"}', "opensesame"),
        ('api_key = "opensesame, cut', "opensesame, cut"),
        ("HF_TOKEN=opensesame", "opensesame"),
        ("password: hunter22", "hunter22"),
        ("meshd run --api-key opensesame --name x", "opensesame"),
        ("llama-server --api-key=opensesame", "opensesame"),
        ("llama-server --api-key 'open sesame' --port 1", "sesame"),
        (f"a\n{PEM}\nb", "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQ"),
        (PEM[:-40], "MC4CAQAwBQYDK2VwBCIEIGFsbCBvZiB0aGlzIGlz"),
        (PEM[40:], "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQ"),
        (json.dumps({"key": PEM}), "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQ"),
        (PEM.replace("PRIVATE", "EC PRIVATE"), "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQ"),
        ("/home/somebody/.cache/huggingface", "somebody"),
        ("/Users/somebody/Library", "somebody"),
    ],
)
def test_what_looks_like_a_secret(text: str, secret: str) -> None:
    assert secret in text
    once = UNKNOWN.redact(text)
    assert secret not in once
    assert UNKNOWN.redact(once) == once


@pytest.mark.parametrize(
    "text",
    [
        "api_key = None",
        "api_key = '(set)'    # environment MESHD_API_KEY",
        '"api_key": null',
        "api_key_file = '/etc/meshd/key'",
        "join = ['(invite)']",
        "tokens_per_s: 251.5",
        "eval time = 11.9 ms / 3 tokens (3.98 ms per token, 251.48 tokens per second)",
        "load: special tokens cache size = 3, token type 2",
        "meshd 0.1.0 at http://127.0.0.1:9337/v1, peers at [::1]:9338",
        "sha256 4e2d6fc0465b0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796",
        "CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)",
        "`meshd runtime build --backend cuda --cuda-arch 121`",
        "https://huggingface.co/unsloth/Qwen3-8B-GGUF/resolve/main/x.gguf",
    ],
)
def test_what_a_report_needs_stays(text: str) -> None:
    assert Redactor.of(("a known secret",), home="/root").redact(text) == text


def test_json_stays_json() -> None:
    told = {"api_key": "opensesame", "password": 'a "quoted" one', "n": 1, "key": PEM}
    text = json.dumps(told, indent=2)
    assert json.loads(UNKNOWN.redact(text))["n"] == 1


NO_SPACE = st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=("Z", "C"))


@given(
    secret=st.text(NO_SPACE, min_size=6, max_size=40),
    before=st.text(max_size=20),
    after=st.text(max_size=20),
)
@example(secret='pass"word\\é', before="", after="")
@example(secret="abcdef/+=%", before="x", after="x")
def test_a_known_secret_goes_in_every_spelling(secret: str, before: str, after: str) -> None:
    redactor = Redactor.of((secret,))
    for spelling in spellings_of(secret):
        shown = redactor.redact(before + spelling + after)
        assert secret not in shown.replace("(secret)", "\0") or secret in before + after


def test_the_longest_of_two_secrets_goes_whole() -> None:
    redactor = Redactor.of(("abcdef", "abcdefghijkl", "", "short", "   "))
    assert redactor.redact("abcdefghijkl abcdef short") == "(secret) (secret) short"


def test_home() -> None:
    redactor = Redactor.of((), home="/home/ada")
    assert redactor.redact("/home/ada/.cache and /home/ada") == "~/.cache and ~"
    assert redactor.redact("/home/adalbert/x") == "/home/(user)/x"
    assert Redactor.of((), home="/").redact("/usr/bin /") == "/usr/bin /"
    assert Redactor.of((), home="/root").redact("/root/x /rooting /srv/root") == (
        "~/x /rooting /srv/root"
    )


def test_names_and_addresses_are_numbered() -> None:
    redactor = Redactor.of((), names=("study", "study-2", "Attic", ""))
    shown = redactor.redact("study dials attic at 192.168.7.4:9338, study-2 at 10.0.0.9, study")
    assert shown == "name-2 dials name-1 at address-1:9338, name-3 at address-2, name-2"
    assert redactor.redact("127.0.0.1 0.0.0.0 1.2.3 studying") == "127.0.0.1 0.0.0.0 1.2.3 studying"
    assert Redactor.of(()).redact("study at 192.168.7.4") == "study at 192.168.7.4"


def test_names_of_secrets() -> None:
    environment = {
        "HF_TOKEN": "1", "MESHD_API_KEY": "2", "OPENAI_API_KEY": "3", "AWS_SECRET_ACCESS_KEY": "4",
        "DB_PASSWORD": "5", "SSH_PRIVATE": "6", "MESHD_API_KEY_FILE": "no", "HF_TOKEN_PATH": "no",
        "GIT_AUTHOR_NAME": "no", "PATH": "no", "KEYBOARD": "no", "XAUTHORITY": "7",
    }  # fmt: skip
    assert sorted(secrets_in(environment)) == list("123456")
    assert is_secret_name("llama_arg_api_key")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "piece", ["4e2d6fc0465b0f1e2d3c4b5a69788796\n", "a.", "a", "--a-", '{"', "x=", "/"]
)
def test_the_time_it_takes_grows_with_the_text_alone(piece: str) -> None:
    """Logs are long, and patterns that look back and forth took minutes for a list of hashes."""
    text = piece * (300_000 // len(piece))
    assert len(Redactor.of(("a known secret",), home="/root").redact(text)) >= len(text) // 2
