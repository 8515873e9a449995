"""Numbers in prose come from `results/<experiment>/summary.json`: the `res` role, and the same numbers in the README.

    {res}`induction_heads.second_copy_loss`         0.18 [0.16, 0.20]
    {res}`induction_heads.second_copy_loss:.2f`     0.18
    {res}`induction_heads.accuracy:%`               97% [96%, 98%]       (`:.0%` prints the value alone)
    {res}`induction_heads.accuracy:n`               512                  (also `:ci`, `:seeds`, `:unit`)
    {res}`addition_circuits.learned:of`             4 of 5               (a share as a count)

The interval, n and how the number was made are shown when the reader points at it. A name that does not exist is a warning, so the
build fails. In the README a number stands between `<!--res NAME-->` and `<!--/res-->`, and `results/FINDINGS.md` (written by `mechinterp
report`) between `<!--findings-->` and `<!--/findings-->`; `python book/_ext/results.py` brings both up to date.
"""
from __future__ import annotations

import json, math, re
from pathlib import Path

README_FINDINGS = re.compile(r"(<!--findings-->\n).*?(<!--/findings-->)", re.S)
README_NUMBER = re.compile(r"(<!--res ([\w.]+(?::[^>]*?)?)-->)(.*?)(<!--/res-->)", re.S)


def lookup(root: Path, name: str) -> dict:
    "The entry `EXPERIMENT.NAME` of the results below `root`; a LookupError that says what is missing."
    experiment, _, key = name.partition(".")
    path = Path(root) / "results" / experiment / "summary.json"
    if not path.exists(): raise LookupError(f"no results for {experiment!r}: there is no {path.relative_to(root)}")
    entries = json.loads(path.read_text(encoding="utf-8"))
    if key not in entries: raise LookupError(f"{path.relative_to(root)} has no {key!r}")
    return entries[key]


def _digits(entry: dict, scale: float) -> int:
    "Decimals that show half the interval's width to one digit; three significant digits where the interval has no width."
    half = scale * (entry["ci_high"] - entry["ci_low"]) / 2
    if half > 0: return min(6, max(0, -math.floor(math.log10(half))))
    value = abs(scale * entry["value"])
    return 0 if value == round(value) or value >= 100 else min(6, 2 - math.floor(math.log10(value)))


def _minus(text: str) -> str: return text.replace("-", "\N{MINUS SIGN}")


def render(entry: dict, spec: str = "") -> str:
    "The text of one result: value and interval for no `spec` or `%`, one part of it for `n`, `seeds`, `unit` and `ci`, a share as a count for `of`, else the value in that format."
    if spec in ("n", "seeds"): return f"{entry[spec]:,}"
    if spec == "unit": return entry["unit"]
    if spec == "of": return f"{round(entry['value'] * entry['n']):,} of {entry['n']:,}".replace(" ", "\N{NO-BREAK SPACE}")
    if spec not in ("", "%", "ci"): return _minus(format(round(entry["value"]) if spec.endswith("d") else entry["value"], spec))
    scale, sign = (100, "%") if spec == "%" else (1, "")
    value, low, high = (_minus(f"{scale * entry[k]:,.{_digits(entry, scale)}f}{sign}") for k in ("value", "ci_low", "ci_high"))
    if spec == "ci": return f"[{low}, {high}]"
    return value if entry["ci_low"] == entry["ci_high"] else f"{value} [{low}, {high}]"


def explain(entry: dict) -> str:
    "What the reader sees on pointing at a result."
    value, low, high = (_minus(f"{entry[k]:.4g}") for k in ("value", "ci_low", "ci_high"))
    unit = f" {entry['unit']}" if entry["unit"] else ""
    seeds = f", {entry['seeds']} seeds" if entry["seeds"] > 1 else ""
    interval = f", 95% interval {low} to {high}" if low != high else ""
    return f"{value}{unit}{interval}, n = {entry['n']:,}{seeds}. {entry['how']}"


def refresh(text: str, root: Path) -> str:
    "`text` with its marked numbers and findings as they are in `results/`."
    def number(match):
        name, _, spec = match[2].partition(":")
        return match[1] + render(lookup(root, name), spec) + match[4]
    written = root / "results" / "FINDINGS.md"
    findings = re.sub(r"\A# .*\n+", "", written.read_text(encoding="utf-8")).strip() + "\n" if written.exists() else ""
    findings = re.sub(r"^#(?=#* )", "##", findings, flags=re.M)     # below the README's own heading
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
