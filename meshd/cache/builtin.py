"""The built-in model: a small llama made on this machine, so that everything works offline.

Its weights are random numbers: **its text is noise**. It has the shape of the real thing (llama
architecture, a vocabulary with byte tokens, a chat template), 4 layers, d 256, 5.1 MB in F16, and
loads in well under a second.

The file is a function of the constants below alone: weights come from the integer generator
splitmix64 and exact arithmetic, so the same bytes come out on every machine, and `SHA256` says
which. It is written by a child process (`python -m meshd.cache.builtin PATH`), because the gguf
package brings numpy, which the daemon has no other use for.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from meshd.config import environment_of_children
from meshd.errors import BrokenWeights

SHA256 = "193dfcfdcbbdb8e0d9964e413e497a799f412b559df905f30aac2d6cd6107f8a"
FILE_NAME = f"builtin-{SHA256[:8]}.gguf"
MAKE_LIMIT_S = 120.0

LAYERS, WIDTH, HEADS, KV_HEADS, FEED_FORWARD = 4, 256, 4, 2, 512
CONTEXT = 8192
SEED = 0x6D657368
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def ensure(directory: Path) -> Path:
    """The model's file in `directory`, made if it is not there or not what it should be.

    Blocking: reads and hashes 5.1 MB, or runs the child that writes it. Raises BrokenWeights.
    """
    path = directory / FILE_NAME
    try:
        if _sha256(path) == SHA256:
            return path
        directory.mkdir(parents=True, exist_ok=True)
        # A name of its own: several daemons share the cache, and may start together.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".builtin-") as temporary:
            made = Path(temporary) / FILE_NAME
            _make(made)
            made.replace(path)
    except subprocess.TimeoutExpired:
        raise BrokenWeights(
            f"making the built-in model took more than {MAKE_LIMIT_S:.0f} s", path=str(path)
        ) from None
    except OSError as error:
        raise BrokenWeights(f"{path} cannot be written: {error.strerror}", path=str(path)) from None
    return path


def _make(path: Path) -> None:
    """Let a child write the model to `path`, and look at what came out."""
    made = subprocess.run(
        [sys.executable, "-m", "meshd.cache.builtin", str(path)],
        capture_output=True,
        text=True,
        timeout=MAKE_LIMIT_S,
        env=environment_of_children(),
        stdin=subprocess.DEVNULL,
        check=False,
    )
    found = _sha256(path)
    if made.returncode != 0 or found is None:
        last = (made.stderr.strip().splitlines() or ["no output"])[-1]
        raise BrokenWeights(f"the built-in model could not be made: {last}", path=str(path))
    if found != SHA256:
        raise BrokenWeights(
            f"the built-in model came out with sha256 {found}, not {SHA256}: the installed gguf "
            "package writes files differently; install the versions of requirements.lock",
            path=str(path),
        )


def write_model(
    path: Path,
    *,
    layers: int = LAYERS,
    width: int = WIDTH,
    feed_forward: int = FEED_FORWARD,
    seed: int = SEED,
    name: str = "meshd built-in",
) -> None:
    """Write a llama of that shape to `path`: random F16 weights out of `seed`."""
    # Late, and only in the child: numpy costs 20 MB.
    import gguf
    import numpy as np

    head = width // HEADS
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_description("Random weights: its text is noise.")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    vocabulary = add_vocabulary(writer)

    state = seed

    def random(name: str, rows: int, columns: int) -> None:
        nonlocal state
        count = rows * columns
        values = _splitmix64(state, count)
        state = (state + 0x632BE59BD9B4E019 * count) & 0xFFFFFFFFFFFFFFFF
        # 24 bits to a float in [-1, 1), exact in float32; then scaled by a power of two.
        centred = (values >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - 1
        scale = np.float32(2.0 ** -round(np.log2(columns) / 2))
        writer.add_tensor(name, (centred * scale).astype(np.float16).reshape(rows, columns))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(width, dtype=np.float32))

    random("token_embd.weight", vocabulary, width)
    for layer in range(layers):
        prefix = f"blk.{layer}"
        ones(f"{prefix}.attn_norm.weight")
        random(f"{prefix}.attn_q.weight", width, width)
        random(f"{prefix}.attn_k.weight", head * KV_HEADS, width)
        random(f"{prefix}.attn_v.weight", head * KV_HEADS, width)
        random(f"{prefix}.attn_output.weight", width, width)
        ones(f"{prefix}.ffn_norm.weight")
        random(f"{prefix}.ffn_gate.weight", feed_forward, width)
        random(f"{prefix}.ffn_up.weight", feed_forward, width)
        random(f"{prefix}.ffn_down.weight", width, feed_forward)
    ones("output_norm.weight")
    random("output.weight", vocabulary, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: Any) -> int:
    """SentencePiece-like: specials, 256 byte tokens, the space mark and printable ASCII."""
    import gguf

    tokens = ["<unk>", "<s>", "</s>"]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    kinds += [gguf.TokenType.BYTE] * 256
    letters = ["\u2581", *(chr(code) for code in range(33, 127))]
    tokens += letters
    kinds += [gguf.TokenType.NORMAL] * len(letters)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(letters))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    return len(tokens)


def _splitmix64(seed: int, count: int) -> Any:
    """`count` numbers of splitmix64 (Steele, Lea, Flood 2014), as uint64."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    write_model(Path(sys.argv[1]))
