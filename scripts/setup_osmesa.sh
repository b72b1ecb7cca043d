#!/usr/bin/env bash
# Make sure that MuJoCo, LIBERO's simulator, has a renderer. Returns at once when it has; otherwise installs OSMesa by apt.
#
#   scripts/setup_osmesa.sh            PYTHON=… names the interpreter (default: .venv/bin/python, else python3)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi

check() { "$python" -m pi_stepnft.envs.libero; }
if check >/dev/null 2>&1; then exit 0; fi

as_root=()
if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then check; fi # tells what to run
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" </dev/null; }
echo "no renderer for LIBERO: installing OSMesa" >&2
apt update || echo "apt-get update reported errors; going on with what it has" >&2
apt install -y --no-install-recommends libosmesa6 libgl1 libglib2.0-0 >/dev/null
check
