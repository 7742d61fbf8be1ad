"""The policy of depth under load, and the pace that its waits come from."""

from __future__ import annotations

import random

import pytest

from sleb.engine.depth_policy import Choice, DepthGovernor, DepthPolicy
from sleb.engine.pace import Pace, Work
from sleb.errors import ConfigError

TEXT = "depths=0,3,6 ttft=800ms max-perplexity=60% hold=20s"


def test_a_policy_is_read():
    assert DepthPolicy.parse(TEXT) == DepthPolicy((0, 3, 6), 0.8, 0.6, 20.0)
    assert DepthPolicy.parse(" ttft=1.5s max-perplexity=7.5%  depths=0,12").depths == (0, 12)
    assert DepthPolicy.parse("depths=0,1 ttft=2s max-perplexity=0%").hold == 20.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("depths=0,3 ttft=1s", "max-perplexity is missing"),
        ("depths=0 ttft=1s max-perplexity=1%", "name two or more"),
        ("depths=3,0 ttft=1s max-perplexity=1%", "the shallowest cut first"),
        ("depths=0,0 ttft=1s max-perplexity=1%", "each once"),
        ("depths=0,x ttft=1s max-perplexity=1%", "depths is '0,x'"),
        ("depths=0,3 ttft=1 max-perplexity=1%", "ttft is '1'"),
        ("depths=0,3 ttft=0s max-perplexity=1%", "ttft is '0s'"),
        ("depths=0,3 ttft=1s max-perplexity=0.6", "max-perplexity is '0.6'"),
        ("depths=0,3 ttft=1s max-perplexity=1% hold=-1s", "hold is '-1s'"),
        ("depths=0,3 ttft=1s max-perplexity=1% ttft=2s", "comes twice"),
        ("depths=0,3 ttft=1s max-perplexity=1% speed=2", "'speed' is not one of"),
        ("", "depths is missing"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(text, reason):
    with pytest.raises(ConfigError, match="--auto") as raised:
        DepthPolicy.parse(text)
    assert reason in str(raised.value) and TEXT in str(raised.value)


def test_no_depth_past_the_bound_is_allowed_nor_one_that_was_not_measured():
    policy = DepthPolicy((0, 3, 6, 9), 1.0, 0.6)
    assert policy.allowed({3: 0.2, 6: 0.59, 9: 0.61}) == (0, 3, 6)
    assert policy.allowed({3: 0.2, 6: None, 9: 0.3}) == (0, 3)
    assert policy.allowed({}) == (0,)
    assert DepthPolicy((3, 6), 1.0, 0.6).allowed({3: 0.9, 6: 0.1}) == ()


def test_one_level_at_a_time_then_refusal_then_held_and_back():
    governor = DepthGovernor(DepthPolicy((0, 3, 6), 1.0, 1.0, hold=20.0), (0, 3, 6), 0.0)
    idle, busy = (0.0, lambda depth: 0.0), (5.0, lambda depth: 6.0)
    assert governor.choose(0.0, *idle) == Choice(0, False)
    assert governor.choose(1.0, *busy) == Choice(3, True)
    assert governor.choose(1.1, *busy) == Choice(6, True)
    assert governor.choose(1.2, *busy) is None
    assert governor.choose(5.0, *idle) == Choice(6, True)  # held
    assert governor.choose(21.1, *idle) == Choice(6, True)
    assert governor.choose(21.3, *idle) == Choice(3, True)
    assert governor.choose(41.3, *idle) == Choice(0, False)
    assert governor.seconds(50.0) == pytest.approx({0: 1.0 + 8.7, 3: 0.1 + 20.0, 6: 20.2})


def test_a_shallower_depth_that_would_not_meet_the_target_does_not_return():
    governor = DepthGovernor(DepthPolicy((0, 3), 1.0, 1.0, hold=10.0), (0, 3), 0.0)
    assert governor.choose(0.0, 2.0, lambda depth: 3.0) == Choice(3, True)
    for now in range(5, 60, 5):
        assert governor.choose(now, 0.5, {0: 1.5, 3: 0.9}.__getitem__) == Choice(3, True)
    assert governor.choose(64.0, 0.1, {0: 0.9, 3: 0.8}.__getitem__) == Choice(3, True)
    assert governor.choose(66.0, 0.1, {0: 0.9, 3: 0.8}.__getitem__) == Choice(0, False)


def test_an_idle_replica_is_at_the_shallowest_however_long_the_prompt():
    governor = DepthGovernor(DepthPolicy((0, 3), 0.5, 1.0, hold=10.0), (0, 3), 0.0)
    assert governor.choose(0.0, 0.0, lambda depth: 60.0) == Choice(0, False)
    assert governor.choose(1.0, 0.4, lambda depth: 60.0) == Choice(3, True)
    assert governor.choose(2.0, 0.4, lambda depth: 60.0) == Choice(
        3, True
    )  # what is before it is not too long
    assert governor.choose(500.0, 0.0, lambda depth: 60.0) == Choice(0, False)


def test_against_a_list_of_what_may_happen():
    """Random loads: never two levels at once, never before the hold is over, never deeper than allowed."""
    rng = random.Random(7)
    policy = DepthPolicy((0, 1, 2, 3), 1.0, 1.0, hold=5.0)
    governor, level, needed, now = DepthGovernor(policy, policy.depths, 0.0), 0, 0.0, 0.0
    refused = 0
    for _ in range(5000):
        now += rng.choice((0.01, 0.5, 3.0))
        ahead = rng.choice((0.0, 0.2, 0.9, 1.5))
        waits = {depth: ahead + 0.3 * (4 - depth) * rng.random() for depth in policy.depths}
        choice = governor.choose(now, ahead, waits.__getitem__)
        if choice is None:
            refused += 1
            assert level == 3 and ahead > 1.0
            needed = now
            continue
        step = choice.depth - level
        assert step <= 1
        if step == 1:
            assert ahead > 0 and waits[level] > 1.0
        if step < 0:
            assert now - needed >= 5.0 * -step
        if ahead > 0 and waits[level] > 1.0:
            assert step == 1 or level == 3
            needed = now
        elif ahead > 0 and level and waits[level - 1] > 1.0:
            assert step == 0
            needed = now
        elif step < 0:
            needed += 5.0 * -step
        level = choice.depth
    assert refused > 10


def test_pace_learns_what_steps_cost_and_predicts_a_wait():
    """Steps of 10 ms and 1 ms a prompt token at depth 0; depth 6 costs 80 % of that."""
    pace = Pace({0: 1.0, 6: 0.8}, step_tokens=100, num_seats=4)
    assert pace.wait(Work({0: 500}, 3, 0), 10, 0) == 0.0  # nothing is known
    for _ in range(60):
        pace.observe_step(0.010, 0, {})
        pace.observe_step(0.008, 6, {})
        pace.observe_step(0.010 + 0.050, 0, {0: 50})
        pace.observe_step(0.008 + 0.040, 6, {6: 50})
        pace.observe_seat(2.0)
    assert pace.step_seconds == pytest.approx(0.010)
    assert pace.token_seconds == pytest.approx(0.001)
    assert pace.wait(Work({}, 0, 4), 100, 0) == pytest.approx(0.110)
    assert pace.wait(Work({}, 0, 4), 100, 6) == pytest.approx(0.088)
    assert pace.wait(Work({0: 100, 6: 100}, 0, 4), 100, 6) == pytest.approx(0.100 + 0.080 + 0.080 + 3 * 0.008)
    assert pace.wait(Work({}, 3, 0), 0, 0) == pytest.approx(4 * 2.0 / 4)  # four seats before it
    assert pace.wait(Work({}, 0, 1), 0, 0) == 0.0
    pace.forget()
    assert pace.wait(Work({0: 500}, 3, 0), 10, 0) == 0.0
