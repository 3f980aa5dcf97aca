#!/usr/bin/env bash
# Builds the sdist, and the wheel from it, into dist/; installs the wheel into fresh
# environments, once as the client alone and once with the server; imports all modules of
# each; and has the client's commands and calls ask the installed server.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
unset PYTHONPATH # what is tested is what was installed
work=$(mktemp --directory)
server_pid=
cleanup() {
  [[ -z $server_pid ]] || kill "$server_pid" 2>/dev/null || true
  wait
  rm -rf "$work"
}
trap cleanup EXIT
fail() { echo "release: $1" >&2 && exit 1; }

# environment NAME REQUIREMENT...: a fresh one in $work/NAME
environment() {
  "$python" -m venv "$work/$1"
  "$work/$1/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt "${@:2}"
}

# imports NAME PACKAGE LIBRARY...: import every module of PACKAGE from the environment;
# those may fail that ask for one of the libraries, which an extra brings
imports() {
  (cd "$work" && "$work/$1/bin/python" -W error - "${@:2}" <<'PYTHON'
import importlib, pkgutil, sys

package, *libraries = sys.argv[1:]
root = importlib.import_module(package)
assert "site-packages" in root.__file__, root.__file__
imported, lacking = [], []
for module in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=print):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] in libraries, (module.name, error)
        lacking.append(module.name)
    else:
        imported.append(module.name)
print(f"{package}: {len(imported)} modules import, {len(lacking)} need an extra")
PYTHON
  )
}

rm -rf dist
environment build build
"$work/build/bin/python" -m build --outdir dist . >"$work/build.log" 2>&1 ||
  { cat "$work/build.log" && fail "sdist or wheel cannot be built"; }
wheel=$(echo "$PWD"/dist/curvd-*.whl)
version=$("$python" -c \
  'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
[[ $wheel == */curvd-$version-py3-none-any.whl ]] || fail "wheel $wheel is not of $version"
"$python" -m zipfile --list "$wheel" >"$work/wheel.list"
for file in curvd/py.typed curvd_server/py.typed; do
  grep -q "^$file " "$work/wheel.list" || fail "the wheel lacks $file"
done
! grep -qvE '^(curvd|curvd_server|curvd-[0-9.]+[.]dist-info)/|^File Name' "$work/wheel.list" ||
  fail "the wheel holds more than the two packages"

echo "the client alone"
environment client "$wheel"
[[ $("$work/client/bin/curvd" --version) == "curvd, version $version" ]] ||
  fail "curvd --version is not $version"
imports client curvd torch scipy curvlinops opentelemetry lightning transformers
! "$work/client/bin/python" -c 'import torch' 2>/dev/null || fail "the client brings torch"
du --summarize --human-readable "$work/client/lib"

echo "the server"
environment server "$wheel[server]"
imports server curvd_server scipy sklearn matplotlib opentelemetry jwt
imports server curvd scipy curvlinops opentelemetry lightning transformers
exec 3< <(exec "$work/server/bin/curvd" serve \
  --listen "unix:$work/socket" --data-dir "$work/data" 2>&1)
server_pid=$!
until [[ ${line:-} == "curvd serves at "* ]]; do
  read -r line <&3 || fail "the installed server does not start"
  echo "$line"
done

echo "the installed client asks the installed server"
"$work/client/bin/curvd" info "unix:$work/socket"
"$work/client/bin/python" tests/images_client.py "unix:$work/socket"
du --summarize --human-readable "$work/server/lib"
ls -l dist
echo "release: passed"
