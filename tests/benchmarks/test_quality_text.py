"""How texts become windows: by hand, and against lm-eval's own rule written out."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sleb.benchmarks.quality.texts import (
    Text,
    Window,
    batches,
    cut_text,
    default_seqlen,
    packed_windows,
    prefix_token,
    read_text,
    rolling_windows,
)
from sleb.engine.text import TextProcessor
from sleb.errors import ConfigError, SlebError


def lm_eval_windows(tokens, prefix, max_seq_len):
    """lm-eval's rule with context_len 1: (context, continuation) of every request, made disjoint."""
    made, predicted = [], 0
    first = min(max_seq_len, len(tokens))
    if tokens:
        made.append(([prefix, *tokens[: first - 1]], tokens[:first]))
        predicted = first
    while predicted < len(tokens):
        count = min(len(tokens) - predicted, max_seq_len)
        end = predicted + count
        made.append((tokens[end - max_seq_len - 1 : end - 1], tokens[end - count : end]))
        predicted += count
    return [(context[: len(context) - (len(after) - 1)], after) for context, after in made]


class TestWindows:
    def test_packed(self):
        assert packed_windows(range(7), 3) == [Window((0, 1, 2), 2), Window((3, 4, 5), 2)]
        assert packed_windows(range(2), 3) == []

    def test_with_a_token_that_each_begins_with(self):
        assert packed_windows([9, 10, 11, 12, 13, 14], 3, 9) == [
            Window((9, 10, 11), 2),
            Window((9, 12, 13), 2),
        ]
        assert packed_windows([10, 11, 12, 13], 3, 9) == [Window((9, 10, 11), 2), Window((9, 12, 13), 2)]
        windows = rolling_windows([10, 11, 12, 13, 14], 1, 3, again=True)
        assert windows == [Window((1, 10, 11, 12), 3), Window((1, 12, 13, 14), 2)]

    def test_rolling_by_hand(self):
        """The prefix stands before the first window alone; the last is filled up with what came before."""
        windows = rolling_windows([10, 11, 12, 13, 14, 15, 16], 1, 3)
        assert windows == [
            Window((1, 10, 11, 12), 3),
            Window((12, 13, 14, 15), 3),
            Window((13, 14, 15, 16), 1),
        ]
        assert rolling_windows([10, 11], 1, 3) == [Window((1, 10, 11), 2)]
        assert rolling_windows([], 1, 3) == []

    @given(length=st.integers(0, 40), seqlen=st.integers(1, 12))
    def test_rolling_is_lm_evals(self, length, seqlen):
        tokens = list(range(100, 100 + length))
        windows = rolling_windows(tokens, 1, seqlen)
        expected = lm_eval_windows(tokens, 1, seqlen)
        found = [
            (list(each.token_ids[: -each.num_scored]), list(each.token_ids[-each.num_scored :]))
            for each in windows
        ]
        assert found == expected
        assert [token for _, after in found for token in after] == tokens
        assert all(len(each.token_ids) <= seqlen + 1 for each in windows)

    def test_batches_hold_windows_of_one_shape(self):
        windows = [*rolling_windows(range(20), 99, 4), Window((1, 2, 3), 2)]
        found = list(batches(windows, 10))
        assert [(tuple(ids.shape), scored) for ids, scored in found] == [
            ((2, 5), 4),
            ((2, 5), 4),
            ((1, 5), 4),
            ((1, 3), 2),
        ]
        assert all(ids.dtype == torch.int64 for ids, _ in found)
        assert [row for ids, _ in found for row in ids.tolist()] == [list(each.token_ids) for each in windows]

    def test_default_length(self):
        assert [default_seqlen(scheme, 8192) for scheme in ("sleb", "lm-eval")] == [2048, 2046]
        assert [default_seqlen(scheme, 512) for scheme in ("sleb", "lm-eval")] == [512, 510]


def scored(text):
    return sum(window.num_scored for window in text.windows)


class TestCut:
    def test_schemes(self, tiny_model_dir):
        processor, text = TextProcessor(tiny_model_dir), Text("t", "abcdefghij")
        packed = cut_text(text, processor, "sleb", 4, None)
        assert [bytes(each.token_ids) for each in packed.windows] == [b"abcd", b"efgh"]
        assert not packed.is_whole and scored(packed) == 6
        rolling = cut_text(text, processor, "lm-eval", 4, None)
        assert rolling.windows[0].token_ids == (256, *b"abcd")
        assert rolling.is_whole and scored(rolling) == 10
        first = cut_text(text, processor, "lm-eval", 4, 2)
        assert len(first.windows) == 2 and not first.is_whole

    def test_a_limit_in_the_tokenizer_does_not_cut_the_text(self, tiny_model_dir, tmp_path):
        tokenizer = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
        tokenizer.enable_truncation(5)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        processor = TextProcessor(tmp_path)
        assert scored(cut_text(Text("t", "x" * 40), processor, "sleb", 10, None)) == 36

    def test_the_number_of_windows_of_the_text_itself(self, tiny_model_dir):
        processor = TextProcessor(tiny_model_dir)
        assert len(cut_text(Text("t", "x" * 40, 3), processor, "sleb", 10, None).windows) == 3
        assert len(cut_text(Text("t", "x" * 40, 3), processor, "sleb", 10, 4).windows) == 4

    @pytest.mark.parametrize(("scheme", "content"), [("sleb", "abc"), ("lm-eval", "")])
    def test_too_short(self, tiny_model_dir, scheme, content):
        with pytest.raises(ConfigError, match=r"t has .* tokens, fewer than one"):
            cut_text(Text("t", content), TextProcessor(tiny_model_dir), scheme, 4, None)

    def test_prefix(self, tiny_model_dir):
        processor = TextProcessor(tiny_model_dir)
        assert prefix_token(processor) == 256
        del processor.named_tokens["bos_token"]
        assert prefix_token(processor) == 258
        del processor.named_tokens["eos_token"]
        with pytest.raises(ConfigError, match="--windows-like sleb"):
            prefix_token(processor)

    def test_words_and_bytes_as_lm_eval_counts_them(self):
        text = Text("t", " zwölf  Boxkämpfer\njagen\n")
        assert (text.num_words, text.num_bytes) == (5, 27)


class TestRead:
    def test_a_file(self, tmp_path):
        path = tmp_path / "some.txt"
        path.write_text("größer\n", encoding="utf-8")
        assert read_text(str(path)) == Text("some.txt", "größer\n")

    def test_what_cannot_be_read(self, tmp_path):
        (tmp_path / "latin").write_bytes(b"gr\xf6\xdfer")
        for name in ("latin", "absent", "."):
            with pytest.raises(ConfigError, match=r"cannot be read .*wikitext2 or c4"):
                read_text(str(tmp_path / name))

    def test_data_sets(self, monkeypatch):
        asked = []

        def load_dataset(*path, **options):
            asked.append((path, options))
            return {"text": ["one", "", "two", *["more"] * 2000]}

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)
        text = read_text("wikitext2")
        assert text.content.startswith("one\n\n\n\ntwo\n\nmore") and text.default_windows is None
        assert asked[0] == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})
        text = read_text("c4")
        assert text.content.startswith("one  two more") and len(text.content.split(" ")) == 1100
        assert text.default_windows == 256
        assert asked[1][1]["split"] == "validation"

        def fail(*path, **options):
            raise OSError("no route\nto host")

        module.load_dataset = fail
        with pytest.raises(SlebError, match=r"could not be downloaded \(no route\): check the network"):
            read_text("wikitext2")
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ConfigError, match="pip install"):
            read_text("wikitext2")
