#!/bin/sh
# Starts Nginx: start.sh [its binary] [its prefix]. It does not start on a damaged file of kept counts, so that is set aside.
nginx=${1:-nginx}
prefix=${2:-/etc/nginx/}

# Before a port is open: a key that came by plain HTTP would have been read by then.
if [ -n "${HTTPS_PORT:-}" ] && [ -z "${TLS:-}" ]; then
  echo "start.sh: HTTPS_PORT is set, but docker-compose.tls.yml is not among the Compose files, so keys would travel in the" \
    "clear: start the stack with make up, add that file with -f, or take HTTPS_PORT out of .env" >&2
  exit 1
fi

while ! said=$("$nginx" -p "$prefix" -c "$prefix/nginx.conf" -e stderr -t 2>&1); do
  file=$(printf '%s\n' "$said" | sed -n 's/.*from state file "\([^"]*\)".*/\1/p' | head -n 1)
  [ -n "$file" ] || break
  echo "start.sh: $file is damaged and set aside as $file.damaged: what was used of limits begins anew" >&2
  mv "$file" "$file.damaged" || break
done

exec "$nginx" -p "$prefix" -c "$prefix/nginx.conf" -e stderr -g "daemon off;"
