"""What docstrings have beyond Google's style, as Markdown: drawings, tables, sections of one paragraph."""

import re
import textwrap

import griffe

RULE = re.compile(r"=+( =+)+")
DRAWING = re.compile(r"(.*?)( ?)::")
SENTENCE = re.compile(r"(Args|Attributes|Determinism|Limits|Raises|Source): (.*)")
SEVERAL = re.compile(r"    \w+(, \w+)+: .*")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
            if obj.is_class and not re.search("^(Args|Attributes):", obj.docstring.value, flags=re.MULTILINE):
                first, *others = obj.docstring.value.split("\n\n")
                obj.docstring.value = "\n\n".join([first, *fields(obj), *others])


def fields(cls):
    """A section of the fields that a comment behind them explains, if there are any."""
    comments = {
        name: re.findall(r"  # (.*)", "\n".join(each.lines))
        for name, each in cls.members.items()
        if each.is_attribute and "property" not in each.labels and not name.startswith("_")
    }
    items = [f"    {name}: {comment[0]}." for name, comment in comments.items() if comment]
    return ["\n".join(["Attributes:", *items])] if items else []


def markdown(text):
    """A docstring of this project in Google's style and Markdown."""
    lines = text.split("\n")
    out = []
    while lines:
        line = lines.pop(0)
        if found := DRAWING.fullmatch(line):
            before, space = found.groups()
            drawn = textwrap.dedent("\n".join(_take(lines, _is_indented))).strip("\n")
            out += [before + ("" if space or not before else ":"), "", "```text", drawn, "```", ""]
        elif RULE.fullmatch(line):
            rows = _take(lines, lambda each: not RULE.fullmatch(each))
            lines.pop(0)
            out += ["| | |", "|---|---|", *("| `{}` | {} |".format(*row.split(maxsplit=1)) for row in rows)]
        elif line.startswith(">>> "):
            out += ["Examples:", *("    " + each for each in [line, *_take(lines, bool)])]
        elif line.startswith("Example; "):
            out += ["Examples:", "    " + line.removeprefix("Example; "), ""]
        elif line == "Example:":
            out += ["Examples:"]
        elif line == "Args:" and lines[0].startswith("    See "):
            out += [f"**Parameters:** {lines.pop(0).strip()}"]
        elif found := SENTENCE.fullmatch(line):
            name, rest = found.groups()
            out += [f"**{'Parameters' if name == 'Args' else name}:** {rest}"]
        elif SEVERAL.fullmatch(line):
            names, colon, rest = line.partition(":")
            out += [names.replace(", ", ",\N{NO-BREAK SPACE}") + colon + rest]
        else:
            out += [line]
    return "\n".join(out)


def _is_indented(line):
    return not line or line[0] == " "


def _take(lines, while_):
    taken = []
    while lines and while_(lines[0]):
        taken.append(lines.pop(0))
    return taken
