"""Checks of an OpenAI-compatible server, over HTTP alone.

check.py     what a check is, and how it tells its outcome
target.py    the server: requests, and answers of the expected shape
checks/      the checks, a module a group
run.py       runs them; report.py shows what came out
"""
