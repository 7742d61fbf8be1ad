"""The chat templates of models: the format is read off each, what it writes of calls is read back and fits the grammar.

Runs where SLEB_TEMPLATES names a folder with chat templates as llama.cpp has them in `models/templates` (they are in
the source distribution of llama-cpp-python too).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from sleb.server.grammar.notation import as_llguidance
from sleb.server.message.reading import AnswerReading
from sleb.server.message.tool_formats import choose
from sleb.server.message.tools import ToolUse

pytestmark = pytest.mark.skipif("SLEB_TEMPLATES" not in os.environ, reason="SLEB_TEMPLATES names no folder")
FORMATS = {
    "apriel": ["Apriel-1.6-15b-Thinker-fixed", "unsloth-Apriel-1.5"],
    "functionary": ["meetkai-functionary-medium-v3.1"],
    "glm": ["GLM-4.6", "GLM-4.7-Flash", "Spark2.5", "poolside-Laguna-XS.2", "inclusionai-ling-3.0-flash"],
    "gpt-oss": ["openai-gpt-oss-120b"],
    "hermes": [
        "Bielik-11B-v3.0-Instruct", "MiMo-VL", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "Qwen-QwQ-32B",
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Reka-Edge",
        "ibm-granite-granite-4.0", "ibm-granite-granite-4.1",
    ],
    "kimi-k2": ["moonshotai-Kimi-K2"],
    "lfm2": ["LFM2.5-8B-A1B"],
    "llama3-json": [
        "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct",
    ],
    "minimax-m1": ["MiniMax-M1"],
    "minimax-m2": ["MiniMax-M2"],
    "mistral": [
        "Mistral-Small-3.2-24B-Instruct-2506", "mistralai-Ministral-3-14B-Reasoning-2512",
        "unsloth-mistral-Devstral-Small-2507",
    ],
    "mistral-list": ["mistralai-Mistral-Nemo-Instruct-2407"],
    "nemotron": ["NVIDIA-Nemotron-Nano-v2"],
    "qwen3-coder": [
        "Qwen3-Coder", "Qwen3.5-4B", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "StepFun3.5-Flash",
    ],
    "seed-oss": ["ByteDance-Seed-OSS"],
}  # fmt: skip
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where"},
        "unit": {"type": "string", "enum": ["C", "F"], "description": "Of what"},
        "days": {"type": "integer", "description": "How many"},
        "sure": {"type": "boolean", "description": "Whether"},
        "at": {"type": "array", "items": {"type": "integer"}, "description": "When"},
    },
    "required": ["city", "unit"],
}
NO_PARAMETERS = {"type": "object", "properties": {}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now", "description": "Time", "parameters": NO_PARAMETERS}},
]
CALLS = [("weather", {"city": "Oslo", "unit": "C", "days": 3, "sure": True, "at": [1, 20]}), ("now", {})]


def render(template, messages, **options):
    [text], _ = render_jinja_template(
        conversations=[messages],
        tools=TOOLS,
        chat_template=template,
        bos_token="<s>",
        eos_token="</s>",
        **options,
    )
    return text


def written(template, calls):
    """The prompt, and the turn in which the assistant made the calls."""
    question = {"role": "user", "content": "Weather?"}
    made = [
        {"id": f"aB345678{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]
    whole = render(template, [question, {"role": "assistant", "content": "", "tool_calls": made}])
    prompts = (render(template, [question], add_generation_prompt=True), render(template, [question]))
    prompt = next((each for each in prompts if whole.startswith(each)), "")
    return prompt, whole[len(prompt) :]


@pytest.mark.parametrize(
    ("name", "file"), [(name, file) for name, files in FORMATS.items() for file in files]
)
def test_a_models_template(name, file):
    template = (Path(os.environ["SLEB_TEMPLATES"]) / f"{file}.jinja").read_text()
    assert choose(template).name == name
    calls = CALLS[:1] if name in ("llama3-json", "gpt-oss") else CALLS
    prompt, text = written(template, calls)
    use = ToolUse(TOOLS, "required", False, True, False)
    reading = AnswerReading(template, None, None, use, None, prompt_end=prompt[-200:])
    told = []
    for delta in reading.make_parser().push(text, "stop"):
        if delta.kind == "call":
            told.append([delta.text, ""])
        elif delta.kind == "arguments":
            told[delta.index][1] += delta.text
    assert [(called, json.loads(arguments)) for called, arguments in told] == calls
    grammars = [as_llguidance(LLMatcher, part) | {"name": part.name} for part in reading.grammar().parts]
    first, last = (*reading.form.marks, "{", " to="), (*reading.form.marks, "}")
    begin = (
        0 if prompt.rstrip().endswith("<think>") else min(text.find(mark) for mark in first if mark in text)
    )
    end = max(text.rfind(mark) + len(mark) for mark in last if mark in text)
    if name == "mistral-list":
        end += 1
    matcher = LLMatcher(LLTokenizer("byte"), json.dumps({"grammars": grammars}))
    accepted = matcher.try_consume_tokens(list(text[begin:end].encode()))
    assert matcher.is_accepting(), text[begin:end].encode()[:accepted]
