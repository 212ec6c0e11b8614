"""What a setting's pictures are worth, measured once: every result is a line of a log, from which a second run takes it."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.classifier import Classifier
from training.draw import Drawer, Setting, asked_labels
from training.judgement import joined
from training.metrics import Gaussian, class_consistency, fit_gaussian, gaussian_distance

_ANSWERS = ("evaluations", "frechet_distance", "class_consistency", "seconds")  # of a line; the rest of it is the question


@dataclass(frozen=True)
class Measured:
    """A setting and what its pictures were worth."""

    setting: Setting
    samples: int
    evaluations: int
    frechet_distance: float
    class_consistency: float
    seconds: float = field(compare=False)  # that it took to draw and judge them

    def entry(self) -> dict[str, Any]:
        """As it stands in `checkpoint.json`."""
        worth = {"frechet_distance": self.frechet_distance, "class_consistency": self.class_consistency}
        return {**self.setting.entry(), "samples": self.samples, "evaluations": self.evaluations, **worth}


class MeasureLog:
    """JSON lines. A line counts only for the same `subject`: checkpoint, judge and data type."""

    def __init__(self, path: Path, subject: dict[str, Any]) -> None:
        self.path, self.subject = path, subject
        self._results = {self._question(line): line for line in self._read()}

    def _read(self) -> list[dict[str, Any]]:
        """Every whole line; one that a kill cut off is left aside."""
        lines = []
        for text in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines

    def _question(self, line: dict[str, Any]) -> str:
        return json.dumps({name: value for name, value in line.items() if name not in _ANSWERS}, sort_keys=True)

    def find(self, setting: Setting, samples: int) -> Measured | None:
        line = self._results.get(self._question({**self.subject, **setting.entry(), "samples": samples}))
        return Measured(setting, samples, **{name: line[name] for name in _ANSWERS}) if line else None

    def add(self, measured: Measured) -> None:
        """On the disk before this returns."""
        line = {**self.subject, **measured.entry(), "seconds": round(measured.seconds, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a") as file:
            file.write(("\n" if torn else "") + json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._results[self._question(line)] = line


class Meter:
    """Draws, judges and logs. `reference` is the real images' Gaussian in the classifier's features."""

    def __init__(self, drawer: Drawer, classifier: Classifier, reference: Gaussian, log: MeasureLog, show: Callable[[str], None]) -> None:
        self.drawer, self.classifier, self.reference, self.log, self.show = drawer, classifier, reference, log, show

    def measure(self, title: str, settings: list[Setting], samples: int) -> list[Measured]:
        """In the same order; says what is ahead, and how far it is."""
        logged = [self.log.find(setting, samples) for setting in settings]
        ahead = sum(self.drawer.forwards(s, samples) for s, found in zip(settings, logged, strict=True) if found is None)
        from_log = f", {sum(1 for found in logged if found)} of them in the log" if any(logged) else ""
        self.show(
            f"{title}: {len(settings)} settings, {samples} pictures each{from_log}; {ahead} forwards of {self.drawer.rows} rows ahead"
        )
        with tqdm(total=ahead, desc=title, unit="forward", dynamic_ncols=True, disable=not ahead) as bar:
            return [found or self._measure(s, samples, bar.update) for s, found in zip(settings, logged, strict=True)]

    def _measure(self, setting: Setting, samples: int, advance: Callable[[int], Any]) -> Measured:
        began = time.perf_counter()
        judged, asked = [], asked_labels("balanced", samples, len(self.drawer.checkpoint.labels))
        for labels, _, images in self.drawer.pictures(setting, asked):
            judged.append(self.classifier.judge(images.permute(0, 3, 1, 2)))
            advance(self.drawer.forwards(setting, len(labels)))
        all_judged = joined(judged)
        measured = Measured(
            setting,
            samples,
            setting.evaluations(self.drawer.checkpoint.config),
            gaussian_distance(fit_gaussian(all_judged.features), self.reference),
            class_consistency(all_judged.predicted, asked),
            time.perf_counter() - began,
        )
        self.log.add(measured)
        return measured
