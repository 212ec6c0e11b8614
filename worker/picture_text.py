"""What a picture says of itself: the JSON in the iTXt chunk `dit` of its PNG. Standard library only; `dit show` reads it in app/."""

import json
import re
from dataclasses import dataclass, replace
from typing import Self

from worker.protocol import GenerationRequest

KEYWORD = "dit"
VERSION = 1
LONGEST = 1 << 16  # characters; a request of 64 pictures takes some hundreds


@dataclass(frozen=True)
class PictureText:
    """Picture `index` of a request, on the checkpoint of this hash: no id and no time, so that a picture's bytes depend on nothing else."""

    request: GenerationRequest
    index: int
    checkpoint: str

    @property
    def alone(self) -> GenerationRequest:
        """The request of this picture and no other; it makes the same pixels."""
        return replace(self.request, class_labels=(self.request.class_labels[self.index],), seed=self.request.seed + self.index)

    def dump(self) -> str:
        document = {
            "version": VERSION,
            "checkpoint": self.checkpoint,
            "index": self.index,
            "seed": self.alone.seed,
            "class_label": self.alone.class_labels[0],
            "request": json.loads(self.request.dump()),
        }
        return json.dumps(document, sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> Self:
        """ValueError for what no worker wrote; anybody may write such a text, so this says nothing of who made the picture."""
        if len(text) > LONGEST:
            raise ValueError(f"its text has {len(text)} characters, more than any request")
        try:
            document = json.loads(text)
            version, index, checkpoint = document["version"], document["index"], document["checkpoint"]
            request = GenerationRequest.parse(json.dumps(document["request"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"its text is no description of a picture: {ascii(error)[:200]}") from error
        if version != VERSION:
            raise ValueError(f"its text is of version {str(version)[:20]!a}, and version {VERSION} is what this dit reads")
        if type(index) is not int or not 0 <= index < request.num_images:
            raise ValueError(f"its text tells of {request.num_images} pictures, numbered from 0, and its index is {str(index)[:20]!a}")
        if not isinstance(checkpoint, str) or not re.fullmatch("[0-9a-f]{64}", checkpoint):
            raise ValueError("its text names no checkpoint by 64 hexadecimal digits")
        found = cls(request, index, checkpoint)
        told = {**document, "request": json.loads(request.dump())}  # one of an older dit has fewer fields
        if told != json.loads(found.dump()):
            raise ValueError("its text contradicts itself: seed or class are not those of its request, or there is more in it")
        return found
