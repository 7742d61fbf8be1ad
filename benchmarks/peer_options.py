"""What `sleb.benchmarks.peers` is asked to measure: tests, formats, peers, who is compared with whom, targets."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sleb.errors import ConfigError

FORMATS = ("bf16", "int8", "int4")
PYTHON_PEERS = ("vllm", "openvino", "transformers")
LLAMA_FORMATS = ("bf16", "q8_0", "q4_1")
# Our format -> llama.cpp's with as many bits a weight.
LLAMA_COUNTERPART = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_1"}

# Tokens of a prompt and of its answer in the decode tests.
DECODE_PROMPT_TOKENS = 64
DECODE_OUTPUT_TOKENS = 128


@dataclass(frozen=True)
class PeerTest:
    """decode: `batch` answers after short prompts. prompt: one token after a prompt of prompt_tokens."""

    kind: Literal["decode", "prompt"]
    batch: int
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, name: str) -> PeerTest:
        """From decode-8 or prompt-512, say. Raises ConfigError."""
        found = re.fullmatch(r"(decode|prompt)-([1-9]\d*)", name.strip())
        if found is None:
            raise ConfigError(
                f"test '{name}' is not known; write decode-STREAMS or prompt-TOKENS, as decode-8"
            )
        number = int(found[2])
        if found[1] == "decode":
            return cls("decode", number, DECODE_PROMPT_TOKENS, DECODE_OUTPUT_TOKENS)
        return cls("prompt", 1, number, 1)

    @property
    def single(self) -> bool:
        """Whether it is one stream, whose first token is taken out of the time."""
        return self.kind == "decode" and self.batch == 1

    @property
    def context(self) -> int:
        """Tokens of one request, prompt and answer together."""
        return self.prompt_tokens + self.output_tokens

    def __str__(self) -> str:
        return f"{self.kind}-{self.batch if self.kind == 'decode' else self.prompt_tokens}"


def tokens_per_second(test: PeerTest, seconds: float, first_token_seconds: float) -> float:
    """The rate of a run; first_token_seconds, the time of the same run cut to one token, counts for one stream only.

    One stream: (n − 1) / (t(n tokens) − t(1 token)). Several: all new tokens over the whole time, prompts included.
    A prompt: its tokens over the time to the first new one.
    """
    if test.kind == "prompt":
        return test.prompt_tokens / seconds
    if not test.single:
        return test.batch * test.output_tokens / seconds
    return (test.output_tokens - 1) / max(seconds - first_token_seconds, 1e-9)


@dataclass(frozen=True)
class PeerSpec:
    """Another engine on this machine.

    Attributes:
        program: its Python interpreter, or for llamacpp the folder with its binaries.
        models: folder or file by format; empty: the model that ours gets.
    """

    name: str
    program: Path
    models: tuple[tuple[str, Path], ...] = ()

    @classmethod
    def parse(cls, text: str) -> PeerSpec:
        """From NAME=PROGRAM[:MODEL] or llamacpp=FOLDER:FORMAT=FILE,…. Raises ConfigError."""
        name, equals, rest = text.partition("=")
        program, colon, models = rest.partition(":")
        known = (*PYTHON_PEERS, "llamacpp")
        if name not in known or not equals or not program:
            raise ConfigError(f"--peer '{text}' does not name one of {', '.join(known)}; write NAME=PROGRAM")
        if name == "llamacpp":
            return cls(name, _existing(program, folder=True), _parse_llama_models(text, models))
        if name == "openvino" and not models:
            raise ConfigError(
                "--peer openvino lacks its model; write openvino=PYTHON:FOLDER, as optimum-cli made"
            )
        given = (("bf16", _existing(models, folder=True)),) if colon and models else ()
        return cls(name, _existing(program, folder=False), given)

    @property
    def contestants(self) -> tuple[str, ...]:
        """What it takes part as: llama.cpp once a format."""
        if self.name != "llamacpp":
            return (self.name,)
        return tuple(f"llamacpp-{weight_format}" for weight_format, _ in self.models)


def _parse_llama_models(text: str, models: str) -> tuple[tuple[str, Path], ...]:
    pairs = []
    for part in filter(None, models.split(",")):
        weight_format, _, file = part.partition("=")
        if weight_format not in LLAMA_FORMATS or not file:
            raise ConfigError(f"'{part}' in --peer {text} is not FORMAT=FILE with {', '.join(LLAMA_FORMATS)}")
        pairs.append((weight_format, _existing(file, folder=False)))
    if not pairs:
        raise ConfigError(
            f"--peer '{text}' names no model; write llamacpp=FOLDER:bf16=FILE,q8_0=FILE,q4_1=FILE"
        )
    return tuple(pairs)


def _existing(text: str, folder: bool) -> Path:
    # Not resolved: the interpreter of a virtual environment is a link, and the link is what finds the environment.
    path = Path(os.path.abspath(Path(text).expanduser()))
    if not (path.is_dir() if folder else path.is_file()):
        raise ConfigError(f"{path} is no {'folder' if folder else 'file'}; see --peer")
    return path


@dataclass(frozen=True)
class Round:
    """A run of one peer between those of ours that it is compared with."""

    peer: str
    formats: tuple[str, ...]

    @property
    def sequence(self) -> tuple[str, ...]:
        """Who runs in turn: ours before the peer, further formats of ours after it."""
        return (self.formats[0], self.peer, *self.formats[1:])


def plan_rounds(test: PeerTest, formats: Sequence[str], contestants: Sequence[str]) -> list[Round]:
    """Who meets whom in `test`.

    bf16 meets every peer that serves bf16, a quantised format llama.cpp's of as many bits; with several streams it
    meets all of llama.cpp's, since none of them is the fastest everywhere.
    """
    rounds = []
    for peer in contestants:
        theirs = peer.removeprefix("llamacpp-") if peer.startswith("llamacpp-") else "bf16"
        any_bits = peer.startswith("llamacpp-") and test.kind == "decode" and test.batch > 1
        met = tuple(
            ours for ours in formats if LLAMA_COUNTERPART[ours] == theirs or (any_bits and ours != "bf16")
        )
        if met:
            rounds.append(Round(peer, met))
    return rounds


@dataclass(frozen=True)
class Target:
    """`factor`: what the best of our `formats` is to reach against the best of `peers`, as a ratio of tokens/s."""

    test: str
    formats: tuple[str, ...]
    peers: tuple[str, ...]
    factor: float


_LLAMA = tuple(f"llamacpp-{weight_format}" for weight_format in LLAMA_FORMATS)
# The aims of this project for 2 cores, set from what each engine leaves of the bandwidth or the arithmetic there is.
TARGETS = (
    Target("decode-1", ("bf16",), ("llamacpp-bf16",), 1.4),
    Target("decode-1", ("bf16",), ("openvino",), 1.6),
    Target("decode-1", ("bf16",), ("vllm",), 2.2),
    Target("decode-8", ("bf16",), ("openvino",), 1.7),
    Target("decode-32", ("bf16",), ("vllm", "openvino"), 2.0),
    Target("prompt-512", ("bf16",), ("vllm",), 1.5),
    Target("prompt-1024", ("bf16",), ("vllm",), 1.5),
    Target("decode-1", ("int8",), ("llamacpp-q8_0",), 1.25),
    Target("decode-1", ("int4",), ("llamacpp-q4_1",), 1.4),
    Target("decode-8", ("int8", "int4"), _LLAMA, 2.0),
    Target("decode-32", ("int8", "int4"), _LLAMA, 2.0),
)
# Share of the speed that memory allows, for decode-1 in bf16; peak memory over vLLM's, at most. Same source.
FLOOR_SHARE_TARGET = 0.8
MEMORY_TARGET = 0.5


def shown_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with every path cut to its last component, those inside NAME=PATH:FORMAT=PATH too."""
    return ["".join(map(_last_component, re.split(r"([=:,])", argument))) for argument in arguments]


def _last_component(text: str) -> str:
    return Path(text).name if "/" in text else text
