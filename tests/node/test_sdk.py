"""The OpenAI SDK against a node and a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.node.conftest import Daemon, DaemonFactory

pytestmark = pytest.mark.engine

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say something"}]


@pytest.fixture
def daemon(make_daemon: DaemonFactory) -> Daemon:
    daemon = make_daemon("--model", "builtin").start()
    daemon.wait_state("builtin", "ready")
    return daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="builtin",
        messages=MESSAGES,
        max_tokens=8,
        seed=1,
    )
    assert answer.model == "builtin"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"


def test_stream_is_the_same_text_in_pieces(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="builtin", messages=MESSAGES, max_tokens=40, temperature=0
    )
    stream = client.chat.completions.create(
        model="builtin", messages=MESSAGES, max_tokens=40, temperature=0, stream=True
    )
    pieces = [event.choices[0].delta.content for event in stream if event.choices]
    assert "".join(piece for piece in pieces if piece) == whole.choices[0].message.content
    assert len(pieces) > 10


def test_completions_and_models(client: OpenAI) -> None:
    answer = client.completions.create(model="builtin", prompt="1 2 3", max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("builtin", "meshd")
    meshd = model.model_extra["meshd"]  # type: ignore[index]
    assert meshd["state"] == "ready"
    assert meshd["context_length"] == 8192
    assert meshd["digest"].startswith("sha256:")
    assert meshd["nodes"] == ["testnode"]


def test_raw_answer_headers(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="builtin",
        messages=MESSAGES,
        max_tokens=1,
        extra_headers={"x-request-id": "mine-1"},
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["x-meshd-node"] == "testnode"
    assert raw.headers["x-meshd-route"] == "local"
    assert raw.headers["x-meshd-attempts"] == "1"
    assert float(raw.headers["x-meshd-queue-ms"]) >= 0


def test_unknown_model_is_not_found_with_a_close_name(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="buildin", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert "builtin" in caught.value.message


def test_the_engines_own_refusals_come_through(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="builtin", messages="no list")  # type: ignore[arg-type]


def test_a_failed_model_says_why(daemon: Daemon, client: OpenAI, short_dir: Path) -> None:
    bad = short_dir / "bad.gguf"
    bad.write_text("version https://git-lfs.github.com/spec/v1\n")
    daemon.load(str(bad))
    daemon.wait_state("bad", "failed")
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="bad", messages=MESSAGES)
    assert (caught.value.status_code, caught.value.code) == (503, "model_failed")
    assert "Git LFS pointer" in caught.value.message
    assert str(bad) in caught.value.message


def test_sdk_retries_over_a_loading_model(make_daemon: DaemonFactory, slow_engine: Path) -> None:
    daemon = make_daemon("--model", "builtin", engine=slow_engine).start()
    with OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=8) as client:
        answer = client.chat.completions.create(
            model="builtin",
            messages=MESSAGES,
            max_tokens=2,
        )
    assert answer.choices[0].finish_reason == "length"


def test_an_api_key_is_asked_for(make_daemon: DaemonFactory, short_dir: Path) -> None:
    key_file = short_dir / "key"
    key_file.write_text("correct-horse\n")
    daemon = make_daemon("--model", "builtin", "--api-key-file", str(key_file)).start()
    daemon.wait_state("builtin", "ready")
    with OpenAI(base_url=f"{daemon.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "unauthorized"
    with OpenAI(base_url=f"{daemon.url}/v1", api_key="correct-horse", max_retries=0) as client:
        assert [m.id for m in client.models.list().data] == ["builtin"]
    assert daemon.request("GET", "/livez")[0] == 200
    assert "correct-horse" not in daemon.stderr()
