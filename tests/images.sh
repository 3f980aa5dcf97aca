#!/usr/bin/env bash
# Builds both images, starts the composed CPU server, and asks it from the host; then the
# composed Prometheus beside it; then the server with TLS and a token, as docker-compose.yml says.
# CONTAINERS names a folder whose `build`, `compose` and `podman` stand in for docker's.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
# A project of its own: what it removes at its end is nobody's server and nobody's state.
own=(--project-name curvd-image-test --profile cpu --profile observe)
files=(-f docker-compose.yml)
if [[ -n ${CONTAINERS:-} ]]; then
  [[ ! -x $CONTAINERS/setup ]] || "$CONTAINERS/setup"
  build() { "$CONTAINERS/build" . "$2" --target "$1" --format docker; }
  files+=(-f tests/images_observe.yml)
  compose() { "$CONTAINERS/compose" "${files[@]}" "${own[@]}" "$@"; }
  engine() { "$CONTAINERS/podman" "$@"; }
  prefix=localhost/
else
  build() { docker build --target "$1" --tag "$2" .; }
  compose() { docker compose "${files[@]}" "${own[@]}" "$@"; }
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
container() { engine ps --filter name=curvd-image-test.cpu --format '{{.ID}}' | head -n 1; }
engine exec "$(container)" curvd health 127.0.0.1:50551
echo "the server runs without root, on a read-only root"
[[ $(engine exec "$(container)" id -u) == 10001 ]]
! engine exec "$(container)" touch /forbidden 2>/dev/null

echo "a client on the host gets in with TLS and the token, and in no other way"
compose down
export CURVD_CERTS="$mounted/certs"
"$python" tests/images_tls.py issue "$CURVD_CERTS"
# As its owner sees it, whatever user of the host 10001 is.
engine run --rm --user 0 --volume "$CURVD_CERTS:/certs" --entrypoint chown \
  "${prefix}curvd-server" 10001 /certs/server.key /certs/token
files+=(-f tests/images_tls.yml)
compose up --detach --no-build cpu
"$python" tests/images_tls.py ask "$CURVD_PUBLISH" "$CURVD_CERTS"
[[ $(engine exec "$(container)" stat -c '%u %a' /certs/server.key) == '10001 400' ]]
engine exec "$(container)" curvd health localhost:50551 --tls-ca /certs/ca.pem
echo "images: passed"
