"""The turns of a chat."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from sleb.client.connection import ClientError

Message = dict[str, str]


@dataclass
class Conversation:
    """Turns, alternately the user's and the model's, under a system message.

    A question counts as a turn once it has an answer: one that failed would leave two questions in a row, which
    many chat templates refuse. `/retry` still knows it.
    """

    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    last_question: str | None = None
    _is_answered: bool = False

    def messages(self, question: str) -> list[Message]:
        """What to send to ask `question`, which is the last one from now on."""
        self.last_question, self._is_answered = question, False
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns, {"role": "user", "content": question}]

    def add_answer(self, answer: str) -> None:
        """Records the answer to the last question, or the part of it that came."""
        assert self.last_question is not None
        question = {"role": "user", "content": self.last_question}
        self.turns += [question, {"role": "assistant", "content": answer}]
        self._is_answered = True

    def take_back(self) -> str | None:
        """The last question, to be asked again; its answer, if it had one, is forgotten."""
        if self._is_answered:
            del self.turns[-2:]
            self._is_answered = False
        return self.last_question

    def reset(self) -> None:
        """Forgets all turns, not the system message."""
        self.turns.clear()
        self.last_question, self._is_answered = None, False

    def save(self, path: Path) -> None:
        """Writes the chat: as the API's `messages` to a .json file, else as Markdown. Raises ClientError."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.turns]
        if path.suffix.lower() == ".json":
            text = json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n".join(f"## {message['role']}\n\n{message['content']}\n" for message in messages)
        try:
            path.write_text(text, "utf-8")
        except OSError as error:
            raise ClientError(f"cannot write {path} ({error.strerror}); name another file") from error
