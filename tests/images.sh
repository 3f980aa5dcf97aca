#!/usr/bin/env bash
# Builds both images, starts the composed CPU server, and asks it from the host; then the
# composed Prometheus beside it.
# CONTAINERS names a folder whose `build`, `compose` and `podman` stand in for docker's.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [[ -n ${CONTAINERS:-} ]]; then
  [[ ! -x $CONTAINERS/setup ]] || "$CONTAINERS/setup"
  build() { "$CONTAINERS/build" . "$2" --target "$1" --format docker; }
  compose() {
    "$CONTAINERS/compose" -f docker-compose.yml -f tests/images_observe.yml \
      --profile cpu --profile observe "$@"
  }
  engine() { "$CONTAINERS/podman" "$@"; }
  prefix=localhost/
else
  build() { docker build --target "$1" --tag "$2" .; }
  compose() { docker compose --profile cpu --profile observe "$@"; }
  engine() { docker "$@"; }
  prefix=
fi

build client curvd-client
build server curvd-server
# No registry of images is asked then.
[[ -z ${CONTAINERS:-} ]] \
  || "$CONTAINERS/build" tests/images_prometheus curvd-prometheus --format docker
for image in curvd-client curvd-server; do
  bytes=$(engine image inspect --format '{{.Size}}' "$prefix$image")
  echo "$image: $((bytes / 1000000)) MB"
done

echo "the client image answers and holds no torch"
engine run --rm --read-only --cap-drop ALL "${prefix}curvd-client" --help | grep -q serve
! engine run --rm --entrypoint python "${prefix}curvd-client" -c 'import torch' 2>/dev/null

export CURVD_IMAGE="${prefix}curvd-server"
export CURVD_PUBLISH="127.0.0.1:${PORT:-50551}"
mounted=$(mktemp -d)
trap 'rm -rf "$mounted"' EXIT
chmod 755 "$mounted"
"$python" tests/images_client.py "$mounted"
export CURVD_DATASETS="$mounted" CURVD_BUILDERS="$PWD/tests/images_builders"
export CURVD_BUILDER=deep=deep:build CURVD_COMPILE_AFTER_S=1
export OMP_NUM_THREADS=1 # so that the plan is the same on every machine
export CURVD_PROMETHEUS="127.0.0.1:${PROMETHEUS_PORT:-9090}"
compose up --detach --no-build cpu prometheus
trap 'compose down --volumes; rm -rf "$mounted"' EXIT

echo "Prometheus answers each question of the dashboard with what a client did"
"$python" tests/images_observe.py "$CURVD_PUBLISH" "$CURVD_PROMETHEUS"

echo "a client on the host gets right products from the composed server, in native code too"
"$python" tests/images_client.py "$CURVD_PUBLISH" native
said=$(compose logs cpu)
grep -q '"event": "compiled"' <<<"$said"
grep -q '"event": "native code took over"' <<<"$said"
container=$(engine ps --filter "ancestor=${prefix}curvd-server" --format '{{.ID}}' | head -n 1)
engine exec "$container" curvd health 127.0.0.1:50551
echo "the server runs without root, on a read-only root"
[[ $(engine exec "$container" id -u) == 10001 ]]
! engine exec "$container" touch /forbidden 2>/dev/null
echo "images: passed"
