"""What `sleb bench peers` is asked to measure: tests, engines, and who is compared with whom."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sleb.benchmarks.idle import QuietPolicy
from sleb.client.connection import base_url
from sleb.errors import ConfigError

FORMATS = ("bf16", "int8", "int4")
PYTHON_PEERS = ("transformers", "vllm", "openvino")
LLAMA_FORMATS = ("bf16", "q8_0", "q4_1")
# Engines that take part by the address of their server alone.
SERVER_PEERS = ("sglang", "ovms")
# Our format -> llama.cpp's with as many bits a weight.
LLAMA_COUNTERPART = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_1"}

# Tokens of a prompt and of its answer in the decode tests.
DECODE_PROMPT_TOKENS = 64
DECODE_OUTPUT_TOKENS = 128
# More of either no engine is asked for; the model and the memory set lower bounds of their own.
MAX_STREAMS = 1024
MAX_PROMPT_TOKENS = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_OURS = "sleb-"


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
        found = re.fullmatch(r"(decode|prompt)-([1-9][0-9]*)", name.strip())
        shown = name if len(name) <= 40 else f"{name[:37]}..."
        if found is None:
            raise ConfigError(
                f"test '{shown}' is not known; write decode-STREAMS or prompt-TOKENS, as decode-8"
            )
        most = MAX_STREAMS if found[1] == "decode" else MAX_PROMPT_TOKENS
        # By length first: int() refuses thousands of digits.
        if len(found[2]) > len(str(most)) or int(found[2]) > most:
            raise ConfigError(f"test '{shown}' is too large; write {found[1]}-1 to {found[1]}-{most}")
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
class Own:
    """sleb as a contestant; http: behind its own server."""

    weight_format: str
    depth: int = 0
    http: bool = False

    @property
    def engine(self) -> str:
        """The process that computes it: one for all depths."""
        return f"{_OURS}{self.weight_format}{'-http' if self.http else ''}"

    @property
    def label(self) -> str:
        """What it is called beside other contestants of ours: bf16, bf16:6, bf16-http:6."""
        return self.engine.removeprefix(_OURS) + (f":{self.depth}" if self.depth else "")

    @property
    def name(self) -> str:
        """What it takes part as."""
        return _OURS + self.label


def is_ours(name: str) -> bool:
    """Whether a contestant, or an engine, is sleb."""
    return name.startswith(_OURS)


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
        """From transformers, NAME=PROGRAM[:MODEL] or llamacpp=FOLDER:FORMAT=FILE,…. Raises ConfigError."""
        name, equals, rest = text.partition("=")
        if name == "transformers" and not equals:
            return cls(name, Path(sys.executable))
        if name in SERVER_PEERS:
            raise ConfigError(
                f"{name} takes part by the address of its server: start it, then give --server {name}=URL"
            )
        known = (*PYTHON_PEERS, "llamacpp")
        if name not in known:
            raise ConfigError(
                f"--peer '{text}' does not name one of {', '.join(known)}; see sleb bench peers --how"
            )
        program, colon, models = rest.partition(":")
        if not program:
            raise ConfigError(f"--peer '{text}' does not say where {name} is; see sleb bench peers --how")
        if name == "llamacpp":
            return cls(name, _absolute(program), _parse_llama_models(text, models))
        if name == "openvino" and not models:
            raise ConfigError(
                "--peer openvino lacks its model; write openvino=PYTHON:FOLDER, as optimum-cli made"
            )
        given = (("bf16", _absolute(models)),) if colon and models else ()
        return cls(name, _absolute(program), given)

    @property
    def contestants(self) -> tuple[str, ...]:
        """What it takes part as: llama.cpp once a format."""
        if self.name != "llamacpp":
            return (self.name,)
        return tuple(f"llamacpp-{weight_format}" for weight_format, _ in self.models)

    @property
    def problem(self) -> str | None:
        """What of it is not there, but for llama.cpp's files, which it takes part with one by one."""
        if self.name == "llamacpp":
            return None if self.program.is_dir() else f"there is no folder {self.program}"
        if not self.program.is_file():
            return f"there is no interpreter {self.program}"
        gone = [path for _, path in self.models if not path.is_dir()]
        return f"there is no model folder {gone[0]}" if gone else None


def _parse_llama_models(text: str, models: str) -> tuple[tuple[str, Path], ...]:
    pairs = []
    for part in filter(None, models.split(",")):
        weight_format, _, file = part.partition("=")
        if weight_format not in LLAMA_FORMATS or not file:
            raise ConfigError(f"'{part}' in --peer {text} is not FORMAT=FILE with {', '.join(LLAMA_FORMATS)}")
        pairs.append((weight_format, _absolute(file)))
    if not pairs:
        raise ConfigError(
            f"--peer '{text}' names no model; write llamacpp=FOLDER:bf16=FILE,q8_0=FILE,q4_1=FILE"
        )
    return tuple(pairs)


def _absolute(text: str) -> Path:
    # Not resolved: the interpreter of a virtual environment is a link, and the link is what finds the environment.
    return Path(os.path.abspath(Path(text).expanduser()))


@dataclass(frozen=True)
class ServerSpec:
    """A server that runs already. url: its API, as …/v1; model: the id to ask for; None: its first one."""

    name: str
    url: str
    model: str | None = None

    @classmethod
    def parse(cls, text: str) -> ServerSpec:
        """From NAME=URL[#MODEL]. Raises ConfigError."""
        name, equals, rest = text.partition("=")
        url, _, model = rest.partition("#")
        if not equals or "://" not in url or not _NAME.fullmatch(name):
            raise ConfigError(f"--server '{text}' is not NAME=URL, as vllm=http://127.0.0.1:8000/v1")
        if is_ours(name) or name == "bandwidth":
            raise ConfigError(f"--server {name}: that name is taken; choose another")
        return cls(name, base_url(url), model or None)


@dataclass(frozen=True)
class PeerOptions:
    """What to measure.

    Attributes:
        model: as the user named it; folder: where it is; model_name: what results call it.
        layer_map: as for LLM. formats: None: those that meet a peer. depths: of ours, each a contestant.
        kv_gib: room for keys and values, of every engine that wants to be told; whole GiB, since vLLM takes no others.
        versions: by peer, for one that does not know its own. api_key: of the servers that want one.
        command: as `shown_arguments` of peer_public gives it.
    """

    model: str
    folder: Path
    model_name: str
    peers: Sequence[PeerSpec]
    tests: Sequence[PeerTest]
    threads: int
    repetitions: int
    servers: Sequence[ServerSpec] = ()
    layer_map: str | None = None
    formats: Sequence[str] | None = None
    depths: Sequence[int] = (0,)
    seed: int = 0
    kv_gib: int = 4
    versions: dict[str, str] = field(default_factory=dict)
    api_key: str | None = None
    policy: QuietPolicy = field(default_factory=QuietPolicy)
    command: Sequence[str] = ()

    @property
    def peer_names(self) -> list[str]:
        """What the others take part as."""
        names = [name for peer in self.peers for name in peer.contestants]
        return names + [server.name for server in self.servers]

    def check(self) -> None:
        """Raises ConfigError for what cannot be meant."""
        names = self.peer_names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"'{twice}' takes part twice; name each once, llamacpp with all its files")
        if not self.depths or min(self.depths) < 0 or len(set(self.depths)) < len(self.depths):
            raise ConfigError(f"--depths is {list(self.depths)}; give different depths from 0 on, as 0,6")


@dataclass(frozen=True)
class Round:
    """A run of one peer between those of ours that it is compared with."""

    peer: str
    own: tuple[Own, ...]

    @property
    def sequence(self) -> tuple[str, ...]:
        """Who runs in turn: ours before the peer, further ones of ours after it."""
        first, *others = (each.name for each in self.own)
        return (first, self.peer, *others)


def plan_rounds(options: PeerOptions, test: PeerTest, present: Sequence[str]) -> list[Round]:
    """Who meets whom in `test`, of the peers and servers that are `present`.

    bf16 meets every peer that serves bf16, a quantised format llama.cpp's of as many bits; with several streams it
    meets all of llama.cpp's, since none of them is the fastest everywhere. What a server computes with is its affair:
    it meets all of our formats. Every format takes part at every depth.
    """
    servers = {server.name for server in options.servers}
    rounds = []
    for peer in present:
        met = _formats_met(options, test, peer, peer in servers)
        own = tuple(Own(each, depth, peer in servers) for each in met for depth in options.depths)
        if own:
            rounds.append(Round(peer, own))
    return rounds


def _formats_met(options: PeerOptions, test: PeerTest, peer: str, is_server: bool) -> list[str]:
    if is_server:
        return list(options.formats or ("bf16",))
    is_llama = peer.startswith("llamacpp-")
    theirs = peer.removeprefix("llamacpp-") if is_llama else "bf16"
    any_bits = is_llama and test.kind == "decode" and test.batch > 1
    return [
        ours
        for ours in options.formats or FORMATS
        if LLAMA_COUNTERPART[ours] == theirs or (any_bits and ours != "bf16")
    ]


def parse_list(option: str, text: str, allowed: Sequence[str] = ()) -> list[str]:
    """Names with commas between, each once. Raises ConfigError naming `option`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if allowed and name not in allowed]
    if unknown or not names or len(set(names)) < len(names):
        listed = f" of {', '.join(allowed)}" if allowed else ""
        raise ConfigError(f"{option} is '{text}'; name some{listed}, each once, with commas between")
    return names


def parse_versions(texts: Sequence[str]) -> dict[str, str]:
    """{"llamacpp": "b1"} from ["llamacpp=b1"]. Raises ConfigError."""
    pairs = [text.partition("=") for text in texts]
    for name, _, value in pairs:
        if name != "llamacpp" or not value:
            raise ConfigError(
                "--peer-version is for llamacpp, whose build may not know its own; write llamacpp=b1234"
            )
    return {name: value for name, _, value in pairs}
