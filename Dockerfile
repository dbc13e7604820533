# anchorctx for CUDA, with the compiler that DeepSpeed needs for offloading to the CPU.
#
#   docker build -t anchorctx .                                  --build-arg EXTRAS=zstd,wandb,eval,flash adds flash-attn
#   docker run --gpus all --shm-size 8g -v "$PWD":/work anchorctx doctor
#   docker run --gpus all --shm-size 8g -v "$PWD":/work --entrypoint torchrun anchorctx \
#       --nproc_per_node 8 -m anchorctx train --recipe llama3_8b_128k data.train=packed out_dir=runs/mine
#
# The versions are those that benchmarks/gpu was measured with. The package index's torch for Linux brings its CUDA.
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04
ARG TORCH=2.11.0
ARG EXTRAS=zstd,wandb,eval
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential git ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/anchorctx
ENV PATH=/opt/anchorctx/bin:$PATH CUDA_HOME=/usr/local/cuda
RUN pip install --no-cache-dir torch==${TORCH} setuptools wheel packaging hatchling
COPY . /opt/source
# flash-attn builds against the torch that is there, which an isolated build would not see
RUN pip install --no-cache-dir --no-build-isolation torch==${TORCH} "/opt/source[${EXTRAS}]"
WORKDIR /work
ENTRYPOINT ["anchorctx"]
