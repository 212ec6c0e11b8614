"""The public contract: what a request may hold and what a job looks like."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

MAX_IMAGES = 64
MAX_SHIFT = 100
MAX_BLOCK_CACHE = 8
MAX_SEED = 2**53 - 1  # what a JSON number carries exactly everywhere

ClassLabel = StrictInt | Annotated[StrictStr, Field(max_length=200)] | None
Fraction = Annotated[StrictFloat | StrictInt, Field(ge=0, le=1, allow_inf_nan=False)]


class GenerateRequest(BaseModel):
    """`POST /generate`. Everything but the class has a default of the model's."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"class_label": "Sneaker", "guidance_scale": 2.0, "steps": 30, "seed": 7}]},
    )

    class_label: ClassLabel | Annotated[list[ClassLabel], Field(min_length=1, max_length=MAX_IMAGES)] = Field(
        description="An index, a name, null for an unconditional picture, or a list of up to 64 of these, one picture each."
    )
    guidance_scale: Annotated[StrictFloat | StrictInt, Field(ge=1, le=20, allow_inf_nan=False)] | None = Field(
        default=None, description="Strength of classifier-free guidance; 1 is none."
    )
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
    shift: Annotated[StrictFloat | StrictInt, Field(gt=0, le=MAX_SHIFT, allow_inf_nan=False)] | None = Field(
        default=None, description="Moves a flow model's times towards noise; 1 leaves them equal."
    )
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


class Progress(BaseModel):
    step: int
    steps: int


class ImageInfo(BaseModel):
    url: str
    seed: int
    sha256: str


class JobView(BaseModel):
    """`GET /jobs/{id}`."""

    id: str
    status: Literal["queued", "running", "succeeded", "failed", "canceling", "canceled"]
    queue_position: int | None = Field(description="Jobs before this one; null once it has left the queue.")
    estimated_wait_s: float | None = Field(
        description="Seconds until it starts, about, from the work before it and the workers' measured pace. Null once it has left the "
        "queue, where no pace is known, and in lists."
    )
    progress: Progress
    request: dict[str, Any] = Field(description="The request with every default resolved.")
    images: list[ImageInfo]
    checkpoint: str
    error: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    links: dict[str, str]


class JobList(BaseModel):
    """`GET /jobs`."""

    jobs: list[JobView]
    next: str | None = Field(description="`cursor` of the next page; null on the last.")


class ModelView(BaseModel):
    """One entry of `GET /models`."""

    id: str
    labels: list[list[str]] = Field(description="Per class, every name it answers to.")
    image_size: int
    image_channels: int
    objective: str
    samplers: list[str]
    spacings: list[str]
    default_spacings: dict[str, str] = Field(description="Per sampler, the spacing of a request that names none.")
    max_steps: int
    defaults: dict[str, Any]
    quality: dict[str, dict[str, Any]]
    metrics: dict[str, Any]
    checkpoint: str
    device: str
    dtype: str
    block_cache: bool = Field(description="Whether requests may ask for a block cache.")
    max_rows: int = Field(description="Rows of one forward of a worker; 0 while the model is not in its memory.")
    rows_per_s: float = Field(description="Rows that a worker does a second with full forwards, as measured at its start; 0 likewise.")


class ModelList(BaseModel):
    models: list[ModelView]


class ProblemView(BaseModel):
    """RFC 9457; `errors` for 422."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    errors: list[dict[str, str]] | None = None
