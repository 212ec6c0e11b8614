"""A request and the record of a model → a request with nothing left to a default; or 422 naming the field and what is allowed."""

import difflib
import secrets
from typing import Any

from app.problems import Problem, field_error, invalid
from app.schemas import MAX_SEED, GenerateRequest
from worker.protocol import ALL_CHANNELS, GenerationRequest, ModelRecord

_NAMES_SHOWN = 20


def choose_model(name: str | None, records: list[ModelRecord]) -> ModelRecord:
    """The named model, or the only one served. 503 while none is."""
    if not records:
        raise Problem(503, "no worker serves a model at the moment; try again shortly", kind="no-worker", retry_after_s=5)
    found = [record for record in records if record.id == name] if name is not None else records
    if len(found) == 1:
        return found[0]
    raise invalid([field_error("model", name, f"must be one of: {', '.join(record.id for record in records)}")])


def resolve(body: GenerateRequest, record: ModelRecord) -> GenerationRequest:
    """Raises a 422 problem that lists every field that is wrong."""
    errors: list[dict[str, str]] = []
    labels = _labels(body, record, errors)
    quality = _quality(body, record, errors)
    settings = {**record.defaults, **quality}
    steps = body.steps if body.steps is not None else int(settings["steps"])
    sampler = body.sampler if body.sampler is not None else str(settings["sampler"])
    scale = float(body.guidance_scale if body.guidance_scale is not None else settings["guidance_scale"])
    if sampler not in record.samplers:
        errors.append(field_error("sampler", sampler, f"model {record.id} ({record.objective}) can do: {', '.join(record.samplers)}"))
    if steps > record.max_steps:
        errors.append(field_error("steps", steps, f"model {record.id} takes 1 … {record.max_steps}"))
    # A spacing was measured with its sampler; with another one it would mean other times.
    measured_spacing = quality.get("spacing") if sampler == settings["sampler"] else None
    spacing, eta, shift = _times(body, record, sampler, measured_spacing, errors)
    low, high = _guidance_interval(body, record, quality, scale)
    if low > high:
        errors.append(field_error("guidance_interval", [low, high], "must be [low, high] with low ≤ high"))
    last = MAX_SEED - len(labels) + 1
    seed = body.seed if body.seed is not None else secrets.randbelow(2**32)
    if seed > last:
        errors.append(
            field_error("seed", seed, f"must be at most {last} for {len(labels)} images, which use seed … seed + {len(labels) - 1}")
        )
    block_cache = body.block_cache or int(settings.get("block_cache", 1))
    if block_cache > 1 and not record.block_cache:
        errors.append(field_error("block_cache", block_cache, f"the workers of model {record.id} have none; DIT_BLOCK_CACHE turns it on"))
    if errors:
        raise invalid(errors)
    return GenerationRequest(
        model=record.id,
        class_labels=tuple(labels),
        guidance_scale=scale,
        guidance_interval=(low, high),
        steps=steps,
        sampler=sampler,
        seed=seed,
        spacing=spacing,
        eta=eta,
        shift=shift,
        guidance_channels=body.guidance_channels or ALL_CHANNELS,
        guidance_rescale=float(body.guidance_rescale or 0),
        block_cache=block_cache,
    )


def _guidance_interval(body: GenerateRequest, record: ModelRecord, quality: dict[str, Any], scale: float) -> tuple[float, float]:
    """The request's own; else the one measured together with the scale: of the quality if that names a scale, else of the defaults.

    Another scale is for all times. Who asks for more or less guidance than was measured means all of it, and an interval that suits one
    scale need not suit another.
    """
    measured = quality if "guidance_scale" in quality else {**record.defaults, **quality}
    tuned = measured.get("guidance_interval") if scale == measured["guidance_scale"] else None
    low, high = body.guidance_interval or tuned or (0.0, 1.0)
    return float(low), float(high)


def _times(
    body: GenerateRequest, record: ModelRecord, sampler: str, measured: str | None, errors: list[dict[str, str]]
) -> tuple[str | None, float, float]:
    """Spacing, eta and shift: what belongs to diffusion, to `ddim` and to flow. `measured` is the spacing of the quality asked for."""
    spacing = body.spacing or measured or record.default_spacings.get(sampler)
    eta, shift = float(body.eta or 0), float(body.shift or 1)
    if body.spacing is not None and body.spacing not in record.spacings:
        known = ", ".join(record.spacings) or ("none; shift moves its times" if record.objective == "flow" else "none told")
        errors.append(field_error("spacing", body.spacing, f"model {record.id} ({record.objective}) has: {known}"))
    if eta and sampler != "ddim":
        errors.append(field_error("eta", eta, f"goes with the sampler ddim, not with {sampler}"))
    if shift != 1 and record.objective != "flow":
        known = ", ".join(record.spacings) or "none told"
        errors.append(field_error("shift", shift, f"is for flow models; model {record.id} has spacing: {known}"))
    return spacing, eta, shift


def _quality(body: GenerateRequest, record: ModelRecord, errors: list[dict[str, str]]) -> dict[str, Any]:
    if body.quality is None:
        return {}
    if body.steps is not None:
        errors.append(field_error("quality", body.quality, "quality sets the steps; give one of the two"))
    if body.quality not in record.quality:
        known = ", ".join(record.quality) or "none, since none was measured for it"
        errors.append(field_error("quality", body.quality, f"model {record.id} has: {known}"))
    return record.quality.get(body.quality, {})


def _labels(body: GenerateRequest, record: ModelRecord, errors: list[dict[str, str]]) -> list[int | None]:
    given = body.class_label if isinstance(body.class_label, list) else [body.class_label] * (body.num_images or 1)
    if isinstance(body.class_label, list) and body.num_images is not None:
        errors.append(field_error("num_images", body.num_images, "goes with one class_label; a list makes one picture each"))
    # Once a request: ImageNet has some 1,800 names, and a list may ask for 64.
    classes = _classes_by_name(record) if any(isinstance(entry, str) for entry in given) else {}
    answers = {entry: _label(entry, classes, record, errors) for entry in dict.fromkeys(given)}
    return [answers[entry] for entry in given]


def _classes_by_name(record: ModelRecord) -> dict[str, list[int]]:
    classes: dict[str, list[int]] = {}
    for index, names in enumerate(record.labels):
        for name in {_normalised(name) for name in names}:
            classes.setdefault(name, []).append(index)
    return classes


def _normalised(name: str) -> str:
    return " ".join(name.split()).casefold()


def _label(given: int | str | None, classes: dict[str, list[int]], record: ModelRecord, errors: list[dict[str, str]]) -> int | None:
    """A class index; case and spacing of names do not matter."""
    if given is None or (isinstance(given, int) and 0 <= given < len(record.labels)):
        return given
    found = classes.get(_normalised(given), []) if isinstance(given, str) else []
    if len(found) == 1:
        return found[0]
    if found:  # ImageNet has two cranes
        allowed = f"is the name of several classes; give an index: {', '.join(map(str, found))}"
    else:
        allowed = f"must be an index 0 … {len(record.labels) - 1}, null or a name: {_some_names(record)}{_suggestion(given, record)}"
    errors.append(field_error("class_label", given, allowed))
    return None


def _some_names(record: ModelRecord) -> str:
    names = [group[0] for group in record.labels]
    more = f" … ({len(names)} in all, see /models/{record.id})" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _suggestion(given: int | str, record: ModelRecord) -> str:
    if isinstance(given, int):
        return ""
    names = {_normalised(name): name for group in record.labels for name in group}
    close = difflib.get_close_matches(_normalised(given), names, n=3)
    return f" (did you mean {', '.join(names[name] for name in close)}?)" if close else ""
