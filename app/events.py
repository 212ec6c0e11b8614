"""What the stream of a job's events tells: the data of each, and the form of all of them."""

import re
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.schemas import MAX_IMAGES, ImageInfo, Progress

EVENT_ID = "^[0-9]{1,19}(-[0-9]{1,19})?$"  # of Last-Event-ID; 0 is the beginning


class QueuedEvent(BaseModel):
    """The job waits: the first event, and once more, with `retry`, after its worker gave it back or died. Then it starts again."""

    retry: bool = False


class ProgressEvent(Progress):
    """A step was made. Step 0 tells that it started."""


class PreviewEvent(BaseModel):
    """What picture `index` looks like on its way, four times each, where `previews=true` asked for it."""

    index: int = Field(ge=0, lt=MAX_IMAGES)
    step: int = Field(ge=0)
    steps: int = Field(ge=1)
    image: str = Field(description="A `data:` URL of a PNG, of half the width.", pattern="^data:image/png;base64,")


class ImageEvent(ImageInfo):
    """Picture `index` is done and can be fetched. After a retry the same index may come again, with the same picture."""

    index: int = Field(ge=0, lt=MAX_IMAGES)
    bytes: int = Field(ge=0)


class DoneEvent(BaseModel):
    """The end of the job and of the stream."""

    status: Literal["succeeded", "failed", "canceled"]
    error: str | None = Field(default=None, description="Why it failed; else absent.")


EVENTS: dict[str, type[BaseModel]] = {
    "queued": QueuedEvent,
    "progress": ProgressEvent,
    "preview": PreviewEvent,
    "image": ImageEvent,
    "done": DoneEvent,
}


def is_event_id(text: str) -> bool:
    return re.fullmatch(EVENT_ID.strip("^$"), text, re.ASCII) is not None


def one_of(name: str) -> dict[str, Any]:
    """The schema of one event of this name: data is JSON in a string."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{EVENTS[name].__name__}"},
    }
    fields = {"id": {"type": "string", "pattern": EVENT_ID}, "event": {"const": name}, "data": data}
    return {"type": "object", "properties": fields, "required": list(fields)}
