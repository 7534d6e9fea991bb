#!/usr/bin/env python3
"""Draws the dashboard without Grafana: the panels and queries of the JSON file, answered by a Prometheus.

    pip install matplotlib requests
    python3 dev/dashboard/render.py http://127.0.0.1:9099 docs/dashboard.png [--minutes 15]

For the picture in the documentation, and for looking at a change. It knows what our dashboard uses: rows, stats, lines,
stacks, units and fixed colours.
"""

import argparse
import json
import math
import time
from datetime import datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import requests
from matplotlib.dates import AutoDateLocator, DateFormatter
from matplotlib.ticker import FuncFormatter
from PIL import Image

DASHBOARD = Path(__file__).resolve().parents[2] / "helm/postroom/files/dashboards/overview.json"
COLORS = {"green": "#73bf69", "yellow": "#f2cc0c", "orange": "#ff9830", "red": "#f2495c", "blue": "#5794f2",
          "purple": "#b877d9", "dark-red": "#c4162a", "gray": "#8e8e8e", "light-blue": "#8ab8ff"}
PALETTE = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0", "#37872d", "#fade2a"]
INK, PAPER, PANEL, GRID = "#ccccdc", "#111217", "#181b1f", "#2c3235"


def short(value: float, unit: str) -> str:
    """A number as Grafana would show it, about."""
    if value is None or math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{value:.1%}"
    if unit == "s":
        for size, name in ((3600, "h"), (60, "min"), (1, "s"), (0.001, "ms"), (0.000001, "µs")):
            if value >= size:
                return f"{value / size:.3g} {name}"
        return "0 s"
    scale = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")) if unit == "bytes" else ((1e6, "M"), (1e3, "K"))
    for size, name in scale:
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g}" + ("/s" if unit == "cps" else "")


class Prometheus:
    def __init__(self, url: str, minutes: float, step: int):
        self.url, self.step = url, step
        self.end = time.time()
        self.start = self.end - minutes * 60

    def series(self, expr: str) -> list[tuple[dict, list, list]]:
        for name, value in (("$__rate_interval", "1m"), ("$namespace", ".*"), ("$job", ".*")):
            expr = expr.replace(name, value)
        query = {"query": expr, "start": self.start, "end": self.end, "step": self.step}
        answer = requests.get(f"{self.url}/api/v1/query_range", params=query, timeout=30).json()
        if answer["status"] != "success":
            raise SystemExit(f"{expr}: {answer['error']}")
        rows = answer["data"]["result"]
        return [(r["metric"], [datetime.fromtimestamp(t) for t, _ in r["values"]], [float(v) for _, v in r["values"]])
                for r in rows]


def legend(form: str, labels: dict) -> str:
    for name, value in labels.items():
        form = form.replace("{{" + name + "}}", value)
    return form


def fixed_colors(panel: dict) -> dict:
    found = {}
    for override in panel["fieldConfig"]["overrides"]:
        for prop in override["properties"]:
            if prop["id"] == "color":
                found[override["matcher"]["options"]] = COLORS[prop["value"]["fixedColor"]]
    return found


def draw_stat(ax, panel: dict, prometheus: Prometheus) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    found = prometheus.series(panel["targets"][0]["expr"])
    value = found[0][2][-1] if found else math.nan
    color = COLORS["gray"]
    for step in defaults["thresholds"]["steps"]:
        if not math.isnan(value) and (step["value"] is None or value >= step["value"]):
            color = COLORS[step["color"]]
    ax.set_xticks([])
    ax.set_yticks([])
    decimals = defaults.get("decimals")
    text = f"{value:.0f}" if decimals == 0 and not math.isnan(value) else short(value, defaults["unit"])
    ax.text(0.5, 0.45, text, color=color, fontsize=17, ha="center", va="center", transform=ax.transAxes)


def draw_lines(ax, panel: dict, prometheus: Prometheus) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    found = [(legend(t["legendFormat"], labels), times, values)
             for t in panel["targets"] for labels, times, values in prometheus.series(t["expr"])]
    found.sort(key=lambda item: item[0])
    colors = fixed_colors(panel)
    free = [c for c in PALETTE if c not in colors.values()]
    picked = [colors.get(name) or free[i % len(free)] for i, (name, _, _) in enumerate(found)]
    if defaults["custom"]["stacking"]["mode"] == "normal" and found:
        moments = sorted({t for _, times, _ in found for t in times})
        rows = [[dict(zip(times, values)).get(m, 0) for m in moments] for _, times, values in found]
        rows = [[0 if math.isnan(v) else v for v in row] for row in rows]
        ax.stackplot(moments, rows, colors=picked, alpha=0.35, labels=[name for name, _, _ in found])
        below = [0.0] * len(moments)
        for row, color in zip(rows, picked):
            below = [a + b for a, b in zip(below, row)]
            ax.plot(moments, below, color=color, lw=0.9)
    else:
        for (name, times, values), color in zip(found, picked):
            ax.plot(times, values, color=color, lw=1.1, label=name)
    ax.set_xlim(datetime.fromtimestamp(prometheus.start), datetime.fromtimestamp(prometheus.end))
    ax.set_ylim(bottom=0)
    if found and ax.get_ylim()[1] < 1e-9 or not found:
        ax.set_ylim(top=1)
    ax.xaxis.set_major_locator(AutoDateLocator(minticks=3, maxticks=7))
    ax.xaxis.set_major_formatter(DateFormatter("%H:%M"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v, defaults["unit"])))
    ax.tick_params(colors=INK, labelsize=6.5, length=0)
    ax.grid(color=GRID, lw=0.6)
    if found:
        longest = max(len(name) for name, _, _ in found)
        columns = max(1, min(5, int(ax.get_window_extent().width / (34 + 5 * longest))))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncol=columns, fontsize=6.2, frameon=False,
                  labelcolor=INK, handlelength=1.2, columnspacing=1.2, handletextpad=0.5)
    else:
        ax.text(0.5, 0.5, "No data", color=COLORS["gray"], fontsize=9, ha="center", transform=ax.transAxes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prometheus")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--step", type=int, default=10)
    options = parser.parse_args()
    prometheus = Prometheus(options.prometheus, options.minutes, options.step)
    panels = json.loads(DASHBOARD.read_text())["panels"]
    width = 24
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = plt.figure(figsize=(16, height * 0.33), facecolor=PAPER, dpi=100)
    for panel in panels:
        at = panel["gridPos"]
        left, top = at["x"] / width, 1 - at["y"] / height
        w, h = at["w"] / width, at["h"] / height
        if panel["type"] == "row":
            figure.text(left + 0.004, top - h / 2, panel["title"], color=INK, fontsize=11, weight="bold", va="center")
            continue
        box = figure.add_axes([left + 0.002, top - h + 0.0012, w - 0.004, h - 0.0024], facecolor=PANEL)
        box.set_xticks([])
        box.set_yticks([])
        for spine in box.spines.values():
            spine.set_color(GRID)
        figure.text(left + 0.007, top - 0.0085, panel["title"], color=INK, fontsize=8, va="center")
        if panel["type"] == "stat":
            draw_stat(box, panel, prometheus)
        else:
            inner = figure.add_axes([left + 0.033, top - h * 0.80, w - 0.042, h * 0.66], facecolor=PANEL)
            for spine in inner.spines.values():
                spine.set_visible(False)
            draw_lines(inner, panel, prometheus)
    figure.savefig(options.picture, facecolor=PAPER)
    # A palette is enough for flat colours, and a fraction of the size.
    Image.open(options.picture).convert("RGB").quantize(96).save(options.picture, optimize=True)
    print(options.picture, f"{options.picture.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
