"""Last words, as llama.cpp at the pinned commit prints them."""

from __future__ import annotations

import time

import pytest

from meshd.runtime.faults import Fault, classify, worse

DETERMINISTIC = {
    "0.00.004.116 E gguf_init_from_file: failed to open GGUF file '/w/m-00003-of-00004.gguf' "
    "(No such file or directory)": "/w/m-00003-of-00004.gguf: No such file or directory",
    "0.00.004.028 E gguf_init_from_reader: invalid magic characters: '<htm', expected 'GGUF'": (
        "the file is not GGUF: '<htm', expected 'GGUF'"
    ),
    "E gguf_init_from_reader: GGUFv1 is no longer supported, please use a more up-to-date "
    "version": "GGUFv1 is no longer supported",
    "E gguf_init_from_reader: this GGUF file is version 99 but this software only supports up to "
    "version 3": "version 99",
    "E gguf_init_from_reader: failed to read key-value pairs": "failed to read key-value pairs",
    "E llama_model_load: error loading model: tensor 'blk.0.ffn_down.weight' data is not within "
    "the file bounds, model is corrupted or incomplete": "blk.0.ffn_down.weight",
    "E llama_model_load: error loading model: unknown model architecture: 'odd'": "'odd'",
    "E llama_model_load: error loading model: key not found in model: llama.context_length": (
        "llama.context_length"
    ),
    "error: invalid argument: --no-such-thing": "--no-such-thing",
    'error while handling argument "--cache-type-k": Unsupported cache type: q9': "cache type: q9",
    "/opt/llama-server: error while loading shared libraries: libcublas.so.13: cannot open shared "
    "object file: No such file or directory": "libcublas.so.13",
    "meshd guard: /opt/llama-server cannot be executed: Permission denied": (
        "/opt/llama-server cannot be executed: Permission denied"
    ),
}

SHORT_OF_MEMORY = {
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9216.00 MiB on device 0: cudaMalloc "
    "failed: out of memory": "cudaMalloc failed: out of memory",
    "E llama_init_from_model: failed to initialize the context: std::bad_alloc": "bad_alloc",
    "E llama_model_load: error loading model: unable to allocate CUDA0 buffer": "CUDA0 buffer",
    "E llama_model_load: error loading model: mmap failed: Cannot allocate memory": (
        "Cannot allocate memory"
    ),
    "CUDA error: out of memory": "out of memory",
    "E alloc_tensor_range: failed to allocate CPU buffer of size 32768000": "32768000",
    "E cmn  common_init_: failed to create context with model 'm.gguf'": "context",
    "E srv    load_model: failed to create_context with model 'm.gguf'": "context",
    "  what():  std::bad_alloc": "bad_alloc",
}

PASSING = {
    "CUDA error: an illegal memory access was encountered": "illegal memory access",
    "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected": (
        "no CUDA-capable device"
    ),
    "/src/ggml/src/ggml-rpc/ggml-rpc.cpp:99: Remote RPC server crashed or returned malformed "
    "response": "rpc-server went away",
    "/src/ggml/src/ggml-rpc/ggml-rpc.cpp:547: Failed to connect to 127.0.0.1:51809": (
        "rpc-server does not answer"
    ),
    "/src/ggml/src/ggml-rpc/ggml-rpc.cpp:550: RPC handshake failed for 127.0.0.1:5": (
        "rpc-server does not answer"
    ),
    "/src/ggml/src/ggml.c:1234: GGML_ASSERT(ne0 == ne1) failed": "GGML_ASSERT(ne0 == ne1)",
    "/src/ggml/src/ggml-cuda/mmq.cu:88: fatal error": ".cu:88: fatal error",
    "llama-server: a.cpp:5: int f(): Assertion `x > 0' failed.": "Assertion `x > 0' failed",
    "  what():  Resource temporarily unavailable": "Resource temporarily unavailable",
    "E srv         start: couldn't bind HTTP server socket, hostname: x.sock, port: 8080": (
        "could not listen"
    ),
    "E srv  llama_server: exiting due to HTTP server error": "could not serve",
    "E srv  llama_server: exiting due to model loading error": "could not load the model",
}


@pytest.mark.parametrize(("line", "words"), DETERMINISTIC.items())
def test_what_would_fail_again(line: str, words: str) -> None:
    fault = classify(line)
    assert fault is not None
    assert words in fault.message
    assert (fault.deterministic, fault.out_of_memory) == (True, False)


@pytest.mark.parametrize(("line", "words"), SHORT_OF_MEMORY.items())
def test_what_a_smaller_launch_may_survive(line: str, words: str) -> None:
    fault = classify(line)
    assert fault is not None
    assert words in fault.message
    assert (fault.deterministic, fault.out_of_memory) == (False, True)


@pytest.mark.parametrize(("line", "words"), PASSING.items())
def test_what_may_not_happen_again(line: str, words: str) -> None:
    fault = classify(line)
    assert fault is not None
    assert words in fault.message
    assert (fault.deterministic, fault.out_of_memory) == (False, False)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "0.00.004.117 I srv    load_model: loading model 'm.gguf'",
        "srv  log_server_r: done request: POST /v1/chat/completions 127.0.0.1 200",
        "W srv  llama_server: security: no API key is set and CORS allows all origins",
        "W llama_context: n_ctx_seq (4096) > n_ctx_train (2048) -- possible overflow",
        "I slot print_timing: id 0 | task 0 | n_decoded = 12, tg = 80.1 t/s",
        "I srv operator(): cleaning up before exit...",
    ],
)
def test_ordinary_lines_tell_of_no_fault(line: str) -> None:
    assert classify(line) is None


def test_the_missing_file_is_told_not_what_follows_from_it() -> None:
    told: Fault | None = None
    for line in (
        "gguf_init_from_file: failed to open GGUF file '/w/x-3.gguf' (No such file or directory)",
        "llama_model_load: error loading model: failed to load GGUF split from /w/x-3.gguf",
        "llama_model_load_from_file_impl: failed to load model",
        "srv  llama_server: exiting due to model loading error",
    ):
        fault = classify(line)
        told = told if fault is None else worse(told, fault)
    assert told is not None
    assert told.message == "/w/x-3.gguf: No such file or directory"


@pytest.mark.parametrize(
    "part",
    [
        *("x", "_", "1", " ", "Assertion ", "Assertion `", "GGML_ASSERT ", "a.c:1:", "CUDA error"),
        *("error loading model: ", "gguf_init_from_", "failed to open GGUF file '", "what(): "),
    ],
)
def test_no_line_holds_up_the_daemon(part: str) -> None:
    line = (part * 4096)[:4096]
    began = time.perf_counter()
    classify(line)
    assert time.perf_counter() - began < 0.1
