"""A small client of OpenAI-compatible servers: what `sleb chat` and `sleb doctor` share."""
