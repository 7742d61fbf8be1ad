"""The records of sleb_cpu.h, which describes them field by field: the same fields in the same order."""

from __future__ import annotations

import ctypes

_pointer, _int = ctypes.c_void_p, ctypes.c_int32


class Linear(ctypes.Structure):
    """sleb_linear"""

    _fields_ = [
        *((name, _pointer) for name in ("data", "scale", "bias")),
        *((name, _int) for name in ("format", "n", "k", "gated")),
    ]


class Norm(ctypes.Structure):
    """sleb_norm"""

    _fields_ = [("weight", _pointer), ("bias", _pointer)]


class Unit(ctypes.Structure):
    """sleb_unit"""

    _fields_ = [
        ("norm", Norm),
        ("first", Linear),
        ("second", Linear),
        *((name, _pointer) for name in ("query_norm", "key_norm", "key_cache", "value_cache")),
        *((name, _int) for name in ("is_attention", "rotate", "window", "activation")),
    ]


class Model(ctypes.Structure):
    """sleb_model"""

    _fields_ = [
        *(
            (name, _int)
            for name in (
                *("hidden_size", "num_heads", "num_kv_heads", "head_dim", "rotary_half", "vocab_size"),
                *("norm_kind", "num_units", "page_size", "kv_format", "embed_format", "embed_packed"),
                *("max_tokens", "position_offset"),
            )
        ),
        ("norm_eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, _pointer) for name in ("cos", "sin", "embed", "position_embed", "units")),
        ("final_norm", Norm),
        ("has_final_norm", _int),
        ("head", Linear),
        ("pool", _pointer),
        ("workspace", _pointer),
    ]


class Step(ctypes.Structure):
    """sleb_step"""

    _fields_ = [
        *((name, _int) for name in ("num_tokens", "num_sequences", "num_samples", "reserved")),
        *(
            (name, _pointer)
            for name in (
                *("token_ids", "positions", "query_starts", "context_lens", "page_starts", "pages"),
                *("unit_sequences", "samples", "logits", "argmax"),
            )
        ),
    ]


_model_p, _unit_p, _step_p = ctypes.POINTER(Model), ctypes.POINTER(Unit), ctypes.POINTER(Step)


class Draw(ctypes.Structure):
    """sleb_draw"""

    _fields_ = [
        *((name, _pointer) for name in ("logits", "temperature", "top_p", "min_p", "points", "top_k")),
        *((name, _pointer) for name in ("chosen", "scratch", "pool")),
        *((name, _int) for name in ("num_rows", "vocab_size")),
    ]


_linear_p, _norm_p = ctypes.POINTER(Linear), ctypes.POINTER(Norm)


class Isa(ctypes.Structure):
    """sleb_isa"""

    _fields_ = [
        ("forward", ctypes.CFUNCTYPE(_int, _model_p, _step_p)),
        ("head", ctypes.CFUNCTYPE(_int, _model_p, _pointer, _int, _pointer, _pointer)),
        (
            "linear",
            ctypes.CFUNCTYPE(_int, _model_p, _norm_p, _linear_p, _pointer, _int, _int, _int, _pointer),
        ),
        ("attention", ctypes.CFUNCTYPE(_int, _model_p, _unit_p, _step_p, _pointer, _pointer)),
        ("draw", ctypes.CFUNCTYPE(_int, ctypes.POINTER(Draw))),
    ]
