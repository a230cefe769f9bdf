#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the plots of a run of attention_bench: share of the machine's limit by shape, time against kv_len for MHA, GQA
and MQA, and what the threads bring. Needs nothing but Python.

    attention_bench --benchmark_out=run.json --benchmark_out_format=json
    bench/plots.py run.json docs/plots
"""
import json
import math
import os
import re
import sys

INK, MUTED, GRID = "#24292f", "#57606a", "#d0d7de"
COLOURS = ["#0969da", "#bc4c00", "#1a7f37", "#8250df"]
NAME = re.compile(
    r"(?P<family>\w+)/tiled/(?P<dtype>\w+)/(?P<where>\w+)/b(?P<b>\d+)q(?P<q>\d+)t(?P<t>\d+)h(?P<h>\d+)g(?P<g>\d+)"
    r"d(?P<d>\d+)(?:e(?P<e>\d+))?/(?:causal|window(?P<window>\d+))/t(?P<threads>\d+)/")


def read(path):
    """The tiled rows of a run, each with the numbers in its name."""
    rows = []
    with open(path) as f:
        for entry in json.load(f)["benchmarks"]:
            found = NAME.match(entry["name"])
            if found:
                numbers = {k: int(v) if v and v.isdigit() else v for k, v in found.groupdict().items()}
                rows.append({**entry, **numbers})
    return rows


class Figure:
    """An SVG document under construction."""

    def __init__(self, width, height, title, subtitle):
        self.width, self.height, self.parts = width, height, []
        self.text(20, 28, title, size=16, weight="600")
        self.text(20, 48, subtitle, colour=MUTED)

    def text(self, x, y, words, size=12, colour=INK, anchor="start", weight="400"):
        words = str(words).replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
                          f'font-weight="{weight}">{words}</text>')

    def line(self, x1, y1, x2, y2, colour=GRID, width=1.0, dash=""):
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
                          f'stroke-width="{width}"{dash}/>')

    def bar(self, x, y, width, height, colour):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" rx="2" '
                          f'fill="{colour}"/>')

    def curve(self, points, colour):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in points:
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')

    def save(self, path):
        with open(path, "w") as f:
            f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                    f'width="{self.width}" height="{self.height}" font-family="system-ui, sans-serif">\n'
                    f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(self.parts) + "\n</svg>\n")


def label(row):
    dims = f"{row['d']}/{row['e']}" if row["e"] else row["d"]
    heads = f"{row['h']} heads on {row['g']}"
    window = f", window {row['window']}" if row["window"] else ""
    batch = f"{row['b']} x " if row["b"] > 1 else ""
    where = row["where"].replace("cache_in_", "cache, ").replace("_", " ")
    return f"{row['dtype']}, {batch}{row['q']} over {row['t']}, {heads}, dim {dims}{window}, {where}"


def horizontal_bars(path, title, subtitle, rows, share, threads):
    """Bars of a share of a limit, one a shape, a colour a number of threads."""
    shapes = list(dict.fromkeys(label(r) for r in rows))
    left, top, step, span = 400, 70, 15 * len(threads) + 9, 420
    figure = Figure(left + span + 60, top + step * len(shapes) + 40, title, subtitle)
    bottom = top + step * len(shapes)
    for percent in range(0, 101, 20):
        x = left + span * percent / 100
        figure.line(x, top - 6, x, bottom)
        figure.text(x, bottom + 16, f"{percent} %", colour=MUTED, anchor="middle", size=11)
    for i, shape in enumerate(shapes):
        y = top + i * step
        figure.text(left - 8, y + step / 2, shape, anchor="end", size=11)
        for j, count in enumerate(threads):
            for row in rows:
                if label(row) == shape and row["threads"] == count:
                    value = row[share]
                    figure.bar(left, y + 15 * j, span * min(value, 1.1), 13, COLOURS[j])
                    figure.text(left + span * min(value, 1.1) + 4, y + 15 * j + 11, f"{100 * value:.0f}", size=10)
    legend(figure, left, bottom + 32, [f"{n} thread{'s' if n > 1 else ''}" for n in threads])
    figure.save(path)


def legend(figure, x, y, names):
    for i, name in enumerate(names):
        figure.bar(x + 110 * i, y - 9, 10, 10, COLOURS[i])
        figure.text(x + 110 * i + 16, y, name, size=11)


def time_against_kv_len(path, rows):
    """Decode of one query, log against log."""
    groups = [(32, "MHA, 32 on 32"), (8, "GQA, 32 on 8"), (1, "MQA, 32 on 1")]
    chosen = [r for r in rows if r["family"] == "decode" and r["dtype"] == "f32" and r["where"] == "cache"
              and r["b"] == 1 and r["h"] == 32 and r["threads"] == 1 and r["t"] <= 32768]
    left, top, width, height = 70, 70, 520, 300
    figure = Figure(left + width + 40, top + height + 70, "Decode: time against keys",
                    "float, one query, 32 heads of dim 128, from a kv_cache, 1 thread")
    lengths = sorted({r["t"] for r in chosen})
    seconds = [r["seconds"] for r in chosen]
    low, high = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))

    def place(t, s):
        x = math.log2(t / lengths[0]) / math.log2(lengths[-1] / lengths[0])
        return left + width * x, top + height * (1 - (math.log10(s) - low) / (high - low))

    for power in range(low, high + 1):
        _, y = place(lengths[0], 10.0 ** power)
        figure.line(left, y, left + width, y)
        name = f"{10 ** (power + 6):.0f} us" if power < -3 else f"{10 ** (power + 3):.0f} ms"
        figure.text(left - 8, y + 4, name, anchor="end", colour=MUTED, size=11)
    for t in lengths:
        x, _ = place(t, 10.0 ** low)
        figure.text(x, top + height + 18, t, anchor="middle", colour=MUTED, size=11)
    for i, (kv_heads, _) in enumerate(groups):
        line = sorted((r["t"], r["seconds"]) for r in chosen if r["g"] == kv_heads)
        figure.curve([place(t, s) for t, s in line], COLOURS[i])
    figure.text(left + width / 2, top + height + 36, "keys", anchor="middle", colour=MUTED, size=11)
    legend(figure, left, top + height + 56, [name for _, name in groups])
    figure.save(path)


def main(source, target):
    rows = read(source)
    threads = sorted({r["threads"] for r in rows})
    os.makedirs(target, exist_ok=True)
    products = [r for r in rows if r["family"] in ("prefill", "append", "group", "dim", "window") and r["q"] > 1]
    horizontal_bars(os.path.join(target, "products.svg"), "Prefill and append: share of the multiply-add peak",
                    "peak of as many threads, measured in the same rounds; bfloat16: of VDPBF16PS", products, "of_peak",
                    threads)
    reads = [r for r in rows if r["q"] == 1 and r["family"] == "decode" and r["b"] * r["t"] * r["g"] >= 1 << 18]
    horizontal_bars(os.path.join(target, "decode.svg"), "Decode: share of the best read bandwidth",
                    "of as many threads, measured in the same rounds", reads, "of_read", threads)
    time_against_kv_len(os.path.join(target, "kv_len.svg"), rows)
    if len(threads) > 1:
        speedups(os.path.join(target, "threads.svg"), rows, threads)


def speedups(path, rows, threads):
    """How much faster all threads are than one, beside what their limits gained."""
    most = threads[-1]
    one = {label(r): r for r in rows if r["threads"] == 1}
    pairs = [(one[label(r)], r) for r in rows if r["threads"] == most and label(r) in one]
    chosen = [(a, b) for a, b in pairs if a["seconds"] > 1e-3 and a["family"] in ("prefill", "append", "decode")]
    left, top, step, span = 400, 70, 18, 420
    bottom = top + step * len(chosen)
    figure = Figure(left + span + 90, bottom + 50, f"{most} threads against 1",
                    "time of 1 thread over time of all; the tick: what multiply-adds (decode: reads) gain")
    for i in range(most + 1):
        x = left + span * i / most
        figure.line(x, top - 6, x, bottom)
        figure.text(x, bottom + 16, f"{i}x", colour=MUTED, anchor="middle", size=11)
    for i, (a, b) in enumerate(chosen):
        y, limit = top + i * step, "read" if a["q"] == 1 else "peak"
        gain, possible = a["seconds"] / b["seconds"], b[limit] / a[limit]
        figure.text(left - 8, y + 10, label(a), anchor="end", size=11)
        figure.bar(left, y, span * min(gain / most, 1.1), 12, COLOURS[0])
        figure.text(left + span * min(gain / most, 1.1) + 6, y + 10, f"{gain:.2f}", size=10)
        figure.line(left + span * possible / most, y - 2, left + span * possible / most, y + 14, COLOURS[1], 2)
    figure.save(path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
