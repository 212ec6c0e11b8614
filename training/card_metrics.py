"""The measures of a checkpoint as tables, for the terminal and for the model card. What was not measured is left out."""

import json
from typing import Any

from training.inception_measures import INCEPTION, NAMES

GRID, TUNING_PLOT, EVALUATION_PLOT, NEIGHBOURS_PLOT = "grid.png", "tuning.png", "evaluation.png", "neighbours.png"
MISSING = "not recorded"
_HEADINGS = ("measure", "pictures", "VAE's reconstructions", "floor: real images")


def share(metrics: dict[str, Any], name: str) -> str:
    return f"{100 * metrics[name]:.1f} %" if name in metrics else MISSING


def number(metrics: dict[str, Any], name: str, digits: int = 3) -> str:
    return f"{metrics[name]:.{digits}f}" if name in metrics else MISSING


def measures(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was measured in the classifier's features, and its value for the pictures, for the reconstructions and for real images."""
    rows = [
        ("class consistency", share, "class_consistency", "class_consistency_reconstructions", "classifier_accuracy"),
        ("Fréchet distance", number, *_three("frechet_distance")),
        ("spatial Fréchet distance", number, *_three("spatial_frechet_distance")),
        ("kernel distance × 1000", _thousandths, *_three("kernel_distance")),
        ("precision", share, *_three("precision")),
        ("recall", share, *_three("recall")),
        ("classifier score", number, *_three("classifier_score")),
    ]
    found = [
        (what, *(told(metrics, name) if name in metrics else "–" for name in names)) for what, told, *names in rows if names[0] in metrics
    ]
    return found + (
        [("nearer to a training image than 99 % of the test images", share(metrics, "near_copies"), "1.0 %", "–")]
        if "near_copies" in metrics
        else []
    )


def _three(name: str) -> tuple[str, str, str]:
    return name, f"{name}_reconstructions", f"{name}_train"


def _thousandths(metrics: dict[str, Any], name: str) -> str:
    return f"{1000 * metrics[name]:.3f}"


def inception_measures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured in Inception's features, under the names of the literature."""
    titles = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "kid": "KID × 1000", "inception_precision": "precision"}
    titles |= {"inception_recall": "recall"}
    digits = {"inception_score": 1, "inception_precision": 3, "inception_recall": 3}
    found = [(name, metrics[name] * (1000 if name == "kid" else 1)) for name in NAMES.values() if name in metrics]
    return [(titles[name], f"{value:.{digits.get(name, 2)}f}") for name, value in found]


def table(metrics: dict[str, Any]) -> list[str]:
    """The lines to print: each measure beside its floor, and the paper's, if there are any."""
    lines = []
    if local := measures(metrics):
        rows = [_HEADINGS, *local]
        wide = [max(len(row[i]) for row in rows) for i in range(4)]
        lines += [settings_line(metrics), *("  ".join(f"{cell:<{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows)]
        lines.append(f"against {metrics['test_images']} test images; the floor is of {metrics['train_images']} training images")
    if INCEPTION in metrics:
        numbers = ", ".join(f"{title} {value}" for title, value in inception_measures(metrics))
        lines += [protocol_line(metrics[INCEPTION]), numbers]
    return lines


def settings_line(metrics: dict[str, Any]) -> str:
    """How the pictures of `measures` were drawn, in one line."""
    return f"{metrics.get('samples', '?')} pictures: {setting_in_words(metrics)}, {metrics.get('dtype', '?')}"


def protocol_line(told: dict[str, Any]) -> str:
    """How the numbers of `inception_measures` were taken, in one line."""
    drawn = f"{setting_in_words(told)}, {told['dtype']}, {told['labels']} labels" if "steps" in told else str(told.get("pictures"))
    references = f" and {told['reference_pictures']} pictures in it" if told["reference_pictures"] else ""
    return f"{told['samples']} pictures ({drawn}) against {told['reference']}{references}, Inception of {told['weights']}"


def setting_in_words(entry: dict[str, Any]) -> str:
    """A setting as it stands in `checkpoint.json`; what is no choice (guidance at all times, no cache) is left out."""
    low, high = entry.get("guidance_interval", (0, 1))
    scale = f"{entry['guidance_scale']:g}" if "guidance_scale" in entry else "?"
    parts = [
        f"{entry.get('sampler', '?')}",
        f"{entry.get('steps', '?')} steps",
        f"guidance {scale}" + (f" in t/T {low:g}–{high:g}" if (low, high) != (0, 1) else ""),
        *(["on the first three channels"] if entry.get("guidance_channels") == "first-three" else []),
        *([f"{entry['spacing']} spacing"] if "spacing" in entry else []),
        *([f"block cache {entry['block_cache']}"] if "block_cache" in entry else []),
    ]
    return ", ".join(parts)


def metrics_section(metrics: dict[str, Any]) -> str:
    """The section of a model card."""
    parts = [*([_local(metrics)] if measures(metrics) else []), *([_inception(metrics)] if INCEPTION in metrics else [])]
    if not parts:
        return "## Metrics\n\nNot evaluated yet: `dit evaluate` measures this checkpoint and rewrites this card."
    return "\n\n".join([*parts, _as_json(metrics)])


def _as_json(metrics: dict[str, Any]) -> str:
    """A line to each measure, folded away: a list may have a thousand classes."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in sorted(metrics.items()))
    return f"<details><summary>All of it as JSON</summary>\n\n```json\n{{\n{lines}\n}}\n```\n\n</details>"


def _local(metrics: dict[str, Any]) -> str:
    rows = [_HEADINGS, ("---",) * 4, *measures(metrics)]
    tests, labels = metrics.get("test_images", "the"), metrics.get("labels", "balanced")
    return (
        f"## Metrics\n\n{_command(metrics)}"
        f"{settings_line(metrics)}; {labels} labels, seeds from 0. All of it is compared with {tests} test images.\n\n"
        + "\n".join(f"| {' | '.join(row)} |" for row in rows)
        + "\n\nJudged by a small convnet trained on the same training split: these numbers live in that convnet's features and are no FIDs "
        f"of the literature. The floor is {metrics.get('train_images', 'as many')} training images, a fixed random subset, and for the "
        "class consistency the test images; the pictures' own floor is their VAE's reconstructions of the test images.\n\n"
        f"{_plots(metrics)}{_took(metrics)}"
    )


def _plots(metrics: dict[str, Any]) -> str:
    if "near_copies" not in metrics:
        return ""
    return (
        f"![precision, recall and class consistency]({EVALUATION_PLOT})\n\n"
        f"![pictures beside the training images nearest to them]({NEIGHBOURS_PLOT})\n\n"
        "Of all pictures the six nearest to a training image, and six at random; beside each its nearest training images, and how far they "
        "are in grey levels (root mean square). *Nearer than 99 % of the test images* counts the pictures that are nearer to a training "
        "image than all but 1 % of the reconstructed test images, which no model was trained on: well above 1 % would be copies.\n\n"
    )


def _inception(metrics: dict[str, Any]) -> str:
    told, rows = metrics[INCEPTION], inception_measures(metrics)
    titles, values = (" | ".join(column) for column in zip(*rows, strict=True))
    return (
        f"## FID and its kin\n\n{_command(told)}{protocol_line(told)}; pixels rounded to the {told['rounding']} level.\n\n"
        f"| {titles} |\n|{'---|' * len(rows)}\n| {values} |\n\n{_took(told)}"
    )


def _command(told: dict[str, Any]) -> str:
    return f"```sh\n{told['command']}\n```\n\n" if told.get("command") else ""


def _took(told: dict[str, Any]) -> str:
    hardware, commit = told.get("hardware", "unrecorded hardware"), told.get("commit") or "unknown"
    return f"Took {told.get('minutes', '?')} minutes on {hardware}, source at commit `{commit}`."
