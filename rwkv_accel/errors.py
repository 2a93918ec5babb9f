"""The one exception that an entry point turns into a single line on stderr and exit code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: a path, a key, a file. The message says what is wrong and the remedy."""


class WriteError(UserError):
    """The disk refused a file (full, no permission). What was there before is untouched, and a run may go on."""
