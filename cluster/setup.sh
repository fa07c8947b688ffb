#!/usr/bin/env bash
# Installs milp_ray with its pinned versions on a node; again with the same package, it installs nothing.
#
#     bash setup.sh PACKAGE
#
# PACKAGE is a wheel, a folder of wheels (the newest is taken), or a Git URL with a tag or commit:
# git+https://…/milp_ray.git@v0.1.0. constraints.txt is expected beside this script.
#
#     MILP_SHARED   an NFS export, HOST:/PATH, that holds runs, users and weights; mounted at MILP_MOUNT
#     MILP_MOUNT    where [/mnt/milp]; without MILP_SHARED a folder of this node alone
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly constraints="$here/constraints.txt"
readonly home="$HOME/.milp_ray"
readonly venv="$home/venv"
readonly shared="${MILP_SHARED:-}"
readonly mount="${MILP_MOUNT:-/mnt/milp}"

fail() {
  printf 'setup.sh: %s\n' "$1" >&2
  exit 2
}

apt_install() {
  command -v apt-get > /dev/null || fail "this machine has no apt-get; install $* by hand and run this again"
  # A fresh machine is still updating itself: wait for its lock.
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install -y "$@" > /dev/null
}

# The file or URL that pip gets.
resolve_package() {
  local wheel newest=""
  case "$1" in
    git+*)
      [[ ${1##*/} == *@?* ]] || fail "$1 names no tag or commit: nodes could get different code; add @v0.1.0"
      printf '%s\n' "$1"
      return
      ;;
    *.whl) newest=$1 ;;
    *)
      for wheel in "$1"/milp_ray-*.whl; do
        if [[ -z $newest || $wheel -nt $newest ]]; then newest=$wheel; fi
      done
      ;;
  esac
  [[ -f $newest ]] || fail "no wheel of milp_ray at $1; make one: python -m pip wheel --no-deps -w dist ."
  printf '%s\n' "$newest"
}

is_usable() {
  command -v "$1" > /dev/null &&
    "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null
}

find_python() {
  local name
  for name in python3.12 python3.11 python3.13 python3; do
    if is_usable "$name"; then
      printf '%s\n' "$name"
      return
    fi
  done
  return 1
}

ensure_python() {
  find_python && return
  # Ubuntu 24.04 has the first, 22.04 the second. What apt says must not get into the answer.
  { apt_install python3.12-venv || apt_install python3.11-venv; } >&2 || true
  find_python || fail "milp_ray needs Python 3.11 or later with its venv module; install it, run this again"
}

mount_shared() {
  if [[ ! -d $mount ]]; then sudo mkdir -p "$mount"; fi
  if mountpoint -q "$mount"; then
    : # an earlier run of this script, or whoever made the machine
  elif [[ -z $shared ]]; then
    printf 'setup.sh: MILP_SHARED is empty: %s is of this node alone, good for one node\n' "$mount" >&2
  else
    command -v mount.nfs > /dev/null || apt_install nfs-common
    # hard: a server that is away for a while makes writers wait, not fail.
    sudo mount -t nfs -o hard,noatime "$shared" "$mount"
  fi
  if [[ ! -w $mount ]]; then sudo chown "$(id -u):$(id -g)" "$mount"; fi
}

# Shells that the launcher opens read ~/.bashrc; the driver of `ray submit` is started by one of them.
write_environment() {
  cat > "$home/env.sh" << EOF
export PATH="$venv/bin:\$PATH"
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export HF_HOME="$mount/huggingface"
export HF_TOKEN_PATH="\$HOME/.cache/huggingface/token"
EOF
  local line='. "$HOME/.milp_ray/env.sh"'
  touch "$HOME/.bashrc"
  grep -qxF "$line" "$HOME/.bashrc" || printf '%s\n' "$line" >> "$HOME/.bashrc"
}

install_package() {
  local package=$1 python=$2 stamp
  stamp=$(
    {
      printf '%s\n' "$package"
      "$python" --version
      cat "$constraints"
      if [[ -f $package ]]; then cat "$package"; fi
    } | sha256sum
  )
  if [[ -f $home/stamp && $(< "$home/stamp") == "$stamp" ]]; then return; fi
  rm -f "$home/stamp"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install -q -c "$constraints" "$package"
  # The same version number may hold other code: the dependencies are there, so this is the package alone.
  "$venv/bin/python" -m pip install -q --no-deps --force-reinstall "$package"
  printf '%s\n' "$stamp" > "$home/stamp"
}

check_gpu() {
  [[ $(nvidia-smi -L 2> /dev/null || true) == *GPU* ]] || return 0
  "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "nvidia-smi sees a GPU and torch does not: the driver is too old for torch's CUDA; newer image"
}

[[ $# -eq 1 && -n $1 ]] || fail "give the package: a wheel, a folder of wheels, or git+https://…@v0.1.0"
[[ -f $constraints ]] || fail "no constraints.txt beside this script"
package=$(resolve_package "$1")
python=$(ensure_python)
mkdir -p "$home"
mount_shared
install_package "$package" "$python"
write_environment
check_gpu
