"""The plots of an evaluation as one HTML page that asks no server and holds no prompt or answer."""

from importlib import resources

from markupsafe import Markup

from equipoise.eval.report.content import ReportContent
from equipoise.eval.report.plots import change_plot, unsafe_rate_plot

_PAGE = Markup(
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>'
    "<body><h1>{title}</h1>{figures}</body></html>\n"
)


def plots_page(content: ReportContent) -> str:
    """Unsafe rate by category and state with 95 % intervals; beside a baseline, the paired changes too."""
    style = Markup((resources.files("equipoise.data") / "report.css").read_text(encoding="utf-8"))
    plots = [unsafe_rate_plot(content), *([change_plot(content)] if content.changes else [])]
    figures = Markup("").join(Markup("<figure>{}</figure>").format(plot) for plot in plots)
    return _PAGE.format(title=content.title, style=style, figures=figures)
