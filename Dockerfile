ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS base
# One virtual environment, owned by root and read-only for the process that runs it.
RUN python3 -m venv /opt/curvd \
 && useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin curvd
ENV PATH=/opt/curvd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /src

# client: the base install alone, no torch.
FROM base AS client
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY client client
COPY server server
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt . \
 && rm -rf /src/*
USER 10001
WORKDIR /
ENTRYPOINT ["curvd"]
CMD ["--help"]

# server: torch and the service. The heavy dependencies come in a layer of their own,
# so that a change of our code rebuilds only the last one.
FROM base AS server
# What makes native code of operators that are used long enough: a compiler, and the
# headers of Python if the image has it from Debian. COMPILER= leaves it out (0.45 GB).
ARG COMPILER="g++ libc6-dev"
RUN if [ -n "${COMPILER}" ]; then \
      python3 -c 'import os, sysconfig as s; exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
        || COMPILER="${COMPILER} python3-dev"; \
      apt-get update && apt-get install --yes --no-install-recommends ${COMPILER} \
      && rm -rf /var/lib/apt/lists/*; \
    fi
# EXTRAS: of the package, for example server,timm,transformers. TORCH: the wheel, for
# example torch==2.13.0+cu130, from the index TORCH_INDEX; without them it is pip's choice.
ARG EXTRAS=server
ARG TORCH=
ARG TORCH_INDEX=
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p client/curvd server/curvd_server \
 && touch client/curvd/__init__.py server/curvd_server/__init__.py \
 && if [ -n "${TORCH}" ]; then \
      pip install --no-cache-dir --disable-pip-version-check -c constraints.txt \
        ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"; \
    fi \
 && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".[${EXTRAS}]" \
 && pip uninstall --yes --quiet curvd
COPY client client
COPY server server
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps . \
 && rm -rf /src/* \
 && install -d -o 10001 -g 10001 -m 0700 /var/lib/curvd \
 && install -d /srv/datasets /srv/builders
# PYTHONPATH: modules with builders of your own. NVIDIA_*: what the container toolkit gives.
ENV CURVD_DATA_DIR=/var/lib/curvd \
    CURVD_DATASETS_ROOT=/srv/datasets \
    PYTHONPATH=/srv/builders \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /var/lib/curvd
EXPOSE 50551
USER 10001
WORKDIR /
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["curvd", "health", "127.0.0.1:50551"]
ENTRYPOINT ["curvd"]
CMD ["serve"]
