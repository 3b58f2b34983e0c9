# syntax=docker/dockerfile:1
# Two targets, one for machines with NVIDIA GPUs and one for those without:
#   docker build --target cpu -t local-attention-serve:cpu .
#   docker build --target gpu -t local-attention-serve:gpu .
ARG PYTHON=3.11
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu

# What every stage has. g++ is for Triton and torch.compile, which compile while an engine starts;
# libnuma1 for vLLM on the CPU; wget for KubeRay's own probes.
FROM python:${PYTHON}-slim-bookworm AS base
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ libnuma1 wget \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_worker_niceness=0 \
    VLLM_DO_NOT_TRACK=1 \
    VLLM_NO_USAGE_STATS=1
WORKDIR /app

# As in the Makefile: PyTorch first, then every pin, and nothing resolved, so that nothing else arrives.
FROM base AS cpu-packages
ARG CPU_INDEX
COPY constraints.txt constraints-cpu.txt ./
RUN --mount=type=cache,target=/root/.cache/pip python -m venv /opt/venv \
 && torch=$(grep '^torch==' constraints-cpu.txt) \
 && { pip install --no-deps "$torch" || pip install --no-deps --index-url "$CPU_INDEX" "$torch"; } \
 && pip install --no-deps -r constraints.txt -r constraints-cpu.txt

FROM base AS gpu-packages
COPY constraints.txt constraints-gpu.txt ./
RUN --mount=type=cache,target=/root/.cache/pip python -m venv /opt/venv \
 && pip install --no-deps -r constraints.txt -r constraints-gpu.txt

# The package itself comes last, so that a change of the source installs nothing else again.
FROM cpu-packages AS cpu-venv
COPY LICENSE README.md pyproject.toml ./
COPY load_tests load_tests
COPY serve_app serve_app
RUN pip install --no-deps --no-build-isolation .

FROM gpu-packages AS gpu-venv
COPY LICENSE README.md pyproject.toml ./
COPY load_tests load_tests
COPY serve_app serve_app
RUN pip install --no-deps --no-build-isolation .

# What runs: an ordinary user, who owns the caches and nothing else.
FROM base AS runtime
RUN useradd --create-home --uid 1000 serve \
 && install -d -o serve -g serve /app/models /cache
ENV HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm
COPY configs configs
COPY deploy deploy
COPY deploy.yaml ./
EXPOSE 8000
STOPSIGNAL SIGTERM
# A large model takes many minutes to load; until then the container is "starting".
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=6 \
  CMD ["wget", "-q", "-T", "4", "-O", "/dev/null", "http://127.0.0.1:8000/ready"]

FROM runtime AS cpu
COPY --from=cpu-venv /opt/venv /opt/venv
USER serve
RUN local-attention demo-model /app/models/demo
CMD ["local-attention", "serve", "deploy/docker-cpu.yaml"]

FROM runtime AS gpu
COPY --from=gpu-venv /opt/venv /opt/venv
USER serve
CMD ["local-attention", "serve", "deploy/docker-gpu.yaml"]
