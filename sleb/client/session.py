"""The loop of `sleb chat`: questions, answers and commands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from sleb.client.answer import Answer
from sleb.client.connection import ClientError, list_models
from sleb.client.console import ChatConsole
from sleb.client.conversation import Conversation

HELP = """\
/model [ID]    the models of the server; with an id, answers come from that one
/system [TEXT] the system message from now on; without a text, none
/reset         forget the conversation
/retry         ask the last question again
/save FILE     write the conversation: as messages to a .json file, else as Markdown
/stats         time to the first text and tokens a second of the last answer
/help          this list
A message goes on over lines that end in a backslash, or between \"\"\" and \"\"\".
Ctrl-C stops an answer, Ctrl-D ends the chat."""


class ChatSession:
    """A chat over one connection; `fields` go into every request (temperature, max_tokens …)."""

    def __init__(
        self,
        client: httpx.Client,
        console: ChatConsole,
        *,
        model: str | None,
        system: str | None = None,
        fields: dict[str, Any] | None = None,
    ) -> None:
        self._client = client
        self._console = console
        self._model = model
        self._fields = fields or {}
        self._conversation = Conversation(system)
        self._last: Answer | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/model": self._choose_model,
            "/system": self._set_system,
            "/reset": self._reset,
            "/retry": self._retry,
            "/save": self._save,
            "/stats": self._show_statistics,
            "/help": lambda _: self._console.say(HELP),
        }

    def run(self) -> None:
        """Until the end of the input. On a terminal errors are shown and the chat goes on; else they are raised."""
        if self._model is None:
            self._model = self._default_model()
        self._console.note(f"{self._client.base_url} {self._model or ''} – /help lists the commands")
        while True:
            try:
                text = self._console.read()
                if text is None:
                    return
                if text.strip():
                    self._handle(text)
            except ClientError as error:
                if not self._console.is_terminal:
                    raise
                self._console.complain(error)
            except KeyboardInterrupt:
                if not self._console.is_terminal:
                    raise
                self._console.say("")
                self._console.note("Ctrl-D ends the chat")

    def _default_model(self) -> str | None:
        """The first model of the server; None where it tells none, so that requests leave the choice to it."""
        try:
            models = list_models(self._client)
        except ClientError as error:
            if error.status not in (404, 405, 501):
                raise
            return None
        return models[0] if models else None

    def _handle(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        name = word.strip()
        if not name.startswith("/") or not name[1:].isalpha():  # a path such as /usr/bin is no command
            self._ask(text)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise ClientError(f"{name} is no command; /help lists them (a message may begin with a space)")

    def _ask(self, question: str) -> None:
        body: dict[str, Any] = {
            "messages": self._conversation.messages(question),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
        }
        if self._model is not None:
            body["model"] = self._model
        self._last = answer = Answer()
        try:
            self._show(answer, body)
        except KeyboardInterrupt:
            if not self._console.is_terminal:
                raise
            self._console.note("(stopped)")
        finally:
            if answer.content:
                self._conversation.add_answer(answer.content)
        if answer.finish_reason not in (None, "stop"):
            self._console.note(f"(ended by {answer.finish_reason})")

    def _show(self, answer: Answer, body: dict[str, Any]) -> None:
        """Writes the answer as it comes, with a line end after each of its parts, however it ends."""
        shown = None
        try:
            with closing(answer.stream(self._client, body)) as pieces:
                for kind, text in pieces:
                    if shown == "reasoning" and kind == "content":
                        self._console.write_reasoning("\n")
                    shown = kind
                    write = (
                        self._console.write_content if kind == "content" else self._console.write_reasoning
                    )
                    write(text)
        finally:
            if shown is not None:
                write = self._console.write_content if shown == "content" else self._console.write_reasoning
                write("\n")

    def _choose_model(self, name: str) -> None:
        models = list_models(self._client)
        if name:
            self._model = name
            if name not in models:
                self._console.note(f"{name} is not in the server's list; it may know it under another name")
            return
        for each in models:
            self._console.say(f"{'*' if each == self._model else ' '} {each}")

    def _set_system(self, text: str) -> None:
        self._conversation.system = text or None

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._last = None

    def _retry(self, _: str) -> None:
        question = self._conversation.take_back()
        if question is None:
            raise ClientError("there is no question to ask again; ask one")
        self._ask(question)

    def _save(self, name: str) -> None:
        if not name:
            raise ClientError("/save needs the name of a file, as in /save chat.md")
        self._conversation.save(Path(name).expanduser())
        self._console.note(f"written to {name}")

    def _show_statistics(self, _: str) -> None:
        self._console.say("no answer yet" if self._last is None else self._last.statistics())
