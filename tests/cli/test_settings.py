"""Options of `sleb serve` from flags, environment and file: which goes first, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import tomllib

import pytest

from sleb.cli import main
from sleb.engine.config import EngineConfig
from sleb.errors import ConfigError
from sleb.server import run
from sleb.server.keys import make_keys
from sleb.server.names import ServedName
from sleb.server.options import ServeOptions, check_origin


@pytest.fixture
def run_serve(monkeypatch):
    """run_serve(*flags, environment) -> the ServeOptions and EngineConfig that the command would serve with."""
    captured = []

    def fake_serve(sock, config, options, make_engine):
        captured.append((options, config))
        return 0

    monkeypatch.setattr(run, "bind_socket", lambda host, port: None)
    monkeypatch.setattr(run, "serve", fake_serve)
    for name in list(os.environ):
        if name.startswith("SLEB_"):
            monkeypatch.delenv(name)

    def call(*flags, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["sleb", "serve", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            main()
        if ended.value.code:
            return ended.value.code
        return captured.pop()

    return call


@pytest.fixture
def write(tmp_path):
    def write(text, name="sleb.toml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return write


def test_each_source_goes_before_the_next(run_serve, write):
    file = write('[serve]\nport = 1\nmodel = "owner/from-file"\nmax_queue = 7\nprefix-caching = false\n')
    options, config = run_serve("owner/m", "--config-file", file)
    assert (config.model, options.port, options.max_queue, options.log_format) == ("owner/m", 1, 7, "text")
    assert not config.prefix_caching
    options, config = run_serve("--config-file", file)
    assert config.model == "owner/from-file"
    options, config = run_serve("--config-file", file, SLEB_PORT="2", SLEB_MODEL="owner/from-env")
    assert (config.model, options.port, options.max_queue) == ("owner/from-env", 2, 7)
    options, config = run_serve("owner/from-flag", "--config-file", file, "--port", 3, "--prefix-caching")
    assert (config.model, options.port, options.max_queue) == ("owner/from-flag", 3, 7)
    assert config.prefix_caching


def test_without_arguments_it_is_the_demo(run_serve, write):
    """The alias, its shipped map and that map's tiers; a model of the environment or the file still goes first."""
    _, config = run_serve()
    assert (config.model, config.layer_map, config.tiers) == ("smollm2", None, None)
    file = write('[serve]\nmodel = "owner/from-file"\n')
    assert run_serve("--config-file", file)[1].model == "owner/from-file"
    assert run_serve(SLEB_MODEL="owner/from-env")[1].model == "owner/from-env"


def test_the_file_itself_may_be_named_in_the_environment(run_serve, write):
    file = write('[serve]\nmodel = "owner/m"\nhost = "0.0.0.0"\n')
    assert run_serve(SLEB_CONFIG_FILE=str(file))[0].host == "0.0.0.0"


def test_an_empty_variable_counts_as_none(run_serve):
    options, config = run_serve("owner/m", SLEB_PORT="", SLEB_API_KEY="", SLEB_OVERLAP="")
    assert (options.port, options.keys, config.overlap) == (8000, (), None)


def test_every_kind_of_option_from_the_environment(run_serve):
    options, config = run_serve(
        "smollm2",
        SLEB_API_KEY="one two",
        SLEB_OVERLAP="no",
        SLEB_WARM_UP="0",
        SLEB_REQUEST_TIMEOUT="2.5",
        SLEB_TIERS="0,3",
        SLEB_CORS_ORIGIN="https://A.example *",
        SLEB_MAX_BODY_MB="0.5",
    )
    assert options.keys == make_keys(("one", "two"), ())
    assert config.overlap is False
    assert options.warm_up is False
    assert options.request_timeout == 2.5
    assert config.tiers == (0, 3)
    assert options.origins == ("https://a.example", "*")
    assert options.max_body_bytes == 2**19


def test_every_kind_of_option_from_a_file(run_serve, write):
    file = write(
        '[serve]\napi_key = ["one", "two"]\noverlap = true\nrequest-timeout = 2\ntiers = [0, 3]\n'
        'cpu_affinity = "0-1"\nserved_model_name = "other"\nkv_cache_memory = 0.5\n'
    )
    options, config = run_serve("smollm2", "--config-file", file)
    assert options.keys == make_keys(("one", "two"), ())
    assert config.overlap is True
    assert options.request_timeout == 2.0
    assert config.tiers == (0, 3)
    assert config.cpu_affinity == (0, 1)
    assert options.served_model_names == ("other",)
    assert config.kv_cache_memory == 0.5
    assert run_serve("smollm2", "--config-file", write("[serve]\ntiers = 3\n"))[1].tiers == (3,)


def test_a_file_with_every_default_changes_nothing(run_serve, write):
    """The dataclasses are the oracle: each field with help is a line of the file, under its flag's name."""
    defaults = {}
    for kind in (EngineConfig, ServeOptions):
        for field in dataclasses.fields(kind):
            about = field.metadata.get("option")
            if about is not None and isinstance(field.default, str | int | float):
                name = next((flag for flag in about.flags if flag.startswith("--")), field.name)
                defaults[name.removeprefix("--").replace("-", "_")] = field.default
    lines = [
        f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for name, value in defaults.items()
    ]
    text = "[serve]\n" + "\n".join(lines).replace("'", '"')
    assert tomllib.loads(text)["serve"] == defaults
    assert len(defaults) > 15
    assert run_serve("owner/m", "--config-file", write(text)) == run_serve("owner/m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[serve]\nprot = 1", "the setting 'prot' in FILE is not known; did you mean port"),
        ("[serve]\nmax-num-seq = 1", "did you mean max_num_seqs"),
        ("[serve]\nzzzzzz = 1", "known are: model, layer_map"),
        ("[serve]\nconfig_file = 'x'", "the setting 'config_file'"),
        ("port = 1", "'port' in FILE is not known; all settings belong below a line [serve]"),
        ("serve = 1", "'serve' in FILE must be a table"),
        ("[serve]\nport = 'abc'", "port in FILE is 'abc'; it must be an integer from 0 to 65535"),
        ("[serve]\nport = true", "port in FILE is true; it must be an integer"),
        ("[serve]\nport = 1.5", "port in FILE is 1.5; it must be an integer"),
        ("[serve]\nhost = 1", "host in FILE is 1; it must be text"),
        ("[serve]\noverlap = 1", "overlap in FILE is 1; it must be true or false"),
        ("[serve]\nrequest_timeout = '3'", "request_timeout in FILE is '3'; it must be a number"),
        ("[serve]\napi_key = []", "api_key in FILE is []; it must be a list of texts"),
        ("[serve]\napi_key = [1]", "it must be a list of texts"),
        ("[serve]\nmax-queue = 1\nmax_queue = 2", "is there twice"),
        ("[serve]\nport = 70000", "--port is 70000"),
        ("[serve]\nport = ", "the settings file FILE is not TOML"),
        (b"\xff", "the settings file FILE is not TOML"),
    ],
)
def test_what_a_file_may_not_hold_is_one_line(run_serve, write, capsys, text, message):
    file = write(text)
    assert run_serve("owner/m", "--config-file", file) == 2
    error = capsys.readouterr().err
    assert message.replace("FILE", str(file)) in error
    assert error.count("\n") == 1


def test_a_missing_file(run_serve, capsys, tmp_path):
    assert run_serve("owner/m", "--config-file", tmp_path / "none.toml") == 2
    assert "none.toml cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SLEB_PORT", "abc", "SLEB_PORT in the environment is 'abc'; it must be an integer from 0 to 65535"),
        ("SLEB_OVERLAP", "maybe", "SLEB_OVERLAP in the environment is 'maybe'; it must be true or false"),
        ("SLEB_KV_CACHE_MEMORY", "much", "it must be a number above 0"),
        ("SLEB_LOG_FORMAT", "xml", "--log-format 'xml' is not known; choose one of: text, json"),
        ("SLEB_LOG_LEVEL", "loud", "--log-level 'loud'"),
        ("SLEB_REQUEST_TIMEOUT", "0", "--request-timeout is 0"),
        ("SLEB_REQUEST_TIMEOUT", "nan", "--request-timeout is nan"),
        ("SLEB_MAX_BODY_MB", "-1", "--max-body-mb is -1"),
        ("SLEB_CORS_ORIGIN", "example.org", "--cors-origin 'example.org' is no origin"),
    ],
)
def test_what_a_variable_may_not_hold_is_one_line(run_serve, capsys, variable, value, message):
    assert run_serve("owner/m", **{variable: value}) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_keys_from_flags_and_from_files_add_up(run_serve, write):
    first, second = (
        write("# first line\n  one \n\ntwo\n", "first"),
        write("alice: sk:a=\nbob:\t b \n", "second"),
    )
    options, _ = run_serve("owner/m", "--api-key", "zero", "--api-key-file", first, "--api-key-file", second)
    digests = [hashlib.sha256(key).digest() for key in (b"zero", b"one", b"two", b"sk:a=", b"b")]
    assert [key.digest for key in options.keys] == digests
    assert [key.name for key in options.keys] == [None, None, None, "alice", "bob"]
    options, _ = run_serve("owner/m", "--config-file", write(f'[serve]\napi_key_file = "{first}"'))
    assert options.keys == make_keys(["one", "two"], ())
    options, _ = run_serve("owner/m", "--api-key", "flag", SLEB_API_KEY="environment")
    assert options.keys == make_keys(["flag"], ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key"),
        (b"# only\n", "holds no key"),
        (b"\xff", "UTF-8"),
        (b"a" * 2**21, "larger"),
        (b"ok\n\nb\xc3\xb6se: S3CRET\n", "line 3 gives a name that cannot be one"),
        (b": S3CRET", "line 1 gives a name"),
        (b"x" * 65 + b": S3CRET", "line 1 gives a name"),
        (b"alice:", "line 1 has no key behind the name alice"),
        (b"alice: one\nalice: S3CRET", "line 2 is another key of the name alice, which .*line 1 has"),
        (b"alice: S3CRET\nbob: S3CRET", "line 2 is the key that .*line 1 has under another name"),
        (b"S3CRET\nbob: S3CRET", "line 2 is the key that .*line 1 has under another name"),
        (b"\n".join(b"n%d: %d" % (n, n) for n in range(1001)), "names 1001 keys; at most 1000"),
    ],
)
def test_files_without_keys(write, tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as refused:
        make_keys((), [write(content, "keys")])
    assert "S3CRET" not in str(refused.value).replace(str(tmp_path), "")


def test_a_key_that_comes_twice_counts_once(write):
    file = write("alice: one\ntwo\nalice: one\n", "keys")
    assert [key.name for key in make_keys(["two", "two"], [file, file])] == [None, "alice"]


@pytest.mark.parametrize("prefix", ["", "1a", "a:b", "ä", "a b", "a" * 65])
def test_what_begins_no_metric(run_serve, capsys, prefix):
    assert run_serve("owner/m", "--metrics-prefix", prefix) == 2
    assert "begins no name of Prometheus" in capsys.readouterr().err


@pytest.mark.parametrize("origin", ["", "x", "ftp://a", "https://", "https://a/path", "https://a?b", "null"])
def test_what_is_no_origin(origin):
    with pytest.raises(ConfigError, match="is no origin"):
        check_origin(origin)


@pytest.mark.parametrize("alias", ["", "a b", "a\n", "\x00", "x" * 201])
def test_what_is_no_alias(alias):
    with pytest.raises(ConfigError, match="is no name"):
        ServedName.parse(alias)


@pytest.mark.parametrize("text", ["a=", "a=b", "a=-1", "a=1.5", "a=²", "a=1234567", "=x"])
def test_a_name_of_what_is_no_depth(text):
    with pytest.raises(ConfigError, match="gives no depth"):
        ServedName.parse(text)


@pytest.mark.parametrize(
    ("model", "names", "said"),
    [
        ("owner/m", ["a=3"], "served depths: 0;"),
        ("smollm2", ["a=4"], "served depths: 0, 3;"),
        ("smollm2", ["a=0", "A=3"], "would name depth 3 A, which is depth 0 already"),
        ("smollm2", ["a", "a:sleb-3=0"], "a:sleb-3, which is depth 3 already"),
        ("smollm2", ["SmolLM2=3"], "which is depth 0 already"),
        ("Owner/Model", ["model:sleb-3=0", "--layer-map=smollm2-135m-instruct"], "which is depth 3 already"),
    ],
)
def test_a_name_that_cannot_be_given_is_told_before_the_model_is_looked_for(
    run_serve, capsys, model, names, said
):
    flags = [each if each.startswith("--") else f"--served-model-name={each}" for each in names]
    tiers = {} if model == "owner/m" else {"SLEB_TIERS": "0,3"}
    assert run_serve(model, *flags, **tiers)
    assert said in " ".join(capsys.readouterr().err.split())


def test_names_that_can_be_given(run_serve):
    options, _ = run_serve("smollm2", "--served-model-name", "a=3", "--served-model-name", "smollm2=0")
    assert options.names == (ServedName("a", 3), ServedName("smollm2", 0))


def test_a_variable_like_a_setting_is_told(run_serve, capsys):
    _, config = run_serve(
        "smollm2", SLEB_TIER="0,3", SLEB_CACHE="folder", SLEB_PORT_8000_TCP="tcp://10.0.0.1:8000"
    )
    assert config.tiers is None
    said = "warning: SLEB_TIER in the environment is no setting; did you mean SLEB_TIERS?\n"
    assert capsys.readouterr().err == said


def test_variables_of_others_do_not_matter(run_serve):
    plain = run_serve("owner/m")
    assert run_serve("owner/m", SLEB_CACHE="/x", PORT="1", SLEB_NONSENSE="1") == plain
