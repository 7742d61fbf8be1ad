"""How models write calls of tools: one record a format, chosen by what a chat template shows.

A required answer is `opening`, calls with `separator` between them, `closing`; a call is `begin`, its body, `end`:

    object      {"name": NAME, "KEY": ARGUMENTS}
    named       NAME `after_name` ARGUMENTS
    parameters  NAME `after_name`, then of each argument `parameter` key `value` text `value_end`
    python      NAME(key=value, …)
    channels    OpenAI's harmony, a message to a recipient (`channels.py`)

White space beside a mark may be left out or not: templates of one family differ in it.
Sources: the models' own chat templates; `tests/server/message/test_tool_formats.py` writes calls as each of them does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Notation = Literal["object", "named", "parameters", "python", "channels"]

NAME = r"(?P<name>[\w.-]+?)"


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """One format.

    Attributes:
        shown: what stands in a chat template that shows it: all of one of these.
        calls: marks that one call or a list of them begins with; "" for none, where a call may only begin an answer.
        around: marks that stand about calls and say nothing.
        kept: whether a mark with no call behind it is content.
        front: between mark and arguments, for calls that begin with the name; its last character begins the arguments,
            or is the last before them.
        call_id: what stands about an id that a call may have.
        drifts: whether it is read whatever the template shows, since models that were shown another one write it.
    """

    name: str
    notation: Notation
    shown: tuple[tuple[str, ...], ...] = ()
    calls: tuple[str, ...]
    around: tuple[str, ...] = ()
    kept: bool = False
    front: str = ""
    opening: str = ""
    begin: str = ""
    key: str = "arguments"
    after_name: str = ""
    parameter: str = ""
    value: str = ""
    value_end: str = ""
    call_id: tuple[str, str] | None = None
    end: str = ""
    separator: str = "\n"
    closing: str = ""
    drifts: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """All that a decoder must show for calls to be found, longest first."""
        inner = (self.after_name, self.parameter, self.value, self.value_end, *(self.call_id or ()))
        known = {*self.calls, *self.around, *re.findall(r"<[^<>\s]+>|\[[A-Z_]+\]", " ".join(inner))}
        return tuple(sorted(filter(None, known), key=len, reverse=True))

    @property
    def bare(self) -> bool:
        """Whether a call may have no mark right before it, where an answer begins or another call ended."""
        return "" in self.calls or (
            self.notation == "object" and bool(self.opening) and "[" not in self.opening
        )

    def is_shown(self, template: str) -> bool:
        return any(all(mark in template for mark in marks) for marks in self.shown)


_FUNCTION = {"after_name": ">\n", "parameter": "<parameter=", "value": ">\n", "value_end": "\n</parameter>\n"}

HERMES = ToolFormat(
    name="hermes",  # and Qwen 2.5 and 3, Granite 4, many others
    notation="object",
    shown=(("<tool_call>",),),
    calls=("<tool_call>",),
    around=("</tool_call>",),
    begin="<tool_call>\n",
    end="\n</tool_call>",
    drifts=True,
)
LLAMA = ToolFormat(
    name="llama3-json",
    notation="object",
    shown=(("<|python_tag|>",), ('"parameters"',)),
    calls=("", "<|python_tag|>"),
    key="parameters",
    front=rf"{NAME}(?:\.call)?\(",  # of the tools that Llama brought with it
    separator="; ",
    drifts=True,
)
MISTRAL = ToolFormat(
    name="mistral",
    notation="named",
    shown=(("[TOOL_CALLS]", "[ARGS]"),),
    calls=("[TOOL_CALLS]",),
    around=("[CALL_ID]", "[ARGS]"),
    front=rf"{NAME}(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*\{{",  # the marks may be special tokens that are not shown
    begin="[TOOL_CALLS]",
    call_id=("[CALL_ID]", ""),
    after_name="[ARGS]",
    separator="",
    drifts=True,
)
MISTRAL_LIST = ToolFormat(
    name="mistral-list",  # up to Nemo
    notation="object",
    shown=(("[TOOL_CALLS]",),),
    calls=("[TOOL_CALLS]",),
    opening="[TOOL_CALLS] [",
    call_id=(', "id": "', '"'),
    separator=", ",
    closing="]",
)
QWEN_CODER = ToolFormat(
    name="qwen3-coder",  # and Qwen 3.5, Nemotron 3, Step 3.5
    notation="parameters",
    shown=(("<function=", "<parameter="),),
    calls=("<function=",),
    around=("<tool_call>", "</tool_call>", "</function>"),
    front=rf"{NAME}>",
    begin="<tool_call>\n<function=",
    end="</function>\n</tool_call>",
    **_FUNCTION,  # type: ignore[arg-type]
    drifts=True,
)
SEED = ToolFormat(
    name="seed-oss",
    notation="parameters",
    shown=(("<seed:tool_call>",),),
    calls=("<function=",),
    around=("<seed:tool_call>", "</seed:tool_call>", "</function>"),
    front=rf"{NAME}>",
    begin="<seed:tool_call>\n<function=",
    end="</function>\n</seed:tool_call>",
    **_FUNCTION,  # type: ignore[arg-type]
)
MINIMAX = ToolFormat(
    name="minimax-m2",
    notation="parameters",
    shown=(("<minimax:tool_call>",),),
    calls=('<invoke name="',),
    around=("<minimax:tool_call>", "</minimax:tool_call>", "</invoke>"),
    front=rf'{NAME}">',
    opening="<minimax:tool_call>\n",
    begin='<invoke name="',
    after_name='">\n',
    parameter='<parameter name="',
    value='">',
    value_end="</parameter>\n",
    end="</invoke>",
    closing="\n</minimax:tool_call>",
)
GLM = ToolFormat(
    name="glm",  # 4.5 to 4.7, Laguna
    notation="parameters",
    shown=(("<arg_key>",),),
    calls=("<tool_call>",),
    around=("</tool_call>",),
    front=rf"{NAME}\s*<",
    begin="<tool_call>",
    after_name="\n",
    parameter="<arg_key>",
    value="</arg_key>\n<arg_value>",
    value_end="</arg_value>\n",
    end="\n</tool_call>",
)
FUNCTIONARY = ToolFormat(
    name="functionary",  # and Llama 3.1 where it is told its own tools
    notation="named",
    shown=(("<|python_tag|>", "<function="),),
    calls=("<function=",),
    around=("</function>",),
    front=rf"{NAME}>",
    begin="<function=",
    after_name=">",
    end="</function>",
    separator="",
)
PYTHONIC = ToolFormat(
    name="pythonic",  # Llama 3.2 and 4
    notation="python",
    shown=(("[func_name1(",), ("pythonic",)),
    calls=("", "<|python_start|>"),
    around=("<|python_end|>",),
    front=rf"{NAME}\s*\(",
    opening="[",
    separator=", ",
    closing="]",
)
LFM2 = ToolFormat(
    name="lfm2",
    notation="python",
    shown=(("<|tool_call_start|>",), ("<|tool_list_start|>",)),
    calls=("<|tool_call_start|>",),
    around=("<|tool_call_end|>",),
    front=rf"{NAME}\s*\(",
    opening="<|tool_call_start|>[",
    separator=", ",
    closing="]<|tool_call_end|>",
)
PHI = ToolFormat(
    name="phi4-mini",
    notation="object",
    shown=(("<|tool_call|>", "<|/tool_call|>"), ("<|tool|>",)),
    calls=("<|tool_call|>",),
    around=("<|/tool_call|>",),
    opening="<|tool_call|>[",
    separator=", ",
    closing="]<|/tool_call|>",
    drifts=True,
)
FUNCTOOLS = ToolFormat(
    name="functools",  # Firefunction, and Phi-4-mini at times
    notation="object",
    shown=(("functools[",),),
    calls=("functools[",),
    kept=True,
    opening="functools[",
    separator=", ",
    closing="]",
)
GRANITE = ToolFormat(
    name="granite",  # 3
    notation="object",
    shown=(("<|tool_call|>",),),
    calls=("<|tool_call|>", "<tool_call>"),
    around=("</tool_call>",),
    opening="<|tool_call|>[",
    separator=", ",
    closing="]",
)
NEMOTRON = ToolFormat(
    name="nemotron",  # Nano 2
    notation="object",
    shown=(("<TOOLCALL>",),),
    calls=("<TOOLCALL>",),
    around=("</TOOLCALL>",),
    opening="<TOOLCALL>[",
    separator=", ",
    closing="]</TOOLCALL>",
)
APRIEL = ToolFormat(
    name="apriel",
    notation="object",
    shown=(("<tool_calls>[",),),
    calls=("<tool_calls>",),
    around=("</tool_calls>",),
    opening="<tool_calls>[",
    call_id=(', "id": "', '"'),
    separator=", ",
    closing="]</tool_calls>",
)
MINIMAX_OLD = ToolFormat(
    name="minimax-m1",
    notation="object",
    shown=(("<tool_calls>",),),
    calls=("<tool_calls>",),
    around=("</tool_calls>",),
    opening="<tool_calls>\n",
    closing="\n</tool_calls>",
)
DEEPSEEK = ToolFormat(
    name="deepseek-v3.1",
    notation="named",
    shown=(("<｜tool▁sep｜>",),),
    calls=("<｜tool▁call▁begin｜>",),
    around=(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁end｜>",
    ),
    front=rf"{NAME}<｜tool▁sep｜>\s*\{{",
    opening="<｜tool▁calls▁begin｜>",
    begin="<｜tool▁call▁begin｜>",
    after_name="<｜tool▁sep｜>",
    end="<｜tool▁call▁end｜>",
    separator="",
    closing="<｜tool▁calls▁end｜>",
)
KIMI = ToolFormat(
    name="kimi-k2",
    notation="named",
    shown=(("<|tool_call_argument_begin|>",),),
    calls=("<|tool_call_begin|>",),
    around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_end|>"),
    front=rf"(?:functions\.)?{NAME}(?::\w+)?\s*<\|tool_call_argument_begin\|>\s*\{{",
    opening="<|tool_calls_section_begin|>",
    begin="<|tool_call_begin|>functions.",
    call_id=(":", ""),
    after_name="<|tool_call_argument_begin|>",
    end="<|tool_call_end|>",
    separator="",
    closing="<|tool_calls_section_end|>",
)
GPT_OSS = ToolFormat(
    name="gpt-oss",
    notation="channels",
    shown=(("<|channel|>", "commentary"),),
    calls=("<|channel|>",),
    around=("<|start|>", "<|message|>", "<|constrain|>", "<|call|>", "<|end|>", "<|return|>"),
)
FENCED = ToolFormat(
    name="fenced",
    notation="object",
    shown=(("```json", '"arguments"'),),
    calls=("```json",),
    kept=True,
    opening="```json\n",
    separator="\n```\n```json\n",
    closing="\n```",
    drifts=True,
)
PLAIN = ToolFormat(name="json", notation="object", calls=("",), separator=";")

# The first whose marks a template shows is meant: the particular before the general.
FORMATS: tuple[ToolFormat, ...] = (
    GPT_OSS, MINIMAX, SEED, GLM, QWEN_CODER, FUNCTIONARY, LFM2, DEEPSEEK, KIMI, MISTRAL, MISTRAL_LIST, NEMOTRON, APRIEL,
    MINIMAX_OLD, FUNCTOOLS, PHI, GRANITE, HERMES, PYTHONIC, LLAMA, FENCED, PLAIN,
)  # fmt: skip
NAMES: tuple[str, ...] = tuple(sorted(each.name for each in FORMATS))
AUTO = "auto"


def choose(template: str | None, name: str | None = None) -> ToolFormat:
    """The format called `name`; with none, or "auto", the one that a chat template shows.

    Hermes's if the template knows no tools: `offer_in_text` explains that one. A name is one of `NAMES`.
    """
    if name not in (None, AUTO):
        return next(each for each in FORMATS if each.name == name)
    if template is None or not knows_tools(template):
        return HERMES
    return next((each for each in FORMATS if each.is_shown(template)), PLAIN)


def knows_tools(template: str | None) -> bool:
    """Whether a chat template shows tools to the model."""
    return re.search(r"\btools\b", template or "") is not None
