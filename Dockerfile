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
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p client/curvd server/curvd_server \
 && touch client/curvd/__init__.py server/curvd_server/__init__.py \
 && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt '.[server]' \
 && pip uninstall --yes --quiet curvd
COPY client client
COPY server server
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps . \
 && rm -rf /src/* \
 && install -d -o 10001 -g 10001 -m 0700 /var/lib/curvd
ENV CURVD_DATA_DIR=/var/lib/curvd
VOLUME /var/lib/curvd
EXPOSE 50551
USER 10001
WORKDIR /
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["curvd", "health", "127.0.0.1:50551"]
ENTRYPOINT ["curvd"]
CMD ["serve"]
