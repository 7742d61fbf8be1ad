"""`python -m sleb`: the same as the command `sleb`."""

from __future__ import annotations

from sleb.cli import main

if __name__ == "__main__":
    main()
