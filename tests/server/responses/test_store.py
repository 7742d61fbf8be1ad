"""The store of answers against a list that does everything the slow way."""

from __future__ import annotations

import random

import pytest

from sleb.server.errors import ApiError
from sleb.server.responses import store as store_module
from sleb.server.responses.store import ResponseStore

OWNERS = (b"", b"one", b"two")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def answer(number, size=10):
    output = [{"id": f"msg_{number}", "type": "message", "content": "x" * size}]
    return {"id": f"resp_{number}", "output": output, "status": "completed"}


def items(number):
    return [{"id": f"in_{number}", "type": "message", "content": "question"}]


def test_what_is_kept_comes_back():
    store = ResponseStore(2**20, 60)
    store.put(b"", answer(1), items(1))
    kept = store.get(b"", "resp_1")
    assert kept.whole() == answer(1)
    assert kept.input_items() == items(1)
    store.put(b"", answer(2), items(2), kept.turns)
    again = store.get(b"", "resp_2")
    assert again.whole() == answer(2)
    assert len(again.turns) == 4
    assert again.turns[:2] == kept.turns
    assert store.item(b"", "msg_1") == answer(1)["output"][0]
    assert store.item(b"", "in_2") == items(2)[0]
    assert store.item(b"other", "msg_1") is None
    assert store.item(b"", "msg_3") is None
    store.delete(b"", "resp_1")
    assert store.item(b"", "msg_1") is None
    assert len(store.get(b"", "resp_2").turns) == 4  # a later answer brings its own


@pytest.mark.parametrize("call", ["get", "delete"])
def test_what_is_not_kept_is_404_and_says_why(call):
    store = ResponseStore(2**20, 60)
    store.put(b"mine", answer(1), items(1))
    for owner, name in ((b"other", "resp_1"), (b"mine", "resp_2")):
        with pytest.raises(ApiError, match=r"store: false .* older than 60 seconds, .*1 MiB") as missing:
            getattr(store, call)(owner, name)
        assert (missing.value.status, missing.value.code) == (404, "response_not_found")
    with pytest.raises(ApiError, match="--response-store-mb 0"):
        getattr(ResponseStore(0, 60), call)(b"", "resp_1")
    assert len(store) == 1


def test_time_is_counted_from_the_making_and_not_from_the_last_use():
    clock = Clock()
    store = ResponseStore(2**20, 60, clock=clock)
    store.put(b"", answer(1), items(1))
    clock.now += 59
    store.put(b"", answer(2), items(2))
    assert store.get(b"", "resp_1").whole() == answer(1)
    clock.now += 1
    with pytest.raises(ApiError):
        store.get(b"", "resp_1")
    assert store.item(b"", "msg_1") is None
    assert list(store) == ["resp_2"]
    clock.now += 59
    assert store.item(b"", "msg_2") is None
    assert (len(store), store.num_bytes) == (0, 0)


def test_an_answer_that_is_too_large_costs_no_other(monkeypatch):
    store = ResponseStore(10_000, 60)
    store.put(b"", answer(1), items(1))
    store.put(b"", answer(2, size=10_000), items(2))
    assert list(store) == ["resp_1"]
    monkeypatch.setattr(store_module, "MAX_ENTRY_BYTES", 3000)
    store.put(b"", answer(3, size=3000), items(3))
    assert list(store) == ["resp_1"]


@pytest.mark.parametrize("seed", range(20))
def test_against_a_list(seed):
    """Bounds in bytes, in number and in time, the order of use, and owners, over random operations."""
    chance, clock = random.Random(seed), Clock()
    max_bytes, max_seconds, max_answers = chance.choice([0, 5_000, 20_000]), 50, chance.choice([1, 4, 100])
    store = ResponseStore(max_bytes, max_seconds, max_answers, clock)
    model = []  # (id, owner, bytes, made, answer, input), the one used last is last
    for number in range(150):
        clock.now += chance.choice([0, 0, 1, 20])
        model = [each for each in model if clock.now - each[3] < max_seconds]
        owner = chance.choice(OWNERS)
        wanted = f"resp_{chance.randrange(number + 1)}"
        found = next((each for each in model if each[0] == wanted and each[1] == owner), None)
        match chance.choice(["put", "put", "get", "delete", "item"]):
            case "put":
                size = chance.choice([1, 500, 3_000, 6_000])
                store.put(owner, answer(number, size), items(number))
                if f"resp_{number}" in store:
                    num_bytes = store.get(owner, f"resp_{number}").num_bytes
                    assert num_bytes >= size + 1024
                    while model and (
                        sum(each[2] for each in model) + num_bytes > max_bytes or len(model) >= max_answers
                    ):
                        model.pop(0)
                    model.append(
                        (f"resp_{number}", owner, num_bytes, clock.now, answer(number, size), items(number))
                    )
                else:
                    assert size + 1024 + 512 > max_bytes - 500
            case "get" if found:
                assert store.get(owner, wanted).whole() == found[4]
                model.append(model.pop(model.index(found)))
            case "delete" if found:
                store.delete(owner, wanted)
                model.remove(found)
            case "item" if found:
                assert store.item(owner, found[5][0]["id"]) == found[5][0]
                model.append(model.pop(model.index(found)))
            case "item":
                assert store.item(owner, wanted.replace("resp", "msg")) is None
            case kind:
                with pytest.raises(ApiError):
                    getattr(store, kind)(owner, wanted)
        assert list(store) == [each[0] for each in model]
        assert store.num_bytes == sum(each[2] for each in model) <= max(max_bytes, 0)
        assert len(store) <= max_answers
