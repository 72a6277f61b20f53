"""The results for a person: a table and a plot, both made from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...texts import markdown_table

__all__ = ["plot", "table"]

_COLUMNS = (
    ("edit succeeds", "success", 100, "%"),
    ("colour", "edit_colour", 100, "%"),
    ("object", "edit_object", 100, "%"),
    ("background", "edit_background", 100, "%"),
    ("IoU", "iou", 1, ""),
    ("PSNR outside, dB", "outside_psnr", 1, ""),
)


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: one row for each kind of edit and condition, 95 % intervals in brackets."""
    head = ["edit", "condition", "pairs", *(title for title, *_ in _COLUMNS), "IoU over shared noise"]
    lines = []
    for kind, conditions in summary.items():
        for condition, entry in conditions.items():
            cells = [_cell(entry[figure], scale, unit) for _, figure, scale, unit in _COLUMNS]
            gain = entry.get("gain_over_shared_noise")
            cells.append(_cell(gain, 1, "", sign=True) if gain else "")
            lines.append([kind, condition, str(entry["pairs"]), *cells])
    return markdown_table(head, lines, words=len(head)) + "\n"


def _cell(figure: Mapping[str, float], scale: float, unit: str, sign: bool = False) -> str:
    if unit == "%":
        mean, low, high = (f"{scale * figure[k]:.1f}" for k in ("mean", "low", "high"))
        return f"{mean} % [{low}, {high}]"
    form = "+.3f" if sign else ".3f" if figure["mean"] <= 1 else ".1f"
    mean, low, high = (f"{scale * figure[k]:{form}}" for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def plot(summary: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Edit success against structure kept, one panel for each kind of edit; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for conditions in summary.values() for name in conditions))
    colours = {name: plt.get_cmap("tab10")(index % 10) for index, name in enumerate(names)}
    figure, axes = plt.subplots(1, len(summary), figsize=(4.6 * len(summary), 4.2), squeeze=False, sharey=True)
    for axis, (kind, conditions) in zip(axes[0], summary.items(), strict=True):
        for name, entry in conditions.items():
            x, y = entry["iou"], entry["success"]
            axis.errorbar(
                x["mean"],
                100 * y["mean"],
                xerr=[[max(0.0, x["mean"] - x["low"])], [max(0.0, x["high"] - x["mean"])]],
                yerr=[[100 * max(0.0, y["mean"] - y["low"])], [100 * max(0.0, y["high"] - y["mean"])]],
                marker="o" if name in names[:3] else "s",
                markersize=7,
                capsize=2,
                color=colours[name],
                label=name,
                linestyle="none",
            )
        axis.set_title(f"{kind} edits")
        axis.set_xlabel("structure kept: IoU of the silhouettes")
        axis.set_xlim(0, 1)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("edit success, %")
    axes[0][0].set_ylim(0, 103)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    rows = -(-len(labels) // 5)
    figure.tight_layout(rect=(0, 0.04 + 0.05 * rows, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)
