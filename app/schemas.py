"""The public contract: what a request may hold and what a job looks like."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, WithJsonSchema

MAX_IMAGES = 64
MAX_SHIFT = 100
MAX_BLOCK_CACHE = 8
MAX_SEED = 2**53 - 1  # what a JSON number carries exactly everywhere

ClassLabel = Annotated[StrictInt, Field(json_schema_extra={"minimum": 0})] | Annotated[StrictStr, Field(max_length=200)] | None
# Their schemas are said in full, since pydantic's of a union has no words for bounds that JSON Schema knows.
Fraction = Annotated[
    StrictFloat | StrictInt, Field(ge=0, le=1, allow_inf_nan=False), WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1})
]
GuidanceScale = Annotated[
    StrictFloat | StrictInt, Field(ge=1, le=20, allow_inf_nan=False), WithJsonSchema({"type": "number", "minimum": 1, "maximum": 20})
]
Shift = Annotated[
    StrictFloat | StrictInt,
    Field(gt=0, le=MAX_SHIFT, allow_inf_nan=False),
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SHIFT}),
]


Status = Literal["queued", "running", "succeeded", "failed", "canceling", "canceled"]
Address = Annotated[str, Field(json_schema_extra={"format": "uri-reference"})]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="Of the PNG.")]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class GenerateRequest(BaseModel):
    """`POST /generate`. Everything but the class has a default of the model's."""

    model_config = ConfigDict(extra="forbid")

    class_label: ClassLabel | Annotated[list[ClassLabel], Field(min_length=1, max_length=MAX_IMAGES)] = Field(
        description="An index, a name, null for an unconditional picture, or a list of up to 64 of these, one picture each."
    )
    guidance_scale: GuidanceScale | None = Field(default=None, description="Strength of classifier-free guidance; 1 is none.")
    guidance_interval: tuple[Fraction, Fraction] | None = Field(
        default=None, description="Guide only while t/T is in [low, high]; 0 is clean, 1 is noise."
    )
    steps: Annotated[StrictInt, Field(ge=1, le=1000)] | None = Field(default=None, description="Sampling steps.")
    quality: Literal["draft", "standard", "best"] | None = Field(
        default=None, description="A measured setting of the model, in place of steps."
    )
    sampler: Annotated[StrictStr, Field(max_length=50)] | None = Field(default=None, description="One of the model's samplers.")
    spacing: Annotated[StrictStr, Field(max_length=50)] | None = Field(
        default=None, description="Where a diffusion model is evaluated: one of the model's spacings."
    )
    eta: Fraction | None = Field(default=None, description="Noise that the sampler ddim adds: 0 none, 1 as much as ddpm.")
    shift: Shift | None = Field(default=None, description="Moves a flow model's times towards noise; 1 leaves them equal.")
    guidance_channels: Literal["all", "first-three"] | None = Field(
        default=None, description="Latent channels that guidance moves; the official DiT code moves the first three."
    )
    guidance_rescale: Fraction | None = Field(
        default=None, description="How far the guided output is shrunk back to the conditional one's spread."
    )
    block_cache: Annotated[StrictInt, Field(ge=1, le=MAX_BLOCK_CACHE)] | None = Field(
        default=None, description="Run the middle blocks at every n-th evaluation only, if the worker has a block cache; 1 is always."
    )
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None, description="Picture i uses seed + i; drawn when absent."
    )
    num_images: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        default=None, description="Pictures of one class; 1 when absent."
    )
    model: Annotated[StrictStr, Field(max_length=100)] | None = Field(
        default=None, description="A model's id; needed when several are served."
    )


class ResolvedRequest(BaseModel):
    """A request with every default resolved, in the words of `POST /generate`: it can be posted again as it is."""

    class_label: int | list[int | None] | None = Field(description="Class indices; null is unconditional.")
    num_images: int | None = Field(default=None, description="Absent where `class_label` is a list.")
    guidance_scale: float
    guidance_interval: tuple[float, float]
    guidance_channels: str
    guidance_rescale: float
    block_cache: int | None = Field(default=None, description="Absent where there is none.")
    steps: int
    sampler: str
    spacing: str | None = Field(default=None, description="Of a diffusion model, as `eta`; else absent.")
    eta: float | None = None
    shift: float | None = Field(default=None, description="Of a flow model; else absent.")
    seed: int
    model: str


class Progress(BaseModel):
    """Sampling steps done, averaged over the pictures of the job."""

    step: int = Field(ge=0)
    steps: int = Field(ge=1)


class ImageInfo(BaseModel):
    """A finished picture."""

    url: Address
    seed: int
    sha256: Sha256


class Links(BaseModel):
    """Where the rest of the job is."""

    self: Address
    events: Address
    grid: Address = Field(description="All pictures as one, once it has succeeded.")


class JobView(BaseModel):
    """`GET /jobs/{id}`."""

    id: str
    status: Status
    queue_position: int | None = Field(description="Jobs before this one; null once it has left the queue.")
    estimated_wait_s: float | None = Field(
        description="Seconds until it starts, about, from the work before it and the workers' measured pace. Null once it has left the "
        "queue, where no pace is known, and in lists."
    )
    progress: Progress
    request: ResolvedRequest
    images: list[ImageInfo] = Field(description="Once it has succeeded; its events tell each before that.")
    checkpoint: str = Field(description="Hash of the checkpoint that makes its pictures.")
    error: str | None = Field(description="Why it failed.")
    created_at: Time
    started_at: Time | None
    finished_at: Time | None
    links: Links


class JobList(BaseModel):
    """`GET /jobs`."""

    jobs: list[JobView]
    next: str | None = Field(description="`cursor` of the next page; null on the last.")


class ModelView(BaseModel):
    """One entry of `GET /models`."""

    id: str
    labels: list[list[str]] = Field(description="Per class, every name it answers to.")
    image_size: int = Field(description="Pixels of a side.")
    image_channels: int = Field(description="1 is grey, 3 is colour.")
    objective: str = Field(description="diffusion or flow.")
    samplers: list[str]
    spacings: list[str] = Field(description="Of a diffusion model.")
    default_spacings: dict[str, str] = Field(description="Per sampler, the spacing of a request that names none.")
    max_steps: int
    defaults: dict[str, Any] = Field(description="Of the fields of a request that are not given.")
    quality: dict[str, dict[str, Any]] = Field(description="Per quality, the fields that it stands for, and what was measured.")
    metrics: dict[str, Any] = Field(description="How good it was found to be, as its model card tells.")
    checkpoint: str = Field(description="Hash of its weights, as jobs and pictures name it.")
    device: str = Field(description="Of a worker that serves it.")
    dtype: str = Field(description="In which that worker computes.")
    block_cache: bool = Field(description="Whether requests may ask for a block cache.")
    max_rows: int = Field(description="Rows of one forward of a worker; 0 while the model is not in its memory.")
    rows_per_s: float = Field(description="Rows that a worker does a second with full forwards, as measured at its start; 0 likewise.")


class QueueView(BaseModel):
    """One entry of `GET /queues`."""

    model: str
    state: Literal["open", "paused", "draining", "suspended"] = Field(
        description="paused: workers take no job of it; draining: no job is accepted; suspended: by `rq suspend`."
    )
    waiting: int = Field(description="Jobs that wait.")
    running: int = Field(description="Jobs that run.")
    workers: int = Field(description="Workers of it that were heard of within 15 s.")
    troubled: int = Field(description="Those of them that take no job since they cannot store pictures; their logs say why.")
    served: bool = Field(description="Whether a worker tells of the model; else no job is accepted.")
    oldest_s: float = Field(description="Age of the next job to run; 0 if none waits.")


class QueueList(BaseModel):
    """`GET /queues`."""

    queues: list[QueueView]


class ModelList(BaseModel):
    """`GET /models`."""

    models: list[ModelView]


class Health(BaseModel):
    """`GET /healthz`."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """`GET /readyz`."""

    status: Literal["ready"]
    models: list[str] = Field(min_length=1, description="Those of which a picture could be made now.")


class FieldProblem(BaseModel):
    """One wrong field of a request."""

    field: str = Field(description="Its name; `body` for the body as a whole.")
    detail: str = Field(description="What is allowed there, and what it was.")


class ProblemView(BaseModel):
    """RFC 9457. `type` and `status` are for programs, `detail` is for people."""

    type: str = Field(description="`urn:dit:problem:<kind>`", pattern="^urn:dit:problem:[a-z-]+$")
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    instance: Address = Field(description="The path of the call.")
    errors: list[FieldProblem] | None = Field(default=None, description="Of a 422.")
