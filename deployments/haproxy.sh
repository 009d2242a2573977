#!/bin/sh
# Serve's HAProxy with its metrics and its statistics on loopback: Serve's template has them listen on every address,
# and only their ports can be set. The gateway listens where serve_config.yaml says (ROUTER_GATEWAY, host:port): by
# default Serve takes every address in HAProxy mode. Serve runs this in place of the binary (deployments/dataplane.py),
# with `-f CONFIG`. Should the binary be killed, understudy.py takes its place until Serve has noticed.
set -eu
config=
previous=
for argument in "$@"; do
    if [ "$previous" = -f ]; then config=$argument; fi
    previous=$argument
done
listen() { # host, port
    sed -i -E "s/^( *bind) +[^ ]*:$2( .*)?$/\1 $1:$2\2/" "$config"
}
listen 127.0.0.1 "$RAY_SERVE_HAPROXY_METRICS_PORT"
listen 127.0.0.1 "$RAY_SERVE_HAPROXY_STATS_PORT"
if [ -n "${ROUTER_GATEWAY:-}" ]; then listen "${ROUTER_GATEWAY%:*}" "${ROUTER_GATEWAY##*:}"; fi
"$ROUTER_PYTHON" -S "${0%/*}/understudy.py" $$ "$config" "$PPID" <&- >/dev/null 2>&1 &
exec "$ROUTER_HAPROXY" "$@"
