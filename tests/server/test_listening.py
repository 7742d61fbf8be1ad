"""Where a server listens: TLS, a Unix socket, and below a path of a proxy; over real sockets."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import suppress
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from sleb.cli import main
from sleb.client.connection import ClientError, list_models, open_client
from sleb.errors import ConfigError
from sleb.server.options import ServeOptions
from sleb.server.run import base_url
from sleb.server.tls import server_context
from sleb.server.unix_socket import UnixSocket

# TLS.


class Files:
    """A certificate of 127.0.0.1 by an authority of our own, in files."""

    def __init__(self, folder):
        self.folder = folder
        self.authority = trustme.CA()
        made = self.authority.issue_cert("127.0.0.1")
        self.key_pem = made.private_key_pem.bytes()
        self.key = self.write("key.pem", self.key_pem)
        self.chain = self.write("chain.pem", b"".join(each.bytes() for each in made.cert_chain_pems))
        self.both = self.write("both.pem", self.key_pem + self.chain.read_bytes())
        self.root = self.write("root.pem", self.authority.cert_pem.bytes())

    def write(self, name, content):
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def encrypted(self, password):
        form = (Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
        return self.write("secret.pem", load_pem_private_key(self.key_pem, None).private_bytes(*form))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("certificates"))


def client_context(files, certificate=None):
    context = ssl.create_default_context(cafile=files.root)
    if certificate is not None:
        certificate.configure_cert(context)
    return context


def over_tls(server, files, certificate=None):
    context = client_context(files, certificate)
    return httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=context, timeout=20)


def test_our_clients_believe_the_certificate_that_ssl_cert_file_names(
    serve_engine, fake_engine, files, monkeypatch
):
    server = serve_engine(fake_engine, ssl_certfile=files.both)
    url = f"https://127.0.0.1:{server.port}/v1"
    with (
        pytest.raises(ClientError, match=r"is not trusted .* set SSL_CERT_FILE"),
        open_client(url, None, 20) as client,
    ):
        list_models(client)
    plain = url.replace("https", "http")
    with pytest.raises(ClientError, match="with https:// if"), open_client(plain, None, 20) as client:
        list_models(client)
    monkeypatch.setenv("SSL_CERT_FILE", str(files.root))
    with open_client(url, None, 20) as client:
        assert list_models(client)[0] == "fake:sleb-1"


def test_answers_and_streams_over_tls(serve_engine, fake_engine, files, wait_until):
    server = serve_engine(
        fake_engine,
        ssl_certfile=files.chain,
        ssl_keyfile=files.encrypted(b"word"),
        ssl_keyfile_password="word",
    )
    with over_tls(server, files) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "fake:sleb-1"
        body = {"prompt": "abc", "stream": True}
        assert client.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
        body |= {"prompt": "x" * 200}
        fake_engine.delay = 0.02
        with client.stream("POST", "/v1/completions", json=body) as answer:  # and one that its client leaves
            next(answer.iter_lines())
    server.wait_idle()
    assert base_url(server.socket, is_secure=True) == f"https://127.0.0.1:{server.port}"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://127.0.0.1:{server.port}/health")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://127.0.0.1:{server.port}/health")


def test_clients_that_must_show_a_certificate(serve_engine, fake_engine, files):
    server = serve_engine(fake_engine, ssl_certfile=files.both, ssl_ca_certs=files.root)
    known, stranger = (each.issue_cert("someone@example.org") for each in (files.authority, trustme.CA()))
    with over_tls(server, files, known) as client:
        assert client.get("/health").status_code == 200
    for certificate in (None, stranger):
        with over_tls(server, files, certificate) as client, pytest.raises(httpx.TransportError):
            client.get("/health")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssl_certfile": "none.pem"}, "--ssl-certfile .*none.pem cannot be read: No such file"),
        ({"ssl_keyfile": "none.pem"}, "--ssl-keyfile .*none.pem cannot be read: No such file"),
        ({"ssl_ca_certs": "none.pem"}, "--ssl-ca-certs .*none.pem cannot be read: No such file"),
        ({"ssl_certfile": "text"}, "no certificate and key can be read from --ssl-certfile .*text"),
        (
            {"ssl_keyfile": "text"},
            "no certificate and key can be read from .*chain.pem and --ssl-keyfile .*text",
        ),
        ({"ssl_ca_certs": "text"}, "--ssl-ca-certs .*text holds no certificate in PEM"),
        ({"ssl_keyfile": "other.pem"}, "the key of --ssl-keyfile .*other.pem is not that of the first cert"),
        (
            {"ssl_keyfile": "secret.pem"},
            "secret.pem is encrypted; give its password by --ssl-keyfile-password",
        ),
        (
            {"ssl_keyfile": "secret.pem", "ssl_keyfile_password": "S3CRET"},
            "--ssl-keyfile-password does not open the key of --ssl-keyfile .*secret.pem",
        ),
        ({"ssl_certfile": None}, "--ssl-certfile is missing; the other --ssl options need it"),
    ],
)
def test_certificates_that_are_none_are_told_at_once(files, changes, message):
    files.encrypted(b"word")
    files.write("text", b"words")
    files.write("other.pem", trustme.CA().issue_cert("127.0.0.1").private_key_pem.bytes())
    paths = {"ssl_certfile": files.chain, "ssl_keyfile": files.key}
    paths |= {
        name: files.folder / value if value and not name.endswith("password") else value
        for name, value in changes.items()
    }
    with pytest.raises(ConfigError, match=message) as refused:
        ServeOptions(**paths).check()
    assert "S3CRET" not in str(refused.value)


def test_a_key_in_the_file_of_the_certificate(files):
    assert server_context(files.both, None, None, None).verify_mode == ssl.CERT_NONE


# A Unix socket.


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


@pytest.fixture
def serve_unix(tmp_path, fake_engine_script):
    """serve_unix(path) -> a process that serves the fake engine there, and what it said when it was ready."""
    processes = []

    def start(path, *flags):
        command = [sys.executable, str(fake_engine_script), "0", "--uds", str(path), *flags]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("curl "):
                break
        threading.Thread(target=process.stderr.read, daemon=True).start()
        return process, "".join(said)

    yield start
    for each in processes:
        each.kill()
        each.wait()


def test_a_server_on_a_unix_socket(serve_unix, tmp_path):
    path = tmp_path / "sleb.sock"
    process, said = serve_unix(path)
    assert f"Serving at http://unix:{path}:/v1" in said
    assert f"curl --unix-socket {path} http://localhost/v1/" in said
    assert path.stat().st_mode & 0o777 == 0o666
    connection = UnixConnection(path)
    connection.request("POST", "/v1/completions", '{"prompt": "abc"}', {"Content-Type": "application/json"})
    assert b'"text":"' in connection.getresponse().read()
    with pytest.raises(ConfigError, match=r"--uds .*sleb\.sock is in use"):
        UnixSocket(path)
    connection.request("GET", "/health")  # it was not disturbed
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not path.exists()


def test_the_log_believes_a_proxy_at_a_unix_socket(serve_engine, fake_engine, tmp_path, caplog, wait_until):
    caplog.set_level("INFO", logger="sleb.server")
    path = tmp_path / "sleb.sock"
    serve_engine(fake_engine, uds=path)  # its own client has nowhere to go
    for headers in ({"X-Forwarded-For": "192.0.2.7"}, {}):
        connection = UnixConnection(path)
        connection.request("GET", "/v1/models", headers=headers)
        assert connection.getresponse().status == 200
    wait_until(lambda: len(caplog.records) >= 2)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith(", from 192.0.2.7") and second.endswith(", from unknown")


def test_a_file_of_a_server_that_is_gone_is_replaced(tmp_path):
    path = tmp_path / "sleb.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with UnixSocket(path) as sock:
        sock.check()
        sock.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_a_path_that_another_took_meanwhile_stays_its_own(tmp_path):
    path = tmp_path / "sleb.sock"
    with (
        UnixSocket(path) as first,
        UnixSocket(path) as second,
    ):  # the first does not listen: it looks as if it were gone
        with pytest.raises(ConfigError, match="is in use"):
            first.check()
        first.close()
        second.check()
    assert not path.exists()


def test_paths_that_cannot_be_had(tmp_path):
    (tmp_path / "file").write_text("precious")
    refused = {
        "file": "there already and is no socket",
        "none/sock": "No such file",
        "x" * 120: "is too long",
    }
    for name, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            UnixSocket(tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"


# Below a path of a proxy.


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = {name: value for name, value in attrs if name in ("href", "src")}
        self.found += [value for value in found.values() if value and not value.startswith("#")]


@pytest.fixture
def proxied(serve_engine, fake_engine):
    """proxied(strips, **options) -> a client of a proxy that serves a server below /llm, and nothing else."""
    proxies = []

    def start(strips, **options):
        server = serve_engine(fake_engine, **options)

        class Proxy(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if not f"{self.path}/".startswith("/llm/"):
                    self.send_error(404)
                    return
                path = (self.path.removeprefix("/llm") or "/") if strips else self.path
                headers = {"Content-Type": self.headers.get("Content-Type", "")}
                answer = server.http.request(self.command, path, content=body, headers=headers)
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name not in ("content-length", "transfer-encoding", "connection", "date"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        client = httpx.Client(base_url=f"http://127.0.0.1:{proxy.server_port}", timeout=20)
        proxies.append((proxy, client))
        return client

    yield start
    for proxy, client in proxies:
        client.close()
        proxy.shutdown()
        proxy.server_close()


@pytest.mark.parametrize("strips", [True, False])
def test_page_docs_and_api_below_a_path(proxied, strips):
    client = proxied(strips, root_path="/llm/")
    page = client.get("/llm/")
    links = Links(page.text).found
    assert {"docs", "page/app.js"} <= set(links)
    waiting, seen = [urljoin("/llm/", each) for each in links], set()
    while waiting:  # the modules of the page too, as a browser resolves their imports
        path = urlsplit(waiting.pop()).path
        if path in seen:
            continue
        seen.add(path)
        answer = client.get(path)
        assert answer.status_code == 200 and path.startswith("/llm/"), path
        if path.endswith(".js") and "/vendor/" not in path:
            waiting += [
                urljoin(path, each) for each in re.findall(r'(?:from|import) "(\./[^"]+)"', answer.text)
            ]
    assert "/llm/page/api.js" in seen
    docs = client.get("/llm/docs")
    assert "/llm/v1/completions" in docs.text  # in a command that works as it stands
    described = client.get(
        urljoin("/llm/docs", next(each for each in Links(docs.text).found if "openapi" in each))
    )
    [base] = [each["url"] for each in described.json()["servers"]]
    assert base == "/llm"
    assert "/v1/completions" in described.json()["paths"]
    assert client.post(f"{base}/v1/completions", json={"prompt": "abc"}).json()["usage"]["prompt_tokens"] == 3
    assert client.post("/llm//models").status_code == client.post("/llm/v1/models").status_code == 405
    assert (
        client.get("/llm/v1/nothing").json()["error"]["message"].startswith("GET /v1/nothing does not exist")
    )
    assert client.get("/llmx/v1/models").status_code == 404


def test_the_path_itself_leads_to_the_page(proxied):
    answer = proxied(False, root_path="/llm").get("/llm")
    assert (answer.status_code, answer.headers["location"]) == (307, "/llm/")


def test_without_a_root_path_nothing_is_taken_off(server):
    assert server.http.get("/llm/v1/models").status_code == 404
    assert "servers" not in server.http.get("/openapi.json").json()


@pytest.mark.parametrize("path", ["llm", "/a//b", "/a b", "/a?b", "http://x/", "/ä"])
def test_what_is_no_root_path(monkeypatch, capsys, path):
    monkeypatch.setattr(sys, "argv", ["sleb", "serve", "owner/m", "--root-path", path])
    with pytest.raises(SystemExit), suppress(ConfigError):
        main()
    assert re.search("--root-path .* is no path; write it like /llm", capsys.readouterr().err)
