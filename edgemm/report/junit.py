"""report.json -> junit.xml: a suite a target, a case a gate; what CI servers show beside the tests.

The standard library is as short as junitparser here, so there is no dependency.
"""

from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree as ET

from edgemm.report.markdown import bundle_line, gate_line, headline
from edgemm.report.schema import Report, TargetReport, Verdict

ELEMENT: dict[Verdict, str] = {"FAIL": "failure", "INCONCLUSIVE": "error", "UNVERIFIED": "skipped"}
COUNTS = {"failures": "FAIL", "errors": "INCONCLUSIVE", "skipped": "UNVERIFIED"}


def render(report: Report) -> str:
    """junit.xml of the whole report."""
    root = ET.Element("testsuites", name=xml(f"edgemm {report.model}"))
    total: Counter[str] = Counter()
    for target in report.targets:
        suite = ET.SubElement(root, "testsuite", name=xml(target.name))
        properties = ET.SubElement(suite, "properties")
        for name, value in (
            ("model", report.model),
            ("recipe", report.recipe),
            ("seed", str(report.seed)),
            ("verdict", target.verdict),
            ("bundle", bundle_line(target)),
        ):
            ET.SubElement(properties, "property", name=name, value=xml(value))
        verdicts: Counter[str] = Counter()
        for case, verdict, message in cases(target):
            element = ET.SubElement(suite, "testcase", classname=xml(f"{report.model}.{target.name}"), name=xml(case))
            if verdict in ELEMENT:
                ET.SubElement(element, ELEMENT[verdict], message=xml(message))
            else:
                ET.SubElement(element, "system-out").text = xml(message)
            verdicts[verdict] += 1
        set_counts(suite, verdicts)
        total += verdicts
    set_counts(root, total)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def cases(target: TargetReport) -> list[tuple[str, Verdict, str]]:
    """Name, verdict, message of each gate, and of the target itself where no gate carries its verdict.

    Without that last case a target that failed with no gate to blame would show as green.
    """
    gates = [(gate.name, gate.verdict, gate_line(gate)) for gate in target.gates]
    if any(verdict == target.verdict for _, verdict, _ in gates):
        return gates
    return [*gates, ("verdict", target.verdict, target.established or "; ".join(target.notes) or headline(target))]


def set_counts(element: ET.Element, verdicts: Counter[str]) -> None:
    element.set("tests", str(verdicts.total()))
    for name, verdict in COUNTS.items():
        element.set(name, str(verdicts[verdict]))


def xml(text: str) -> str:
    """`text` without the characters that XML 1.0 can't hold, even escaped."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
