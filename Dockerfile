# Two images, which differ in TensorFlow's libraries alone: `docker build --target cpu .`, and `--target gpu` with CUDA's
# (the host brings the driver and the NVIDIA container toolkit). Each layer changes less often than the next: a change
# of the code installs no package again.
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS base
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    TRIALYARD_HOME=/yard \
    TRIALYARD_ARTIFACTS=/artifacts \
    TRIALYARD_DATA=/data
# A new named volume takes the owner of the folder that it is mounted on.
RUN useradd --uid 1000 --create-home trialyard \
    && install --directory --owner=trialyard --group=trialyard /yard /artifacts /data
WORKDIR /source
# Of both images, in which the command is.
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s CMD ["trialyard", "alive"]
CMD ["trialyard", "work", "--forever"]

FROM base AS gpu-packages
# Docker's GPU runtime gives a container what these ask for; `utility` is NVML, by which the cards are found.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY requirements-gpu.lock ./
RUN pip install --require-hashes --requirement requirements-gpu.lock

FROM base AS cpu-packages
COPY requirements.lock ./
RUN pip install --require-hashes --requirement requirements.lock

FROM gpu-packages AS gpu
COPY pyproject.toml README.md LICENSE ./
COPY storage storage
COPY studies studies
COPY search search
COPY trialyard trialyard
RUN pip install --no-deps --no-build-isolation .
USER 1000:1000
WORKDIR /yard

FROM cpu-packages AS cpu
COPY pyproject.toml README.md LICENSE ./
COPY storage storage
COPY studies studies
COPY search search
COPY trialyard trialyard
RUN pip install --no-deps --no-build-isolation .
USER 1000:1000
WORKDIR /yard
