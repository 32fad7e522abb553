"""What the rule of `tiny` does not find out by itself, by model type."""

from typing import Any

EXCEPTIONS: dict[str, dict[str, Any]] = {}
SKIPPED: dict[str, str] = {}
