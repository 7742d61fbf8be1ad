"""Running the checks against one server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from sleb.client.connection import ClientError, list_models
from sleb.doctor.check import Check
from sleb.doctor.checks import GROUPS
from sleb.doctor.outcome import CheckFailedError, CheckSkippedError, MissingFeatureError, Outcome
from sleb.doctor.target import Target, shown
from sleb.errors import ConfigError
from sleb.version import __version__

# What taking an answer apart raises when its shape is another than expected.
_SHAPE_ERRORS = (LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Result:
    """How one check ended; `reason` is empty for a pass."""

    check: Check
    outcome: Outcome
    reason: str
    seconds: float

    @property
    def is_bad(self) -> bool:
        """Whether it lacks something required; a further wire format may be missing, but not be wrong."""
        lacks = self.outcome is Outcome.MISSING and not self.check.further
        return self.check.required and (lacks or self.outcome is Outcome.FAIL)


@dataclass(frozen=True)
class Examination:
    """All results for one server. `strict`: what only sleb promises counts too."""

    url: str
    model: str | None
    results: list[Result]
    strict: bool = False

    @property
    def problems(self) -> list[Result]:
        """The results that make the examination fail."""
        passing = (Outcome.PASS, Outcome.SKIPPED)
        return [each for each in self.results if each.is_bad or (self.strict and each.outcome not in passing)]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        counts = {outcome: sum(each.outcome is outcome for each in self.results) for outcome in Outcome}
        checks = [
            {
                "group": each.check.group,
                "name": each.check.name,
                "required": each.check.required,
                "further": each.check.further,
                "outcome": each.outcome,
                "reason": each.reason or None,
                "seconds": round(each.seconds, 4),
                "expected": each.check.expected,
                "source": each.check.source,
            }
            for each in self.results
        ]
        head = {"sleb_version": __version__, "url": self.url, "model": self.model, "strict": self.strict}
        return {**head, "passed": not self.problems, "counts": counts, "checks": checks}


def choose_checks(only: Sequence[str]) -> list[Check]:
    """All checks, or those of the groups in `only`. Raises ConfigError for a group that does not exist."""
    names = [group.name for group in GROUPS]
    for name in only:
        if name not in names:
            raise ConfigError(f"there is no group '{name}'; the groups are {', '.join(names)}")
    return [check for group in GROUPS if not only or group.name in only for check in group.checks]


def connect(http: httpx.Client, model: str | None, api_key: str | None) -> Target:
    """The target, once the server has answered. Raises ClientError if it does not, or wants another key."""
    models: list[str] = []
    try:
        models = list_models(http)
    except ClientError as error:  # any other answer is for the checks to judge
        if error.status in (None, 401, 403):
            raise
    return Target(http, model or (models[0] if models else None), api_key)


def examine(
    target: Target,
    checks: Sequence[Check],
    on_check: Callable[[Check], None] = lambda _: None,
    *,
    strict: bool = False,
) -> Examination:
    """Runs `checks` one after another; `on_check` hears of each before it starts."""
    results = []
    for check in checks:
        on_check(check)
        started = time.monotonic()
        outcome, reason = run_check(check, target)
        results.append(Result(check, outcome, reason, time.monotonic() - started))
    return Examination(target.url, target.model, results, strict)


def run_check(check: Check, target: Target) -> tuple[Outcome, str]:
    """The outcome of one check, and why unless it passed."""
    failed = Outcome.FAIL if check.required else Outcome.DIFFERS
    try:
        check.run(target)
    except CheckFailedError as error:
        return failed, str(error)
    except MissingFeatureError as error:
        return Outcome.MISSING, str(error)
    except CheckSkippedError as error:
        return Outcome.SKIPPED, str(error)
    except httpx.TimeoutException:
        return failed, "no answer in time (--timeout gives more)"
    except httpx.HTTPError as error:
        return failed, f"the connection failed: {type(error).__name__}: {shown(str(error))}"
    except KeyError as error:
        return failed, f"the answer lacks {shown(str(error.args[0]))}"
    except _SHAPE_ERRORS as error:
        return failed, f"the answer has another shape: {type(error).__name__}: {shown(str(error))}"
    return Outcome.PASS, ""
