# kanlm for NVIDIA GPUs, at the versions of constraints.txt:
#
#     docker build --tag kanlm .
#     docker run --rm --gpus all --shm-size 8g --volume "$PWD/runs:/kanlm/runs" kanlm \
#         scripts/launch pretrain configs/pretrain.yaml training.precision=bf16
#
# torch's wheels bring CUDA, so the host needs a driver and NVIDIA's container toolkit alone.
# Folders that are mounted must be writable for user 1000 (--build-arg UID=$(id -u) for another).
FROM python:3.12-slim-bookworm

# Triton compiles what launches its kernels, torch.compile and decoding on a CPU what they run: an
# image without compilers would train without all of them. git says in results which commit made
# them. Debian keeps no older versions of packages that could be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG UID=1000
RUN useradd --create-home --uid "$UID" kanlm \
    && install --directory --owner kanlm /kanlm /kanlm/runs
WORKDIR /kanlm
USER $UID
ENV PATH=/kanlm/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1

COPY --chown=$UID . .
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --editable .

CMD ["kanlm", "--help"]
