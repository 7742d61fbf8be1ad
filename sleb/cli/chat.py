"""`sleb chat`: a chat in the terminal with any OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer

API_KEY_VARIABLES = ["SLEB_API_KEY", "OPENAI_API_KEY"]
_SILENCE_SECONDS = 600.0  # a long prompt on a slow machine takes minutes to its first token


def chat(
    url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str | None, typer.Option(help="Id of the model.", show_default="the server's first")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's key.", envvar=API_KEY_VARIABLES)] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default="none")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the likeliest token.", show_default="the model's")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Share of the probability to draw from.", show_default="the model's")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.", show_default="none")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer.", show_default="what the context holds")
    ] = None,
) -> None:
    """Chat with a model behind any OpenAI-compatible server; /help in the chat lists its commands.

    Reads standard input, a line a message, when that is no terminal: `echo hi | sleb chat`.
    """
    from sleb.client.connection import base_url, open_client
    from sleb.client.console import ChatConsole
    from sleb.client.session import ChatSession
    from sleb.files import cache_dir

    given = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens}
    fields = {name: value for name, value in given.items() if value is not None}
    with (
        open_client(base_url(url), api_key, _SILENCE_SECONDS) as client,
        ChatConsole(cache_dir() / "chat_history") as console,
    ):
        ChatSession(client, console, model=model, system=system, fields=fields).run()
