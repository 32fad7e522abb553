"""docs/features.md claims nothing without the test that proves it."""

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/features.md"
LINK = re.compile(r"\[(\w+)\]\((\.\./tests/[\w/]+\.py)\)")


def claims(text):
    """Feature → what our column says."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[-1] for row in cells if not set(row[0]) <= set("-: ") and row[-1][:1] in "✓~–"}


def unproven(said, folder):
    """What is wrong with a claim; nothing, where every test it names is there."""
    if not re.match(r"[✓~–] \S", said):
        return "says neither a test nor a reason"
    links = LINK.findall(said)
    if said.startswith("✓") and not links:
        return "has a ✓ and no test"
    for name, path in links:
        file = folder / path
        tree = ast.parse(file.read_text(encoding="utf-8")) if file.exists() else ast.Module([], [])
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            return f"names {path}::{name}, which is not there"
    return None


def test_every_claim_has_its_test():
    found = claims(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 30
    assert {feature: why for feature, said in found.items() if (why := unproven(said, PAGE.parent))} == {}


@pytest.mark.parametrize(
    "said, why",
    [
        ("✓", "neither"),
        ("✓ of course", "no test"),
        ("✓ [test_no_such](../tests/test_features.py)", "not there"),
        ("✓ [test_every_claim_has_its_test](../tests/test_no_such.py)", "not there"),
        ("~", "neither"),
    ],
)
def test_a_claim_without_a_test_would_be_seen(said, why):
    assert why in unproven(said, PAGE.parent)
    assert unproven("✓ [test_every_claim_has_its_test](../tests/test_features.py)", PAGE.parent) is None
