"""sweep.html: one file that asks nobody for anything, in the style of a run's report."""

from importlib import resources
from pathlib import Path

from comparison.figures import FIGURES
from comparison.methods import BASE
from markupsafe import Markup
from sweeping import plots
from sweeping.results import HELPFULNESS_BELOW_BASE, NUM_REPLICATES, Results

from equipoise.eval.report.html import csp_hash, environment

_STYLE = """
th, td { overflow-wrap: normal; }
td.front { font-weight: 700; }
pre { max-height: 22rem; overflow: auto; unicode-bidi: isolate; }
figure svg text { fill: currentColor; }
"""


def page(results: Results, title: str) -> str:
    """The sweep as HTML: plots where a setting is complete, every point with what became of it, logs of failures."""
    style = (resources.files("equipoise.data") / "report.css").read_text(encoding="utf-8") + _STYLE
    shown = results.drawn is not None
    template = environment(Path(__file__).parent).get_template("sweep.html.jinja")
    return template.render(
        title=title,
        style=Markup(style),
        style_hash=csp_hash(style),
        results=results,
        shown=shown,
        base=BASE,
        rates=[figure for figure in FIGURES if figure != "helpfulness"],
        titles=plots.TITLES | {"gap": "worst − best"},
        judge=next(iter(results.outcomes.values())).report.judge if results.outcomes else None,
        num_replicates=NUM_REPLICATES,
        below_base=HELPFULNESS_BELOW_BASE,
        front_plot=plots.front_plot(results) if shown else None,
        parallel_plot=plots.parallel_plot(results) if shown else None,
        trade_off_plot=plots.trade_off_plot(results) if shown else None,
        trade_off_key=plots.trade_off_key(results) if shown else None,
        iterations_plot=plots.iterations_plot(results),
    )
