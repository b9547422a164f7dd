#!/bin/sh
# Makes .venv with the Python packages of one group of pyproject.toml: scripts (default), test, bench or lint.
# For the tests it sees to a browser as well. Shell, because Python may not be here yet. Run again it does nothing until
# pyproject.toml changes.
# All it says goes to stderr: what the command after it prints may be read by a program.
set -eu
exec >&2
cd "$(dirname "$0")/.."
group=${1:-scripts}
stamp=.venv/.installed-$group

apt_install() {
  root=
  [ "$(id -u)" = 0 ] || root=sudo
  { $root apt-get update -q && $root env DEBIAN_FRONTEND=noninteractive apt-get install -qy "$@"; } >/dev/null
}

# Not where the Python that it was made with is gone (an upgrade of the system), or where its making was broken off.
is_whole() { .venv/bin/python -c 'import pip' 2>/dev/null; }
is_done() { [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp" && is_whole; }
# The tests of the status page run in it. Ubuntu's package of that name is a snap; there the tests say what to do.
lacks_browser() { [ "$group" = test ] && ! command -v chromedriver >/dev/null && grep -q '^ID=debian' /etc/os-release; }

if is_done && ! lacks_browser; then exit 0; fi

# Two at once would break each other's .venv. The lock is on this file, which is there, and ends with the process.
if command -v flock >/dev/null; then
  exec 9<scripts/bootstrap.sh
  if ! flock --nonblock 9; then
    echo "Another command installs packages here; waiting for its end ..."
    flock 9
  fi
fi

if lacks_browser; then
  echo "Installing Chromium and its driver for the browser tests ..."
  apt_install chromium chromium-driver || echo "Chromium could not be installed; the browser tests will fail."
fi
if is_done; then exit 0; fi

find_python() {
  for python in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  return 1
}

if ! is_whole; then
  if ! python=$(find_python); then
    echo "Installing Python (3.11 or newer with venv is needed) ..."
    if ! command -v apt-get >/dev/null; then
      echo "Python 3.11 or newer with venv is missing, and this is neither Debian nor Ubuntu: install it and run this again."
      exit 1
    fi
    packages="python3 python3-venv"
    # Ubuntu 22.04 has Python 3.10 under that name
    if grep -q 'Ubuntu 22.04' /etc/os-release; then packages="python3.11 python3.11-venv"; fi
    # shellcheck disable=SC2086
    if ! apt_install $packages || ! python=$(find_python); then
      echo "Python 3.11 or newer could not be installed by apt-get: install it with its venv module and run this again."
      exit 1
    fi
  fi
  echo "Making .venv with $("$python" --version) ..."
  "$python" -m venv --clear .venv
fi

echo "Installing the Python packages of group '$group' from pyproject.toml into .venv ..."
pip="env PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install -qq"
# `--group` came with 25.1
if ! { $pip --upgrade 'pip>=25.1' && $pip --group "$group"; }; then
  echo "pip could not install them: look at what it says above, check the network, and run this again."
  exit 1
fi
cp pyproject.toml "$stamp"
