"""Numbers in prose come from `results/<experiment>/summary.json`: the `res` role, and the same numbers in the README.

    {res}`induction_heads.second_copy_loss`         0.18 [0.16, 0.20]
    {res}`induction_heads.second_copy_loss:.2f`     0.18
    {res}`induction_heads.accuracy:%`               97% [96%, 98%]       (`:.0%` prints the value alone)
    {res}`induction_heads.accuracy:n`               512                  (also `:ci`, `:seeds`, `:unit`)
    {res}`addition_circuits.learned:of`             4 of 5               (a share as a count)

The interval, n and how the number was made are shown when the reader points at it. A name that does not exist is a warning, so the
build fails. In the README a number stands between `<!--res NAME-->` and `<!--/res-->`, and `results/FINDINGS.md` (written by `mechinterp
report`), the first finding of each chapter, between `<!--findings-->` and `<!--/findings-->`; `python book/_ext/results.py` brings both up to date.
"""
from __future__ import annotations

import re
from pathlib import Path

from mechinterp_lib.report import explain, lookup, render

README_FINDINGS = re.compile(r"(<!--findings-->\n).*?(<!--/findings-->)", re.S)
README_NUMBER = re.compile(r"(<!--res ([\w.]+(?::[^>]*?)?)-->)(.*?)(<!--/res-->)", re.S)


def refresh(text: str, root: Path) -> str:
    "`text` with its marked numbers and findings as they are in `results/`."
    def number(match):
        name, _, spec = match[2].partition(":")
        return match[1] + render(lookup(root, name), spec) + match[4]
    written = root / "results" / "FINDINGS.md"
    page = written.read_text(encoding="utf-8") if written.exists() else ""
    chapters = re.findall(r"^## (.+)\n\n- (.+)$", "".join(re.findall(r"<!--found-->\n(.*?)<!--/found-->", page, re.S)), re.M)
    findings = "".join(f"- **{title}.** {first}\n" for title, first in chapters)
    text = README_FINDINGS.sub(lambda match: match[1] + findings + match[2], text)
    return README_NUMBER.sub(number, text)


def role(name, rawtext, text, lineno, inliner, options=None, content=None):
    "The `res` role."
    from docutils import nodes
    env = inliner.document.settings.env
    key, _, spec = text.partition(":")
    env.note_dependency(str(Path(env.srcdir) / "results" / key.partition(".")[0] / "summary.json"))
    try:
        entry = lookup(env.srcdir, key)
        shown, why = render(entry, spec), explain(entry)
    except (LookupError, ValueError) as error:
        message = inliner.reporter.warning(f"no result {text!r}: {error.args[0]}", line=lineno)
        return [inliner.problematic(rawtext, rawtext, message)], [message]
    return [nodes.abbreviation(rawtext, shown, explanation=why, classes=["result"])], []


def setup(app):
    app.add_role("res", role)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    readme = root / "README.md"
    readme.write_text(refresh(readme.read_text(encoding="utf-8"), root), encoding="utf-8")
