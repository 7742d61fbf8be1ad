"""The table of tuned configurations, on a stand-in for a GPU and its clock."""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext, suppress

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource, CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from sleb.errors import ConfigError
from sleb.kernels.batch import BatchTensors, PagedBatch
from sleb.kernels.quantization import Int8Weight
from sleb.kernels.triton import tuning
from sleb.kernels.triton.tuning import Config, Launch, tuned

CONFIGS = (Config(block=1), Config(block=2), Config(block=3))
KEY = ("an operator", "torch.bfloat16", 128)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU called "Fake", on which block b takes times[b] ms, and another; measured: the blocks that were timed."""
    numbers = {"times": {1: 3.0, 2: 1.0, 3: 2.0}, "measured": [], "folder": tmp_path}
    gpu = type("FakeGpu", (), numbers | {"device": 0, "names": ["Fake", "Other"]})()

    def device_time(run):
        block = run()
        gpu.measured.append(block)
        return gpu.times[block]

    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_state", tuning._State())
    monkeypatch.setattr(tuning, "_device_time", device_time)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu.names[device])
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path))
    return gpu


def run(key=KEY, configs=CONFIGS, launch=None):
    """The block that `tuned` runs last."""
    ran = []

    def record(config):
        ran.append(config["block"])
        return config["block"]

    tuned(key, configs, Launch(launch or record))
    return ran[-1] if ran else None


def restart(monkeypatch):
    monkeypatch.setattr(tuning, "_state", tuning._State())


@pytest.mark.parametrize(("launching", "computing"), [(0.3, 0.02), (0.01, 4.0)])
def test_what_is_timed_is_the_gpu_and_not_the_host(monkeypatch, launching, computing):
    """On a stand-in for a queue that a host fills: it clears caches in 0.06 ms, and sleeps a million cycles in 0.5."""
    now = {"host": 0.0, "device": 0.0, "runs": 0}

    def queue(duration):
        now["device"] = max(now["host"], now["device"]) + duration

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue(0.0)
            self.time = now["device"]

        def synchronize(self):
            now["host"] = max(now["host"], self.time)

        def elapsed_time(self, other):
            return other.time - self.time

    class Caches:
        zero_ = staticmethod(lambda: queue(0.06))

    def run():
        now["runs"] += 1
        now["host"] += launching
        queue(computing)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue(cycles / 2e6))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning.torch, "empty", lambda *shape, **options: Caches())
    assert tuning._device_time(run) == pytest.approx(computing)
    assert 5 < now["runs"] <= 31


def test_an_unknown_key_runs_the_first_while_serving(gpu):
    assert run() == 1
    assert gpu.measured == [] and not list(gpu.folder.rglob("*.json"))


def test_the_fastest_is_kept_for_the_next_start(gpu, monkeypatch):
    names = []
    with tuning.tuning(names.append):
        assert run() == 2
        assert run(("another", 1)) == 2
        assert run() == 2
    assert names == ["an operator", "another"] and gpu.measured == [1, 2, 3, 1, 2, 3]
    restart(monkeypatch)
    assert run() == 2 and run(("a third", 1)) == 1
    assert len(gpu.measured) == 6
    [file] = gpu.folder.rglob("*.json")
    assert json.loads(file.read_text())["gpu"].startswith("Fake, triton")


def test_another_gpu_has_its_own_table(gpu, monkeypatch):
    with tuning.tuning():
        assert run() == 2
        gpu.device, gpu.times[2] = 1, 9.0
        assert run() == 3
    tables = {json.loads(file.read_text())["gpu"][:5]: file for file in gpu.folder.rglob("*.json")}
    assert sorted(tables) == ["Fake,", "Other"]
    restart(monkeypatch)
    assert run() == 3
    gpu.device = 0
    assert run() == 2


def test_what_ran_untuned_is_measured_by_the_warm_up(gpu):
    assert run() == 1
    with tuning.tuning():
        assert run() == 2
    assert run() == 2


@pytest.mark.parametrize(
    ("number", "expected"),
    [(1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (17, 64), (64, 64), (65, 256), (100_000, 262_144)],
)
def test_a_bucket_is_the_smallest_power_of_four_that_holds(number, expected):
    assert tuning.bucket(number) == expected


def failing_compiler(error):
    """A launch whose blocks 1 and 2 Triton's own `compile` fails for with `error`, and whose block 3 runs."""

    class Source(ASTSource):
        def __init__(self):
            self.fn, self.signature, self.constants, self.attrs = None, {}, {}, {}
            self.ext, self.name, self.language = "ttir", "a kernel", Language.TRITON

        def hash(self):
            return "a hash"

        def parse_options(self):
            return {}

        def make_ir(self, *arguments):
            raise error

    def launch(config):
        if config["block"] < 3:
            triton.compile(Source(), target=GPUTarget("cuda", 80, 32))
        return config["block"]

    return launch


REFUSALS = [
    pytest.param(lambda config: fail(OutOfResources(300_000, 200_000, "shared memory")), id="shared memory"),
    pytest.param(lambda config: fail(PTXASError("ptxas died")), id="ptxas"),
    pytest.param(lambda config: fail(CompilationError("", None, "unsupported")), id="front end"),
    pytest.param(failing_compiler(RuntimeError("PassManager::run failed")), id="pass"),
    pytest.param(failing_compiler(AssertionError()), id="assertion of a pass"),
]


def fail(error):
    raise error


def refusing(refusal, ran):
    """A launch that notes the blocks that it is asked for; all but 3 are refused."""

    def launch(config):
        ran.append(config["block"])
        if config["block"] < 3:
            refusal(config)
        return config["block"]

    return launch


@pytest.mark.parametrize("refusal", REFUSALS)
def test_untuned_the_first_that_the_gpu_takes_runs_and_is_remembered(gpu, refusal):
    ran = []
    launch = refusing(refusal, ran)
    for _ in range(2):
        tuned(KEY, CONFIGS, Launch(launch))
    assert ran == [1, 2, 3, 3]
    tuned(("another", 1), CONFIGS, Launch(launch))
    assert ran[4:] == [1, 2, 3]
    assert not list(gpu.folder.rglob("*.json"))


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_the_gpu_refuses_is_left_out_of_the_measurement(gpu, refusal):
    with tuning.tuning():
        tuned(KEY, CONFIGS, Launch(refusing(refusal, [])))
    assert gpu.measured == [3] and run() == 3


def test_a_variant_of_a_known_key_that_is_refused_runs_the_next(gpu):
    with tuning.tuning():
        assert run() == 2
    ran = []
    tuned(KEY, CONFIGS, Launch(refusing(lambda config: fail(PTXASError("no")), ran)))
    assert ran == [2, 1, 3]


FAULTS = [
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    TypeError("launch() missing 1 required positional argument"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("warm_up", [False, True])
def test_a_fault_of_the_gpu_is_no_refusal(gpu, fault, warm_up):
    ran = []

    def launch(config):
        ran.append(config["block"])
        raise fault

    with tuning.tuning() if warm_up else nullcontext(), pytest.raises(type(fault)) as caught:
        tuned(KEY, CONFIGS, Launch(launch))
    assert caught.value is fault and ran == [1]


def test_a_full_disk_is_no_refusal(gpu):
    with pytest.raises(OSError, match="No space left"):
        tuned(KEY, CONFIGS, Launch(failing_compiler(OSError(28, "No space left on device"))))


def test_what_is_changed_in_place_is_changed_once(gpu):
    residual = torch.zeros(3)

    def add(config):
        if config["block"] == 1:
            raise OutOfResources(300_000, 200_000, "shared memory")
        residual.add_(1)
        return config["block"]

    for expected in (1, 2):
        with tuning.tuning():
            tuned(KEY, CONFIGS, Launch(add, (residual,)))
        assert residual.tolist() == [expected] * 3
    tuned(("another", 1), CONFIGS, Launch(add, (residual,)))
    assert residual.tolist() == [3] * 3 and gpu.measured == [2, 3]


@pytest.mark.parametrize("warm_up", [False, True])
def test_nothing_that_runs_is_an_error_of_one_line(gpu, warm_up):
    def launch(config):
        raise OutOfResources(300_000, 200_000, "shared memory")

    wanted = r"no configuration of an operator .*128.* on this GPU \(Fake, Triton .*Required: 300000"
    with tuning.tuning() if warm_up else nullcontext(), pytest.raises(ConfigError, match=wanted) as caught:
        tuned(KEY, CONFIGS, Launch(launch))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"configs": 3}', '{"configs": {"a": 1}}'])
def test_a_broken_table_is_made_anew(gpu, monkeypatch, caplog, content):
    with tuning.tuning():
        run()
    [file] = gpu.folder.rglob("*.json")
    file.write_text(content)
    restart(monkeypatch)
    assert run() == 1
    assert "not readable" in caplog.text
    with tuning.tuning():
        assert run() == 2
    assert json.loads(file.read_text())["configs"]


def test_a_configuration_that_is_no_more_is_chosen_anew(gpu):
    with tuning.tuning():
        run()
    assert run(configs=CONFIGS[2:]) == 3


def test_a_folder_that_cannot_be_written_only_warns(gpu, monkeypatch, caplog):
    (gpu.folder / "tuning").write_text("a file where the folder would be")
    with tuning.tuning():
        assert run() == 2
    assert "cannot be written" in caplog.text


def test_the_interpreter_has_one_configuration(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    with tuning.tuning():
        assert run() == 1
    assert gpu.measured == []


META = torch.device("meta")


def half(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def integers(*shape):
    return torch.empty(shape, dtype=torch.int32, device=META)


def attend(module, rows, context):
    batch = BatchTensors.of(PagedBatch((1,) * rows, (context,) * rows, integers(rows, 64), 16), META)
    operator = getattr(module, module.__name__.rpartition(".")[2])
    operator(half(rows, 4, 64), half(256, 2, 64), half(256, 2, 64), batch, 1.0, None)


def multiply(module, rows, context):
    with suppress(IndexError):  # nothing ran
        module.linear(half(rows, 128), Int8Weight.empty(256, 128, META), None)


def mix(module, rows, context):
    starts = torch.zeros(5, dtype=torch.int32, device=META)
    module.grouped_linear(half(rows, 128), half(4 * 256, 128), None, None, starts, 4)


@pytest.mark.parametrize(
    ("name", "launch", "least", "by_context"),
    [
        ("paged_decode", attend, 1, True),
        ("paged_prefill", attend, 4, True),  # a chunk has more than one token
        ("linear", multiply, 1, False),
        ("experts", mix, 1, False),
    ],
)
def test_choices_are_made_by_buckets_of_rows_and_of_context(monkeypatch, name, launch, least, by_context):
    """Not once for all batches, and not anew for every length."""
    module = importlib.import_module(f"sleb.kernels.triton.{name}")

    def key(rows, context=100):
        keys = []
        monkeypatch.setattr(module, "tuned", lambda key, *rest: keys.append(key))
        launch(module, rows, context)
        [found] = keys
        return found

    assert len({key(least * rows) for rows in (1, 4, 16, 64, 256)}) == 5
    assert key(65) != key(64) and key(200) == key(256)
    assert (key(4, 1000) != key(4, 1025)) == by_context and key(4, 1000) == key(4, 257)
