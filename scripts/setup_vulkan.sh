#!/usr/bin/env bash
# Make sure that SAPIEN, ManiSkill's simulator, has a Vulkan driver it can render with. Returns at once when it has.
# Otherwise installs Mesa's software driver, lavapipe 24.3 or newer, and the system libraries that SAPIEN and OpenCV link to.
#
#   scripts/setup_vulkan.sh            PYTHON=… names the interpreter with SAPIEN (default: .venv/bin/python, else python3)
set -euo pipefail
export LC_ALL=C

NEED=24.3 # older lavapipe lacks what SAPIEN asks for
PACKAGES=(mesa-vulkan-drivers libvulkan1 libx11-6 libgl1 libglib2.0-0)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
has_sapien() { "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("sapien") is None)' 2>/dev/null; }
check() { "$python" -m pi_stepnft.envs.vulkan "$@"; }

if has_sapien; then
  if check --quick >/dev/null 2>&1; then exit 0; fi
  # A driver that the user has named stays in force whatever is installed: let the check explain.
  if [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}${VK_LOADER_DRIVERS_SELECT:-}" ]; then check --quick || exit 1; fi
fi

release() { sed -n "s/^$1=//p" /etc/os-release 2>/dev/null | tr -d "\"'"; }
if ! command -v apt-get >/dev/null; then
  case " $(release ID) $(release ID_LIKE) " in
    *" fedora "* | *" rhel "*) hint="run: sudo dnf install mesa-vulkan-drivers vulkan-loader libX11" ;;
    *" arch "*) hint="run: sudo pacman -S vulkan-swrast vulkan-icd-loader libx11" ;;
    *) hint="install it and the Vulkan loader with this system's package manager" ;;
  esac
  die "no usable Vulkan driver: ManiSkill needs Mesa's lavapipe $NEED or newer on a machine without a GPU; $hint"
fi

as_root=()
if [ "$(id -u)" != 0 ]; then
  if ! sudo -n true 2>/dev/null; then
    die "no usable Vulkan driver, and installing one needs root; run: sudo PYTHON=$(command -v "$python") bash $root/scripts/setup_vulkan.sh"
  fi
  as_root=(sudo -n)
fi
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" </dev/null; }

# What apt would install now, or with a suite given first.
candidate() { apt-cache ${1:+-o "APT::Default-Release=$1"} policy mesa-vulkan-drivers 2>/dev/null | sed -n 's/^ *Candidate: //p'; }
new_enough() { [ -n "$1" ] && [ "$1" != "(none)" ] && dpkg --compare-versions "$1" ge "$NEED"; }
# Repository, suite and component, line by line: apt's own reading of its sources, in whichever format they are
sources() { apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' | sort -u; }

say "no usable Vulkan driver: installing Mesa's software driver (lavapipe)"
apt update || say "apt-get update reported errors; going on with what it has"
target=()
added=
if ! new_enough "$(candidate)" && [ "$(release ID)" = debian ]; then
  suite=$(release VERSION_CODENAME)
  backports=$suite-backports
  if ! sources | grep -q " $backports main$"; then
    mirror=$(sources | awk -v suite="$suite" '$2 == suite && $3 == "main" { print $1; exit }')
    [ -n "$mirror" ] || die "apt has no source for Debian $suite main; add one with $backports, then run this again"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    added=/etc/apt/sources.list.d/$backports-vulkan.list
    printf 'deb %s%s %s main\n' "$([ -f $keyring ] && echo "[signed-by=$keyring] ")" "$mirror" "$backports" |
      "${as_root[@]}" tee "$added" >/dev/null
    apt update || say "apt-get update reported errors; going on with what it has"
  fi
  target=(-t "$backports")
fi
found=$(candidate ${target[1]:-})
if ! new_enough "$found"; then
  if [ -n "$added" ]; then "${as_root[@]}" rm -f "$added"; fi
  die "no usable Vulkan driver: Mesa $NEED or newer is needed and apt offers ${found:-none}; Debian 12 (backports), Debian 13 and Ubuntu 24.04 have it"
fi
apt install -y --no-install-recommends "${target[@]}" "${PACKAGES[@]}" >/dev/null ||
  die "apt-get could not install ${PACKAGES[*]}; see its message above"

if has_sapien; then check >&2; else say "installed Mesa $found; not tried, because SAPIEN is not installed in $python"; fi
