"""What the README says about the code is true of the code."""

import re

from flamingo_kernels._backends import dispatch, env
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()


def section(title):
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_two_commands_come_first():
    assert re.match(r"# flamingo-kernels\n\n```\nmake demo .*\nmake test ", README)


def test_it_names_every_operator_and_backend():
    operators = re.findall(r"^\| `(\w+)\(", README, flags=re.MULTILINE)
    assert sorted(operators) == sorted(dispatch.operators())
    assert set(env.BACKENDS) <= set(re.findall(r"`(\w+)`", section("What runs where")))


def test_it_links_to_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    linked = {*re.findall(r"\(docs/(\w+\.md)", README)}
    # These are for people who read on in the pages that are linked.
    assert pages - linked == {"adding_a_model.md", "adding_an_operator.md", "environment.md"} & pages
