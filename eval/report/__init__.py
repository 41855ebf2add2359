"""What people and other tools read of an evaluation: HTML, markdown, tables, an inspect_ai log, a JSON schema."""

from equipoise.eval.report.html import write_report

__all__ = ["write_report"]
