"""Draws the dashboard's panels from what a Prometheus answers to their questions.

`images_panels.py PROMETHEUS MINUTES PICTURE`: titles, places, legends and questions are those
of observe/grafana/dashboards/curvd.json; Grafana draws them otherwise.
"""

import re
import sys
import time
from datetime import UTC, datetime

from images_observe import BOARD, SCRAPED_S, Prometheus
from matplotlib import dates, pyplot, ticker

COLUMNS = 24
"""Of Grafana's grid."""
SCALE = {"bytes": 2**20, "s": 1e-3}
SHOWN = {"bytes": "MiB", "s": "ms"}


def drawn(axes, panel, prometheus, begin_s, end_s):
    """One panel: a line for each series of each answer."""
    unit = panel["fieldConfig"]["defaults"].get("unit", "")
    lines = 0
    for target in panel["targets"]:
        legend = target.get("legendFormat", "")
        question = target["expr"].replace("$__rate_interval", f"{4 * SCRAPED_S}s")
        answer = prometheus.ask(
            "query_range", query=question, start=begin_s, end=end_s, step=SCRAPED_S
        )
        for series in answer["result"]:
            labels = series["metric"]
            name = re.sub(
                r"{{(\w+)}}", lambda found, of=labels: of.get(found[1], ""), legend
            )
            at = [datetime.fromtimestamp(at, UTC) for at, _ in series["values"]]
            values = [
                float(value) / SCALE.get(unit, 1) for _, value in series["values"]
            ]
            axes.plot(at, values, linewidth=1, label=name)
            lines += 1
    axes.set_visible(lines > 0)  # of workers, where there are none
    axes.set_title(panel["title"], fontsize=9, loc="left")
    axes.set_ylabel(SHOWN.get(unit, ""), fontsize=7)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)
    if lines:
        scale = panel["fieldConfig"]["defaults"]["custom"].get("scaleDistribution", {})
        axes.set_yscale(scale.get("type", "linear"))
        axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
        axes.xaxis.set_major_locator(dates.MinuteLocator())
        if not scale:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.legend(fontsize=5.5, loc="upper left", ncols=2, framealpha=0.6)


def main(place, minutes, picture):
    prometheus, end_s = Prometheus(place), time.time()
    panels = [panel for panel in BOARD["panels"] if "targets" in panel]
    bottom = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = pyplot.figure(figsize=(13, 0.27 * bottom), layout="constrained")
    grid = figure.add_gridspec(bottom, COLUMNS)
    for panel in panels:
        at = panel["gridPos"]
        place_of = grid[at["y"] : at["y"] + at["h"], at["x"] : at["x"] + at["w"]]
        drawn(
            figure.add_subplot(place_of),
            panel,
            prometheus,
            end_s - 60 * float(minutes),
            end_s,
        )
    figure.savefig(picture, dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    main(*sys.argv[1:])
