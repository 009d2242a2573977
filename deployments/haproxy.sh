#!/bin/sh
# Serve's HAProxy with its metrics and its statistics on loopback: Serve's template has them listen on every address,
# and only their ports can be set. Serve runs this in place of the binary (deployments/dataplane.py), with `-f CONFIG`.
set -eu
config=
previous=
for argument in "$@"; do
    if [ "$previous" = -f ]; then config=$argument; fi
    previous=$argument
done
sed -i -E \
    -e "s/^( *bind) +(\*)?:${RAY_SERVE_HAPROXY_METRICS_PORT}$/\1 127.0.0.1:${RAY_SERVE_HAPROXY_METRICS_PORT}/" \
    -e "s/^( *bind) +(\*)?:${RAY_SERVE_HAPROXY_STATS_PORT}$/\1 127.0.0.1:${RAY_SERVE_HAPROXY_STATS_PORT}/" \
    "$config"
exec "$ROUTER_HAPROXY" "$@"
