# Two images: `docker build --target api .` has no torch; `docker build --target worker .` has CUDA's, which runs on a CPU too.
# Packages come before our source, so that a change of source installs nothing anew.
FROM python:3.11.14-slim-bookworm AS python
ENV PATH=/opt/dit/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/dit
# Folders that are written belong to who writes them; a new volume takes over the owner and what is in it.
RUN useradd --uid 10001 --user-group --create-home dit \
 && install --directory --owner dit --group dit /data /checkpoints /keys /pictures
WORKDIR /src
# The packages of pyproject.toml are named without being there: what is installed for now is what they depend on.
COPY pyproject.toml constraints.txt ./
RUN touch README.md && mkdir -p app/commands app/routes model worker/stores training/data

FROM python AS api-packages
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt '.[s3]' && pip uninstall --yes dit
COPY . .
RUN pip install --no-deps .

FROM python AS worker-packages
# An index of one's own, with a torch for the CPU alone, makes the image smaller: --build-arg PIP_EXTRA_INDEX_URL=…
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt torch
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt '.[training,s3]' && pip uninstall --yes dit
COPY . .
RUN pip install --no-deps .

FROM python AS api
WORKDIR /home/dit
COPY --from=api-packages /opt/dit /opt/dit
USER 10001:10001
EXPOSE 8000
CMD ["dit", "api"]

FROM python AS worker
# torch.compile writes C++ for the CPU, and Triton a little C for CUDA.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /home/dit
COPY --from=worker-packages /opt/dit /opt/dit
COPY --chown=10001:10001 checkpoints/ /checkpoints/
ENV DIT_CHECKPOINTS=/checkpoints \
    DIT_DATA=/data \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
RUN mkdir runs
CMD ["dit", "worker"]
