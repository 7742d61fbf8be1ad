"""Options of the HTTP side of `sleb serve`."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from sleb.engine.depth_policy import DepthPolicy
from sleb.errors import ConfigError
from sleb.fields import shown_text
from sleb.options import check_values, option
from sleb.server.bench_result import BenchResult
from sleb.server.keys import Key, make_keys
from sleb.server.logs import FORMATS, LEVELS
from sleb.server.message.tool_formats import AUTO
from sleb.server.message.tool_formats import NAMES as TOOL_FORMATS
from sleb.server.names import ServedName
from sleb.server.tls import server_context

_DAY = 86400
_PREFIX = re.compile("[a-zA-Z_][a-zA-Z0-9_]{0,63}")
_ROOT = re.compile(r"(/[A-Za-z0-9_.~-]+)*/?")
_ADDRESS, _TLS, _NAMES, _LIMITS, _LOG = (
    *("Address and access", "TLS"),
    *("What is told of the model", "Limits", "Start and log"),
)


@dataclass(frozen=True)
class ServeOptions:
    """What a server is told beside its engine's options.

    Attributes:
        keep_alive_seconds: of silence in a stream before a comment says that it lives.
        log_interval: seconds between lines about throughput, while there is any.
    """

    host: str = option("127.0.0.1", "Address to listen on.", group=_ADDRESS)
    port: int = option(8000, "Port; 0 for any free one.", minimum=0, maximum=65535, group=_ADDRESS)
    uds: Path | None = option(
        None, "Unix socket to listen on, in place of host and port.", unset="none", group=_ADDRESS
    )
    root_path: str | None = option(
        None,
        "Path that a proxy serves all of this below, such as /llm, whether it takes it off or not.",
        unset="none",
        metavar="PATH",
        group=_ADDRESS,
    )
    api_keys: tuple[str, ...] = option(
        (),
        "A key that opens the API; repeatable. Other users see flags: prefer SLEB_API_KEY or a file.",
        unset="open to all",
        flags=("--api-key",),
        group=_ADDRESS,
    )
    api_key_files: tuple[Path, ...] = option(
        (),
        "File with a key a line, KEY or NAME: KEY, beside --api-key; repeatable. Log and metrics tell the name.",
        unset="none",
        flags=("--api-key-file",),
        group=_ADDRESS,
    )
    cors_origins: tuple[str, ...] = option(
        (),
        "Origin of web pages that may use the API, or *; repeatable.",
        unset="none",
        flags=("--cors-origin",),
        group=_ADDRESS,
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "A name by which clients may know this server, or *; repeatable. Addresses and local names need none.",
        unset="none",
        flags=("--allowed-host",),
        metavar="NAME",
        group=_ADDRESS,
    )
    ssl_certfile: Path | None = option(
        None,
        "Certificate in PEM, with those up to a root behind it: serve https.",
        unset="http",
        group=_TLS,
    )
    ssl_keyfile: Path | None = option(
        None, "The certificate's key in PEM.", unset="in the file of the certificate", group=_TLS
    )
    ssl_keyfile_password: str | None = option(
        None,
        "Of an encrypted key. Other users see flags: prefer SLEB_SSL_KEYFILE_PASSWORD.",
        unset="none",
        group=_TLS,
    )
    ssl_ca_certs: Path | None = option(
        None,
        "Certificates in PEM, of which one must have signed that of a client.",
        unset="clients show none",
        group=_TLS,
    )
    served_model_names: tuple[str, ...] = option(
        (),
        "Another name of the model, and NAME:sleb-k of its depth k, or with a depth of that alone; repeatable.",
        unset="none",
        flags=("--served-model-name",),
        metavar="NAME[=DEPTH]",
        group=_NAMES,
    )
    auto: str | None = option(
        None,
        'Serve MODEL:auto, which takes a deeper cut while requests wait: "depths=0,3,6 ttft=800ms max-perplexity=60% '
        'hold=20s".',
        unset="none",
        metavar="POLICY",
        group=_NAMES,
    )
    tool_format: str = option(
        AUTO,
        "How the model writes calls of tools: auto reads it off the chat template, or the checkpoint's own response "
        "template.",
        choices=(AUTO, *TOOL_FORMATS),
        group=_NAMES,
    )
    bench_results: tuple[Path, ...] = option(
        (),
        "JSON of `sleb bench throughput` or `sleb eval`: what /v1/models tells of each tier; repeatable.",
        unset="none",
        flags=("--bench-result",),
        group=_NAMES,
    )
    fronts: int = option(
        0,
        "Processes that speak HTTP, beside the engine's own; 0: one process does both.",
        minimum=0,
        maximum=64,
        group=_LIMITS,
    )
    stream_interval: int = option(
        1,
        "Tokens of an answer that a stream tells at once; the first and the last are told when they come.",
        minimum=1,
        maximum=1024,
        group=_LIMITS,
    )
    max_queue: int = option(1024, "Requests that may wait.", minimum=0, maximum=10**6, group=_LIMITS)
    request_timeout: float | None = option(
        None,
        "Seconds after which a request ends with an error.",
        unset="never",
        minimum=0.001,
        maximum=_DAY,
        group=_LIMITS,
    )
    max_body_mb: float | None = option(
        None,
        "MiB of a request's body.",
        unset="4, or 16 bytes a token of the context if that is more",
        minimum=0.001,
        maximum=1024,
        group=_LIMITS,
    )
    max_connections: int = option(
        4096, "Open connections; an idle one gives way to a new one.", minimum=1, maximum=10**6, group=_LIMITS
    )
    read_timeout: float = option(
        30.0,
        "Seconds that a request's headers may take, and its body; a second more for each 16 KiB of it.",
        minimum=0.1,
        maximum=_DAY,
        group=_LIMITS,
    )
    write_timeout: float = option(
        60.0,
        "Seconds for which a client may read nothing of its answer.",
        minimum=0.1,
        maximum=_DAY,
        group=_LIMITS,
    )
    response_store_mb: float = option(
        64.0, "MiB of answers that /v1/responses keeps; 0: none.", minimum=0, maximum=2**20, group=_LIMITS
    )
    response_store_seconds: float = option(
        86400.0, "Seconds for which it keeps an answer.", minimum=0.1, maximum=365 * _DAY, group=_LIMITS
    )
    shutdown_delay: float = option(
        0.0,
        "Seconds for which requests are still taken after SIGTERM while /ready is 503: until balancers have seen it.",
        minimum=0,
        maximum=3600,
        group=_LIMITS,
    )
    drain_timeout: float = option(
        30.0,
        "Seconds to finish open requests on SIGTERM, behind --shutdown-delay.",
        minimum=0,
        maximum=_DAY,
        group=_LIMITS,
    )
    warm_up: bool = option(True, "Let every tier answer once before /ready says so.", group=_LOG)
    log_format: str = option("text", "Of the log on standard error.", choices=FORMATS, group=_LOG)
    log_level: str = option("info", "From which level on lines are written.", choices=LEVELS, group=_LOG)
    metrics_prefix: str = option(
        "sleb",
        "What the names in /metrics begin with, before a colon; vllm for dashboards of vLLM.",
        metavar="NAME",
        group=_LOG,
    )
    keep_alive_seconds: float = 15.0
    log_interval: float = 10.0

    def check(self) -> None:
        """Raises ConfigError for the first option with a value that is not allowed, or a file that cannot be read."""
        check_values(self)
        if not _PREFIX.fullmatch(self.metrics_prefix):
            raise ConfigError(
                f"--metrics-prefix {shown_text(self.metrics_prefix[:80])!r} begins no name of Prometheus; "
                "use up to 64 letters, digits and underscores, and no digit first"
            )
        if not _ROOT.fullmatch(self.root_path or ""):
            raise ConfigError(
                f"--root-path {shown_text(str(self.root_path)[:80])!r} is no path; write it like /llm, of letters, "
                "digits, - _ . and ~"
            )
        _ = self.ssl_context, self.names, self.depth_policy, self.keys, self.origins, self.results

    @property
    def root(self) -> str:
        """root_path, without a slash at its end."""
        return (self.root_path or "").rstrip("/")

    @property
    def max_body_bytes(self) -> int | None:
        return None if self.max_body_mb is None else int(self.max_body_mb * 2**20)

    @cached_property
    def ssl_context(self) -> ssl.SSLContext | None:
        """Of the --ssl options; None without a certificate. Raises ConfigError."""
        if self.ssl_certfile is not None:
            return server_context(
                self.ssl_certfile, self.ssl_keyfile, self.ssl_keyfile_password, self.ssl_ca_certs
            )
        if self.ssl_keyfile or self.ssl_keyfile_password or self.ssl_ca_certs:
            raise ConfigError("--ssl-certfile is missing; the other --ssl options need it")
        return None

    @cached_property
    def names(self) -> tuple[ServedName, ...]:
        """The content of served_model_names. Raises ConfigError."""
        return tuple(map(ServedName.parse, self.served_model_names))

    @cached_property
    def depth_policy(self) -> DepthPolicy | None:
        """The content of auto. Raises ConfigError."""
        return None if self.auto is None else DepthPolicy.parse(self.auto)

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """The keys of api_keys and of the files. Raises ConfigError."""
        return make_keys(self.api_keys, self.api_key_files)

    @cached_property
    def origins(self) -> tuple[str, ...]:
        """cors_origins as browsers send them. Raises ConfigError."""
        return tuple(map(check_origin, self.cors_origins))

    @cached_property
    def results(self) -> tuple[BenchResult, ...]:
        """The content of bench_results. Raises ConfigError."""
        return tuple(map(BenchResult.load, map(str, self.bench_results)))


def check_origin(origin: str) -> str:
    """The origin as browsers send it. Raises ConfigError for what is none."""
    if origin == "*":
        return origin
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise ConfigError(
            f"--cors-origin '{origin}' is no origin; write it like https://example.org, or * for all"
        )
    return f"{parts.scheme}://{parts.netloc}".lower()
