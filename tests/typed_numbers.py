"""Finds results that were typed into prose.

A result is printed from `results/` by the role `res`. So prose may hold no decimal number, no percentage, no number in scientific
notation and no number with a unit. Not looked at: code, roles, math, links' targets, names that hold digits (GPT-2, L5H1), and whole cells
tagged `literature` (what others published), `prediction` (written down before the run) or `design` (what the experiment was set to).
"""
from __future__ import annotations

import re

ALLOWED_TAGS = {"literature", "prediction", "design"}

_UNITS = (r"nats?|bits?|per ?cent|percent(?:age)?|points?|steps?|tokens?|characters?|heads?|layers?|models?|seeds?|runs?|seconds?|minutes?|hours?|"
          r"times|fold|x|ms|standard (?:deviations?|errors?)|of \d+|out of \d+")
_SKIPPED = re.compile(
    r"<!--(?P<mark>res|findings)\b.*?<!--/(?P=mark)-->"         # what the README's refresh wrote
    r"|<!--.*?-->"
    r"|^ *(?P<fence>`{3,}|~{3,})(?!\{).*?^ *(?P=fence) *$"   # fenced code, but not a directive
    r"|^ {0,3}:{3,}.*?$|^ *`{3,}\{.*?$|^ *:[\w-]+:.*?$"      # a directive's head and options
    r"|\{[\w:-]+\}`[^`]*`|`+[^`]*`+"             # roles and inline code
    r"|\$\$.*?\$\$|\$[^$\n]*\$"
    r"|\]\([^)]*\)|<?https?://\S+|^\(.*\)=$"
    r"|^ *\d+[.)](?= )"                          # a list's marker
    r"|\b[A-Za-z][\w.]*-?\d[\w.-]*", re.M | re.S)   # GPT-2, L5H1, BabyLlama-105, seed0
_NUMBER = re.compile(rf"(?<![\w.])[-+\N{{MINUS SIGN}}]?(?:\d+\.\d+|\.\d+|\d+(?:\.\d+)?e[-+]?\d+|\d[\d,]*(?:-\d+)?(?: ?%|\N{{MULTIPLICATION SIGN}}|[ -](?:{_UNITS})\b))(?:%)?", re.I)


def typed_numbers(prose: str) -> list[str]:
    "The numbers in Markdown prose that look like results, each with the words around it."
    seen = _SKIPPED.sub(" ", prose)
    return [" ".join(seen[max(0, m.start() - 40):m.end() + 25].split()) for m in _NUMBER.finditer(seen)]


def in_cell(cell) -> list[str]:
    "The typed numbers of a notebook cell: of its prose, or of the captions in a code cell."
    if ALLOWED_TAGS & set(cell.metadata.get("tags", [])): return []
    if cell.cell_type == "markdown": return typed_numbers(cell.source)
    captions = re.findall(r"^#\s*\|\s*fig-cap:(.*)$", cell.source, re.M) if cell.cell_type == "code" else []
    return typed_numbers("\n".join(captions))
